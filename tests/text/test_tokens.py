import logging
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import open_clip
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nemo_dali.errors import NemoError
from nemo_dali.io import cache as cache_module
from nemo_dali.text import tokens as tokens_module
from nemo_dali.text.tokens import token_rows, tokenize
from tests.helpers.paths import ROOT

AWKWARD = [
    "left man",
    "",
    "   ",
    "Left\tMAN\n  on   grass",
    "the dog's ball, it's they're I'd",
    "café naïve — 漢字 🙂 Ω",
    "\u201ccurly\u201d ﬁ lig\u00adature é",
    "doesnâ€™t",  # mojibake that the tokenizer's cleaning mends
    "fish &amp; chips &lt;b&gt; &amp;amp;",
    "a&b & c",
    "!! ?!.. :-) #1 50% a/b x_y",
    "!@!@!@",
    "<start_of_text> hi <END_OF_TEXT> there",
    "word " * 200,
    "supercalifragilistic" * 30,
    "\x00\x07control\x1b[31m red",
    "12345 6th 2nd",
]


@pytest.fixture
def cache(tmp_path, monkeypatch):
    folder = tmp_path / "cache"
    monkeypatch.setenv("NEMO_DALI_CACHE", str(folder))
    return folder


@pytest.fixture(scope="module")
def clip():
    return open_clip.SimpleTokenizer()


def end_positions(tokens, clip):
    """Length of each row up to and including the last end token."""
    return [max(i for i, token in enumerate(row) if token == clip.eot_token_id) + 1 for row in tokens.tolist()]


@pytest.mark.parametrize("length", [None, 77, 20, 17, 3])
def test_tokens_are_open_clips(clip, length):
    tokens, lengths = tokenize(AWKWARD, context_length=length)
    assert tokens.dtype == lengths.dtype == np.int32
    np.testing.assert_array_equal(tokens, clip(AWKWARD, context_length=length).numpy())
    assert lengths.tolist() == end_positions(tokens, clip)


@settings(max_examples=10, deadline=None)
@given(st.lists(st.text(max_size=30) | st.text(st.characters(codec="ascii"), max_size=30), min_size=20, max_size=60))
def test_tokens_of_any_text_are_open_clips(sentences):
    np.testing.assert_array_equal(tokenize(sentences)[0], open_clip.tokenize(sentences).numpy())


def test_zero_is_a_token_and_not_only_padding(clip):
    tokens, lengths = tokenize(["!@!@!@ man", "man"])
    assert 0 in tokens[0, : lengths[0]]
    assert lengths.tolist() == end_positions(tokens, clip)


def test_repeated_sentences_keep_their_order():
    sentences = ["b", "a", "b", "c", "a"]
    tokens, _ = tokenize(sentences)
    np.testing.assert_array_equal(tokens, open_clip.tokenize(sentences).numpy())


def test_a_models_tokenizer_and_its_length():
    tokens, _ = tokenize(["left man"], tokenizer="ViT-B-32")
    np.testing.assert_array_equal(tokens, open_clip.get_tokenizer("ViT-B-32")(["left man"]).numpy())


def test_no_sentences(cache):
    for _ in range(2):
        tokens, lengths = tokenize([], context_length=20, fingerprint="f")
        assert tokens.shape == (0, 20) and lengths.shape == (0,)
    assert tokenize([], tokenizer=lambda strings: [[1]])[0].shape[0] == 0


def refuse(*args, **kwargs):
    raise AssertionError("the tokenizer was made again")


def test_cache_is_used(cache, monkeypatch):
    first = tokenize(AWKWARD, fingerprint="f")
    assert [path.suffix for path in cache.iterdir()] == [".cache"]
    monkeypatch.setattr(open_clip, "SimpleTokenizer", refuse)
    for was, now in zip(first, tokenize(AWKWARD, fingerprint="f"), strict=True):
        assert now.dtype == np.int32
        np.testing.assert_array_equal(was, now)
    for other in (
        dict(fingerprint="g"),
        dict(fingerprint="f", context_length=20),
        dict(fingerprint=None),
    ):
        with pytest.raises(AssertionError, match="made again"):
            tokenize(AWKWARD, **other)
    tokenize(AWKWARD, tokenizer="ViT-B-32", fingerprint="f")
    assert len(list(cache.iterdir())) == 2


def test_another_open_clip_has_another_cache(cache, monkeypatch):
    tokenize(["a"], fingerprint="f")
    monkeypatch.setattr(tokens_module, "version", lambda name: "99")
    tokenize(["a"], fingerprint="f")
    assert len(list(cache.iterdir())) == 2


