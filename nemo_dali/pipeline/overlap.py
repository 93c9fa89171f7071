"""Batches in flight: a pipeline is given some ahead and then, for each one that is done, the next.

batches ──▶ feed, feed ──▶ wait ──▶ land ──▶ feed ──▶ who asked for the batch ──▶ wait ──▶ ...
"""

from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

from nemo_dali.pipeline.batches import BatchPipeline

K = TypeVar("K")


class Fed(NamedTuple, Generic[K]):
    """The arguments of ``BatchPipeline.feed`` for a batch.

    Attributes:
        paths, work, turn: see there.
        keep: what the caller keeps for the batch; it is held until the batch is done.
    """

    paths: list[npt.NDArray[np.uint8]]
    work: Any
    keep: K
    turn: npt.NDArray[np.uint8] | None = None


def in_flight(
    pipeline: BatchPipeline[K],
    batches: Iterable[Fed[K]],
    *,
    prefetch: int,
    land: Callable[[K, Any], None] | None = None,
    failed: Callable[[K, RuntimeError], Exception] | None = None,
) -> Iterator[tuple[K, Any]]:
    """Make batches, several of them at a time; whoever opened the pipeline closes it, whatever happens here.

    Args:
        batches: taken one by one, each when there is room for it.
        prefetch: the pipeline's; there must be at least as many batches.
        land: called with ``keep`` and what ``wait`` gave, before the next batch is fed and before this one is yielded.
        failed: makes the error to raise if DALI could not make a batch, from ``keep`` and DALI's; None: DALI's own.

    Yields:
        ``keep`` and what ``wait`` gave, in the order of the batches.
    """
    following = iter(batches)

    def feed(count: int) -> None:
        for batch in islice(following, count):
            pipeline.feed(batch.paths, batch.work, batch.keep, turn=batch.turn)

    feed(prefetch)
    while pipeline.in_flight:
        keep = pipeline.oldest
        try:
            made = pipeline.wait()
        except RuntimeError as error:
            if failed is None:
                raise
            raise failed(keep, error) from error
        if land is not None:
            land(keep, made)
        feed(1)
        yield keep, made
