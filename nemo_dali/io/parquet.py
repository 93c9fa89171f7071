"""Parquet files, read in pieces by pyarrow, which is an extra and imported when a file is read."""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from nemo_dali._lazy import extra
from nemo_dali.errors import NemoError
from nemo_dali.io.files import open_regular

ROWS = 1 << 16  # of a piece


def parquet_pieces(path: Path, columns: Sequence[str], *, what: str, rows: int = ROWS) -> Iterator[Any]:
    """The rows of some columns as pyarrow's RecordBatches.

    Args:
        columns: those that the file must have; others are not read.
        what: what the file should be, for messages.
        rows: of a piece, at most.

    Raises:
        OSError: it cannot be opened, or is not a regular file; ``strerror`` says which.
        NemoError: pyarrow is not installed, or the file is not a Parquet file, is damaged, or lacks a column.
    """
    with extra("parquet", f"To read {path}"):
        import pyarrow
        from pyarrow import parquet
    with os.fdopen(open_regular(path), "rb") as opened:
        try:
            file = parquet.ParquetFile(opened)
            there = set(file.schema_arrow.names)
            if missing := [name for name in columns if name not in there]:
                raise NemoError(f"{path} has no column {missing[0]}, so it is not {what}. Check the path.")
            yield from file.iter_batches(batch_size=rows, columns=list(columns))
        except (pyarrow.ArrowException, OSError) as error:
            raise NemoError(
                f"{path} cannot be read as Parquet: it is damaged, or not Parquet. Get it again."
            ) from error
