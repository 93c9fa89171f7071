"""What ranks tell each other, by processes that torch.distributed knows of."""

import json
import time
from datetime import timedelta

import pytest

from nemo_dali.distributed import ranks as ranks_module
from nemo_dali.distributed._rendezvous import Rendezvous
from nemo_dali.distributed.ranks import Ranks, joined_ranks
from nemo_dali.errors import NemoError
from nemo_dali.plan.policy import MosaicPolicy
from tests.helpers import fork_server
from tests.helpers.paths import ROOT

pytestmark = pytest.mark.process

RANKS = 4
ALIKE = {"seed": 3, "files": {"dataset": ["9f" * 32], "negatives": []}, "drop_last": True}


def said(facts):
    try:
        Ranks.through_store().agree(facts, "made a Loader")
    except NemoError as error:
        return str(error)
    return ""


def both_ways():
    """What a rank hears of the others through the store, and through gloo."""

    def heard(ranks):
        def fail():
            if ranks.rank == 2:
                raise NemoError("no photo")

        found = [ranks.rank, ranks.size, ranks.share(ranks.rank), ranks.node_peers()]
        for call in (lambda: ranks.agree({"model": ranks.rank % 3}, "began mining"), lambda: ranks.attempt(fail)):
            try:
                call()
            except NemoError as error:
                found.append(str(error))
        return found

    with joined_ranks() as ranks:
        return heard(Ranks.through_store()), heard(ranks)


def missed():
    begin = time.monotonic()
    try:
        Ranks.through_store().share(None)
    except NemoError as error:
        return str(error), time.monotonic() - begin
    return "", 0.0


def made(files, **options):
    from nemo_dali.loader.loader import Loader

    try:
        loader = Loader(*files[:2], policy=MosaicPolicy(max_similarity=0.4), **{"batch_size": 4, "seed": 1} | options)
    except NemoError as error:
        return str(error)
    return loader.rank, len(loader)


def passed(loader):
    try:
        next(iter(loader))
    except NemoError as error:
        return str(error)
    return ""


def act(rank, port, folder, files):
    """One rank's part in everything; what came of it is written to a file."""
    import torch.distributed as distributed

    from nemo_dali.loader.loader import Loader

    def begin(group):
        # The store lives in another process, as under torchrun; Gloo would take an earlier group's entries for its own.
        store = distributed.PrefixStore(group, distributed.TCPStore("127.0.0.1", port, is_master=False))
        distributed.init_process_group("gloo", store=store, rank=rank, world_size=RANKS, timeout=timedelta(seconds=60))

    early = Loader(*files[:2], batch_size=4, policy=MosaicPolicy(max_similarity=0.4)) if rank == 0 else None
    begin("first")
    found = {
        "early": passed(early) if rank == 0 else None,
        "all": Ranks.through_store().share((rank, {"seed": None}))
        == [(other, {"seed": None}) for other in range(RANKS)],
        "alike": said(ALIKE),
        "seed": said({**ALIKE, "seed": 4 if rank == 2 else 3}),
        "halves": said({**ALIKE, "drop_last": rank < 2}),
        "files": said({**ALIKE, "files": {"dataset": ["9f" * 32 if rank else "9f" * 31 + "00"], "negatives": []}}),
        "older": said({"version": "0.2", **ALIKE} if rank != 3 else ALIKE),
        "node": Ranks.through_store().node_peers(),
    }
    found["both ways"] = both_ways()
    older = Rendezvous(ranks_module._store_of(object()), rank, RANKS, patience=60)  # of a torch without the public way
    found["older torch"] = older.exchange(rank, patience=60)
    ranks_module.socket.gethostname = lambda: f"host{rank % 2}"
    found["two nodes"] = Ranks.through_store().node_peers()
    distributed.destroy_process_group()
    found["alone"] = Ranks.through_store().share(rank)
    begin("second")
    found["again"] = Ranks.through_store().share(10 * rank)
    found["loader"] = made(files)
    found["other batch"] = made(files, batch_size=2 + rank // 3)
    found["by hand"] = made(files, batch_size=1 + rank, rank=0, world_size=1) if rank == 1 else None
    ranks_module.PATIENCE = 1.0
    if rank in (0, 2):
        found["missed"] = missed()
    (folder / f"{rank}.json").write_text(json.dumps(found))
    distributed.destroy_process_group()


def fork(*arguments):
    """Become all ranks."""
    import torch

    torch.multiprocessing.start_processes(act, arguments, nprocs=RANKS, start_method="fork")


@pytest.fixture(scope="module")
def ranks(files, tmp_path_factory):
    """What each rank found."""
    import torch.distributed as distributed

    folder = tmp_path_factory.mktemp("ranks")
    made(files)  # keeps the tokens, which take longer to make than all the rest
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GLOO_SOCKET_IFNAME", "lo")
        store = distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        fork_server.call(fork, store.port, folder, files)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(RANKS)]


