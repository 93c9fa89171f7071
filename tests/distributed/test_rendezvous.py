"""Ranks that meet through a store; here they are threads."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch.distributed as distributed

from nemo_dali.distributed._rendezvous import Rendezvous, listed_ranks
from nemo_dali.errors import NemoError


def together(store, ranks, world_size, patience=20.0):
    """The meeting of some of the ranks, or what one of them raised; by rank."""

    def come(rank):
        try:
            return Rendezvous(store, rank, world_size, patience=patience)
        except NemoError as error:
            return str(error)

    with ThreadPoolExecutor(len(ranks)) as pool:
        return dict(zip(ranks, pool.map(come, ranks), strict=True))


def tell(meetings, facts, patience=20.0):
    with ThreadPoolExecutor(len(meetings)) as pool:
        said = pool.map(lambda rank: meetings[rank].exchange(facts[rank], patience=patience), meetings)
        return list(said)


def test_all_learn_what_all_give_turn_by_turn():
    meetings = together(distributed.HashStore(), range(5), 5)
    for turn in range(3):
        facts = [(turn, rank) for rank in range(5)]
        assert tell(meetings, facts) == [facts] * 5


@pytest.mark.parametrize(
    ("come", "missing"), [([0, 2], "Rank 1 of 3"), ([1, 2], "Rank 0 of 3"), ([0], "Ranks 1, 2 of 3")]
)
def test_those_who_do_not_come_are_named(come, missing):
    said = together(distributed.HashStore(), come, 3, patience=0.2)
    assert all(text.startswith(f"{missing} made no Loader within") for text in said.values())


def test_what_dead_ranks_left_is_not_taken_for_the_living_ones():
    """A store that outlives restarts: after each kind of death all meet anew, however far they had come."""
    store = distributed.HashStore()
    first = together(store, range(3), 3)
    tell(first, ["old"] * 3)
    first[0]._store.set(f"{first[0]._prefix}/2/0", b"half a turn")  # died before the others gave anything
    assert "Rank 2 of 3" in together(store, [0, 1], 3, patience=0.2)[0]  # rank 2 died before it came
    assert "Rank 0 of 3" in together(store, [1, 2], 3, patience=0.2)[1]
    assert tell(together(store, range(3), 3), ["a", "b", "c"]) == [["a", "b", "c"]] * 3


@pytest.mark.parametrize("ranks", [2, 4])
def test_more_or_fewer_ranks_come_back(ranks):
    store = distributed.HashStore()
    tell(together(store, range(3), 3), ["old"] * 3)
    facts = list(range(ranks))
    assert tell(together(store, range(ranks), ranks), facts) == [facts] * ranks


def test_a_rank_that_gives_nothing_is_named():
    meetings = together(distributed.HashStore(), range(3), 3)
    del meetings[1]
    with pytest.raises(NemoError, match="Rank 1 of 3 made no Loader within"):
        tell(meetings, {0: "a", 2: "c"}, patience=0.2)


def test_many_ranks_are_not_all_listed():
    assert listed_ranks(list(range(3, 40))) == "Ranks 3, 4, 5, 6, 7, 8, 9, 10 and 29 more"
