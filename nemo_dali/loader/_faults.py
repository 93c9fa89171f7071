"""What becomes of a batch that DALI could not make: it is made again, or without the bad photo, or an error names that.

DALI fails a whole batch and does not tell which photo it stumbled over. Its own decoder is asked again, so that a photo
is bad for everybody or for nobody: Pillow refuses a little more. Which samples come of it says ``nemo_dali.plan``.
"""

import logging
import os
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt

from nemo_dali.data.decoding import is_wrong_size
from nemo_dali.data.orientation import turned_sizes
from nemo_dali.data.photos import Problem, find_problem
from nemo_dali.data.s3 import failed_address, is_remote
from nemo_dali.errors import NemoError, PhotoError
from nemo_dali.kernels.mosaic.cpu import DONE
from nemo_dali.kernels.plan.rows import PlanRows
from nemo_dali.kernels.tile import TILE
from nemo_dali.loader.sources import Corpus
from nemo_dali.pipeline.cells import lay_out
from nemo_dali.pipeline.graphs import MEMORY, StreamPipeline
from nemo_dali.pipeline.paths import encode_path
from nemo_dali.plan.planner import Planner, Replaced, ShortPools

logger = logging.getLogger("nemo_dali")

PAUSES = (0.1, 0.5, 2.0)  # seconds before a batch is made for the second, third and last time
READING = re.compile(r"`nvidia\.dali\.fn\.(io\.file\.read|peek_image_shape|reshape|decoders\.image)`")


@dataclass(frozen=True)
class Substituted:
    """What was replaced, up to the batch delivered last.

    Attributes:
        photos: what is wrong with each photo known to be bad, by path. Known are those that this rank has met.
        targets: samples that show another ref.
        negatives: cells that show another negative.
    """

    photos: Mapping[str, str]
    targets: int
    negatives: int


class PhotoFaults:
    """Keeps the photos that turned out to be bad.

    Args:
        substitute: show others in their place; else they are errors.
        photos: whether batches are made from photos; False with resident tiles.
        num_threads: DALI's threads for looking at photos.
    """

    def __init__(self, corpus: Corpus, planner: Planner, *, substitute: bool, photos: bool, num_threads: int) -> None:
        self._corpus = corpus
        self._planner = planner
        self._substitute = substitute
        self._photos = photos
        self._num_threads = num_threads
        self._bad = np.zeros(len(corpus.photo_width), bool)
        self._reasons: dict[str, str] = {}
        self._replaced = Replaced()
        self._told = False  # of short pools: once is enough

    @property
    def substituted(self) -> Substituted:
        """See ``Loader.substituted``."""
        return Substituted(MappingProxyType(self._reasons), self._replaced.targets, self._replaced.negatives)

    def replace(self, epoch: int, rows: PlanRows) -> tuple[PlanRows, Replaced]:
        """Plan rows, dtype ``plan.PLAN`` [B], without the bad photos known so far."""
        if not self._reasons:
            return rows, Replaced()
        return self._planner.substitute(epoch, rows, self._bad)

    def count(self, replaced: Replaced) -> None:
        """Count what ``replace`` gave for a batch, once it is delivered."""
        self._replaced += replaced

    def report(self, epoch: int, replaced: Replaced, short: ShortPools) -> None:
        """Say at the end of a pass what it replaced and, once, how many pools were too small so far."""
        if short != ShortPools() and not self._told:
            self._told = True
            logger.warning("%s", short)
        if replaced != Replaced():
            logger.warning(
                "Epoch %d: %d targets and %d negatives were replaced by others; %d bad photos are known.",
                epoch,
                replaced.targets,
                replaced.negatives,
                len(self._reasons),
            )

    def settle(self, epoch: int, rows: PlanRows, error: RuntimeError | None, tries: int) -> int:
        """Find out why a batch failed. If this returns, it is to be made again, from what ``replace`` then gives.

        Args:
            epoch: that of the rows.
            rows: what ``replace`` gave for the batch.
            error: DALI's; None if a photo had the wrong size.
            tries: 0, or what this returned for the same batch.

        Raises:
            PhotoError: a photo is at fault, and there is no substitution, or it may be readable again later.
            NemoError: no photo is at fault, or too few are left.
        """
        problems = self._problems(rows, error) if self._photos else {}
        lasting = {photo: problem for photo, problem in problems.items() if not problem.passing}
        if not lasting and tries < len(PAUSES) and (problems or _may_pass(error)):
            cause = next((problem.sentence() for problem in problems.values()), None) or _gist(error)
            logger.warning("A batch could not be made and is tried again in %s s: %s.", PAUSES[tries], cause)
            time.sleep(PAUSES[tries])
            return tries + 1
        if self._substitute:
            for photo, problem in lasting.items():
                self._bad[photo] = True
                self._reasons[self._corpus.photo_path(photo)] = problem.text
                logger.warning("%s. Others are shown in its place. %s", problem.sentence(), problem.remedy())
            if lasting:
                return 0
        for photo, problem in (lasting or problems).items():
            more = "" if self._substitute else " With on_error='substitute' training goes on without it."
            raise PhotoError(
                f"{problem.sentence()}; {self._use(epoch, rows, photo)}. {problem.remedy()}{more}"
            ) from error
        if MEMORY.search(str(error)):
            raise NemoError(
                f"The DALI pipeline ran out of memory. Lower batch_size or prefetch. ({_gist(error)})"
            ) from error
        if error is None or is_wrong_size(error):
            raise NemoError(
                "A photo's size did not match its annotation when the batch was read, but does now. Restart the run; "
                "if it recurs, look for a process that rewrites the photos."
            )
        if not self._photos:
            raise NemoError(f"The DALI pipeline failed: {_gist(error)}") from error
        raise NemoError(
            f"The DALI pipeline failed, though every photo of the batch can be read: {_gist(error)}"
        ) from error

    def _problems(self, rows: PlanRows, error: RuntimeError | None) -> dict[int, Problem]:
        """What is wrong with which photo of a batch, in the order of the cells."""
        photos = list(dict.fromkeys(lay_out(rows, self._planner.size)[2].tolist()))
        paths = [self._corpus.photo_path(photo) for photo in photos]
        sizes = np.stack([self._corpus.photo_width[photos], self._corpus.photo_height[photos]], axis=1)
        turn = np.ones(len(photos), np.uint8) if self._corpus.photo_turn is None else self._corpus.photo_turn[photos]
        wanted = [(int(width), int(height), int(turned)) for (width, height), turned in zip(sizes, turn, strict=True)]
        if (address := failed_address(error)) in paths:
            problem = find_problem(address, *wanted[first := paths.index(address)])
            if problem is not None and problem.passing:
                return {photos[first]: problem}  # the server's fault: each of the others would wait as long
        problems = {}
        stored = turned_sizes(sizes, turn).T
        for index, message in refused(paths, *stored, num_threads=self._num_threads).items():
            problem = _problem(paths[index], *wanted[index], message)
            if problem is not None:
                problems[photos[index]] = problem
        return problems

    def _use(self, epoch: int, rows: PlanRows, photo: int) -> str:
        """Which sample a photo was read for."""
        row = rows[(rows["images"] == photo).any(axis=1)][0]
        ref_id = self._corpus.ref_id[row["ref"]]
        part = "the photo" if row["images"][row["cell"]] == photo else "a negative"
        return f"it is {part} of ref {ref_id} at position {row['position']} of epoch {epoch}"


