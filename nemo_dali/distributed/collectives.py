"""Ranks that work on one thing together: what they tell each other goes through torch.distributed's gloo on the host.

Started by torchrun they find each other; a single process is rank 0 of 1 and needs none of it.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from nemo_dali.errors import NemoError, ToldElsewhere

T = TypeVar("T")
LONGEST_WAIT = timedelta(days=1)  # for others, who may fetch weights or build an index; a dead one is noticed at once
Array = npt.NDArray[Any]


class Ranks:
    """All processes of a job, seen from one of them. Every method must be called by all of them, in the same order.

    Args:
        group: torch.distributed's process group with gloo; None: there is only this process.

    Attributes:
        rank, size: of this process, of them all.
    """

    def __init__(self, group: Any = None) -> None:
        self._group = group
        self.rank, self.size = 0, 1
        if group is not None:
            import torch.distributed as distributed

            self.rank, self.size = distributed.get_rank(group), distributed.get_world_size(group)

    def share(self, fact: T) -> list[T]:
        """What every rank gives, in their order; anything small that can be pickled."""
        if self._group is None:
            return [fact]
        import torch.distributed as distributed

        facts: list[Any] = [None] * self.size
        self._call(lambda: distributed.all_gather_object(facts, fact, group=self._group))
        return facts

    def gather(self, array: Array) -> Array:
        """Arrays of one shape and type from all ranks, [size, ...], on every rank."""
        if self._group is None:
            return array[None]
        import torch
        import torch.distributed as distributed

        mine = _as_bytes(array)
        every = [torch.empty_like(mine) for _ in range(self.size)]
        self._call(lambda: distributed.all_gather(every, mine, group=self._group))
        return np.stack([_from_bytes(one, array) for one in every])

    def to_first(self, array: Array) -> Array | None:
        """Arrays of one shape and type from all ranks, [size, ...], on rank 0; None on the others."""
        if self._group is None:
            return array[None]
        import torch
        import torch.distributed as distributed

        mine = _as_bytes(array)
        every = [torch.empty_like(mine) for _ in range(self.size)] if self.rank == 0 else None
        self._call(lambda: distributed.gather(mine, every, dst=0, group=self._group))
        return None if every is None else np.stack([_from_bytes(one, array) for one in every])

    def from_first(self, array: Array) -> Array:
        """Rank 0's array; the others give one of its shape and type."""
        if self._group is None or not array.size:
            return array
        import torch.distributed as distributed

        sent = _as_bytes(array)
        self._call(lambda: distributed.broadcast(sent, src=0, group=self._group))
        return _from_bytes(sent, array)

    def attempt(self, function: Callable[[], T]) -> T:
        """Call a function that may fail on some ranks only; if it does on any, no rank goes on.

        Raises:
            ToldElsewhere: it failed, but not here.
        """
        if self._group is None:
            return function()
        error: Exception | None = None
        try:
            result = function()
        except Exception as raised:  # whatever it is, the others must not wait for this rank
            error = raised
        told = self.share(None if error is None else str(error))
        if error is not None:
            raise error
        for rank, text in enumerate(told):
            if text is not None:
                raise ToldElsewhere(f"Rank {rank} failed: {text}")
        return result

    def _call(self, collective: Callable[[], object]) -> None:
        try:
            collective()
        except RuntimeError as error:
            raise NemoError(
                f"Another of the {self.size} ranks went away ({str(error).splitlines()[0]:.120}). See its own message, "
                "then start the same command again: it goes on where it stopped."
            ) from error


@contextmanager
def joined_ranks() -> Iterator[Ranks]:
    """The ranks of torch.distributed, where it is initialised or torchrun announces it; else this process alone."""
    import torch.distributed as distributed

    joined = distributed.is_available() and distributed.is_initialized()
    own = not joined and int(os.environ.get("WORLD_SIZE", "1")) > 1
    if not joined and not own:
        yield Ranks()
        return
    if own:
        try:
            distributed.init_process_group("gloo", timeout=LONGEST_WAIT)
        except (RuntimeError, ValueError) as error:  # ValueError: a variable of the environment is missing
            raise NemoError(
                f"The ranks could not find each other ({str(error).splitlines()[0]:.160}). Start them with torchrun."
            ) from error
    try:
        group = distributed.group.WORLD if own else distributed.new_group(backend="gloo", timeout=LONGEST_WAIT)
        yield Ranks(group)
    finally:
        if own:
            distributed.destroy_process_group()


def _as_bytes(array: Array) -> Any:
    import torch

    return torch.from_numpy(np.ascontiguousarray(array).reshape(-1).view(np.uint8).copy())


def _from_bytes(tensor: Any, like: Array) -> Array:
    return np.asarray(tensor.numpy()).view(like.dtype).reshape(like.shape)