def the_same(ranks, name):
    assert len({json.dumps(found[name]) for found in ranks}) == 1
    return ranks[0][name]


def test_everybody_learns_what_everybody_gives(ranks):
    assert the_same(ranks, "all") is True


def test_ranks_that_agree_go_on(ranks):
    assert the_same(ranks, "alike") == ""


def test_a_rank_that_differs_is_named_to_all_with_both_values(ranks):
    assert the_same(ranks, "seed") == (
        "Rank 2 of 4 made a Loader with a different seed: 4 on rank 2, 3 on rank 0. Give every rank the same files and "
        "options."
    )


def test_of_two_halves_the_lowest_ranks_one_is_the_norm(ranks):
    assert "Ranks 2, 3 of 4" in the_same(ranks, "halves")


def test_rank_0_can_be_the_one_that_differs_and_long_values_are_cut_to_where_they_do(ranks):
    assert the_same(ranks, "files") == (
        "Rank 0 of 4 made a Loader with different files: ...9f9f9f9f9f9f9f9f9f9f00'], 'negatives': []} on rank 0, "
        "...9f9f9f9f9f9f9f9f9f9f9f'], 'negatives': []} on rank 1. Give every rank the same files and options."
    )


def test_a_rank_that_does_not_know_a_fact_differs(ranks):
    assert "a different version: nothing on rank 3, '0.2' on rank 0" in the_same(ranks, "older")


def test_the_ranks_of_a_node_find_each_other(ranks):
    assert the_same(ranks, "node") == [0, 1, 2, 3]
    assert [found["two nodes"] for found in ranks] == [[0, 2], [1, 3], [0, 2], [1, 3]]


def test_ranks_hear_the_same_through_the_store_and_through_gloo(ranks):
    for rank, found in enumerate(ranks):
        by_store, by_gloo = found["both ways"]
        assert (
            by_store
            == by_gloo
            == [
                rank,
                RANKS,
                [0, 1, 2, 3],
                [0, 1, 2, 3],
                "Ranks 1, 2 of 4 began mining with a different model: 1 on rank 1, 0 on rank 0. Give every rank the "
                "same files and options.",
                "no photo" if rank == 2 else "Rank 2 failed: no photo",
            ]
        )


def test_torch_s_private_parts_are_touched_in_one_place():
    modules = sorted((ROOT / "nemo_dali").rglob("*.py"))
    found = [
        (path.name, path.read_text().count("_get_default_store")) for path in modules if "c10d" in path.read_text()
    ]
    assert found == [("ranks.py", 1)]


def test_a_torch_without_a_public_way_to_the_store_will_do(ranks):
    assert the_same(ranks, "older torch") == [0, 1, 2, 3]


def test_a_process_group_may_end_and_another_begin(ranks):
    assert [found["alone"] for found in ranks] == [[0], [1], [2], [3]]
    assert the_same(ranks, "again") == [0, 10, 20, 30]


def test_loaders_that_differ_are_refused_unless_their_ranks_are_given(ranks):
    assert [found["loader"] for found in ranks] == [[rank, 3] for rank in range(RANKS)]
    assert the_same(ranks, "other batch").startswith(
        "Rank 3 of 4 made a Loader with a different batch_size: 3 on rank 3"
    )
    assert ranks[1]["by hand"] == [0, 24]


def test_a_loader_made_too_early_would_show_everything_on_each_rank_and_says_so(ranks):
    assert "torch.distributed now has 4 ranks, but this Loader was made before" in ranks[0]["early"]


def test_ranks_that_are_missing_are_named_when_time_is_up(ranks):
    for rank in (0, 2):
        text, seconds = ranks[rank]["missed"]
        assert text.startswith("Ranks 1, 3 of 4 made no Loader within") and seconds >= 1.0


def test_without_torch_distributed_a_process_is_alone():
    assert Ranks.through_store().share("fact") == ["fact"] and Ranks.through_store().node_peers() == [0]
    Ranks.through_store().agree({"seed": 1}, "made a Loader")
