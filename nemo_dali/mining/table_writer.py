"""Writing a negative table in place: rows as they are made, and how much of it is done."""

from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from nemo_dali.io.layout import Layout
from nemo_dali.io.writer import Unfinished, unfinished
from nemo_dali.mining.crops import CROPS
from nemo_dali.mining.table import BY_ROW, FORMAT, VERSION, NegativeTable, done, read_table


def rules_as_attributes(
    *,
    category: bool = False,
    similar_photos: float | None = None,
    siblings: float | None = None,
    crops: float | None = None,
    photos_of: Sequence[str] = (),
) -> dict[str, Any]:
    """What ``mining.Exclusions`` asks for, as a table records it; other data sets by their fingerprints."""
    return {
        "exclude_category": int(category),
        "exclude_similar_photos": [] if similar_photos is None else [float(similar_photos)],
        "exclude_siblings": [] if siblings is None else [float(siblings)],
        **({} if crops is None else {"exclude_crops": [float(crops)]}),
        "exclude_photos_of": list(photos_of),
    }


def begin_table(
    path: str | Path,
    *,
    sentences: int,
    photos: int,
    width: int,
    attributes: dict[str, Any],
    models: int = 1,
    recalls: int = 0,
    crops: bool = False,
) -> AbstractContextManager[Unfinished[NegativeTable]]:
    """A table to fill, or one to continue; see ``io.writer.unfinished``.

    Args:
        sentences, photos: S and M.
        width: D, of the embeddings.
        attributes: ``dataset_fingerprint``, ``dataset_name``, ``model``, ``pretrained``, ``weights_hash``, ``depth``,
            ``exclusions``, ``method``, ``batch_size``, ``encoder`` and what ``rules_as_attributes`` gives.
        models: how many make the embeddings.
        recalls: rows of ``/recall``.
        crops: whether embeddings of photos' crops are kept.
    """
    stages = 3 if crops else 2  # of each model, before the ranking
    ranking = sentences, min(attributes["depth"], photos - 1)
    return unfinished(
        Path(path).absolute(),
        format=FORMAT,
        version=VERSION,
        attributes=attributes,
        arrays={
            "text_embedding": Layout("<f4", (sentences, width), by_row=True),
            "image_embedding": Layout("<f4", (photos, width), by_row=True),
            **({"crop_embedding": Layout("<f4", (CROPS * photos, width), by_row=True)} if crops else {}),
            "neighbors": Layout("<i4", ranking, by_row=True),
            "similarity": Layout("<f4", ranking, by_row=True),
            "own_rank": Layout("<i4", (sentences,)),
            **({"recall": Layout("<f8", (recalls, 2))} if recalls else {}),
            "excluded_photos": Layout("|u1", (-(-photos // 8),)),
            "progress": Layout("<i8", (stages * models + 1,)),
        },
        read=read_table,
        done=done,
    )


def write_excluded(made: Unfinished[NegativeTable], photos: npt.NDArray[np.bool_] | None) -> None:
    """Write which photos no sentence may be shown with, bool [M]; None: there are none."""
    made.writable("excluded_photos")[:] = 0 if photos is None else np.packbits(photos, bitorder="little")


def finish_table(made: Unfinished[NegativeTable]) -> NegativeTable:
    """Complete a table whose rows are all written, and open it.

    Raises:
        FileFormatError: impossible candidates: the unfinished file was damaged between two runs.
    """
    for name in BY_ROW:
        if name in made.file.mapped.index.arrays:
            made.seal(name)
    table = read_table(made.path)
    table.check_all_rows()
    made.finish(table.content_fingerprint())
    return read_table(made.path)


def write_table(  # noqa: PLR0913  # what a table holds
    path: str | Path,
    *,
    blocks: Iterable[tuple[npt.NDArray[np.int32], npt.NDArray[np.floating[Any]]]],
    text_embedding: npt.NDArray[np.float32],
    image_embedding: npt.NDArray[np.float32],
    depth: int,
    dataset_fingerprint: str,
    dataset_name: str,
    model: str,
    pretrained: str,
    weights_hash: str,
    exclusions: list[str],
    excluded_photos: npt.NDArray[np.bool_] | None = None,
    rules: Mapping[str, Any] | None = None,
) -> str:
    """Write a table whose rows arrive in blocks, so that it is never held in memory; return its fingerprint.

    Args:
        blocks: ``(neighbors int32 [b, N], similarity float32 [b, N])`` for consecutive sentences, S rows in all, with
            N = min(depth, M - 1); short rows end in -1 and -inf.
        text_embedding: float32 [S, D].
        image_embedding: float32 [M, D].
        excluded_photos: bool [M], photos that no sentence may be shown with; None: none.
        rules: the arguments of ``rules_as_attributes`` for the rules that the rows obey; None: none.

    Raises:
        FileFormatError: the file cannot be written, or the rows are not valid.
        ValueError: the blocks do not have a row for each sentence.
    """
    sentences, width = text_embedding.shape
    attributes = {
        "dataset_fingerprint": dataset_fingerprint,
        "dataset_name": dataset_name,
        "model": model,
        "pretrained": pretrained,
        "weights_hash": weights_hash,
        "depth": depth,
        "exclusions": exclusions,
        **rules_as_attributes(**rules or {}),
        "method": "given",
        "batch_size": 0,
        "encoder": "none",
    }
    photos = len(image_embedding)
    with begin_table(path, sentences=sentences, photos=photos, width=width, attributes=attributes) as made:
        made.writable("text_embedding")[:] = text_embedding
        made.writable("image_embedding")[:] = image_embedding
        write_excluded(made, excluded_photos)
        neighbors, similarity = made.writable("neighbors"), made.writable("similarity")
        row = 0
        for some_neighbors, some_similarity in blocks:
            neighbors[row : row + len(some_neighbors)] = some_neighbors
            similarity[row : row + len(some_neighbors)] = some_similarity
            row += len(some_neighbors)
        if row != sentences:
            raise ValueError(f"blocks ({row} rows) must have one row for each of {sentences} sentences")
        for stage, rows in enumerate((photos, sentences, sentences)):
            made.record("progress", stage, rows.to_bytes(8, "little"))
        return finish_table(made).fingerprint
