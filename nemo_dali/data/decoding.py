"""DALI's decoding of photos, as every graph does it: headers first, then the pixels of photos of the annotated size."""

import threading
from typing import Any

import numpy as np

from nemo_dali.errors import NemoError

DECODING: dict[str, Any] = {"adjust_orientation": False}  # as stored; ``orientation`` says why


def of_size(encoded: Any, sizes: Any) -> Any:
    """The bytes for the decoder; the batch fails where they must not reach it.

    A header that cannot be parsed must not (DALI 2.4): the decoder parses on several threads, and when one fails, it
    goes away while the others use it. Nor must a header with a wrong size: a file of a few kilobytes may hold a photo
    of gigabytes. So all headers are parsed here first; then the bytes are reshaped, to their own shape where the sizes
    agree, which copies nothing, and otherwise to one that they cannot have, which fails.

    Args:
        encoded: DALI CPU data, uint8 [bytes] a sample.
        sizes: DALI CPU data, int32 [2] a sample: height and width of the photo as it should be stored.
    """
    from nvidia.dali import fn, types

    found = fn.peek_image_shape(encoded, dtype=types.INT32, adjust_orientation=False)
    agree = fn.reductions.min(fn.cast(found[:2] == sizes, dtype=types.FLOAT), keep_dims=True)
    return fn.reshape(encoded, rel_shape=agree)


def is_wrong_size(error: object) -> bool:
    """Whether a batch failed in ``of_size`` because of a size."""
    return "`nvidia.dali.fn.reshape`" in str(error)


_own = threading.local()


def is_decodable(content: bytes, width: int, height: int) -> bool:
    """Whether DALI's CPU decoder decodes a photo stored in this size. Each thread has a pipeline for it.

    Raises:
        NemoError: the pipeline cannot be made.
    """
    if not hasattr(_own, "pipeline"):
        try:
            _own.pipeline = _pipeline()
        except RuntimeError as error:
            raise NemoError(f"DALI's decoder cannot be made: {error}") from error
    try:
        _own.pipeline.feed_input("encoded", [np.frombuffer(content, np.uint8)])
        _own.pipeline.feed_input("sizes", np.array([[height, width]], np.int32))
        _own.pipeline.run()
    except RuntimeError as error:
        if "bad_alloc" in str(error):
            raise MemoryError from error
        return False
    return True


def _pipeline() -> Any:
    from nvidia.dali import Pipeline, fn, types

    pipe = Pipeline(batch_size=1, num_threads=1, device_id=None, prefetch_queue_depth=1)
    with pipe:
        encoded = fn.external_source(name="encoded", ndim=1, dtype=types.UINT8)
        sizes = fn.external_source(name="sizes", ndim=1, dtype=types.INT32)
        pipe.set_outputs(fn.decoders.image(of_size(encoded, sizes), **DECODING))
    pipe.build()
    return pipe
