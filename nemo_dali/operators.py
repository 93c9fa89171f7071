"""DALI operators built on the kernels."""

from typing import Any

from nvidia.dali import types
from nvidia.dali.plugin.numba import NumbaFunction

from nemo_dali.kernels.mosaic import run_address, setup_address


class _TileWriter(NumbaFunction):
    """``numba_function`` with callbacks compiled once per machine; DALI's own compiles for seconds at every build."""

    def _get_run_fn_cpu(self, *_: Any) -> Any:
        return run_address

    def _get_setup_fn_cpu(self, _: Any) -> Any:
        return setup_address


def write_tiles(tiles: Any, photos: Any) -> Any:
    """Write each photo into the cell of the frame that its tile record names.

    Args:
        tiles: DALI CPU data, uint8 [TILE.itemsize] a sample, the record as bytes.
        photos: DALI CPU data, uint8 [H, W, 3] a sample, RGB.

    Returns:
        uint8 [1] a sample: ``mosaic.DONE`` or ``mosaic.WRONG_SIZE``.
    """
    write = _TileWriter(
        run_fn=None,
        out_types=[types.UINT8],
        in_types=[types.UINT8, types.UINT8],
        outs_ndim=[1],
        ins_ndim=[1, 3],
        device="cpu",
    )
    return write(tiles, photos)
