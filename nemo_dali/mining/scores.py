"""Rankings made elsewhere: scores for pairs of sentence and photo, read in pieces, whatever the file's size.

F.parquet, F.csv, F.tsv   columns sent_id, image_id and score, in any order of rows
F.lmdb                    what NeMo's dataloader.py reads: a value a ref, {sent_id: [(image_id, score), ...]}
"""

import csv
import os
import warnings
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import numpy as np
import numpy.typing as npt

from nemo_dali.data.annotations.cris_lmdb import is_lmdb
from nemo_dali.errors import NemoError
from nemo_dali.io.files import open_regular
from nemo_dali.io.lmdb import Lmdb
from nemo_dali.io.parquet import parquet_pieces
from nemo_dali.io.unpickle import unpickle_builtins

NAMES = ("sent_id", "image_id", "score")
ROWS = 1 << 20  # of a piece; 24 MB
LONGEST_LINE = 4096  # characters of a line, which holds three numbers and columns that are not read
MOST_KEYS = 100_000_000
DELIMITERS = {".csv": ",", ".tsv": "\t"}


class Scores(NamedTuple):
    """A piece of a file: columns of equal length, with the publisher's ids."""

    sent_id: npt.NDArray[np.int64]
    image_id: npt.NDArray[np.int64]
    score: npt.NDArray[np.float64]


def check_scores_path(path: Path) -> None:
    """Refuse a path whose name is not of a known kind.

    Raises:
        ValueError: naming the kinds.
    """
    if path.suffix.lower() not in (".parquet", *DELIMITERS) and not is_lmdb(path):
        raise ValueError(f"scores ({path}) must be a .parquet, .csv or .tsv file, or an LMDB called .lmdb")


def read_scores(path: Path) -> Iterator[Scores]:
    """The pieces of a file.

    Raises:
        ValueError: its name is not of a known kind.
        NemoError: it cannot be read, is damaged or hostile, or holds something else.
    """
    check_scores_path(path)
    try:
        if is_lmdb(path):
            yield from _of_lmdb(path)
        elif path.suffix.lower() == ".parquet":
            yield from _of_parquet(path)
        else:
            yield from _of_text(path, DELIMITERS[path.suffix.lower()])
    except OSError as error:
        raise NemoError(f"{path} cannot be read: {error.strerror}. Check the path.") from error


def _of_parquet(path: Path) -> Iterator[Scores]:
    for batch in parquet_pieces(path, NAMES, what="a file of scores", rows=ROWS):
        columns = [np.asarray(batch.column(name).to_numpy(zero_copy_only=False)) for name in NAMES]
        kinds = [column.dtype.kind for column in columns]  # nulls turn integers into floats
        if not (kinds[0] in "iu" and kinds[1] in "iu" and kinds[2] in "iuf"):
            raise NemoError(
                f"{path} must have integers in its columns sent_id and image_id and numbers in score, without nulls. "
                "Write it again."
            )
        yield Scores(columns[0].astype(np.int64), columns[1].astype(np.int64), columns[2].astype(np.float64))


def _of_text(path: Path, delimiter: str) -> Iterator[Scores]:
    kinds = np.dtype([("sent_id", "<i8"), ("image_id", "<i8"), ("score", "<f8")])
    with os.fdopen(open_regular(path), encoding="utf-8-sig", newline="") as file:
        read = 0
        try:
            columns = _columns(file, delimiter)
            lines = _lines(file)
            while True:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore", UserWarning)  # about lines without data, and about the end
                    rows = np.loadtxt(
                        lines,
                        kinds,
                        comments=None,
                        delimiter=delimiter,
                        usecols=columns,
                        ndmin=1,
                        max_rows=ROWS,
                        quotechar='"',
                    )
                if not len(rows):
                    return
                read += len(rows)
                yield Scores(*(np.ascontiguousarray(rows[name]) for name in NAMES))
        except (ValueError, csv.Error) as error:  # not quoted: it may hold a whole line
            raise NemoError(
                f"{path} must have a sentence's id, a photo's id and a score in every line, in this order or under the "
                f"names {', '.join(NAMES)}: one of the {ROWS:,} lines after line {read:,} has something else. "
                "Write it again."
            ) from error


def _columns(file: TextIO, delimiter: str) -> tuple[int, ...]:
    """Where the three columns are, by the first line, which is skipped if it has their names."""
    first = file.readline(LONGEST_LINE)
    cells = [cell.strip() for cell in next(csv.reader([first], delimiter=delimiter), [])]
    if set(NAMES) <= set(cells):
        return tuple(cells.index(name) for name in NAMES)
    file.seek(0)
    return 0, 1, 2


def _lines(file: TextIO) -> Iterator[str]:
    for line in iter(partial(file.readline, LONGEST_LINE), ""):
        if len(line) == LONGEST_LINE:
            raise ValueError("a line is far too long")
        yield line


def _of_lmdb(path: Path) -> Iterator[Scores]:
    with Lmdb(path / "data.mdb" if path.is_dir() else path) as database:
        keys = _value(database, b"__keys__", f"'__keys__' of {path}")
        if type(keys) is not list or not all(type(key) is bytes for key in keys) or len(keys) > MOST_KEYS:
            raise NemoError(f"'__keys__' of {path} is not a list of keys, so it is no LMDB of scores. Check the path.")
        if len(set(keys)) != len(keys):
            raise NemoError(f"{path} lists a key twice. Write the LMDB again.")
        for number, key in enumerate(keys):
            where = f"value {number} of {path}"
            value = _value(database, key, where)
            if type(value) is not dict:
                raise NemoError(f"{where} is not a dict of sentence ids. Check that it is an LMDB of scores.")
            for sent_id, pairs in value.items():
                yield _of_pairs(sent_id, pairs, where)


def _value(database: Lmdb, key: bytes, where: str) -> Any:
    value = database.get(key)
    if value is None:
        raise NemoError(f"{where} is missing, so it is no LMDB of scores. Check the path.")
    if value[:1] != b"\x80":  # pickle's protocols from 2 on
        raise NemoError(
            f"{where} is not pickled: pyarrow's own format, which NeMo's dataloader.py reads, was dropped in pyarrow "
            "15. Write the scores as Parquet or CSV where an older pyarrow is installed; docs/mining.md explains how."
        )
    return unpickle_builtins(value, where)


def _of_pairs(sent_id: Any, pairs: Any, where: str) -> Scores:
    if type(sent_id) is str and sent_id.isdecimal() and sent_id.isascii() and len(sent_id) < 19:
        sent_id = int(sent_id)
    if type(sent_id) is not int or type(pairs) is not list:
        raise NemoError(f"{where} is not a dict of sentence ids, with lists of photos and scores. Check the file.")
    if not all(
        type(pair) in (tuple, list) and len(pair) == 2 and type(pair[0]) is int and type(pair[1]) in (int, float)
        for pair in pairs
    ):
        raise NemoError(f"{where} has a candidate that is not a pair of a photo's id and a score. Check the file.")
    try:
        image_id = np.array([photo for photo, _ in pairs], np.int64)
        score = np.array([score for _, score in pairs], np.float64)
        return Scores(np.full(len(pairs), sent_id, np.int64), image_id, score)
    except OverflowError as error:
        raise NemoError(f"{where} has an id of more than 64 bits. Check the file.") from error
