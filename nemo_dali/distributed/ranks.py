"""``Ranks``: which of all processes this one is, and how they exchange data.

    Loader, tiles      through the store by which torch.distributed's ranks found each other: facts
    mining, metrics    through torch.distributed's collectives: facts, and arrays; who goes away is noticed at once

A single process is rank 0 of 1 and needs neither.
"""

import logging
import os
import socket
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import numpy as np
import numpy.typing as npt

from nemo_dali._checks import MOST, integer, shorten
from nemo_dali.distributed._rendezvous import Rendezvous, listed_ranks
from nemo_dali.errors import NemoError, ToldElsewhere

T = TypeVar("T")
Array = npt.NDArray[Any]

logger = logging.getLogger("nemo_dali")

PATIENCE = 600.0  # seconds until a silent rank counts as missing; the slowest may have to compile kernels first
LONGEST_WORK = timedelta(days=1)  # gloo needs a timeout; it notices a dead rank at once, and rank 0 may work for hours
_meetings: WeakKeyDictionary[Any, Rendezvous] = WeakKeyDictionary()  # by process group


class Ranks:
    """All processes of a job, seen from one of them. Every method must be called by all of them, in the same order.

    Args:
        group: torch.distributed's process group; None: there is only this process.
        patience: seconds until an error names a rank that gives nothing. The ranks then talk through the store by which
            they found each other: that works with any backend and leaves the training's communicators alone, but takes
            no arrays. None: they talk through the group's collectives.

    Attributes:
        rank, size: this process's number; how many there are.
    """

    def __init__(self, group: Any = None, *, patience: float | None = None) -> None:
        self._group, self._patience = group, patience
        self.rank, self.size = 0, 1
        if group is not None:
            import torch.distributed as distributed

            self.rank, self.size = distributed.get_rank(group), distributed.get_world_size(group)

    @classmethod
    def through_store(cls, patience: float | None = None) -> "Ranks":
        """The ranks of torch.distributed, through their store, where it is initialised; else this process alone."""
        import torch.distributed as distributed

        joined = distributed.is_available() and distributed.is_initialized()
        return cls(distributed.group.WORLD if joined else None, patience=PATIENCE if patience is None else patience)

    def share(self, fact: T) -> list[T]:
        """The facts that all ranks give, in rank order; anything small that can be pickled.

        Raises:
            NemoError: ranks gave nothing in time, and the message gives their numbers; or another rank went away.
        """
        if self._group is None:
            return [fact]
        if self._patience is not None:
            return _meeting(self._group, self._patience).exchange(fact, patience=self._patience)
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
        """Call a function that may fail on some ranks only; if it fails on any, no rank continues.

        Raises:
            ToldElsewhere: it failed, but only on other ranks.
        """
        if self._group is None:
            return function()
        error: Exception | None = None
        try:
            result = function()
        except Exception as raised:  # whatever it is, the others must not wait for this rank
            error = raised
        shared = self.share(None if error is None else str(error))
        if error is not None:
            raise error
        for rank, text in enumerate(shared):
            if text is not None:
                raise ToldElsewhere(f"Rank {rank} failed: {text}")
        return result

    def agree(self, facts: Mapping[str, Any], did: str) -> None:
        """Check that all ranks have equal values.

        The norm is the value that most ranks have; in a tie, that of the lowest rank.

        Args:
            facts: by their names in messages, the most telling ones first; equal values must have equal ``repr``.
            did: what the ranks did with them, for the message.

        Raises:
            NemoError: ranks differ. The message, the same on every rank, gives the first fact in which ranks differ
                from the norm, which ranks, and both values.
        """
        every = self.share({name: repr(value) for name, value in facts.items()})
        for name in every[0]:
            values = [others.get(name, "nothing") for others in every]
            norm = Counter(values).most_common(1)[0][0]  # in a tie, the first
            if strangers := [rank for rank, value in enumerate(values) if value != norm]:
                here, there = shorten(values[strangers[0]], norm)
                article = "" if name.endswith("s") else "a "
                raise NemoError(
                    f"{listed_ranks(strangers)} of {len(every)} {did} with {article}different {name}: {here} on rank "
                    f"{strangers[0]}, {there} on rank {values.index(norm)}. Give every rank the same files and options."
                )

    def node_peers(self) -> list[int]:
        """The ranks on this one's node, including itself, in order.

        They have the host, its boot, and the PID and user namespaces in common: containers on one machine are nodes of
        their own.
        """
        node = (
            socket.gethostname(),
            Path("/proc/sys/kernel/random/boot_id").read_text(),
            os.stat("/proc/self/ns/pid").st_ino,
            os.stat("/proc/self/ns/user").st_ino,
        )
        return [rank for rank, other in enumerate(self.share(node)) if other == node]

    def _call(self, collective: Callable[[], object]) -> None:
        try:
            collective()
        except RuntimeError as error:
            raise NemoError(
                f"Another of the {self.size} ranks stopped ({str(error).splitlines()[0]:.120}). See its own message, "
                "then repeat the same command: it continues where it stopped."
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
            distributed.init_process_group("gloo", timeout=LONGEST_WORK)
        except (RuntimeError, ValueError) as error:  # ValueError: an environment variable is missing
            raise NemoError(
                f"The ranks could not find each other ({str(error).splitlines()[0]:.160}). Start them with torchrun."
            ) from error
    try:
        group = distributed.group.WORLD if own else distributed.new_group(backend="gloo", timeout=LONGEST_WORK)
        yield Ranks(group)
    finally:
        if own:
            distributed.destroy_process_group()


def rank_and_world_size(rank: int | None, world_size: int | None) -> tuple[int, int]:
    """The arguments, where both are given; else torch.distributed's, if it is initialised; else 0 of 1."""
    import torch.distributed as distributed

    if rank is None and world_size is None:
        if distributed.is_available() and distributed.is_initialized():
            return distributed.get_rank(), distributed.get_world_size()
        if (announced := os.environ.get("WORLD_SIZE", "1")) != "1":
            logger.warning(
                "WORLD_SIZE is %s, but torch.distributed is not initialised: this loader is rank 0 of 1 and so shows "
                "every sample. Make it after init_process_group, or give rank and world_size.",
                announced,
            )
        return 0, 1
    if rank is None or world_size is None:
        raise ValueError(f"rank ({rank}) and world_size ({world_size}) must be given together")
    world_size = integer("world_size", world_size, least=1, most=MOST)
    rank = integer("rank", rank, least=0, most=MOST)
    if rank >= world_size:
        raise ValueError(f"rank ({rank}) must be < world_size ({world_size})")
    return rank, world_size


def check_still_alone() -> None:
    """Refuse to continue with a Loader that was made as rank 0 of 1 if there are more ranks now.

    Raises:
        NemoError: there are more.
    """
    if (ranks := rank_and_world_size(None, None)[1]) > 1:
        raise NemoError(
            f"torch.distributed now has {ranks} ranks, but this Loader was made before it was initialised and "
            "would show every sample on each. Make it after init_process_group, or give rank and world_size."
        )


def _meeting(group: Any, patience: float) -> Rendezvous:
    """The meeting of a group's ranks, held once."""
    if group not in _meetings:
        _meetings[group] = Rendezvous(_store_of(group), group.rank(), group.size(), patience=patience)
    return _meetings[group]


def _store_of(group: Any) -> Any:
    if hasattr(group, "get_group_store"):  # public, but not in every torch from 2.4 on
        return group.get_group_store()
    import torch.distributed as distributed

    return distributed.distributed_c10d._get_default_store()


def _as_bytes(array: Array) -> Any:
    import torch

    return torch.from_numpy(np.ascontiguousarray(array).reshape(-1).view(np.uint8).copy())


def _from_bytes(tensor: Any, like: Array) -> Array:
    return np.asarray(tensor.numpy()).view(like.dtype).reshape(like.shape)
