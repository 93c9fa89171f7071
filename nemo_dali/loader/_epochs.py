"""EpochIterator: the passes over epochs, as users of torch's DataLoader and of DALI's iterators expect them."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from nemo_dali._checks import integer
from nemo_dali.distributed.ranks import check_still_alone
from nemo_dali.errors import NemoError
from nemo_dali.loader._faults import PhotoFaults, Substituted
from nemo_dali.loader._position import JOIN, Pass, Position
from nemo_dali.loader._prefetch import Prefetcher
from nemo_dali.loader._state import SAMPLING, make_state, read_state, sampling_facts
from nemo_dali.loader.options import LoaderOptions
from nemo_dali.loader.styles import arrange
from nemo_dali.plan.by_epoch import LAST_EPOCH
from nemo_dali.plan.planner import Replaced, ShortPools
from nemo_dali.plan.schedule import Schedule

if TYPE_CHECKING:
    from nemo_dali.loader.contact_sheet import Sample


class EpochIterator:
    """Iterates over epochs; ``Loader`` says how.

    Args:
        prints: fingerprints of the files by their kind.
        schedule: which samples a step has.
        prefetcher: makes the steps' batches.
        faults: counts what was replaced.
    """

    batch_sampler = None  # Lightning asks for it wherever there is a sampler

    def __init__(
        self,
        options: LoaderOptions,
        prints: dict[str, list[str]],
        schedule: Schedule,
        prefetcher: Prefetcher,
        faults: PhotoFaults,
    ) -> None:
        self._seed, self._infinite, self._alone = options.seed, options.format.infinite, options.ranks.alone
        self._style = options.format.style
        self._fingerprints = {**prints, SAMPLING: sampling_facts(options)}
        self._schedule, self._prefetcher, self._faults = schedule, prefetcher, faults
        self._position = Position()
        self.short_pools = ShortPools()  # of all batches delivered so far

    def __reduce__(self) -> Any:
        raise TypeError("A Loader cannot be pickled or copied. Make one in each process.")

    def __len__(self) -> int:
        """Steps in a full epoch, the same on every rank; in evaluation, those that have samples for this rank."""
        return self._schedule.steps_after(0)

    @property
    def dataset(self) -> Sequence[Any]:
        """The samples of an epoch over all ranks, for ``len(loader.dataset)`` only."""
        return range(self._schedule.length)

    @property
    def substituted(self) -> Substituted:
        """What ``on_error="substitute"`` has replaced so far, on this rank."""
        return self._faults.substituted

    @property
    def epoch(self) -> int:
        """The epoch that the current or the next pass shows."""
        return self._position.epoch

    @property
    def sampler(self) -> "EpochIterator":
        """Itself: ``loader.sampler.set_epoch(e)`` works as with a DistributedSampler."""
        return self

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch of the next pass. Choosing the epoch of a loaded state keeps the loaded position.

        An epoch that is chosen after its last batch was delivered is shown again.
        """
        self._position.choose(integer("epoch", epoch, least=0, most=LAST_EPOCH), self._schedule)

    def reset(self) -> None:
        """Do nothing, as no pass needs a reset: for loops written for DALI's iterators, which call it after each."""

    def state_dict(self) -> dict[str, Any]:
        """The position of the pass: JSON-able, the same on every rank, loadable by any rank of any number of ranks."""
        position = self._position
        return make_state(
            seed=self._seed, epoch=position.epoch, samples_seen=position.seen, fingerprints=self._fingerprints
        )

    def load_state_dict(self, state: dict[str, Any], strict: bool = True) -> None:
        """Continue after the samples that the saved pass delivered: in the next pass, or in one that has shown none.

        Args:
            state: what ``state_dict`` returned. One saved before ``sampling`` was among the fingerprints is accepted
                with a warning.
            strict: refuse a state that was saved with a different policy, ``samples``, ``split_mode``, ``size`` or
                ``erase``, under which the rest of the epoch would differ. False: accept it, with a warning.

        Raises:
            StateError: the state has a different version, seed, data set or table, or different samples; nothing is
                changed then.
        """
        epoch, seen = read_state(state, seed=self._seed, fingerprints=self._fingerprints, strict=strict)
        self._position.load(epoch, seen)

    def next_samples(self, count: int) -> "list[Sample]":
        """What a contact sheet shows of the samples in this rank's next steps; nothing is taken from the pass.

        The steps made ahead for the pass are made again, so do not call this at every step.

        Raises:
            ValueError: ``count`` < 1.
            NemoError: a step cannot be made, this rank has no samples, or another thread is taking a step and does not
                finish within a minute.
        """
        integer("count", count, least=1)
        samples: list[Sample] = []
        with self._position.turns.between():
            epoch, seen = self._position.epoch, self._position.seen
            if not self._schedule.steps_after(0):
                raise NemoError(f"This rank has no samples of the {self._schedule.length}. Use fewer ranks.")
            if not self._schedule.steps_after(seen):
                epoch, seen = epoch + 1, 0
            while len(samples) < count:
                batch = self._prefetcher.step(epoch, seen).batch
                samples += batch.samples(count - len(samples))
                epoch, seen = self._schedule.behind(epoch, seen)
        return samples

    def close(self) -> None:
        """Shut down the pipeline, its threads and the batches made ahead. The next step starts a new one.

        Raises:
            NemoError: another thread is taking a step, and does not finish within a minute.
        """
        with self._position.turns.between(JOIN):
            self._prefetcher.close()

    def __iter__(self) -> Iterator[Any]:
        if self._alone:
            check_still_alone()
        return Pass(self._position.turns, self._epochs(*self._position.begin(self._schedule)))

    def _epochs(self, number: int, epoch: int, seen: int) -> Iterator[Any]:
        if number == self._position.overtaken:  # detectron2 begins a pass and then loads the state
            number, epoch, seen = self._position.begin(self._schedule)
        yield from self._steps(number, epoch, seen)
        while self._infinite and number == self._position.passes:
            yield from self._steps(number, self._position.epoch, 0)

    def _steps(self, number: int, epoch: int, seen: int) -> Iterator[Any]:
        replaced = Replaced()
        for _ in range(self._schedule.steps_after(seen)):
            self._position.turns.check(number)
            delivery = self._prefetcher.step(epoch, seen)
            batch = arrange(delivery.batch, self._style)
            seen += self._schedule.global_batch
            self._position.advance(number, epoch, seen)
            self.short_pools += delivery.short
            self._faults.count(delivery.replaced)
            replaced += delivery.replaced
            if not self._schedule.steps_after(seen):  # now: whoever counts steps does not ask for one more
                self._faults.report(epoch, replaced, self.short_pools)
            yield batch
        self._position.advance(number, epoch + 1, 0)
