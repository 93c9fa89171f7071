"""Pickles made to crash, to hang or to take memory ▸ one sentence, soon; none that a publisher wrote is refused."""

import itertools
import pickle
import random
import struct
from collections.abc import Sequence
from pathlib import Path

import pytest

from nemo_dali.data.annotations._untrusted import read_bytes
from nemo_dali.errors import AnnotationError
from nemo_dali.io import unpickle
from nemo_dali.io.unpickle import unpickle_builtins
from tests.helpers.bounds import fuzz, mutate_bytes, outcome
from tests.helpers.counts import examples
from tests.helpers.lanes import lanes

LARGE = 4_000_000  # bytes; RefCOCO's have five times as many
MEMORY = 250 << 20  # for a file as large


def read(path: Path) -> object:
    return unpickle_builtins(read_bytes(path), path)


def refs(count: int, *, tokens: int = 4, sentences: int = 3) -> list[dict[str, object]]:
    """Refs as RefCOCO has them, with no value twice, or with hardly any."""
    number = itertools.count()

    def word() -> str:
        return f"word{next(number)}"

    return [
        {
            "sent_ids": [3 * row + i for i in range(sentences)],
            "file_name": f"COCO_train2014_{row:012d}_{row}.jpg",
            "ann_id": row,
            "ref_id": row,
            "image_id": row,
            "split": "train",
            "sentences": [
                {"tokens": [word() for _ in range(tokens)], "raw": word(), "sent_id": 3 * row + i, "sent": word()}
                for i in range(sentences)
            ],
            "category_id": row % 90,
        }
        for row in range(count)
    ]


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize(("tokens", "sentences"), [(4, 3), (0, 1), (30, 1), (2, 12)])
def test_refs_are_far_from_every_bound(
    monkeypatch: pytest.MonkeyPatch, protocol: int, tokens: int, sentences: int
) -> None:
    value = refs(1000, tokens=tokens, sentences=sentences)
    for name, share in (("CONTAINERS_PER_BYTE", 2 / 3), ("STEPS_PER_BYTE", 3 / 4), ("BYTES_PER_BYTE", 1 / 3)):
        monkeypatch.setattr(unpickle, name, share * getattr(unpickle, name))
    for name in ("FREE_CONTAINERS", "FREE_STEPS", "FREE_BYTES"):
        monkeypatch.setattr(unpickle, name, 0)
    assert unpickle_builtins(pickle.dumps(value, protocol), "refs.p") == value


def text(length: int, letter: bytes = b"a") -> bytes:
    return b"X" + struct.pack("<I", length) + length * letter


