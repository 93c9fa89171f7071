"""Which of all processes this one is, what it shares with the others, and what share of the machine is its own."""

import logging
import os
import socket
from collections import Counter
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

from nemo_dali._checks import MOST, integer, shorten
from nemo_dali.distributed._rendezvous import Rendezvous, listed_ranks
from nemo_dali.errors import NemoError

logger = logging.getLogger("nemo_dali")

PATIENCE = 600.0  # seconds until a rank that gives nothing is missed; the slowest may have kernels to compile first
_rendezvous: WeakKeyDictionary[Any, Rendezvous] = WeakKeyDictionary()  # by process group


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
    """Refuse to go on with a Loader that was made as rank 0 of 1 where there are more ranks now.

    Raises:
        NemoError: there are.
    """
    if (ranks := rank_and_world_size(None, None)[1]) > 1:
        raise NemoError(
            f"torch.distributed now has {ranks} ranks, but this Loader was made before it was initialised and "
            "would show every sample on each. Make it after init_process_group, or give rank and world_size."
        )


def exchange(fact: Any, *, patience: float | None = None) -> list[Any]:
    """What every rank gives, in the order of ranks; only its own where torch.distributed is not initialised.

    All ranks must call it, equally often.

    Args:
        fact: anything small that can be pickled.
        patience: seconds until a rank that gives nothing is missed; None: ``PATIENCE``.

    Raises:
        NemoError: ranks that did not call it in time, by number.
    """
    import torch.distributed as distributed

    if not (distributed.is_available() and distributed.is_initialized()):
        return [fact]
    group, patience = distributed.group.WORLD, PATIENCE if patience is None else patience
    if group not in _rendezvous:
        store: Any = distributed.distributed_c10d._get_default_store()
        _rendezvous[group] = Rendezvous(store, distributed.get_rank(), distributed.get_world_size(), patience=patience)
    return _rendezvous[group].exchange(fact, patience=patience)


def agree(facts: dict[str, Any]) -> None:
    """Check that all ranks make their Loaders with equal values.

    Args:
        facts: by the names to call them by, the most telling ones first; equal values must have equal ``repr``.

    Raises:
        NemoError: see ``compare``; or ranks that did not call it.
    """
    compare(exchange({name: repr(value) for name, value in facts.items()}), "made a Loader")


def compare(every: list[dict[str, str]], did: str) -> None:
    """Check that all ranks have equal values.

    The norm is the value that most ranks have; where as many have another one, that of the lowest rank.

    Args:
        every: by rank, by the names to call them by.
        did: what they did with them.

    Raises:
        NemoError: the first fact in which ranks differ from the norm, which ranks, and both values; on every rank the
            same sentence.
    """
    for name in every[0]:
        values = [others.get(name, "nothing") for others in every]
        norm = Counter(values).most_common(1)[0][0]  # of equally many the first
        if strangers := [rank for rank, value in enumerate(values) if value != norm]:
            here, there = shorten(values[strangers[0]], norm)
            raise NemoError(
                f"{listed_ranks(strangers)} of {len(every)} {did} with another {name}: {here} on rank "
                f"{strangers[0]}, {there} on rank {values.index(norm)}. Give every rank the same files and options."
            )


def node_peers() -> list[int]:
    """Ranks that share this one's node, itself among them, in order.

    They have the host, its boot, and the namespaces of PIDs and users in common: containers on one machine are nodes of
    their own. Called by all ranks, as ``exchange`` is.
    """
    node = (
        socket.gethostname(),
        Path("/proc/sys/kernel/random/boot_id").read_text(),
        os.stat("/proc/self/ns/pid").st_ino,
        os.stat("/proc/self/ns/user").st_ino,
    )
    return [rank for rank, other in enumerate(exchange(node)) if other == node]
