"""The rules that propose tau and K, on curves whose answer is known."""

import json
from dataclasses import replace

import numpy as np
import pytest

from nemo_dali.commands.cli import main
from nemo_dali.data.dataset import Dataset
from nemo_dali.errors import NemoError
from nemo_dali.loader.loader import Loader
from nemo_dali.mining.pool_curves import DRAWN, Curves, NoTargetCurves, measure_curves
from nemo_dali.mining.table import NegativeTable
from nemo_dali.mining.tune import depth_advice, mining_advice, needed_depth, propose
from nemo_dali.plan.policy import MosaicPolicy, read_policy
from tests.helpers.files import index_refer, make_files
from tests.helpers.forged import forge
from tests.helpers.tables import write_ranked_table

TAUS = np.round(np.arange(0.10, 0.41, 0.02), 3)
KS = np.array([3, 8, 20, 50, 100, 200])


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tune")
    return write_ranked_table(folder / "a.neg.h5", Dataset.open(index_refer(folder, photos=40)), depth=15)


@pytest.fixture
def curves(table):
    """Own photos at 0.1 to 0.4, evenly; K 20 varied enough, up to K 100 hard enough."""
    shape = len(TAUS), len(KS)
    drawn = np.zeros((*shape, len(DRAWN)))
    drawn[:, :, DRAWN.index(0.01)] = 0.05
    return Curves(
        table=table,
        rows=np.arange(len(table.neighbors)),
        taus=TAUS,
        ks=KS,
        true=np.linspace(0.1, 0.4, 1001),
        chance=np.linspace(-0.1, 0.1, 1001),
        size=np.broadcast_to(KS, shape).astype(float),
        empty=np.zeros(shape),
        short3=np.zeros(shape),
        short8=np.zeros(shape),
        cut=np.zeros(shape),
        similarity=np.broadcast_to([0.2, 0.2, 0.2, 0.19, 0.165, 0.1], shape),
        shown=np.broadcast_to(np.linspace(0.3, 0.8, len(TAUS))[:, None], shape),
        shown_by_chance=0.3,
        labelled=1.0,
        true_below=(np.linspace(0.1, 0.4, 1001)[:, None] <= TAUS).mean(axis=0),
        drawn=drawn,
        never=np.zeros(shape),
        ranks=np.array([1]),
        rank_quantiles=np.zeros((1, 5)),
    )


def test_tau_is_the_largest_that_lets_few_own_photos_pass(curves):
    for passing, tau in ((0.25, 0.16), (0.5, 0.24), (0.01, 0.1), (0.0, 0.1)):
        assert propose(curves, passing=passing).policy.max_similarity == tau
    proposal = propose(curves)
    assert proposal.policy == MosaicPolicy(max_similarity=0.16, top_k=20, grids={2: 1.0}) and proposal.t == 3
    assert "tau 0.16 is the largest value that at most 25% of the own photos do not exceed: 20" in proposal.why[0]
    assert "40% of the candidates then show the target's category" in proposal.why[0]
    assert "without a bound 80% would, and of all photos 30% do" in proposal.why[0] and len(proposal.why) == 2


def test_false_negatives_are_bounded_and_many_are_warned_of(curves, tmp_path):
    told = np.full(curves.shown.shape, 0.03)
    assert not any("false negatives:" in text for text in propose(curves).why)
    few = propose(replace(curves, known_false=told)).why
    assert few[1].startswith(
        "At least 3% and at most 40% of the candidates are false negatives: for that many, another"
    )
    assert "Warning" not in few[1]
    many = propose(replace(curves, known_false=told + 0.04)).why[1]
    assert many.startswith("At least 7% and at most 40%") and "Warning: that is more than 5%" in many
    assert "Lower --passing, or mine with --exclude-crops MARGIN, which leaves fewer at the same hardness" in many
    unlabelled = replace(curves, known_false=np.full_like(told, np.nan))
    assert len(propose(unlabelled).why) == len(few) - 1

    def exclude(parts):
        parts.attributes["exclude_crops"] = [0.0]

    path = tmp_path / "crops.neg.h5"
    forge(curves.table.path, exclude, path)
    with_crops = replace(curves, known_false=told + 0.04, table=NegativeTable.open(path))
    assert "raise the margin of --exclude-crops" in propose(with_crops).why[1]


def test_targets_are_put_where_sentences_that_name_places_stay_true(curves):
    for share, cell in ((0.0, "uniform"), (0.01, "uniform"), (0.011, "positional"), (0.4, "positional")):
        proposal = propose(replace(curves, placed=share))
        assert proposal.policy.target_cell == cell
        assert ("positional" in proposal.why[-1]) == (cell == "positional")
    assert proposal.why[-1].startswith("40% of the sentences say where in the photo their target is")


