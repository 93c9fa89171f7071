"""Tokens of BERT and CLIP against independent tokenizers, and the vocabularies that are refused."""

import collections
import hashlib
import json
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

from nemo_dali.errors import NemoError
from nemo_dali.text import tokenize, wordpiece
from tests.helpers.independent_tokenizers import bert_row, bert_vocabulary, bert_words, clip_row
from tests.helpers.paths import ROOT

AWKWARD = [
    "left man",
    "",
    "   ",
    "?!",
    "- - ' .",
    "Man in the RED shirt",
    "a café with naïve über-waiters, señor",
    "man 🙂 with 🐶 on left ☂",
    "漢字 sign and日本 text",
    "the \u201cright\u201d one \u2014 the dog\u2019s \u2018ball\u2019…",
    '"quoted" zebra \'s left',
    "fish &amp; chips &lt;b&gt; &amp;amp; &quot;x&quot;",
    " ".join(f"word{n}" for n in range(37)),
    "\x07bell\x1b[31m red\u200bzero\u200dwidth\ufeff",
    "tab\tand\nline  feed\r\n   spaces\u00a0nbsp\u3000wide",
    "black-and-white dog, half-eaten hot-dog---",
    "12345 6th 2nd 3.5 #1 50% 10:30",
    "the dog's ball, it's they're I'd don't o'clock",
    "supercalifragilistic" * 6,
    "quick queue equip qq",
    "!@!@!@ a_b <b> [brackets] {x} a&b & c",
    "ﬁligree ﬂower ½ ² Ω æ ß ø",
    "<|startoftext|> hi",
]
COMMON = "the left right man woman dog shirt with and white black quick word zebra spaces in on of bell red quoted cafe"


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory):
    path = tmp_path_factory.mktemp("bert") / "vocab.txt"
    path.write_text("\n".join([*bert_vocabulary(COMMON.split()), "漢", "日", "\u2028", "…", "ω"]) + "\n", "utf-8")
    return path


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("NEMO_DALI_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def ids_of(path):
    with open(path, encoding="utf-8") as file:
        return {line.rstrip("\n"): row for row, line in enumerate(file)}


def check(made, rows):
    tokens, lengths = made
    assert tokens.dtype == lengths.dtype == np.int32
    np.testing.assert_array_equal(tokens, [row for row, _ in rows])
    assert lengths.tolist() == [length for _, length in rows]


@pytest.mark.parametrize("keep_end", [True, False])
@pytest.mark.parametrize("length", [None, 20, 5, 60])
def test_berts_tokens(vocabulary, length, keep_end):
    ids = ids_of(vocabulary)
    rows = [bert_row(sentence, ids, length or 20, keep_end) for sentence in AWKWARD]
    check(tokenize(AWKWARD, tokenizer=f"bert:{vocabulary}", context_length=length, keep_end=keep_end), rows)
    assert any(ids["[UNK]"] in row for row, _ in rows)
    assert any(row[n - 1] != ids["[SEP]"] for row, n in rows) == (not keep_end)


@pytest.mark.parametrize("keep_end", [True, False])
@pytest.mark.parametrize("length", [17, 22, 77])
def test_clips_tokens(length, keep_end):
    rows = [clip_row(sentence, length, keep_end) for sentence in AWKWARD[:-1]]
    check(tokenize(AWKWARD[:-1], context_length=length, keep_end=keep_end), rows)


def test_text_that_names_clips_own_tokens_is_text():
    """The one difference found: the repositories' tokenizer has other names for them than open_clip's."""
    row, length = clip_row(AWKWARD[-1], 20)
    tokens, lengths = tokenize(AWKWARD[-1:], context_length=20)
    assert lengths[0] > length and row[1] == row[0] == tokens[0, 0] != tokens[0, 1]


@pytest.fixture(scope="module")
def real_sentences():
    """Those of JSON files ([{"sents": "..."}, ...]) in a folder that the environment names."""
    folder = os.environ.get("NEMO_DALI_TEST_SENTENCES")
    if not folder:
        pytest.skip("NEMO_DALI_TEST_SENTENCES names no folder of sentences")
    found = [entry["sents"] for path in sorted(Path(folder).glob("*.json")) for entry in json.loads(path.read_text())]
    assert found
    return found


def test_real_sentences(real_sentences, tmp_path):
    count = collections.Counter(word for sentence in real_sentences for word in bert_words(sentence))
    path = tmp_path / "vocab.txt"
    path.write_text("\n".join(bert_vocabulary([word for word, _ in count.most_common(1500)])), "utf-8")
    ids = ids_of(path)
    made = tokenize(real_sentences, tokenizer=f"bert:{path}", keep_end=False)
    check(made, [bert_row(sentence, ids, 20, keep_end=False) for sentence in real_sentences])
    check(tokenize(real_sentences, context_length=17), [clip_row(sentence, 17) for sentence in real_sentences])


def test_where_a_vocabulary_is_looked_for(vocabulary, tmp_path, monkeypatch):
    expected = tokenize(AWKWARD, tokenizer=f"bert:{vocabulary}")[0]
    json_file = tmp_path / "tokenizer.json"
    json_file.write_text(json.dumps({"model": {"type": "WordPiece", "vocab": ids_of(vocabulary)}}))
    asked = []

    def download(name, file):
        asked.append((name, file))
        if file == "vocab.txt":
            raise EntryNotFoundError("404")
        return str(json_file)

    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda name, file: None)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    for name in (vocabulary.parent, json_file, tmp_path, "someone/bert"):
        np.testing.assert_array_equal(tokenize(AWKWARD, tokenizer=f"bert:{name}")[0], expected)
    assert asked == [("someone/bert", "vocab.txt"), ("someone/bert", "tokenizer.json")]
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda name, file: str(vocabulary))
    np.testing.assert_array_equal(tokenize(AWKWARD, tokenizer="bert:bert-base-uncased")[0], expected)
    assert len(asked) == 2
    (tmp_path / "windows.txt").write_bytes(vocabulary.read_bytes().replace(b"\n", b"\r\n"))
    np.testing.assert_array_equal(tokenize(AWKWARD, tokenizer=f"bert:{tmp_path}/windows.txt")[0], expected)


