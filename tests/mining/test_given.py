"""Tables of scores that others computed: every kind of file gives the table by its definition, or one sentence."""

import pickle
import subprocess
import sys

import lmdb
import numpy as np
import pytest

from nemo_dali.commands.cli import main
from nemo_dali.data.dataset import Dataset
from nemo_dali.errors import NemoError
from nemo_dali.loader.loader import Loader
from nemo_dali.mining import given, scores
from nemo_dali.mining.exclusions import ALWAYS, Exclusions
from nemo_dali.mining.given import mine_scores, sentence_ids
from nemo_dali.mining.job import mine
from nemo_dali.mining.table import NegativeTable
from nemo_dali.plan.policy import MosaicPolicy
from tests.helpers.files import index_grefs, index_refer, make_noise
from tests.helpers.forged import forge
from tests.helpers.paths import ROOT

pa = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")

KINDS = ["parquet", "csv", "plain.csv", "tsv", "lmdb"]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return Dataset.open(index_refer(tmp_path_factory.mktemp("given"), photos=14))


def pairs_of(dataset, *, seed=0, share=0.7, scale=1.0):
    """(sent_id, image_id, score) of some pairs in no order, a few of other data sets; scores of few distinct values."""
    rng = np.random.default_rng(seed)
    some = np.argwhere(rng.random((len(dataset.sentences.ref), len(dataset.images.id))) < share)
    rng.shuffle(some)
    score = (rng.integers(-20, 20, len(some)) / 32 * scale).tolist()  # exact as float32
    known = zip(
        dataset.sentences.sent_id[some[:, 0]].tolist(), dataset.images.id[some[:, 1]].tolist(), score, strict=True
    )
    return [(10**12, dataset.images.id.tolist()[0], 0.5), *known, (dataset.sentences.sent_id.tolist()[0], 7, 0.5)]


def write(folder, kind, pairs):
    path = folder / f"scores.{kind}"
    sent_id, image_id, score = (list(column) for column in zip(*pairs, strict=True))
    if kind == "parquet":
        table = pa.table(
            {"score": pa.array(score, pa.float32()), "note": score, "image_id": image_id, "sent_id": sent_id}
        )
        parquet.write_table(table, path, row_group_size=50)
    elif kind == "csv":
        lines = [f'"{c!r}",x,{b},{a}\n' for a, b, c in pairs]
        path.write_text("\ufeffscore,note, image_id,sent_id\n" + "\n".join(lines), encoding="utf-8")
    elif kind in ("plain.csv", "tsv"):
        sign = "\t" if kind == "tsv" else ","
        path.write_text("".join(f"{a}{sign}{b}{sign}{c!r}\n" for a, b, c in pairs))
    else:
        by_sentence = {}
        for a, b, c in pairs:
            by_sentence.setdefault(a, []).append((b, c))
        names = list(by_sentence)
        values = [{name: by_sentence[name] for name in names[i : i + 2]} for i in range(0, len(names), 2)]
        write_lmdb(path, values)
    return path


def write_lmdb(path, values):
    keys = [str(number).encode() for number in range(len(values))]
    content = dict(zip(keys, values, strict=True)) | {b"__keys__": keys, b"__len__": len(keys)}
    with lmdb.open(str(path), subdir=False, map_size=1 << 24) as database, database.begin(write=True) as transaction:
        for key, value in content.items():
            transaction.put(key, value if isinstance(value, bytes) else pickle.dumps(value))


def expected_rows(dataset, pairs, depth, left_out=lambda sentence, photo: False):
    """The rows by definition: all but the own photo, by falling score, equal ones by row."""
    row_of = {image_id: row for row, image_id in enumerate(dataset.images.id.tolist())}
    own = dataset.refs.image[dataset.sentences.ref]
    rows = []
    for sentence, sent_id in enumerate(dataset.sentences.sent_id.tolist()):
        found = [(-score, row_of[b]) for a, b, score in pairs if a == sent_id and b in row_of]
        kept = [(score, row) for score, row in found if row != own[sentence] and not left_out(sentence, row)]
        rows.append([(row, -score) for score, row in sorted(kept)[:depth]])
    return rows