def test_the_share_of_sentences_that_name_places_is_measured(tmp_path):
    def say(refs, _):
        for number, ref in enumerate(refs):
            for sentence in ref["sentences"]:
                sentence["sent"] = "the kite furthest up" if number % 4 == 0 else "a kite"

    dataset = Dataset.open(index_refer(tmp_path, photos=40, edit=say))
    table = write_ranked_table(tmp_path / "a.neg.h5", dataset, depth=15)
    expected = np.mean([text != "a kite" for text in dataset.sentences.text])
    curves = measure_curves(dataset, table)
    assert curves.placed == expected > 0.1 and propose(curves).policy.target_cell == "positional"


def test_where_every_own_photo_may_pass_there_is_no_bound(curves):
    proposal = propose(curves, passing=1.0)
    assert proposal.policy.max_similarity is None and proposal.tau is None and "No bound is needed" in proposal.why[0]


def test_tau_is_raised_where_pools_would_be_short(curves):
    short = np.zeros_like(curves.short3)
    short[:6] = 0.2
    short[6:9] = 0.011
    for cut, remedy in (
        (0.0, "more photos would make that unnecessary"),
        (0.3, "a deeper table would make that unnecessary"),
    ):
        changed = replace(curves, short3=short, cut=np.full_like(short, cut))
        proposal = propose(changed)
        assert proposal.policy.max_similarity == TAUS[9] and proposal.tau == 0.16
        assert (
            f"20.0% of the pools would hold fewer than 3 photos there, so tau is raised to {TAUS[9]:g}"
            in proposal.why[1]
        )
        assert remedy in proposal.why[1]
    assert propose(curves, grid=3).policy.max_similarity == 0.16
    eight = propose(replace(curves, short8=short), grid=3)
    assert eight.policy.max_similarity == TAUS[9] and eight.policy.grids == {3: 1.0} and "fewer than 8" in eight.why[1]
    assert propose(replace(curves, short3=np.ones_like(short))).policy.max_similarity is None


def test_k_is_the_smallest_that_is_varied_enough(curves):
    drawn = np.array(curves.drawn)
    drawn[:, :3, DRAWN.index(0.01)] = 0.3
    proposal = propose(replace(curves, drawn=drawn))
    assert (
        proposal.policy.top_k == 50
        and "K 50 is the smallest, from 20 on, at which the 1% of the photos" in proposal.why[-1]
    )
    drawn[:, :, DRAWN.index(0.01)] = 0.3
    proposal = propose(replace(curves, drawn=drawn))
    assert proposal.policy.top_k == 100 and "more than 10%, but with a larger K" in proposal.why[-1]  # 200 is too easy
    easy = np.array(curves.similarity)
    easy[:, 3:] = 0.0
    assert propose(replace(curves, drawn=drawn, similarity=easy)).policy.top_k == 20


def test_k_follows_the_tau_of_each_k(curves):
    """Where tau must be raised for the K at hand, the draws there count."""
    short, drawn = np.zeros_like(curves.short3), np.array(curves.drawn)
    short[:10, 2] = 0.5
    drawn[10:, 2, DRAWN.index(0.01)] = 0.5
    proposal = propose(replace(curves, short3=short, drawn=drawn))
    assert (proposal.policy.top_k, proposal.policy.max_similarity) == (50, 0.16)


def other(curves, *, short3=0.0, short8=0.0):
    """Curves with sentences without a target beside them."""
    shape = curves.size.shape
    short3, short8 = np.broadcast_to(short3, shape), np.broadcast_to(short8, shape)
    none = NoTargetCurves(curves.rows[:9], curves.size, np.zeros(shape), short3, short8, np.zeros(shape))
    return replace(curves, no_target=none)


def test_sentences_without_a_target_get_a_tau_of_their_own(curves):
    """A twentieth of the own photos of the others do not exceed it; K is that of all."""
    assert propose(curves).policy.max_similarity_no_target is None and propose(curves).t_no_target is None
    proposal = propose(other(curves))
    assert proposal.policy == MosaicPolicy(max_similarity=0.16, max_similarity_no_target=0.1, top_k=20, grids={2: 1.0})
    assert proposal.t_no_target == 0 and "For sentences without a target tau is 0.1, the largest" in proposal.why[-1]
    assert "at most 5% of the others' own photos do not exceed" in proposal.why[-1]
    assert propose(other(curves), passing=0.01).policy.max_similarity_no_target == 0.1  # no more than the others get
    low = replace(other(curves), true=curves.true - 0.05, true_below=(curves.true[:, None] - 0.05 <= TAUS).mean(axis=0))
    assert "the smallest that the table reaches" in propose(low).why[-1]


def test_their_tau_is_raised_where_their_own_pools_would_be_short(curves):
    short = np.zeros_like(curves.short3)
    short[:4] = 0.4
    proposal = propose(other(curves, short3=short))
    assert proposal.policy.max_similarity == 0.16 and proposal.policy.max_similarity_no_target == TAUS[4]
    assert (
        "40.0% of these sentences' pools would hold fewer than 3 photos there, so it is raised to 0.18"
        in proposal.why[-1]
    )
    assert propose(other(curves, short8=short)).policy.max_similarity_no_target == 0.1
    eight = propose(other(curves, short8=short), grid=3)
    assert eight.policy.max_similarity_no_target == TAUS[4] and "fewer than 8" in eight.why[-1]