def refused(
    paths: Sequence[str], width: npt.NDArray[Any], height: npt.NDArray[Any], *, num_threads: int
) -> dict[int, str | None]:
    """Read and decode photos by DALI's CPU decoder; why it refuses some of them.

    Args:
        paths: of n photos, n > 0.
        width, height: int [n], in pixels, as they should be stored.

    Returns:
        DALI's message for each photo refused, by its place in ``paths``; None for a photo of another size.
    """
    tiles = np.zeros(len(paths), TILE)  # their boxes are empty: only sizes are compared
    tiles["photo_width"], tiles["photo_height"] = width, height
    encoded = [encode_path(path) for path in paths]
    found: dict[int, str | None] = {}
    pipeline = StreamPipeline(max_cells=len(paths), num_threads=num_threads, prefetch=1)

    def look(begin: int, end: int) -> None:
        pipeline.feed(encoded[begin:end], tiles[begin:end], None)
        try:
            status = pipeline.wait()
        except RuntimeError as error:
            if end - begin == 1:
                found[begin] = None if is_wrong_size(error) else str(error)
                return
            middle = (begin + end) // 2
            look(begin, middle)
            look(middle, end)
            return
        found.update((begin + int(index), None) for index in np.flatnonzero(status != DONE))

    try:
        look(0, len(paths))
    finally:
        pipeline.close()
    return found


def _problem(path: str, width: int, height: int, turn: int, message: str | None) -> Problem | None:
    """What is wrong with a photo that DALI refused; None if that was no fault of the photo and is over."""
    problem = find_problem(path, width, height, turn)
    if problem is not None:  # that its whole folder is gone is no fault of the photo
        folder_gone = not is_remote(path) and not os.path.isdir(os.path.dirname(path))
        return problem._replace(passing=problem.passing or folder_gone)
    if message is None:
        return Problem("size", f"{path} (not {width}x{height} pixels)")
    if MEMORY.search(message):
        return None
    if "`nvidia.dali.fn.io.file.read`" not in message:
        return Problem("corrupt", f"{path} ({_gist(message)})")
    return None


def _may_pass(error: RuntimeError | None) -> bool:
    """Whether a batch may succeed at another try although nothing is wrong with its photos now."""
    return error is None or (READING.search(str(error)) is not None and MEMORY.search(str(error)) is None)


def _gist(error: object) -> str:
    """DALI's message without the pipeline's definition around it."""
    text = str(error).split("encountered:")[-1].split("Current pipeline object")[0]
    return " ".join(text.split()).rstrip(" :.")
