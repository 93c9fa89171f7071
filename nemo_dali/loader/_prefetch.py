"""Prefetcher: the batches of this rank, made ahead by a pipeline, in order."""

import functools
import weakref
from dataclasses import dataclass

from nemo_dali.errors import NemoError
from nemo_dali.kernels.mosaic.cpu import DONE
from nemo_dali.loader._assembly import Assembler, PreparedBatch
from nemo_dali.loader._faults import PhotoFaults
from nemo_dali.loader._steps import StepPlanner
from nemo_dali.loader.batch import Batch
from nemo_dali.loader.options import LoaderOptions
from nemo_dali.loader.sources import Corpus
from nemo_dali.pipeline.batches import BatchPipeline
from nemo_dali.pipeline.opening import open_pipeline
from nemo_dali.plan.planner import Replaced, ShortPools
from nemo_dali.plan.schedule import Schedule
from nemo_dali.tiles.placement import ResidentTiles


@dataclass(frozen=True, eq=False)
class Step:
    """A batch in flight: everything that the pipeline writes into, and what was replaced in it."""

    prepared: PreparedBatch
    replaced: Replaced

    @property
    def place(self) -> tuple[int, int]:
        """Its epoch, and the samples before it."""
        return self.prepared.planned.epoch, self.prepared.planned.seen


@dataclass(frozen=True, eq=False)
class Delivery:
    """A finished batch, how many of its samples had too few candidates, and what was replaced in it."""

    batch: Batch
    short: ShortPools
    replaced: Replaced


class Prefetcher:
    """Makes the batches that are asked for, and those after them ahead of time.

    Args:
        steps: plans what they show.
        assembler: makes them.
        faults: decides what happens to a step that DALI could not make.
        resident: tiles to be shown in place of the photos.
    """

    def __init__(
        self,
        corpus: Corpus,
        options: LoaderOptions,
        schedule: Schedule,
        steps: StepPlanner,
        assembler: Assembler,
        faults: PhotoFaults,
        *,
        resident: ResidentTiles | None,
    ) -> None:
        self._schedule, self._steps, self._assembler, self._faults = schedule, steps, assembler, faults
        self._prefetch = options.resources.prefetch
        self._check_files = [corpus.check_files] if resident is None else [corpus.check_files, resident.check_files]
        # Called again when a pipeline is broken. It must not refer to this object, which closes its pipeline when gone.
        self._open_pipeline = functools.partial(
            open_pipeline,
            batch_size=options.batch_size,
            most_cells=options.policy.largest_grid**2,
            resident=resident is not None,
            erase=options.format.erase > 0,
            turns=corpus.photo_turn is not None,
            **options.resources._asdict(),
        )
        self._pipeline: BatchPipeline[Step] | None = None
        # At exit the interpreter ends the thread itself.
        weakref.finalize(self, steps.close, wait=False).atexit = False

    @property
    def in_flight(self) -> int:
        """Steps that were started and not delivered."""
        return 0 if self._pipeline is None else self._pipeline.in_flight

    def step(self, epoch: int, seen: int) -> Delivery:
        """The batch after ``seen`` samples of an epoch; those after it are started, into the next epoch too.

        Raises:
            PhotoError: a photo is bad and must not be replaced.
            NemoError: a batch failed through no photo's fault, a file was cut short, or this is a fork.
        """
        retry = self._faults.retry()
        try:
            while True:
                pipeline = self._running_pipeline()
                if pipeline.in_flight and pipeline.oldest.place != (epoch, seen):
                    pipeline.drain()  # made ahead for an abandoned pass, or with a photo now known to be bad
                    pipeline = self._running_pipeline()
                self._start_ahead(pipeline, epoch, seen)
                step = pipeline.oldest
                failure = None
                try:
                    if (pipeline.wait() == DONE).all():
                        break
                except RuntimeError as error:
                    failure = error
                retry.after(step.prepared.planned, failure)
                self._assembler.look_again()
            self._start_ahead(pipeline, *self._schedule.behind(epoch, seen))
        except BaseException:  # an interrupt, say: what DALI has taken cannot be taken back
            self.close()
            raise
        return Delivery(self._assembler.finish(step.prepared), step.prepared.planned.short, step.replaced)

    def close(self) -> None:
        """End the pipeline: its threads, and the steps made ahead. The next step makes a new one."""
        try:
            self._close_pipeline()
        finally:
            self._steps.close()

    def _close_pipeline(self) -> None:
        if self._pipeline is not None:
            self._pipeline.close()  # a second call continues where an interrupt ended the first
            self._close.detach()
            self._pipeline = None

    def _running_pipeline(self) -> BatchPipeline[Step]:
        if self._pipeline is not None and self._pipeline.broken:
            self._close_pipeline()
        if self._pipeline is None:
            self._pipeline = self._open_pipeline()
            self._pipeline.holds = self._assembler
            self._close = weakref.finalize(self, self._pipeline.close)
            self._close.atexit = False  # the pipeline does that itself
        if self._pipeline.inherited:
            raise NemoError("A running Loader does not survive a fork. Make one in each process, after the fork.")
        return self._pipeline

    def _start_ahead(self, pipeline: BatchPipeline[Step], epoch: int, seen: int) -> None:
        """Start steps until ``prefetch`` are in flight. If none is, begin with the given one."""
        while pipeline.in_flight < self._prefetch:
            if pipeline.in_flight:
                epoch, seen = self._schedule.behind(*pipeline.newest.place)
            self._start(pipeline, epoch, seen)

    def _start(self, pipeline: BatchPipeline[Step], epoch: int, seen: int) -> None:
        for check in self._check_files:
            check()
        planned = self._steps.plan(epoch, seen)
        rows, replaced = self._faults.replace(epoch, planned.rows)
        if replaced != Replaced():
            planned = self._steps.with_rows(planned, rows)
        prepared = self._assembler.prepare(planned)
        pipeline.feed(
            prepared.paths, prepared.work, Step(prepared, replaced), turn=prepared.turn, squares=prepared.squares
        )
