"""Prefetcher: the steps of this rank, made ahead by a pipeline, in order."""

import functools
import weakref
from dataclasses import dataclass

from nemo_dali.errors import NemoError
from nemo_dali.kernels.mosaic.cpu import DONE
from nemo_dali.kernels.plan.rows import PlanRows
from nemo_dali.loader._faults import PhotoFaults
from nemo_dali.loader._frames import FrameAllocator, PreparedBatch
from nemo_dali.loader.options import Resources
from nemo_dali.loader.sources import Corpus
from nemo_dali.pipeline.graphs import StreamPipeline
from nemo_dali.pipeline.opening import open_pipeline
from nemo_dali.plan.planner import Planner, Replaced, ShortPools
from nemo_dali.plan.schedule import Schedule
from nemo_dali.tiles.placement import ResidentTiles


@dataclass(frozen=True, eq=False)
class Step:
    """A batch in flight: which one it is, and everything that the pipeline writes into."""

    epoch: int
    seen: int  # samples of the epoch before this step, over all ranks
    plan: PlanRows
    short: ShortPools
    replaced: Replaced
    drawing: PreparedBatch


class Prefetcher:
    """Makes the steps that are asked for, and those behind them ahead.

    Args:
        faults: settles what becomes of a step that DALI could not make.
        resources: how many steps are in flight, the one asked for among them, and on which device.
        resident: tiles to be shown in place of the photos.
    """

    def __init__(
        self,
        schedule: Schedule,
        planner: Planner,
        corpus: Corpus,
        frames: FrameAllocator,
        faults: PhotoFaults,
        resources: Resources,
        *,
        resident: ResidentTiles | None,
    ) -> None:
        self._schedule = schedule
        self._planner = planner
        self._corpus = corpus
        self._frames = frames
        self._faults = faults
        self._prefetch = resources.prefetch
        self._resident = resident
        # Called again when a pipeline is broken. It must not refer to this object, which closes its pipeline when gone.
        self._open_pipeline = functools.partial(
            open_pipeline,
            batch_size=schedule.batch_size,
            most_cells=planner.policy.largest_grid**2,
            resident=resident is not None,
            device_id=resources.device_id,
            num_threads=resources.num_threads,
            prefetch=resources.prefetch,
            hw_decoder_load=resources.hw_decoder_load,
            erase=frames.erases,
            turns=corpus.photo_turn is not None,
        )
        self._pipeline: StreamPipeline | None = None

    @property
    def in_flight(self) -> int:
        """Steps that were started and not delivered."""
        return 0 if self._pipeline is None else len(self._pipeline.running)

    def step(self, epoch: int, seen: int) -> Step:
        """The step behind ``seen`` samples of an epoch; those behind it are started, into the next epoch too.

        Raises:
            PhotoError: a photo that is bad and may not be replaced.
            NemoError: a batch that failed without a photo's fault, a file that was cut short, or a fork.
        """
        tries = 0
        try:
            while True:
                pipeline = self._running_pipeline()
                if pipeline.running and (pipeline.running[0].epoch, pipeline.running[0].seen) != (epoch, seen):
                    pipeline.drain()  # made ahead for a pass that was given up, or with a photo now known to be bad
                    pipeline = self._running_pipeline()
                self._start_ahead(pipeline, epoch, seen)
                step: Step = pipeline.running[0]
                failure = None
                try:
                    if (pipeline.wait() == DONE).all():
                        break
                except RuntimeError as error:
                    failure = error
                tries = self._faults.settle(epoch, step.plan, failure, tries)
                self._frames.look_again()
            self._start_ahead(pipeline, *self._schedule.behind(epoch, seen))
        except BaseException:  # an interrupt, say: what DALI has taken cannot be taken back
            self.close()
            raise
        return step

    def close(self) -> None:
        """End the pipeline: its threads, and the steps made ahead. The next step makes a new one."""
        if self._pipeline is not None:
            self._close()
            self._pipeline = None

    def _running_pipeline(self) -> StreamPipeline:
        if self._pipeline is not None and self._pipeline.broken:
            self.close()
        if self._pipeline is None:
            self._pipeline = self._open_pipeline()
            self._close = weakref.finalize(self, self._pipeline.close)
            self._close.atexit = False  # the pipeline sees to that itself
        if self._pipeline.inherited:
            raise NemoError("A running Loader does not survive a fork. Make one in each process, after the fork.")
        return self._pipeline

    def _start_ahead(self, pipeline: StreamPipeline, epoch: int, seen: int) -> None:
        """Start steps until ``prefetch`` are in flight. If none is, begin with the given one."""
        while len(pipeline.running) < self._prefetch:
            if pipeline.running:
                last: Step = pipeline.running[-1]
                epoch, seen = self._schedule.behind(last.epoch, last.seen)
            self._start(pipeline, epoch, seen)

    def _start(self, pipeline: StreamPipeline, epoch: int, seen: int) -> None:
        self._corpus.check_files()
        if self._resident is not None:
            self._resident.check_files()
        rows, short = self._planner.plan_and_count(epoch, self._schedule.positions(seen))
        rows, replaced = self._faults.replace(epoch, rows)
        drawing = self._frames.prepare(epoch, rows)
        step = Step(epoch, seen, rows, short, replaced, drawing)
        pipeline.feed(drawing.paths, drawing.work, step, turn=drawing.turn, squares=drawing.squares)
