"""What happens to a batch that DALI could not make: it is made again, or without the bad photo, or an error names it.

DALI fails a whole batch and does not say which photo it failed on. Its own decoder is asked again, so that a photo is
bad for everybody or for nobody: Pillow refuses a little more. ``nemo_dali.plan`` says which samples result.
"""

import logging
import os
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np

from nemo_dali.data.decoding import is_wrong_size
from nemo_dali.data.orientation import turned_sizes
from nemo_dali.data.photos import Problem, find_problem
from nemo_dali.data.s3 import failed_address, is_remote
from nemo_dali.errors import NemoError, PhotoError
from nemo_dali.kernels.plan.rows import PlanRows
from nemo_dali.loader._steps import PlannedStep
from nemo_dali.loader.options import LoaderOptions
from nemo_dali.loader.sources import Corpus
from nemo_dali.pipeline.decoder_check import refused
from nemo_dali.pipeline.graphs import MEMORY
from nemo_dali.plan.planner import Planner, Replaced, ShortPools

logger = logging.getLogger("nemo_dali")

PAUSES = (0.1, 0.5, 2.0)  # seconds before a batch is made for the second, third and last time
READING = re.compile(r"`nvidia\.dali\.fn\.(io\.file\.read|peek_image_shape|reshape|decoders\.image)`")


@dataclass(frozen=True)
class Substituted:
    """What was replaced, up to the batch delivered last.

    Attributes:
        photos: what is wrong with each photo known to be bad, by path. A rank knows those that it has met.
        targets: samples that show another ref.
        negatives: cells that show another negative.
    """

    photos: Mapping[str, str]
    targets: int
    negatives: int


class PhotoFaults:
    """Keeps track of the photos that turned out to be bad.

    Args:
        options: whether bad photos are replaced or are errors, and the number of DALI's threads that check photos.
        planner: chooses the replacements.
    """

    def __init__(self, corpus: Corpus, options: LoaderOptions, planner: Planner) -> None:
        self._corpus = corpus
        self._planner = planner
        self._substitute = options.on_error == "substitute"
        self._photos = options.tiles is None  # else no photo is read
        self._num_threads = options.resources.num_threads
        self._bad = np.zeros(len(corpus.photo_width), bool)
        self._reasons: dict[str, str] = {}
        self._replaced = Replaced()
        self._told = False  # short pools were reported: once is enough

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
        """Log at the end of a pass what it replaced and, once, how many pools were too small so far."""
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

    def retry(self) -> "Retry":
        """For a step: decides what happens each time that it fails."""
        return Retry(self)

    def problems(self, photos: list[int], error: RuntimeError | None) -> dict[int, Problem]:
        """What is wrong with the photos of a batch that failed, by photo, in the order given."""
        if not self._photos:
            return {}
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

    def keep(self, problems: Mapping[int, Problem]) -> bool:
        """Replace these photos from now on; returns whether that is allowed and there are any."""
        if not self._substitute:
            return False
        for photo, problem in problems.items():
            self._bad[photo] = True
            self._reasons[self._corpus.photo_path(photo)] = problem.text
            logger.warning("%s. Others are shown in its place. %s", problem.sentence(), problem.remedy())
        return bool(problems)

    def error(self, step: PlannedStep, problems: Mapping[int, Problem], error: RuntimeError | None) -> NemoError:
        """Why a step cannot be made."""
        if problems:
            photo, problem = next(iter(problems.items()))
            more = "" if self._substitute else " With on_error='substitute' training continues without it."
            return PhotoError(f"{problem.sentence()}; {self._use(step, photo)}. {problem.remedy()}{more}")
        if MEMORY.search(str(error)):
            return NemoError(f"The pipeline ran out of memory. Lower batch_size or prefetch. ({_gist(error)})")
        if error is None or is_wrong_size(error):
            return NemoError(
                "A photo's size did not match its annotation when the batch was read, but does now. Restart the run; "
                "if it recurs, look for a process that rewrites the photos."
            )
        readable = ", though every photo of the batch can be read" if self._photos else ""
        return NemoError(f"The pipeline failed{readable}: {_gist(error)}")

    def _use(self, step: PlannedStep, photo: int) -> str:
        """Which sample a photo was read for."""
        rows = step.rows
        row = rows[(rows["images"] == photo).any(axis=1)][0]
        ref_id = self._corpus.ref_id[row["ref"]]
        part = "the photo" if row["images"][row["cell"]] == photo else "a negative"
        return f"it is {part} of ref {ref_id} at position {row['position']} of epoch {step.epoch}"


class Retry:
    """The attempts at one step."""

    def __init__(self, faults: PhotoFaults) -> None:
        self._faults = faults
        self._tries = 0

    def after(self, step: PlannedStep, error: RuntimeError | None) -> None:
        """Find out why the step failed. If this returns, make the step again, from the rows that it then has.

        Args:
            step: with the rows that failed.
            error: DALI's; None if a photo had the wrong size.

        Raises:
            PhotoError: a photo is at fault, and there is no substitution, or it may be readable again later.
            NemoError: no photo is at fault, or too few are left.
        """
        problems = self._faults.problems(list(dict.fromkeys(step.cells.photo.tolist())), error)
        lasting = {photo: problem for photo, problem in problems.items() if not problem.passing}
        if not lasting and self._tries < len(PAUSES) and (problems or _may_pass(error)):
            cause = next((problem.sentence() for problem in problems.values()), None) or _gist(error)
            pause = PAUSES[self._tries]
            logger.warning("A batch could not be made and is retried in %s s: %s.", pause, cause)
            time.sleep(pause)
            self._tries += 1
        elif self._faults.keep(lasting):
            self._tries = 0
        else:
            raise self._faults.error(step, lasting or problems, error) from error


def _problem(path: str, width: int, height: int, turn: int, message: str | None) -> Problem | None:
    """What is wrong with a photo that DALI refused; None if it was not the photo's fault and has passed."""
    problem = find_problem(path, width, height, turn)
    if problem is not None:  # that its whole folder is gone is not the photo's fault
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
    """Whether a batch may succeed on another try, given that nothing is wrong with its photos now."""
    return error is None or (READING.search(str(error)) is not None and MEMORY.search(str(error)) is None)


def _gist(error: object) -> str:
    """DALI's message without the pipeline's definition around it."""
    text = str(error).split("encountered:")[-1].split("Current pipeline object")[0]
    return " ".join(text.split()).rstrip(" :.")