def rows(table):
    return [
        [(int(photo), float(score)) for photo, score in zip(*pair, strict=True) if photo >= 0]
        for pair in zip(table.neighbors, table.similarity, strict=True)
    ]


@pytest.mark.parametrize("depth", [4, 1000])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_file_gives_the_best_of_each_sentence(dataset, tmp_path, monkeypatch, kind, depth):
    pairs = pairs_of(dataset)
    path = write(tmp_path, kind, pairs)
    monkeypatch.setattr(scores, "ROWS", 23)  # pieces that no row is whole in
    monkeypatch.setattr(given, "SORTED_CELLS", 50)
    report = mine_scores(dataset.path, path, output=tmp_path / "a.neg.h5", depth=depth)
    table = NegativeTable.open(tmp_path / "a.neg.h5")
    table.check_dataset(dataset)
    table.check_rows(np.arange(len(table.neighbors)), dataset.refs.image[dataset.sentences.ref])
    wanted = expected_rows(dataset, pairs, depth)
    assert rows(table) == wanted
    assert (report.read, report.unknown) == (len(pairs), 2) and report.fingerprint == table.fingerprint
    own = sum(len(row) for row in expected_rows(dataset, pairs, 99)) + 2 + report.excluded
    assert own == len(pairs) and report.short == sum(len(row) < table.neighbors.shape[1] for row in wanted)
    assert (table.model, table.pretrained, table.method) == ("scores", path.name, "given scores")
    assert table.exclusions == ALWAYS and table.text_embedding.shape == (len(wanted), 0)
    assert table.image_embedding.shape == (14, 0) and (table.own_rank == 0).all()


@pytest.mark.parametrize("kind", ["csv", "lmdb"])
def test_a_loader_draws_from_such_a_table(dataset, tmp_path, kind):
    pairs = pairs_of(dataset, share=1.0)
    mine_scores(dataset.path, write(tmp_path, kind, pairs), output=tmp_path / "a.neg.h5")
    policy = MosaicPolicy(p_mined=1.0, max_similarity=0.3, top_k=4)
    loader = Loader(dataset.path, tmp_path / "a.neg.h5", batch_size=2, size=32, policy=policy)
    plan = loader.plan(0, np.arange(len(loader.dataset)))
    wanted = expected_rows(dataset, pairs, 99)
    for row in plan:
        pool = [photo for photo, score in wanted[row["sentence"]] if score <= 0.3][:4]
        negatives = [photo for cell, photo in enumerate(row["images"][:4]) if cell != row["cell"]]
        assert len(pool) == 4 and set(negatives) <= set(pool)
    assert next(iter(loader)).image.shape == (2, 3, 32, 32)


def test_scores_of_any_size_are_taken_and_told(dataset, tmp_path):
    pairs = pairs_of(dataset, scale=100.0)
    path = write(tmp_path, "parquet", pairs)
    report = mine_scores(dataset.path, path, output=tmp_path / "a.neg.h5")
    assert report.lowest < -1 and report.highest > 1 and "outside -1 to 1" in str(report)
    table = NegativeTable.open(tmp_path / "a.neg.h5")
    assert rows(table) == expected_rows(dataset, pairs, 99)
    assert table.pool_sizes(20.0, 5)["max_similarity"] == 20.0
    few = mine_scores(dataset.path, write(tmp_path, "csv", pairs_of(dataset)), output=tmp_path / "b.neg.h5")
    assert "outside" not in str(few) and "have fewer candidates than 13" in str(few)


