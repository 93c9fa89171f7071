"""Embedding: a CLIP model's unit vectors of photos and sentences, the same bytes from any number of ranks.

    photos ──DALI: read, decode──▶ open_clip's preprocessing ──┐
                                                               ├──▶ micro-batches ──▶ encoder ──▶ vectors, on all ranks
    sentences, each once ──tokenizer──▶ shortest first ────────┘

An embedding changes in the last bits with the batch that it was computed in. So inputs are cut into micro-batches of
one size, in an order that depends on the data alone, the last one filled up. Of those still to do, rank r of W computes
the micro-batches r, r + W, r + 2W, ...; on a CPU each in one thread, as many at a time as there are cores.
"""

import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from functools import partial
from itertools import islice
from typing import Any

import numpy as np
import numpy.typing as npt

from nemo_dali.distributed.ranks import Ranks
from nemo_dali.errors import NemoError
from nemo_dali.io.progress import progress
from nemo_dali.mining._inputs import Inputs
from nemo_dali.mining._precision import deterministic_convolutions, exact_float32
from nemo_dali.mining.clip import Clip
from nemo_dali.mining.ranking import first_not_finite

F32 = npt.NDArray[np.float32]

ROUND_S = 10.0  # seconds of work between two exchanges: what a killed run loses, and how long the fastest rank idles
ROUND_BYTES = 64 << 20  # of vectors that a rank sends at a time, at most


class Stage:
    """How embedding went.

    Attributes:
        rows: rows embedded in this run.
        seconds: how long it took.
        starved: seconds in which this rank's model had nothing to do because its inputs were not there yet.
    """

    def __init__(self) -> None:
        self.rows, self.seconds, self.starved = 0, 0.0, 0.0

    @property
    def rate(self) -> float:
        """Rows per second."""
        return self.rows / self.seconds if self.seconds else 0.0


def embed(
    inputs: Inputs,
    clip: Clip,
    embedding: F32,
    *,
    done: int,
    batch_size: int,
    scale: float,
    ranks: Ranks,
    record: Callable[[int], None],
    workers: int,
) -> Stage:
    """Fill an embedding, on every rank, with what all of them compute.

    Args:
        inputs: what the model sees.
        embedding: float32 [all rows, D], written into.
        done: rows that are already filled, on every rank.
        batch_size: rows of a micro-batch.
        scale: length of the vectors.
        record: called on rank 0 with the number of rows filled so far.
        workers: micro-batches computed at the same time.

    Raises:
        PhotoError: a photo is missing, cannot be decoded or has changed its size.
        NemoError: an embedding is not finite, a batch is too large for the memory, or another rank stopped.
    """
    stage, start = Stage(), time.monotonic()
    total, width = -(-inputs.rows // batch_size), embedding.shape[1]
    first, most = -(-done // batch_size), max(1, ROUND_BYTES // (4 * batch_size * width))
    mine = range(first + ranks.rank, total, ranks.size)  # this rank's micro-batches

    def rounds() -> Iterator[int]:
        """Rows as they are placed; in a round every rank sends the same number of micro-batches."""
        following, count = first, 1
        with closing(_vectors(inputs, clip, mine, workers, stage)) as made:
            while following < total:
                begun = time.monotonic()
                count = int(ranks.from_first(np.array([count]))[0])
                given = np.zeros((count, batch_size, width), np.float32)
                taken, error = _taken(made, count)
                for place, vectors in enumerate(taken):
                    given[place] = vectors * np.float32(scale)
                every = ranks.gather(given).swapaxes(0, 1).reshape(-1, width)
                # Up to the first one that is missing on any rank: what was done before an error is kept.
                ready = min(had * ranks.size + rank for rank, had in enumerate(ranks.share(len(taken))))
                begin, following = following, min(following + count * ranks.size, following + ready, total)
                rows = range(begin * batch_size, min(following * batch_size, inputs.rows))
                inputs.place(every[: len(rows)], rows.start, embedding)
                if ranks.rank == 0:
                    record(rows.stop)
                yield from rows
                ranks.attempt(partial(_raise, error))
                count = max(1, min(most, 2 * count, int(count * ROUND_S / (time.monotonic() - begun))))

    shown: Iterable[int] = rounds()
    if ranks.rank == 0 and done < inputs.rows:
        shown = progress(shown, total=inputs.rows - done, what=inputs.what, unit=inputs.unit)
    stage.rows = sum(1 for _ in shown)
    stage.seconds = time.monotonic() - start
    return stage


def _taken(made: Iterator[F32], count: int) -> tuple[list[F32], Exception | None]:
    """Up to ``count`` items, and the error that ended them early."""
    taken: list[F32] = []
    try:
        taken.extend(islice(made, count))
    except Exception as error:
        return taken, error
    return taken, None


def _raise(error: Exception | None) -> None:
    if error is not None:
        raise error


def _vectors(
    inputs: Inputs, clip: Clip, numbers: Sequence[int], workers: int, stage: Stage
) -> Generator[F32, None, None]:
    """Unit vectors float32 [batch size, D] of micro-batches, in their order."""
    import torch

    def run(number: int, batch: Any) -> F32:
        with torch.inference_mode():
            try:
                features = inputs.encode(batch.to(clip.device)).float()
            except torch.OutOfMemoryError as error:
                raise NemoError(f"Out of GPU memory at batch size {len(batch)}. Lower --batch-size.") from error
            vectors: F32 = (features / features.norm(dim=-1, keepdim=True)).cpu().numpy()
        if (bad := first_not_finite(vectors)) is not None:
            row = min(number * len(batch) + bad, inputs.rows - 1)
            raise NemoError(f"{clip.name} gives no finite embedding for {inputs.name(row)}. Use other weights.")
        return vectors

    waiting: deque[Future[F32]] = deque()
    with _exact_products(clip), ThreadPoolExecutor(workers) as pool, closing(inputs.batches(numbers)) as batches:
        try:
            for number in numbers:
                start = time.monotonic()
                try:
                    batch = next(batches)
                except NemoError:
                    while waiting:  # what came before the bad photo is kept
                        yield waiting.popleft().result()
                    raise
                if all(future.done() for future in waiting):
                    stage.starved += time.monotonic() - start
                waiting.append(pool.submit(run, number, batch))
                if len(waiting) > workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


@contextmanager
def _exact_products(clip: Clip) -> Iterator[None]:
    """Compute everything in float32, in an order that does not depend on what else the machine does."""
    import torch

    threads = torch.get_num_threads()
    if clip.device.type == "cpu":
        torch.set_num_threads(1)
    try:
        with exact_float32(), deterministic_convolutions():
            yield
    finally:
        torch.set_num_threads(threads)
