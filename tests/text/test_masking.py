import sys
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest

from nemo_dali.errors import NemoError
from nemo_dali.text import masking
from nemo_dali.text.masking import MASK, SPECIAL, mask_nouns, mask_tokens, noun_runs

SEED, EPOCH = 2**63 + 5, 3
PLAN = {"seed": SEED, "epoch": EPOCH}


def random_words(position, count):
    key = np.array([SEED, EPOCH], np.uint64)  # a list of them would become float64, and lose bits
    return np.random.Philox(key=key, counter=[0, position, 1, 0]).random_raw(count).tolist()


def batch(rows, length=20, text=12):
    """Tokens int32 [rows, length]: [CLS], words, an [UNK], [SEP], padding; and positions."""
    tokens = np.zeros((rows, length), np.int32)
    tokens[:, :text] = np.random.default_rng(0).integers(1000, 30000, (rows, text))
    tokens[:, [0, 3, text - 1]] = 101, 100, 102
    return tokens, np.random.default_rng(1).permutation(rows) * 1000003


@pytest.mark.parametrize("share, masked, replaced", [(0.15, 0.8, 0.1), (1.0, 0.3, 0.7), (0.5, 0.0, 0.5)])
def test_masked_tokens_are_maskriss_by_philox(share, masked, replaced):
    tokens, positions = batch(40, length=21)
    expected = tokens.astype(np.int64)
    for row, position in zip(expected, positions.tolist(), strict=True):
        words = random_words(position, 42)
        for i, token in enumerate(row):
            drawn = (words[2 * i] >> 11) / 2**53
            if drawn < share and token not in SPECIAL:
                if drawn / share < masked:
                    row[i] = MASK
                elif drawn / share < masked + replaced:
                    row[i] = words[2 * i + 1] * 30522 >> 64
    options = dict(share=share, masked=masked, replaced=replaced)
    made = mask_tokens(tokens, **PLAN, positions=positions, **options)
    assert made.dtype == np.int64
    np.testing.assert_array_equal(made, expected)
    np.testing.assert_array_equal(tokens, batch(40, length=21)[0])  # the argument is not written to


def test_the_shares_are_those_of_maskris():
    tokens, positions = batch(20000)
    made = mask_tokens(tokens, **PLAN, positions=positions)
    words = ~np.isin(tokens, SPECIAL)
    np.testing.assert_array_equal(made[~words], tokens[~words])
    count = words.sum()
    for happened, probability in [
        (made[words] == MASK, 0.15 * 0.8),
        ((made[words] != tokens[words]) & (made[words] != MASK), 0.15 * 0.1),
    ]:
        assert abs(happened.mean() - probability) < 4 * np.sqrt(probability / count)
    other = made[words & (made != tokens) & (made != MASK)]
    assert other.min() < 300 and other.max() > 30200  # the whole vocabulary, special tokens included
    assert abs(other.mean() - 30522 / 2) < 4 * 30522 / np.sqrt(12 * len(other))


def test_a_sample_does_not_depend_on_its_batch():
    tokens, positions = batch(12)
    runs = np.tile(np.array([[1, 3], [4, 5], [6, 9]], np.int32), (12, 1, 1))
    lengths = np.full(12, 12)
    for mask in (mask_tokens, lambda t, r=slice(None), **k: mask_nouns(t, lengths[r], runs[r], **k)):
        whole = mask(tokens, **PLAN, positions=positions)
        for row in range(12):
            one = {"r": slice(row, row + 1)} if mask is not mask_tokens else {}
            alone = mask(tokens[row : row + 1], **one, **PLAN, positions=positions[row : row + 1])
            np.testing.assert_array_equal(alone[0], whole[row])
        for other in ({**PLAN, "seed": 1}, {**PLAN, "epoch": 4}):
            assert (mask(tokens, **other, positions=positions) != whole).any()