def test_a_hit_needs_neither_sentences_nor_open_clip(cache):
    tokenize(["a man", "b"], fingerprint="f")
    code = (
        "import sys, nemo_dali.text\n"
        "class Unread(list):\n"
        "    def __len__(self): return 2\n"
        "    def __iter__(self): raise AssertionError\n"
        "tokens, lengths = nemo_dali.text.tokenize(Unread(), fingerprint='f')\n"
        "assert tokens.shape == (2, 77) and lengths.tolist() == [4, 3]\n"
        "assert not {'torch', 'open_clip'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, env=os.environ)


def packed(array):
    """A file of the cache that holds this array, its checksum right."""
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setenv("NEMO_DALI_CACHE", folder)
        cache_module.cached("a", array.dtype.type, array.shape, make=lambda: array, fits=lambda _: True)
        return (Path(folder) / "a.cache").read_bytes()


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: b"not an array",
        lambda content: content[:-7],
        lambda content: bytes(len(content)),
        lambda content: packed(np.zeros((3, 79), np.int32)),
        lambda content: packed(np.zeros((2, 40), np.int32)),
        lambda content: packed(np.zeros((2, 79), np.int64)),
        lambda content: packed(np.full((2, 79), 99, np.int32)),
        lambda content: packed(np.full((2, 79), -1, np.int32)),
    ],
    ids=["garbage", "short", "zeros", "rows", "columns", "dtype", "long", "negative"],
)
def test_a_damaged_cache_is_made_anew(cache, damage):
    good, lengths = (array.copy() for array in tokenize(["a", "b"], context_length=77, fingerprint="f"))
    (path,) = cache.iterdir()
    content = path.read_bytes()
    path.write_bytes(damage(content))
    tokens, again = tokenize(["a", "b"], context_length=77, fingerprint="f")
    np.testing.assert_array_equal(tokens, good)
    np.testing.assert_array_equal(again, lengths)
    assert path.read_bytes() == content
    assert list(cache.iterdir()) == [path]


def test_rows_of_the_cache_are_looked_at_when_they_are_used(cache, monkeypatch, caplog):
    """A start reads none of them; one that is damaged has all of them made anew, once and with one line."""
    sentences = [f"a man {i}" for i in range(500)]
    good, lengths = (array.copy() for array in tokenize(sentences, fingerprint="f"))
    (path,) = cache.iterdir()
    content = bytearray(path.read_bytes())
    content[-8:-4] = (5).to_bytes(4, "little")  # the last one's number of tokens
    path.write_bytes(content)
    monkeypatch.setattr(cache_module.xxhash, "xxh3_64_intdigest", refuse)
    with caplog.at_level(logging.INFO, "nemo_dali"):
        rows = token_rows(sentences, fingerprint="f")
        rows.check(np.arange(499))
        assert np.array_equal(rows.tokens[:499], good[:499]) and rows.lengths[499] == 5 and not caplog.records
        for _ in range(2):
            rows.check(np.array([3, 499]))
            assert np.array_equal(rows.tokens, good) and np.array_equal(rows.lengths, lengths)
    (record,) = caplog.records
    assert f"{path} is rebuilt: its checksum does not match." in record.getMessage()


@given(st.integers(0, 77), st.integers(1, 2**32 - 1))
def test_no_changed_number_of_a_row_goes_unnoticed(column, change):
    packed = np.arange(3 * 78, dtype=np.int32).reshape(3, 78)
    rows = np.arange(7, 10)
    sums = tokens_module._sums(packed, rows)
    packed.view(np.uint32)[1, column] ^= change
    assert (tokens_module._sums(packed, rows) != sums).tolist() == [False, True, False]
    assert tokens_module._sums(np.zeros((1, 78), np.int32), rows[:1]) != 0  # a page that was never written


def test_a_row_that_changed_places_does_not_pass(cache):
    good, lengths = tokenize(["a", "b c", "d e f"], fingerprint="f")
    (path,) = cache.iterdir()
    write_packed(path, read_packed(path)[[1, 0, 2]])
    rows = token_rows(["a", "b c", "d e f"], fingerprint="f")
    rows.check(np.array([1]))
    assert np.array_equal(rows.tokens, good) and np.array_equal(rows.lengths, lengths)


def test_a_width_that_is_not_the_tokens_own_is_seen_when_the_cache_is_opened(cache):
    good, _ = tokenize(["a man", "b"], fingerprint="f")
    (path,) = cache.iterdir()
    write_packed(path, np.ascontiguousarray(read_packed(path)[:, :22]))
    assert np.array_equal(token_rows(["a man", "b"], fingerprint="f").tokens, good)