def test_no_bound_at_all_is_none_and_otherwise_one_that_bounds_nothing(curves):
    """Where only the other tau is given, it binds these sentences too."""
    unbounded = other(curves, short3=1.0)
    assert propose(unbounded).policy.max_similarity_no_target == TAUS[-1]
    both = replace(unbounded, short3=np.ones_like(curves.short3))
    assert propose(both).policy == MosaicPolicy(top_k=20)
    assert propose(replace(both, taus=TAUS + 0.7, short3=curves.short3)).policy.max_similarity_no_target == 1.0


@pytest.mark.parametrize("excluded", [0, 3])
def test_too_few_photos_for_a_mosaic_are_refused(tmp_path, capsys, excluded):
    """As the Loader refuses them, and before a policy is written."""
    files = make_files(tmp_path, photos=3 + excluded)

    def exclude(parts):
        parts.arrays["excluded_photos"][:] = 0b111
        for row, values in zip(parts.arrays["neighbors"], parts.arrays["similarity"], strict=True):
            kept = row > 2
            count = kept.sum()
            row[:count], values[:count] = row[kept], values[kept]
            row[count:], values[count:] = -1, -np.inf

    if excluded:
        forge(files.negatives, exclude)
    output = tmp_path / "policy.json"
    assert main(["tune", str(files.dataset), str(files.negatives), "-o", str(output)]) == 1
    message = capsys.readouterr().err
    assert "A 2x2 mosaic needs 4 photos" in message and "Index more photos" in message and not output.exists()
    with pytest.raises(NemoError, match="A 2x2 mosaic needs 4 photos"):
        Loader(files.dataset, files.negatives, batch_size=1)
    advice = mining_advice(Dataset.open(files.dataset), NegativeTable.open(files.negatives))
    assert "no policy can be proposed" in advice  # mining itself goes on


def test_a_model_that_knows_nothing_is_told(curves):
    assert "Warning" not in propose(curves).why[0]
    proposal = propose(replace(curves, true=curves.chance))
    assert (
        "53%" not in proposal.why[0]
        and proposal.why[0].startswith("Warning")
        and "mine with another" in proposal.why[0]
    )


def test_without_categories_nothing_is_said_of_them(curves):
    unlabelled = replace(curves, labelled=0.0, shown=np.full_like(curves.shown, np.nan))
    assert "category" not in " ".join(propose(unlabelled).why)


def test_the_depth_that_suffices(curves, table):
    """Counted from the embeddings where rows end above tau."""
    similarity = np.asarray(table.text_embedding) @ np.asarray(table.image_embedding).T
    for tau in (-0.1, 0.05, 0.2):
        above = np.sort((similarity > tau).sum(axis=1))
        exact = above[int(np.ceil(0.999 * (len(above) - 1)))] + 5
        assert exact - 1 <= needed_depth(curves, curves.rows, tau, 5) <= min(50 * (exact // 50 + 1), 39)
    deep = propose(curves)
    advice = depth_advice(curves, replace(deep, depth=39))
    assert "99.9% of the pools for tau 0.16 and K 20 are complete in a table 39 photos deep; this one has 15" in advice
    assert "mine again with --embeddings THIS_TABLE --depth 39" in advice
    assert "mine again" not in depth_advice(curves, replace(deep, depth=15))


@pytest.mark.parametrize(
    ("options", "named"), [({"passing": 1.1}, "passing"), ({"passing": -1}, "passing"), ({"grid": 4}, "grid")]
)
def test_wrong_arguments(curves, options, named):
    with pytest.raises(ValueError, match=rf"{named} \("):
        propose(curves, **options)


def test_the_command_writes_a_policy_and_says_why(tmp_path, capsys):
    dataset = Dataset.open(index_refer(tmp_path, photos=40))
    table = write_ranked_table(tmp_path / "a.neg.h5", dataset)
    words = ["tune", str(dataset.path), str(table.path), "--passing", "0.5", "-o", str(tmp_path / "policy.json")]
    assert main(words) == 0
    out = capsys.readouterr().out
    expected = propose(measure_curves(dataset, table), passing=0.5)
    policy, tuned_for = read_policy(tmp_path / "policy.json")
    assert policy == expected.policy and tuned_for == table.fingerprint
    why = json.loads((tmp_path / "policy.json").read_text())["why"]
    assert why[:-1] == list(expected.why) and all(reason in out for reason in why)
    assert f"max_similarity {policy.max_similarity}, top_k {policy.top_k}" in out
    (tmp_path / "notes.json").write_text('{"mine": 1}')
    assert main([*words[:-1], str(tmp_path / "notes.json")]) == 1
    assert "is not a policy file" in capsys.readouterr().err and (tmp_path / "notes.json").read_text() == '{"mine": 1}'
    assert main([*words[:-1], str(tmp_path / "policy.json")]) == 0
    with pytest.raises(SystemExit):
        main([*words[:-1], str(tmp_path / "policy.txt")])