def many(step: bytes, *, size: int = LARGE) -> bytes:
    """A list of what the step makes, or nothing, over and over."""
    return b"\x80\x04](" + step * (size // len(step)) + b"e."


KEY, DEEP, CONTAINERS = "as the key of a dict or in a set", "nests values more than 32 deep", "has more containers"
STEPS, REPEATS, DAMAGED, LONG = (
    "has more steps",
    "repeats its values",
    "not a pickle, or is damaged",
    "than 1000 characters",
)
# Made when they are tried, as many are large.
doubled = b"N" + b"2\x86" * 40
collisions = b"".join(pickle.dumps(i * (2**61 - 1), 2)[2:-1] + b"N" for i in range(1, 10_000))
HOSTILE = {
    # what is hashed
    "doubled key": (lambda: b"}" + doubled + b"Ns.", KEY),
    "doubled keys": (lambda: b"}(" + doubled + b"Nu.", KEY),
    "doubled in DICT": (lambda: b"(" + doubled + b"Nd.", KEY),
    "doubled item": (lambda: b"\x8f(" + doubled + b"\x90.", KEY),
    "doubled in FROZENSET": (lambda: b"(" + doubled + b"\x91.", KEY),
    "doubled in set()": (lambda: b"cbuiltins\nset\n]" + doubled + b"a\x85R.", KEY),
    "doubled in frozenset()": (lambda: b"cbuiltins\nfrozenset\n(" + doubled + b"t\x85R.", KEY),
    "doubled by the memo": (lambda: b"}N" + b"".join(b"q%ch%c\x86" % (i, i) for i in range(40)) + b"Ns.", KEY),
    "doubled in set.__new__": (lambda: b"cbuiltins\nfrozenset\n]" + doubled + b"a\x85\x81.", DAMAGED),
    "deep key": (lambda: b"}N" + 90_000 * b"\x85" + b"Ns.", KEY),
    "very deep key": (lambda: b"}N" + 1_000_000 * b"\x85" + b"Ns.", CONTAINERS),
    "frozenset as key": (lambda: b"}(\x91Ns.", KEY),
    "colliding keys": (lambda: b"}(" + collisions + b"u.", "has numbers among more than 100"),
    "colliding keys one by one": (
        lambda: b"}" + b"".join(pickle.dumps(float(i), 2)[2:-1] + b"Ns" for i in range(200)) + b".",
        "has numbers among more than 100"),
    "equal long keys": (
        lambda: text(LARGE // 4) + b"q\0" + text(LARGE // 4) + b"q\1}" + b"h\0Nsh\1Ns" * 200_000 + b".", LONG),
    # depth and cycles
    "a list in itself": (lambda: b"]q\0h\0a.", DEEP),
    "a dict in itself": (lambda: b"}q\0K\0h\0s.", DEEP),
    "deep tuples": (lambda: b"N" + 90_000 * b"\x85" + b".", DEEP),
    "deep lists": (lambda: 90_000 * b"]" + 89_999 * b"a" + b".", DEEP),
    "deep marks": (lambda: LARGE * b"(", DEEP),
    "doubled lists": (lambda: b"]" + 60 * b"q\0]h\0ah\0a" + b".", REPEATS),
    "wide and doubled": (lambda: b"](" + 1000 * b"N" + b"e" + 20 * (b"q\0](" + 9 * b"h\0" + b"e") + b".", REPEATS),
    # memory and time
    "sets": (lambda: many(b"\x8f"), CONTAINERS),
    "dicts": (lambda: many(b"}"), CONTAINERS),
    "lists": (lambda: many(b"]"), CONTAINERS),
    "LISTs": (lambda: many(b"(l"), CONTAINERS),
    "tuples": (lambda: many(b"N\x85"), CONTAINERS),
    "dicts of one": (lambda: many(b"}K\0Ns"), CONTAINERS),
    "memo": (lambda: b"N" + LARGE * b"\x94" + b".", STEPS),
    "nothing": (lambda: many(b"N"), STEPS),
    "marks": (lambda: many(b"(1"), STEPS),
    "popped": (lambda: many(b"N0"), STEPS),
    "sets of one list": (lambda:
        b"\x80\x04cbuiltins\nset\n\x94](" + b"".join(b"K%c" % i for i in range(90)) + b"e\x85\x94]("
        + 400_000 * b"h\0h\1R" + b"e.", CONTAINERS),
    "bytes of one text": (lambda:
        b"c_codecs\nencode\nq\0" + text(LARGE // 2) + text(6).replace(b"aaaaaa", b"latin1") + b"\x86q\1]("
        + 400_000 * b"h\0h\1R" + b"e.", CONTAINERS),
    "one text": (lambda: text(LARGE // 2) + b"q\0](" + 1_000_000 * b"h\0" + b"e.", REPEATS),
    "memo index": (lambda: b"]r" + struct.pack("<I", 2**31) + b".", DAMAGED),
    "negative memo index": (lambda: b"]q\0g-1\n.", DAMAGED),
    "nothing put there": (lambda: b"]q\1h\0.", DAMAGED),
    # numbers and names
    "LONG4": (lambda: b"\x8b" + struct.pack("<i", LARGE) + LARGE * b"\x7f" + b".", DAMAGED),
    "INT": (lambda: b"I" + LARGE * b"9" + b"\n.", DAMAGED),
    "INT in hexadecimal": (lambda: b"I0x" + LARGE * b"f" + b"\n.", DAMAGED),
    "LONG": (lambda: b"L" + LARGE * b"9" + b"L\n.", DAMAGED),
    "FLOAT": (lambda: b"F" + LARGE * b"9" + b"\n.", DAMAGED),
    "GLOBAL": (lambda: b"c" + LARGE * b"x" + b"\nx\n.", DAMAGED),
    "escape": (lambda: b"c\x1b[31mred\nx\n.", r"wants to use '\x1b[31mred.x'"),
    "long name": (lambda: b"\x80\x04" + text(LARGE // 2) + text(9) + b"\x93.", "wants to use 'aaa"),
    # what is no container
    "items of a list": (lambda: b"]K\0Ns.", DAMAGED),
    "items of a class": (lambda: b"cbuiltins\nset\n(Nl\x90.", DAMAGED),
    "append to a dict": (lambda: b"}Na.", DAMAGED),
    "append to a class": (lambda: b"cbuiltins\nset\n(Ne.", DAMAGED),
    "call of a list": (lambda: b"])R.", DAMAGED),
    "a dict as arguments": (lambda: b"cbuiltins\nset\n}R.", DAMAGED),
}  # fmt: skip


SLOW = {"dicts", "lists", "LISTs", "tuples", "dicts of one", "memo", "nothing", "marks", "popped", "very deep key"}


@pytest.mark.parametrize("name", lanes(HOSTILE, fast=set(HOSTILE) - SLOW))
def test_hostile_pickles_are_refused_within_bounds(tmp_path: Path, name: str) -> None:
    make, reason = HOSTILE[name]
    (tmp_path / "x.p").write_bytes(make())
    sentence = outcome(read, tmp_path / "x.p", memory=MEMORY)
    assert sentence.startswith(str(tmp_path / "x.p")) and reason in sentence


@pytest.mark.slow
def test_a_large_file_that_is_not_refused_stays_within_bounds(tmp_path: Path) -> None:
    for step in (b"}K\0Ns" + b"\x8c\2\xc4\x80" * 4, b"\x8c\2\xc4\x80", b"\x8a\2\xff\0", b"I9\n", b"C\2ab\x94"):
        (tmp_path / "x.p").write_bytes(many(step))
        assert outcome(read, tmp_path / "x.p", memory=MEMORY) == "None", step


def test_few_numbers_may_be_keys_or_those_that_count() -> None:
    value = [{i: None for i in range(100)}, set(range(100)), {None: 1, True: 2, 1.5: 3, b"x": 4, "y": 5}]
    assert unpickle_builtins(pickle.dumps(value), "x.p") == value
    counted = [dict.fromkeys(range(5000)), set(range(5000))]
    assert unpickle_builtins(pickle.dumps(counted), "x.p") == counted
    for value in (dict.fromkeys(range(1000, 1101)), {*map(str, range(100)), 1.5}, {*range(101), -1}):
        with pytest.raises(AnnotationError, match="numbers among more than 100"):
            unpickle_builtins(pickle.dumps(value), "x.p")


PIECES = [
    *(bytes([code]) for code in range(256)),
    *(b"h\0", b"h\1", b"j\5\0\0\0", b"q\0", b"\x94", b"2", b"(", b"\x85", b"\x86", b"\x87", b"]", b"}", b"\x8f", b")"),
    *(b"K\5", b"M\0\1", b"I5\n", b"L5L\n", b"F1e999\n", b"G\x7f\xf8\0\0\0\0\0\0", b"\x8a\x02\xff\xff", b"S'a'\n"),
    *(b"g0\n", b"\x8c\1x", b"U\1x"),
    *(b"cbuiltins\nset\n", b"cbuiltins\nfrozenset\n", b"cbuiltins\nbytes\n", b"c_codecs\nencode\n"),
    *(b"2\x86", b"h\0a", b"h\0h\0\x86", b"Ns", b"(NNu", b"(N\x90", b"(N\x91", b"]N\x85aR", b")R", b"\x85R", b"\x81"),
]  # fmt: skip


def mutate(random: random.Random, seeds: Sequence[bytes]) -> bytes:
    return mutate_bytes(random, seeds, pieces=PIECES)


@pytest.mark.fuzz
def test_any_pickle_is_read_or_refused(tmp_path: Path) -> None:
    sound = [*refs(3), {"a": {1, 2}, "b": frozenset({"x"}), "c": (1.5, None, True, 2**70, b"x" * 300, "ü")}]
    seeds = [pickle.dumps(sound, protocol) for protocol in range(6)]
    seeds += [data for make, _ in HOSTILE.values() if len(data := make()) < 2000] * 2
    readable = fuzz(read, seeds, mutate, tmp_path / "x.p", examples(5000))
    assert readable > examples(5000) // 50  # not every input ends at its first byte