def test_the_tokens_are_kept_by_what_they_depend_on(vocabulary, cache, tmp_path, monkeypatch):
    def made(path=vocabulary, **options):
        before = set(cache.glob("*"))
        tokens = tokenize(AWKWARD, tokenizer=f"bert:{path}", fingerprint="f", **options)[0]
        return tokens, len(set(cache.glob("*")) - before)

    first, new = made()
    assert new == 1
    moved = tmp_path / "moved.txt"
    moved.write_bytes(vocabulary.read_bytes())
    monkeypatch.setattr(wordpiece, "WordPiece", None)  # a hit makes no tokenizer
    for options in ({}, {"context_length": 20}, {"path": moved}):
        again, new = made(**options)
        assert new == 0
        np.testing.assert_array_equal(again, first)
    monkeypatch.undo()
    monkeypatch.setenv("NEMO_DALI_CACHE", str(cache))
    assert made(keep_end=False)[1] == made(context_length=21)[1] == 1
    moved.write_bytes(vocabulary.read_bytes() + b"zzz\n")
    assert made(path=moved)[1] == 1
    monkeypatch.setattr("nemo_dali.text.tokens.version", lambda name: "99")
    assert made()[1] == 1


def test_the_name_of_clips_tokens_has_not_changed(cache):
    tokenize(["a"], fingerprint="f")
    parts = [4, "clip", version("open_clip_torch"), None, "f"]
    assert [path.name for path in cache.iterdir()] == [
        f"tokens-{hashlib.sha256(repr(parts).encode()).hexdigest()}.cache"
    ]
    tokenize(["a"], fingerprint="f", keep_end=False)
    assert len(list(cache.iterdir())) == 2