def test_other_vocabularies():
    tokens = np.array([[7, 1, 2, 3, 8, 9]])
    options = dict(share=1.0, masked=1.0, replaced=0.0, mask=9, special=(7, 8, 9))
    assert mask_tokens(tokens, **PLAN, positions=[5], **options).tolist() == [[7, 9, 9, 9, 8, 9]]
    options = dict(share=1.0, masked=0.0, replaced=1.0, special=(), vocabulary_size=1)
    assert mask_tokens(tokens, **PLAN, positions=[5], **options).tolist() == [[0] * 6]
    assert mask_tokens(tokens, **PLAN, positions=[5], share=0.0).tolist() == tokens.tolist()
    assert mask_tokens(tokens[:0], **PLAN, positions=[]).shape == (0, 6)


TAGS = {"man": "NN", "dogs": "NNS", "tank": "NN", "top": "NN", "hat": "NN", "anna": "NNP"}


def tagged_nouns(sentence):
    return [place for place, word in enumerate(sentence.lower().split(), 1) if TAGS.get(word, "X") in ("NN", "NNS")]


SENTENCES = [
    "man in tank top with dogs",
    "the one on left",
    "Anna",
    "hat",
    "man in tank top with dogs",
    "x " * 18 + "top hat",
]
RUNS = [
    [[1, 2], [3, 5], [6, 7]],
    [[0, 0]] * 3,
    [[0, 0]] * 3,
    [[1, 2], [0, 0], [0, 0]],
    [[1, 2], [3, 5], [6, 7]],
    [[19, 20], [0, 0], [0, 0]],  # DMMI looks at the first 19 words
]


def test_neighbouring_nouns_are_one_run():
    runs = noun_runs(SENTENCES, nouns=tagged_nouns)
    assert runs.dtype == np.int32 and runs.tolist() == RUNS
    assert noun_runs(SENTENCES, nouns=tagged_nouns, context_length=4)[0].tolist() == [[1, 2], [3, 4]]
    assert noun_runs([], nouns=tagged_nouns).shape == (0, 0, 2)
    assert noun_runs(["a"], nouns=tagged_nouns).shape == (1, 0, 2)


def test_masked_nouns_are_dmmis_by_philox():
    tokens, positions = batch(60)
    runs = np.array(RUNS * 10)
    lengths = np.full(60, 12)
    lengths[::7] = 2  # cut before the end of some runs
    expected = tokens.astype(np.int64)
    for row, position, found, length in zip(expected, positions.tolist(), runs.tolist(), lengths, strict=True):
        found = [run for run in found if run[1]]
        if found:
            begin, end = found[random_words(position, 8193)[8192] * len(found) >> 64]
            row[begin : min(end, length)] = 103
    made = mask_nouns(tokens, lengths, runs, **PLAN, positions=positions, mask=103)
    assert made.dtype == np.int64
    np.testing.assert_array_equal(made, expected)
    firsts = {
        int(np.flatnonzero(row != was)[0])
        for row, was in zip(made[::6], tokens[::6], strict=True)
        if (row != was).any()
    }
    assert firsts == {1, 3, 6}  # each run of the first sentence was drawn
    zeros = mask_nouns(tokens, lengths, runs, **PLAN, positions=positions)
    np.testing.assert_array_equal(zeros, np.where(expected == 103, 0, expected))
    assert mask_nouns(tokens, lengths, runs[:, :0], **PLAN, positions=positions).tolist() == tokens.tolist()


@pytest.fixture
def textblob(monkeypatch):
    """A stand-in with the interface of TextBlob 0.20, which counts how often it tags."""
    module, exceptions = ModuleType("textblob"), ModuleType("textblob.exceptions")
    exceptions.MissingCorpusError = type("MissingCorpusError", (Exception,), {})
    module.exceptions, module.calls = exceptions, []

    def blob(sentence):
        module.calls.append(sentence)
        if sentence == "no data":
            raise exceptions.MissingCorpusError
        return SimpleNamespace(tags=[(word, TAGS.get(word, "DT")) for word in sentence.split()])

    module.TextBlob = blob
    monkeypatch.setitem(sys.modules, "textblob", module)
    monkeypatch.setitem(sys.modules, "textblob.exceptions", exceptions)
    monkeypatch.setattr(masking, "version", lambda name: "1")
    return module


