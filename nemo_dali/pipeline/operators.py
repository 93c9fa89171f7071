"""DALI operators built on the kernels."""

import gc
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from nvidia.dali import types
from nvidia.dali.plugin.numba import NumbaFunction

from nemo_dali.kernels.gather.cpu import run_address as run_gather
from nemo_dali.kernels.mosaic.cpu import run_address as run_write_tiles
from nemo_dali.kernels.mosaic.cpu import setup_address
from nemo_dali.pipeline import gpu
from nemo_dali.pipeline.batches import mark_as_dalis


class Compiled(NumbaFunction):
    """``numba_function`` with the addresses of compiled callbacks; DALI's own takes seconds to compile per build."""

    def _get_run_fn_cpu(self, run_fn: Any, *_: Any) -> Any:
        return run_fn

    def _get_setup_fn_cpu(self, setup_fn: Any) -> Any:
        return setup_fn


class _Collection:
    """Pauses Python's garbage collection, one for the whole process, while any thread wants none."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._threads = 0
        self._was_on = False

    def pause(self) -> None:
        with self._lock:
            if self._threads == 0:
                self._was_on = gc.isenabled()
                gc.disable()
            self._threads += 1

    def go_on(self) -> None:
        with self._lock:
            self._threads -= 1
            if self._threads == 0 and self._was_on:
                gc.enable()


_collection = _Collection()


@contextmanager
def no_collection() -> Iterator[None]:
    """For what ``fn`` runs on the threads of a user's own pipeline: a collection could shut down a forgotten pipeline,
    which waits for these threads. A Loader's own pipelines handle this themselves: ``mark_as_dalis``.
    """
    _collection.pause()
    try:
        yield
    finally:
        _collection.go_on()


def _status(run: Any, *inputs: Any, ndims: list[int]) -> Any:
    """Call a callback; returns its status, uint8 [1] a sample."""
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


def turned(photos: Any, turns: Any) -> Any:
    """Turn photos. Those that are not to be turned are passed on without a copy.

    Args:
        photos: DALI data, uint8 [H, W, 3] a sample.
        turns: DALI CPU data, int32 [3] a sample: a row of ``data.orientation.TURNS``.
    """
    from nvidia.dali import fn

    # What DALI makes of an "if" in a graph's definition: each sample goes one way or the other.
    conditional: Any = fn._conditional  # type: ignore[attr-defined]  # DALI's types do not know it
    some = fn.cast(fn.reductions.max(turns), dtype=types.BOOL)
    kept = conditional.split(photos, predicate=some)[1]
    photos, turns = (conditional.split(data, predicate=some)[0] for data in (photos, turns))
    across = fn.cast(turns[0], dtype=types.BOOL)
    ways = [conditional.split(data, predicate=across) for data in (photos, turns)]
    (transposed, flipped), (its_turns, flips) = ways
    transposed = transpose_on_gpu(transposed, its_turns) if photos.device == "gpu" else transpose(transposed, its_turns)
    flipped = fn.flip(flipped, horizontal=flips[1], vertical=flips[2])
    return conditional.merge(conditional.merge(transposed, flipped, predicate=across), kept, predicate=some)


def transpose(photos: Any, turns: Any) -> Any:
    """Transpose photos on the CPU, and flip them, in a third of the time that DALI's operators take."""
    from nvidia.dali import fn

    from nemo_dali.kernels import turn

    run: Any = turn.run_address
    call = Compiled(
        run_fn=run,
        setup_fn=turn.setup_address,
        out_types=[types.UINT8],
        in_types=[types.UINT8, types.INT32],
        outs_ndim=[3],
        ins_ndim=[3, 1],
        device="cpu",
    )
    return fn.reshape(call(photos, turns), layout="HWC")


def transpose_on_gpu(photos: Any, turns: Any) -> Any:
    """The same on a GPU."""
    from nvidia.dali import fn

    photos = fn.transpose(photos, perm=[1, 0, 2], output_layout="HWC")
    return fn.flip(photos, horizontal=turns[1], vertical=turns[2])


def call_on_stream(function: Callable[[list[Any], int], None], *inputs: Any, device_id: int) -> Any:
    """Call a Python function with each batch, on DALI's thread and without waiting for the GPU.

    Args:
        function: called with DLPack capsules, one a sample, and the address of DALI's CUDA stream; what it queues there
            comes before everything that waits for the output.
        inputs: one of DALI GPU data, or none: then the function is called with no capsules, once in a batch of one.
        device_id: CUDA device number.

    Returns:
        uint8 [0] a sample: it tells DALI when the batch is done, and leaves nothing to copy.
    """
    import torch
    from nvidia.dali import fn
    from nvidia.dali.python_function_plugin import current_dali_stream
    from torch.utils.dlpack import to_dlpack  # type: ignore[attr-defined]  # torch's types leave it out

    done = torch.zeros(0, dtype=torch.uint8, device=gpu.place(device_id))

    def call(*batch: list[Any]) -> list[Any]:
        capsules = batch[0] if batch else []
        mark_as_dalis()
        function(capsules, current_dali_stream())
        # Not with __dlpack__, which looks up device and stream each time, at ten times the cost.
        return [to_dlpack(done) for _ in capsules or [None]]

    # Capsules as they are: wrapping each photo as an array costs five times as much.
    return fn.dl_tensor_python_function(
        *inputs, function=call, device="gpu", batch_processing=True, synchronize_stream=False
    )