def test_what_is_left_out(dataset, tmp_path):
    def edit(parts):
        parts.arrays["images/digest"][5] = parts.arrays["images/digest"][2]

    def three(parts):
        parts.arrays["images/coco_id"][3:] = -1
        parts.arrays["images/digest"][3:] = 0

    twins, other = forge(dataset.path, edit, tmp_path / "t.ris.h5"), forge(dataset.path, three, tmp_path / "o.ris.h5")
    opened = Dataset.open(twins)
    pairs = pairs_of(opened, share=1.0)
    path = write(tmp_path, "csv", pairs)
    shown, own = opened.shown_categories(), opened.refs.image[opened.sentences.ref]
    category = opened.refs.category[opened.sentences.ref]
    for exclusions, left_out in (
        (Exclusions(), lambda s, p: {own[s], p} == {2, 5}),
        (Exclusions(category=True), lambda s, p: {own[s], p} == {2, 5} or shown[p, category[s]]),
        (Exclusions(photos_of=[other]), lambda s, p: {own[s], p} == {2, 5} or p in (0, 1, 2, 5)),
    ):
        mine_scores(twins, path, output=tmp_path / "a.neg.h5", exclusions=exclusions)
        table = NegativeTable.open(tmp_path / "a.neg.h5")
        assert rows(table) == expected_rows(opened, pairs, 99, left_out)
    assert np.flatnonzero(table.excluded_photos).tolist() == [0, 1, 2, 5]
    for rule in ({"similar_photos": 0.9}, {"siblings": 0.9}):
        with pytest.raises(ValueError, match=r"must be None with scores, as it compares embeddings"):
            mine_scores(twins, path, output=tmp_path / "b.neg.h5", exclusions=Exclusions(**rule))


def test_what_needs_embeddings_says_so(dataset, tmp_path, capsys):
    path = write(tmp_path, "csv", pairs_of(dataset))
    table = tmp_path / "a.neg.h5"
    assert main(["mine", str(dataset.path), "--scores", str(path), "-o", str(table)]) == 0
    out = capsys.readouterr().out
    assert "13 negatives" in out and "a table of given scores has no embeddings, which 'tune' and 'report' need" in out
    for words in (
        ["tune", str(dataset.path), str(table), "-o", str(tmp_path / "p.json")],
        ["report", str(dataset.path), str(table), "-o", str(tmp_path / "r.html")],
        ["mine", str(dataset.path), "--embeddings", str(table), "-o", str(tmp_path / "b.neg.h5")],
    ):
        assert main(words) == 1
        error = capsys.readouterr().err
        assert "was made from scores and has no embeddings" in error and error.count("\n") == 1
    assert {path.name for path in tmp_path.iterdir()} == {"a.neg.h5", "scores.csv"}
    assert main(["inspect", str(table), "--max-similarity", "0.3"]) == 0
    assert "scores.csv" in capsys.readouterr().out
    other = Dataset.open(index_grefs(tmp_path / "other"))
    with pytest.raises(NemoError, match=r"Mine this one with: nemo-dali mine .* --scores scores\.csv -o"):
        NegativeTable.open(table).check_dataset(other)
    for more in (["--model", "x"], ["--embeddings", str(table)], ["--approximate"]):
        with pytest.raises(SystemExit, match="2"):
            main(["mine", str(dataset.path), "--scores", str(path), *more, "-o", str(tmp_path / "b.neg.h5")])
        assert "must be left out with --scores" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        main(["mine", str(dataset.path), "--scores", str(tmp_path / "x.npz"), "-o", str(tmp_path / "b.neg.h5")])


TEXT = "must have a sentence's id, a photo's id and a score in every line"
NO_NUMBER = "is not a finite number in 32 bits"
BAD_TEXT = {
    "words": ("a,b,c\n", TEXT),
    "two columns": ("1,2\n", TEXT),
    "a name": ("sent_id,image_id\n1,2\n", TEXT),
    "no integer": ("500,1.5,2\n", TEXT),
    "too large": (f"{10**30},1,2\n", TEXT),
    "long": ("1," + " " * 5000 + "2,3\n", TEXT),
    "bytes": (b"\xff\xfe\x00", TEXT),
    "quote": ('"1,2,3\n', TEXT),
    "nan": ("500,1,nan\n", NO_NUMBER),
    "inf": ("500,1,1e39\n", NO_NUMBER),
    "nothing": ("", "None of the 0 scores"),
    "only names": ("sent_id,image_id,score\n", "None of the 0 scores"),
}


@pytest.mark.parametrize("what", BAD_TEXT)
def test_bad_text_is_told(dataset, tmp_path, what):
    content, told = BAD_TEXT[what]
    (tmp_path / "a.csv").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(NemoError, match=told):
        mine_scores(dataset.path, tmp_path / "a.csv", output=tmp_path / "a.neg.h5")
    assert [path.name for path in tmp_path.iterdir()] == ["a.csv"]