def test_textblobs_tags_are_kept(textblob, tmp_path, monkeypatch):
    monkeypatch.setenv("NEMO_DALI_CACHE", str(tmp_path / "cache"))
    assert noun_runs(SENTENCES).tolist() == RUNS
    assert textblob.calls == list(dict.fromkeys(sentence.lower() for sentence in SENTENCES))
    assert not (tmp_path / "cache").exists()
    noun_runs(SENTENCES, fingerprint="f")
    textblob.calls.clear()
    assert noun_runs(SENTENCES, fingerprint="f").tolist() == RUNS and textblob.calls == []
    for change in ({"fingerprint": "g"}, {"context_length": 21}):
        noun_runs(SENTENCES, **{"fingerprint": "f", **change})
        assert textblob.calls
        textblob.calls.clear()
    monkeypatch.setattr(masking, "version", lambda name: "2")
    noun_runs(SENTENCES, fingerprint="f")
    assert textblob.calls and len(list((tmp_path / "cache").iterdir())) == 4
    for path in (tmp_path / "cache").iterdir():
        path.write_bytes(b"damaged")
    assert noun_runs(SENTENCES, fingerprint="f").tolist() == RUNS
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("NEMO_DALI_CACHE", str(tmp_path / "file" / "cache"))
    assert noun_runs(SENTENCES, fingerprint="f").tolist() == RUNS


def test_textblob_or_its_data_is_missing(textblob, monkeypatch):
    with pytest.raises(NemoError, match=r"no data.*python -m textblob.download_corpora"):
        noun_runs(["no data"])
    monkeypatch.setitem(sys.modules, "textblob", None)
    for fingerprint in (None, "f"):
        with pytest.raises(NemoError, match=r"pip install 'nemo-dali\[nouns\]'"):
            noun_runs(["a"], fingerprint=fingerprint)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"tokens": np.zeros((2, 3))}, r"tokens \(float64 \[2, 3\]\) must be integers \[B, L\]"),
        ({"tokens": np.zeros(2, int)}, "must be integers"),
        ({"tokens": np.zeros((2, 4097), int)}, "L at most 4096"),
        ({"positions": [1]}, r"positions \(\[1\]\) must be \[2\]"),
        ({"seed": -1}, r"seed \(-1\) must be in"),
        ({"epoch": 2**64}, r"epoch \(18446744073709551616\) must be in"),
        ({"share": 1.5}, r"share \(1.5\) must be from 0 to 1"),
        ({"masked": -0.1}, r"masked \(-0.1\) must be"),
        ({"replaced": float("nan")}, r"replaced \(nan\) must be"),
        ({"masked": 0.8, "replaced": 0.3}, r"masked \+ replaced \(1.1\d*\) must be at most 1"),
        ({"vocabulary_size": 0}, r"vocabulary_size \(0\) must be"),
    ],
)
def test_arguments_of_mask_tokens(change, message):
    arguments = {"tokens": np.zeros((2, 3), int), "positions": [0, 1], "seed": 0, "epoch": 0, **change}
    with pytest.raises(ValueError, match=message):
        mask_tokens(arguments.pop("tokens"), **arguments)


def test_arguments_of_nouns():
    tokens, positions = batch(2)
    for lengths, runs, message in [
        ([1], np.zeros((2, 1, 2), int), r"lengths \(\[1\]\) must be \[2\]"),
        ([1, 1], np.zeros((2, 2), int), r"runs \(\[2, 2\]\) must be \[2, R, 2\]"),
        ([1, 1], np.zeros((3, 1, 2), int), "runs"),
    ]:
        with pytest.raises(ValueError, match=message):
            mask_nouns(tokens, lengths, runs, **PLAN, positions=positions)
    for places in ([0], [2, 2], [3, 1]):
        with pytest.raises(ValueError, match=r"nouns \(.*\) must give ascending places from 1 on"):
            noun_runs(["a"], nouns=lambda sentence, places=places: places)
    with pytest.raises(ValueError, match="must be 'textblob' or a callable"):
        noun_runs(["a"], nouns="spacy")
    with pytest.raises(ValueError, match=r"context_length \(2\) must be"):
        noun_runs(["a"], nouns=tagged_nouns, context_length=2)