def test_tokens_of_another_length_than_the_damaged_ones_are_not_put_in_their_place(cache, monkeypatch):
    tokenize(["a man", "b"], fingerprint="f")
    rows = token_rows(["a man", "b"], fingerprint="f")
    rows._packed = rows._packed.copy()
    rows._packed[1, 0] += 1
    made = rows._make()
    monkeypatch.setattr(rows, "_make", lambda: made[:, 3:])
    with pytest.raises(NemoError, match=r"makes 74 tokens a sentence where they had 77\. Make the Loader again"):
        rows.check(np.array([1]))


def read_packed(path):
    """The array of a file of the cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NEMO_DALI_CACHE", str(path.parent))
        return cache_module.cached(
            path.stem, np.int32, (None, None), make=lambda: refuse(), fits=lambda _: True, compare=False
        ).copy()


def write_packed(path, array):
    path.write_bytes(packed(array))


def test_an_unwritable_cache_is_told_once(tmp_path, monkeypatch, caplog):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("NEMO_DALI_CACHE", str(tmp_path / "file" / "cache"))
    with caplog.at_level(logging.INFO, "nemo_dali"):
        for fingerprint in "fgh":
            tokens, _ = tokenize(["a"], fingerprint=fingerprint)
    np.testing.assert_array_equal(tokens, open_clip.tokenize(["a"]).numpy())
    (record,) = caplog.records
    assert record.levelno == logging.INFO and "NEMO_DALI_CACHE" in record.getMessage()


def test_a_full_disk_leaves_nothing_behind(cache, monkeypatch):
    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    assert tokenize(["a"], fingerprint="f")[0].shape == (1, 77)
    assert list(cache.iterdir()) == []


def test_a_callable(cache):
    calls = []

    def words(strings):
        calls.append(strings)
        return np.array([[len(s), 0, 7, 0, 0] if s else [0] * 5 for s in strings])

    tokens, lengths = tokenize(["ab", "", "ab"], tokenizer=words, fingerprint="f")
    assert tokens.tolist() == [[2, 0, 7, 0, 0], [0] * 5, [2, 0, 7, 0, 0]]
    assert lengths.tolist() == [3, 0, 3]
    assert calls == [["ab", ""]]
    assert not cache.exists()


@pytest.mark.parametrize(
    "result, message",
    [
        (np.zeros((2, 5)), "must give integers"),
        (np.zeros((1, 5), int), r"must give integers \[2, L\]"),
        (np.zeros(2, int), "must give integers"),
        (np.zeros((2, 9), int), r"context_length \(5\) must be None or 9"),
    ],
)
def test_a_callable_that_gives_something_else(result, message):
    with pytest.raises(ValueError, match=message):
        tokenize(["a", "b"], tokenizer=lambda strings: result, context_length=5)


@pytest.mark.parametrize(
    "pad, end, rows, expected",
    [
        (0, 1, [[5, 0, 1, 0, 0], [1, 0, 0, 0, 0], [5, 5, 5, 5, 1]], [3, 1, 5]),
        (1, 1, [[5, 6, 1, 1, 1], [1, 1, 1, 1, 1], [5, 5, 5, 5, 1]], [3, 1, 5]),  # padded with the end token, as SigLIP
    ],
)
def test_lengths_with_another_padding(monkeypatch, pad, end, rows, expected):
    class OfHuggingFace:
        tokenizer = SimpleNamespace(pad_token_id=pad, eos_token_id=end)

        def __call__(self, strings):
            return np.array(rows)

    monkeypatch.setattr(open_clip, "get_tokenizer", lambda name, context_length: OfHuggingFace())
    tokens, lengths = tokenize(["a", "b", "c"], tokenizer="ViT-B-16-SigLIP")
    assert tokens.tolist() == rows and lengths.tolist() == expected


@pytest.mark.parametrize("name", ["ViT-B-23", "bert", "", "Clip"])
def test_an_unknown_tokenizer(name, cache):
    with pytest.raises(ValueError, match=r"tokenizer \('.*'\) must be 'clip', a model of open_clip") as raised:
        tokenize(["a"], tokenizer=name, fingerprint="f")
    assert "ViT-B-32" in str(raised.value) or "clip" in str(raised.value)
    assert not cache.exists()


def test_a_tokenizer_that_cannot_be_loaded(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"must be one that can be loaded: .*nowhere"):
        tokenize(["a"], tokenizer=f"local-dir:{tmp_path}/nowhere")

    def missing(name, context_length):
        raise ModuleNotFoundError("No module named 'transformers'", name="transformers")

    monkeypatch.setattr(open_clip, "get_tokenizer", missing)
    with pytest.raises(NemoError, match="pip install transformers"):
        tokenize(["a"], tokenizer="roberta-ViT-B-32")


@pytest.mark.parametrize("length", [0, 2, -1, 10**6])
def test_a_bad_context_length(length):
    with pytest.raises(ValueError, match=rf"context_length \({length}\) must be"):
        tokenize(["a"], context_length=length)
