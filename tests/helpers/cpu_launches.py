"""The CUDA kernels' launches without a GPU: the source built for the host, and its PTX for each architecture."""

import functools

import pytest

from tests.helpers import cuda_host
from tests.helpers.building import needs_compiler
from tests.helpers.ptx import launches

HOST = "host"
# For a fixture's ``params``. The fast lane has the oldest architecture with asynchronous copies.
WAYS = [
    pytest.param(HOST, marks=needs_compiler),
    *(
        pytest.param(name, id=f"sm_{name}", marks=[needs_compiler, *[pytest.mark.slow] * (name != launches.FAST)])
        for name in launches.ARCHITECTURES
    ),
]


def launch_of(kernels, way):
    """``launch(tiles)`` of "mosaic", "gather" or "letterbox" by one of WAYS, with host addresses."""
    if way == HOST:
        launch = {
            "mosaic": cuda_host.launch,
            "gather": cuda_host.launch_gather,
            "letterbox": cuda_host.launch_letterbox,
        }[kernels]
        return functools.partial(launch, cuda_host.library())
    launch = getattr(launches, kernels)
    return lambda tiles: launch(tiles, way) if len(tiles) else None