BAD_COLUMNS = {
    "a column less": ({"sent_id": [1], "image_id": [2]}, "has no column score, so it is not a file of scores"),
    "null": ({"sent_id": [1, None], "image_id": [2, 3], "score": [0.5, 0.5]}, "without nulls"),
    "null score": ({"sent_id": [1], "image_id": [2], "score": pa.array([None], pa.float32())}, NO_NUMBER),
    "floats": ({"sent_id": [1.0], "image_id": [2], "score": [0.5]}, "integers in its columns"),
    "text": ({"sent_id": [1], "image_id": ["2"], "score": [0.5]}, "integers in its columns"),
}


@pytest.mark.parametrize("what", [*BAD_COLUMNS, "cut short", "nothing"])
def test_bad_parquet_is_told(dataset, tmp_path, what):
    columns, told = BAD_COLUMNS.get(
        what, ({"sent_id": [1], "image_id": [2], "score": [0.5]}, "cannot be read as Parquet")
    )
    path = tmp_path / "a.parquet"
    parquet.write_table(pa.table(columns), path)
    if what not in BAD_COLUMNS:
        path.write_bytes(path.read_bytes()[:-30] if what == "cut short" else b"")
    with pytest.raises(NemoError, match=told):
        mine_scores(dataset.path, path, output=tmp_path / "a.neg.h5")


BAD_VALUES = {
    "list": ([[(1, 0.5)]], "is not a dict of sentence ids"),
    "float id": ([{1.5: [(1, 0.5)]}], "is not a dict of sentence ids, with lists"),
    "tuple": ([{1: (1, 0.5)}], "is not a dict of sentence ids, with lists"),
    "triple": ([{1: [(1, 0.5, 2)]}], "not a pair of a photo's id and a score"),
    "text": ([{1: [("a", 0.5)]}], "not a pair of a photo's id and a score"),
    "bool": ([{1: [(True, 0.5)]}], "not a pair of a photo's id and a score"),
    "large": ([{1: [(10**30, 0.5)]}], "an id of more than 64 bits"),
    "NumPy's": ([{1: [(1, np.float32(0.5))]}], "wants"),
    "pyarrow's": ([b"\xff\xff\xff\xff\xf0"], "is not pickled: pyarrow's own format"),
}


@pytest.mark.parametrize("what", BAD_VALUES)
def test_bad_lmdbs_are_told(dataset, tmp_path, what):
    values, told = BAD_VALUES[what]
    write_lmdb(tmp_path / "a.lmdb", values)
    with pytest.raises(NemoError, match=told):
        mine_scores(dataset.path, tmp_path / "a.lmdb", output=tmp_path / "a.neg.h5")


def test_an_lmdb_of_something_else_is_told(dataset, tmp_path):
    with lmdb.open(str(tmp_path / "a.lmdb"), subdir=False) as database, database.begin(write=True) as transaction:
        transaction.put(b"x", b"y")
    with pytest.raises(NemoError, match=r"'__keys__' of .* is missing, so it is no LMDB of scores"):
        mine_scores(dataset.path, tmp_path / "a.lmdb", output=tmp_path / "a.neg.h5")
    with pytest.raises(NemoError, match="cannot be read"):
        mine_scores(dataset.path, tmp_path / "nowhere.lmdb", output=tmp_path / "a.neg.h5")


@pytest.mark.parametrize("depth", [1, 1000])
def test_two_scores_of_one_pair_are_refused(dataset, tmp_path, depth):
    sent_id, image_id = int(dataset.sentences.sent_id[3]), int(dataset.images.id[4])
    lines = [f"{sent_id},{image_id},{score}\n" for score in (0.5, 0.25)]
    (tmp_path / "a.csv").write_text("".join(lines))
    with pytest.raises(NemoError, match=f"two scores for sentence {sent_id} and photo {image_id}. Leave one out"):
        mine_scores(dataset.path, tmp_path / "a.csv", output=tmp_path / "a.neg.h5", depth=depth)


def test_scores_of_another_data_set_are_told_and_nothing_is_written(dataset, tmp_path):
    path = write(tmp_path, "csv", [(10**12, 1, 0.5), (1, 10**12, 0.5)])
    with pytest.raises(
        NemoError, match=r"None of the 2 scores .* 2 are of none of its sentences or photos. Check that"
    ):
        mine_scores(dataset.path, path, output=tmp_path / "a.neg.h5")
    assert [path.name for path in tmp_path.iterdir()] == ["scores.csv"]


