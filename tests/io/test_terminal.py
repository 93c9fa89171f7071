"""What reaches a terminal: nothing that it would obey."""

import io
import json
import logging
import os
import sys
import unicodedata

import pytest

from nemo_dali.io import terminal
from nemo_dali.io.progress import progress
from nemo_dali.io.terminal import Formatter, printable, say, say_json

PLAIN = "Straße 東京 اللغة e\u0301 \u00a0\u3000 🐈 a\\b <&>"
HOSTILE = {
    "\x1b[2J": "\\x1b[2J",
    "a\rb\nc\td": "a\\rb\\nc\\td",
    "\x7f\x9b31m": "\\x7f\\x9b31m",
    "\u202egnp.exe": "\\u202egnp.exe",
    "\u2066\u2069\u200b\ufeff\u00ad": "\\u2066\\u2069\\u200b\\ufeff\\xad",
    "\u2028\u2029\x85": "\\u2028\\u2029\\x85",
    "\U000e0041": "\\U000e0041",
    os.fsdecode(b"caf\xe9"): "caf\\xe9",
    "\ud800": "\\ud800",
}


def test_text_stays_and_what_a_terminal_obeys_does_not():
    assert printable(PLAIN) == PLAIN
    for text, shown in HOSTILE.items():
        assert printable(text) == shown and printable(f"ü{text}") == f"ü{shown}"


def test_no_character_that_orders_or_hides_is_let_through():
    for code in range(0x110000):
        if unicodedata.category(chr(code)) in ("Cc", "Cf", "Cs", "Zl", "Zp"):
            assert printable(chr(code)).isascii() and printable(chr(code)).isprintable()


def test_lines_are_lines(capsys):
    say("one\ntwo", "\x1b[0m")
    say("\u202e", error=True)
    out, err = capsys.readouterr()
    assert out == "one\\ntwo\n\\x1b[0m\n" and err == "\\u202e\n"


def test_json_is_ascii_and_says_the_same(capsys):
    value = {"\x9b": ["\u202e\x7f", os.fsdecode(b"\xff"), 1.5, None]}
    say_json(value)
    out = capsys.readouterr().out
    assert json.loads(out) == value
    assert all(line.isprintable() and line.isascii() for line in out.split("\n"))


def test_a_stream_that_knows_few_letters_gets_the_others_spelt(monkeypatch):
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, "ascii"))
    say("für")
    assert raw.getvalue() == b"f\\xfcr\n"


def test_a_record_is_shown_without_what_a_terminal_obeys():
    record = logging.LogRecord("nemo_dali", logging.WARNING, "x", 1, "%s is bad", ("\x1b[8m.jpg",), None)
    assert Formatter().format(record) == "\\x1b[8m.jpg is bad"
    try:
        raise ValueError("\x1b[8m")
    except ValueError:
        record.exc_info = sys.exc_info()
    lines = Formatter().format(record).split("\n")
    assert lines[-1] == "ValueError: \\x1b[8m" and len(lines) > 2


def test_where_nobody_reads_on_the_work_goes_on(monkeypatch):
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        for _ in range(3):
            say("x" * 100_000)
    monkeypatch.setattr(sys, "stdout", None)
    say("x")


def test_a_disk_that_is_full_is_told(monkeypatch):
    with pytest.raises(OSError, match="No space left"), open("/dev/full", "w") as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        say("x")


def test_progress_needs_no_stderr(monkeypatch):
    monkeypatch.setattr(sys, "stderr", None)
    monkeypatch.setattr("nemo_dali.io.progress.PLAIN_INTERVAL_S", 0.0)
    assert list(progress(range(3), total=3, what="counting", unit="one")) == [0, 1, 2]


def test_closed_streams_lead_nowhere(monkeypatch):
    kept = os.dup(0)
    try:
        os.close(0)
        terminal.open_closed_streams()
        assert os.readlink("/proc/self/fd/0") == os.devnull
    finally:
        os.dup2(kept, 0)
        os.close(kept)
