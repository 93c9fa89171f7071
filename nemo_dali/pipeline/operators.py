"""DALI operators built on the kernels."""

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from nvidia.dali import types
from nvidia.dali.plugin.numba import NumbaFunction

from nemo_dali.kernels.gather.cpu import run_address as run_gather
from nemo_dali.kernels.mosaic.cpu import run_address as run_write_tiles
from nemo_dali.kernels.mosaic.cpu import setup_address
from nemo_dali.pipeline import gpu


class Compiled(NumbaFunction):
    """``numba_function`` with the addresses of compiled callbacks; DALI's own compiles for seconds at every build."""

    def _get_run_fn_cpu(self, run_fn: Any, *_: Any) -> Any:
        return run_fn

    def _get_setup_fn_cpu(self, setup_fn: Any) -> Any:
        return setup_fn


@contextmanager
def no_collection() -> Iterator[None]:
    """For what runs on DALI's threads: a collection could close a forgotten pipeline, which waits for these threads."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()


def _status(run: Any, *inputs: Any, ndims: list[int]) -> Any:
    """Call a callback; its status, uint8 [1] a sample."""
    call = Compiled(
        run_fn=run,
        setup_fn=setup_address,
        out_types=[types.UINT8],
        in_types=[types.UINT8] * len(inputs),
        outs_ndim=[1],
        ins_ndim=ndims,
        device="cpu",
    )
    return call(*inputs)


def write_tiles(tiles: Any, photos: Any) -> Any:
    """Write each photo into the cell of the frame that its tile record names.

    Args:
        tiles: DALI CPU data, uint8 [TILE.itemsize] a sample, the record as bytes.
        photos: DALI CPU data, uint8 [H, W, 3] a sample, RGB.

    Returns:
        uint8 [1] a sample: ``kernels.mosaic.cpu.DONE`` or ``WRONG_SIZE``.
    """
    return _status(run_write_tiles, tiles, photos, ndims=[1, 3])


def gather(samples: Any) -> Any:
    """Write each sample from photos that were resampled beforehand.

    Args:
        samples: DALI CPU data, uint8 [cells, TILE.itemsize] a sample: what ``kernels.gather.cpu.write_sample`` takes.

    Returns:
        uint8 [1] a sample: ``kernels.mosaic.cpu.DONE``.
    """
    return _status(run_gather, samples, ndims=[2])


def call_on_stream(function: Callable[[list[Any], int], None], *inputs: Any, device_id: int) -> Any:
    """Call a Python function with each batch, on DALI's thread and without waiting for the GPU.

    Args:
        function: called with DLPack capsules, one a sample, and the address of DALI's CUDA stream; what it queues there
            comes before everything that waits for the output.
        inputs: one of DALI GPU data, or none: then the function is called with no capsules, once in a batch of one.
        device_id: CUDA device number.

    Returns:
        uint8 [0] a sample: DALI knows by it when the batch is done, and has nothing to copy.
    """
    import torch
    from nvidia.dali import fn
    from nvidia.dali.python_function_plugin import current_dali_stream

    done = torch.zeros(0, dtype=torch.uint8, device=gpu.place(device_id))

    def call(*batch: list[Any]) -> list[Any]:
        capsules = batch[0] if batch else []
        with no_collection():
            function(capsules, current_dali_stream())
            return [done.__dlpack__() for _ in capsules or [None]]

    # Capsules as they are: to wrap each photo as an array costs five times as much.
    return fn.dl_tensor_python_function(
        *inputs, function=call, device="gpu", batch_processing=True, synchronize_stream=False
    )