def test_sentences_with_one_id_share_its_scores_and_those_without_are_counted(dataset, tmp_path):
    """gRefCOCO has refs twice; CRIS's LMDBs have no ids."""

    def edit(parts):
        parts.arrays["sentences/sent_id"][:] = parts.arrays["sentences/sent_id"] // 3 * 3

    opened = Dataset.open(forge(dataset.path, edit, tmp_path / "shared.ris.h5"))
    distinct = dict.fromkeys((a // 3 * 3, b) for a, b, _ in pairs_of(dataset))
    pairs = [(a, b, float(np.float32(i / len(distinct)))) for i, (a, b) in enumerate(distinct)]
    mine_scores(opened.path, write(tmp_path, "csv", pairs), output=tmp_path / "a.neg.h5")
    assert rows(NegativeTable.open(tmp_path / "a.neg.h5")) == expected_rows(opened, pairs, 99)

    def forget(parts):
        parts.arrays["sentences/sent_id"][:] = -1

    assert sentence_ids(Dataset.open(forge(dataset.path, forget, tmp_path / "none.ris.h5")))[:3].tolist() == [0, 1, 2]

    def one(parts):
        parts.arrays["sentences/sent_id"][:] = 7

    forge(dataset.path, one, tmp_path / "one.ris.h5")
    with pytest.raises(NemoError, match=r"sentences of .* have one id, so their scores cannot be told apart"):
        mine_scores(tmp_path / "one.ris.h5", tmp_path / "scores.csv", output=tmp_path / "b.neg.h5")


def test_without_pyarrow_its_command_is_told(dataset, tmp_path, monkeypatch):
    path = write(tmp_path, "parquet", pairs_of(dataset))
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(NemoError, match=r"pip install 'nemo-dali\[parquet\]'"):
        mine_scores(dataset.path, path, output=tmp_path / "a.neg.h5")


def test_a_table_of_scores_is_one_of_a_model_with_the_same_scores(tmp_path, clip):
    """The same rows, as a model's own similarities come back by Parquet."""
    opened = Dataset.open(make_noise(tmp_path))
    weights = {"model": str(clip[0] / "tiny.json"), "pretrained": str(clip[0] / "tiny.pt"), "device": "cpu"}
    mine(opened.path, output=tmp_path / "a.neg.h5", **weights)
    table = NegativeTable.open(tmp_path / "a.neg.h5")
    sentences, places = np.nonzero(table.neighbors >= 0)
    columns = {
        "sent_id": opened.sentences.sent_id[sentences],
        "image_id": opened.images.id[table.neighbors[sentences, places]],
        "score": table.similarity[sentences, places],
    }
    parquet.write_table(pa.table(columns), tmp_path / "scores.parquet")
    mine_scores(opened.path, tmp_path / "scores.parquet", output=tmp_path / "b.neg.h5")
    again = NegativeTable.open(tmp_path / "b.neg.h5")
    np.testing.assert_array_equal(again.neighbors, table.neighbors)
    np.testing.assert_array_equal(again.similarity, table.similarity)


@pytest.mark.slow
@pytest.mark.process
def test_under_torchrun_one_rank_does_the_work_and_a_fault_is_told_once(dataset, tmp_path):
    pairs = pairs_of(dataset)
    mine_scores(dataset.path, write(tmp_path, "csv", pairs), output=tmp_path / "one.neg.h5")
    (tmp_path / "bad.csv").write_text("a,b,c\n")
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    for scores_file, code in (("scores.csv", 0), ("bad.csv", 1)):
        mining = ["-m", "nemo_dali.mining", str(dataset.path), "--scores", str(tmp_path / scores_file)]
        run = subprocess.run(
            [*words, *mining, "-o", str(tmp_path / "two.neg.h5")], cwd=ROOT, capture_output=True, text=True, timeout=300
        )
        assert run.returncode == code, run.stderr
        told = (run.stdout + run.stderr).count("13 negatives" if code == 0 else TEXT)
        assert told == 1, run.stderr
    assert (tmp_path / "two.neg.h5").read_bytes() == (tmp_path / "one.neg.h5").read_bytes()
