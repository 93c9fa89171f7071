"""How ranks exchange small facts: through the store by which torch.distributed's ranks found each other.

No collective is run, so it works with any backend, needs no GPU and leaves the training's communicators alone.

A store may outlive ranks: torchrun keeps one for all its restarts, and what dead ranks left in it must not be mistaken
for what living ones say. So ranks meet first. Each writes a name that nobody had before; rank 0 publishes the roster of
all names, again whenever one changes; a rank that finds its own name in the roster agrees to it; once all have agreed,
rank 0 lets them go. Everything after that is filed under this roster.
"""

import hashlib
import json
import pickle
import time
import uuid
from collections.abc import Iterator
from typing import Any

from nemo_dali.errors import NemoError

LONGEST_PAUSE = 0.05  # seconds between two looks into the store
LONGEST_LIST = 8  # ranks named in a message


class Rendezvous:
    """The ranks of one process group.

    Args:
        store: torch.distributed's, for these ranks.
        rank, world_size: this one's number; how many there are.
        patience: seconds until a rank that does not come counts as missing.

    Raises:
        NemoError: ranks did not come; the message gives their numbers.
    """

    def __init__(self, store: Any, rank: int, world_size: int, *, patience: float) -> None:
        self._store, self._rank, self._world_size = store, rank, world_size
        self._turn = 0
        self._prefix = self._meet(patience)

    def _meet(self, patience: float) -> str:
        store, ranks, name = self._store, range(self._world_size), uuid.uuid4().hex
        store.set(f"nemo_dali/name of {self._rank}", name)
        names = [f"nemo_dali/name of {rank}" for rank in ranks]
        roster: list[str] = []
        agreed: list[str] = []
        prefix = ""
        for _ in _looks(patience):
            if self._rank == 0 and store.check(names):
                if (found := [store.get(key).decode() for key in names]) != roster:
                    roster = found
                    store.set("nemo_dali/roster", json.dumps(roster))
            elif self._rank and store.check(["nemo_dali/roster"]):
                found = json.loads(store.get("nemo_dali/roster"))
                if len(found) == self._world_size and found[self._rank] == name:
                    roster = found
            if roster != agreed:
                agreed, prefix = roster, f"nemo_dali/{hashlib.sha256(json.dumps(roster).encode()).hexdigest()}"
                store.set(f"{prefix}/agreed {self._rank}", b"")
            if agreed and self._rank == 0 and store.check([f"{prefix}/agreed {rank}" for rank in ranks]):
                store.set(f"{prefix}/go", b"")
            if agreed and store.check([f"{prefix}/go"]):
                return prefix
        if agreed:
            missing = [rank for rank in ranks if not store.check([f"{prefix}/agreed {rank}"])]
        else:
            missing = [rank for rank in ranks if not store.check([names[rank]])] or [0]
        raise self._missed(missing, patience)

    def exchange(self, fact: Any, *, patience: float) -> list[Any]:
        """The facts that all ranks give, in rank order.

        Args:
            fact: anything small that can be pickled.
            patience: seconds until a rank that gives nothing counts as missing.

        Raises:
            NemoError: ranks gave nothing; the message gives their numbers.
        """
        self._turn += 1
        keys = [f"{self._prefix}/{self._turn}/{rank}" for rank in range(self._world_size)]
        read = [f"{key} read" for key in keys]
        self._store.set(keys[self._rank], pickle.dumps(fact))
        for _ in _looks(patience):
            if self._store.check(keys):
                break
        else:
            raise self._missed([rank for rank, key in enumerate(keys) if not self._store.check([key])], patience)
        facts = [pickle.loads(self._store.get(key)) for key in keys]
        self._store.set(read[self._rank], b"")
        if self._rank == 0:  # the store may live in this process, which must not end before all have read
            for _ in _looks(patience):
                if self._store.check(read):
                    break
        return facts

    def _missed(self, ranks: list[int], patience: float) -> NemoError:
        return NemoError(
            f"{listed_ranks(ranks)} of {self._world_size} made no Loader within {patience:.0f} s. Make one on every "
            "rank, equally often on each, or give rank and world_size."
        )


def listed_ranks(ranks: list[int]) -> str:
    """ "Rank 3", "Ranks 3, 4"; only the first ones of many."""
    named = ", ".join(map(str, ranks[:LONGEST_LIST]))
    more = f" and {len(ranks) - LONGEST_LIST} more" if len(ranks) > LONGEST_LIST else ""
    return f"Rank{'s' if len(ranks) > 1 else ''} {named}{more}"


def _looks(patience: float) -> Iterator[None]:
    """Turns with pauses between them until time is up. The store's own wait would block Ctrl+C until then."""
    deadline, pause = time.monotonic() + patience, 0.001
    while True:
        yield
        if time.monotonic() > deadline:
            return
        time.sleep(pause)
        pause = min(2 * pause, LONGEST_PAUSE)