def test_a_hit_imports_no_tokenizer(vocabulary, cache):
    tokenize(["a", "b"], tokenizer=f"bert:{vocabulary}", fingerprint="f")
    code = (
        "import sys, nemo_dali.text\n"
        f"nemo_dali.text.tokenize(['', ''], tokenizer={f'bert:{vocabulary}'!r}, fingerprint='f')\n"
        "assert not {'tokenizers', 'huggingface_hub', 'open_clip', 'torch'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, env=os.environ)
    assert len(list(cache.iterdir())) == 1


def change(tokens, **replaced):
    return "\n".join(replaced.get(token.strip("[]"), token) for token in tokens)


TOKENS = bert_vocabulary(["man"])
IDS = {token: row for row, token in enumerate(TOKENS)}


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("vocab.txt", change(TOKENS, CLS="x1", SEP="x2"), r"lacks \[CLS\], \[SEP\].*bert-base-uncased"),
        ("vocab.txt", change(TOKENS, UNK="x1"), r"lacks \[UNK\]"),
        ("vocab.txt", "", r"lacks \[PAD\]"),
        ("vocab.txt", "\n".join(TOKENS[1:] + TOKENS[:1]), r"\[PAD\] as token \d+, but batches are padded with 0; use"),
        ("vocab.txt", "\n".join([*TOKENS, "Man"]), r"cased model \(it has 'Man'\).*bert-base-uncased"),
        ("vocab.txt", b"\xff\xfe\x00", "not UTF-8"),
        ("tokenizer.json", "{", "not a Hugging Face tokenizer.json"),
        ("tokenizer.json", "[]", "not a Hugging Face tokenizer.json"),
        ("tokenizer.json", json.dumps({"model": {"vocab": {"a": -1}}}), "not a Hugging Face tokenizer.json"),
        ("tokenizer.json", json.dumps({"model": {"vocab": {"a": "b"}}}), "not a Hugging Face tokenizer.json"),
        ("tokenizer.json", json.dumps({"model": {"type": "BPE", "vocab": IDS}}), "of type BPE, not WordPiece"),
        (
            "tokenizer.json",
            json.dumps({"normalizer": {"lowercase": False}, "model": {"type": "WordPiece", "vocab": IDS}}),
            "cased model.*bert-base-uncased",
        ),
        ("other", "", "has neither vocab.txt nor tokenizer.json; download"),
    ],
)
def test_a_vocabulary_of_something_else(tmp_path, cache, name, content, message):
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(NemoError, match=message):
        tokenize(["a"], tokenizer=f"bert:{tmp_path}", fingerprint="f")
    assert not cache.exists()


def test_a_vocabulary_that_cannot_be_had(tmp_path, monkeypatch):
    for name in (tmp_path / "vocab.txt", "./nothing", "~/nothing/at/all", "vocab.json"):
        with pytest.raises(NemoError, match=r"There is no vocabulary '.*'; download vocab.txt of bert-base-uncased"):
            tokenize(["a"], tokenizer=f"bert:{name}")
    (tmp_path / "weights.bin").write_bytes(b"")
    for name in ("", tmp_path / "weights.bin"):
        with pytest.raises(ValueError, match=r"tokenizer \('bert:.*'\) must be 'bert:' and a vocab.txt"):
            tokenize(["a"], tokenizer=f"bert:{name}")
    with pytest.raises(
        NemoError, match="no vocabulary 'not a name!' on this machine, and the Hugging Face Hub gives none"
    ):
        tokenize(["a"], tokenizer="bert:not a name!")
    for error, told in [
        (LocalEntryNotFoundError("offline"), "Hub cannot be reached"),
        (EntryNotFoundError("404.\nmore"), r"Hub gives none \(404\)"),
        (OSError("broken"), r"Hub gives none \(broken\)"),
    ]:

        def fail(name, file, error=error):
            raise error

        monkeypatch.setattr(huggingface_hub, "hf_hub_download", fail)
        with pytest.raises(NemoError, match=f"{told}; download vocab.txt of bert") as raised:
            tokenize(["a"], tokenizer="bert:no-such/bert")
        assert "\n" not in str(raised.value)


def test_only_clip_and_bert_go_without_the_end(vocabulary):
    with pytest.raises(ValueError, match=r"keep_end \(False\) must be True"):
        tokenize(["a"], tokenizer=lambda strings: [[1]], keep_end=False)
    tokens, lengths = tokenize(["word " * 99], tokenizer="ViT-B-32", keep_end=False)
    assert lengths.tolist() == [77] and tokens[0, -1] != 49407
