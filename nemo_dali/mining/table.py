"""The negative table (.neg.h5): for each sentence the photos that a CLIP model finds closest to it.

    similarity   .41  .38  .33  .31  .30  .27  .22 ...     descending
                           ^begin          ^end
                   > tau   |  the pool     |  too easy     here tau = .35 and K = 4

Neither tau nor K is stored: the pool for both is a window of the row.

An unfinished table is called F.neg.h5.partial; ``/progress`` says how many rows of each stage are done.
"""

import json
import math
from collections.abc import Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import h5py
import numpy as np
import numpy.typing as npt

from nemo_dali.errors import FileFormatError
from nemo_dali.io.h5 import MappedFile, fingerprint, map_array, open_h5
from nemo_dali.io.resumable import UNFINISHED, Unfinished, offset, unfinished

if TYPE_CHECKING:
    from nemo_dali.data.dataset import Dataset

FORMAT = "nemo-dali/neg"
VERSION = 1
SAMPLED_ROWS = 32  # whose contents are checked when a table is opened; all of them would be a read of the whole file


@dataclass(frozen=True, eq=False, repr=False)
class NegativeTable:
    """An open table of S sentences and M photos: mapped arrays.

    Attributes:
        neighbors: int32 [S, N], photo rows by descending similarity, -1 behind the last one; N = min(depth, M - 1).
        similarity: float32 or float16 [S, N], -inf behind the last one.
        text_embedding: float32 [S, D], of unit length.
        image_embedding: float32 [M, D], of unit length.
        own_rank: int32 [S], the place of a sentence's own photo among all M, from 1; 0 where unknown.
        recall: float64 [n, 2], rows (N, the share of the exact first N that an approximate search found); n may be 0.
        progress: int64, the rows done of each stage: for each model photos and sentences embedded, then ranked.
        model, pretrained: of an ensemble all of them, with " + " between.
        weights_hash: sha256 over the model's tensors, whatever file they came from.
        exclusions: what was left out of every row, for people.
        method: how photos were searched: "exact", or by what first stage.
        batch_size, encoder: what the embeddings' last bits depend on.
    """

    path: Path
    mapped: MappedFile
    fingerprint: str
    dataset_fingerprint: str
    dataset_name: str
    model: str
    pretrained: str
    weights_hash: str
    depth: int
    exclusions: list[str]
    method: str
    batch_size: int
    encoder: str
    neighbors: npt.NDArray[np.int32]
    similarity: npt.NDArray[np.floating[Any]]
    text_embedding: npt.NDArray[np.float32]
    image_embedding: npt.NDArray[np.float32]
    own_rank: npt.NDArray[np.int32]
    recall: npt.NDArray[np.float64]
    progress: npt.NDArray[np.int64]

    @staticmethod
    def open(path: str | Path) -> "NegativeTable":
        """Open a table in milliseconds, whatever its size: some rows' contents are checked, the arrays are mapped.

        Raises:
            FileFormatError: not such a file, cut short, half built, or damaged.
        """
        table = read_table(path)
        if table.fingerprint == UNFINISHED:
            raise FileFormatError(
                f"{table.path} is half built: {_done(table) or 'nothing is done'}. Repeat the command that began it."
            )
        return table

    def __reduce__(self) -> tuple[Any, ...]:
        return NegativeTable.open, (self.path,)  # a mapped array would pickle as its bytes

    def content_fingerprint(self) -> str:
        """The fingerprint of what the file holds now; reads all of it."""
        return _fingerprint(
            self.neighbors, self.similarity, self.dataset_fingerprint, self.weights_hash, self.exclusions
        )

    def check_dataset(self, dataset: "Dataset") -> None:
        """Refuse a data set other than the one that this table was mined for.

        Raises:
            FileFormatError: naming both fingerprints.
        """
        rows = len(self.neighbors), len(self.image_embedding)
        if self.dataset_fingerprint != dataset.fingerprint:
            raise FileFormatError(
                f"{self.path} was mined for another data set ({self.dataset_name}, {self.dataset_fingerprint[:12]}) "
                f"than {dataset.path} ({dataset.name}, {dataset.fingerprint[:12]}). Mine this one with: nemo-dali mine "
                f"{dataset.path} --model {self.model} --pretrained {self.pretrained} -o {self.path}"
            )
        if rows != (len(dataset.sentences.ref), len(dataset.images.id)):
            raise FileFormatError(
                f"{self.path} is damaged: it has {rows[0]} sentences and {rows[1]} photos, unlike {dataset.path}. "
                "Mine it again."
            )

    def windows(self, max_similarity: float | None, top_k: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """The pool of each sentence, as a half-open window ``neighbors[s, begin[s]:end[s]]``.

        A window starts at the first photo whose similarity is at most ``max_similarity`` (None: at the first) and holds
        the next ``top_k`` photos, or as many as there are.

        Returns:
            ``(begin int64 [S], end int64 [S])``.
        """
        if max_similarity is not None and not math.isfinite(max_similarity):
            raise ValueError(f"max_similarity ({max_similarity}) must be a finite number or None")
        if top_k < 1:
            raise ValueError(f"top_k ({top_k}) must be at least 1")
        # Both ends from the similarities alone, so that a cold table's neighbors are not read.
        last = first_at_most(self.similarity, -np.inf)
        # As float64: in the table's own type 0.3 would become 0.30000001, or more.
        begin = np.zeros_like(last) if max_similarity is None else first_at_most(self.similarity, max_similarity)
        return begin, np.minimum(begin + top_k, last)

    def pool_sizes(self, max_similarity: float | None, top_k: int) -> dict[str, Any]:
        """How many candidates the sentences have for this tau and K, as JSON values.

        ``fewer_than_3`` and ``fewer_than_8`` count the sentences whose pool does not fill a 2x2 or a 3x3 mosaic;
        ``quantiles`` are of the pool size, at 0, 5, 25, 50, 75, 95 and 100 %.
        """
        begin, end = self.windows(max_similarity, top_k)
        size = end - begin
        percents = (0, 5, 25, 50, 75, 95, 100)
        return {
            "max_similarity": max_similarity,
            "top_k": top_k,
            "sentences": len(size),
            "empty": int((size == 0).sum()),
            "fewer_than_3": int((size < 3).sum()),
            "fewer_than_8": int((size < 8).sum()),
            "mean": float(size.mean()),
            "quantiles": {
                str(percent): int(value)
                for percent, value in zip(percents, np.percentile(size, percents, method="lower"), strict=True)
            },
        }


def first_at_most(descending: npt.NDArray[np.floating[Any]], limit: float) -> npt.NDArray[np.int64]:
    """Per row the first column whose value is at most ``limit``, or the number of columns.

    By bisection: of C columns log2(C) cells a row are touched.
    """
    rows, columns = descending.shape
    low, high = np.zeros(rows, np.int64), np.full(rows, columns)
    every_row = np.arange(rows)
    for _ in range(columns.bit_length()):
        middle = (low + high) // 2
        found = (low == high) | (descending[every_row, np.minimum(middle, columns - 1)] <= np.float64(limit))
        high = np.where(found, middle, high)
        low = np.where(found, low, middle + 1)
    return low


def read_table(path: str | Path) -> NegativeTable:
    """Open a table, finished or not.

    Raises:
        FileFormatError: not such a file, cut short, or damaged.
    """
    path = Path(path).absolute()
    remedy = f"Make it with: nemo-dali mine F.ris.h5 --model NAME --pretrained TAG_OR_FILE -o {path}"
    with open_h5(path, format=FORMAT, version=VERSION, remedy=remedy) as file:
        try:
            table = _read(file, path)
            # Read, not mapped: a page fault may read megabytes ahead.
            # Of an unfinished one what was recorded as done: a killed run leaves the rows behind that half written.
            filled = len(table.neighbors)
            if table.fingerprint == UNFINISHED:
                filled = min(max(int(table.progress[-1]), 0), filled)
            rows = np.unique(np.linspace(0, filled - 1, min(SAMPLED_ROWS, filled)).astype(int))
            some_neighbors, some_similarity = file["neighbors"][rows], file["similarity"][rows].astype(np.float32)
        except (OSError, RuntimeError, LookupError, TypeError, ValueError) as error:
            raise FileFormatError(f"{path} is damaged ({error}). {remedy}") from error
    if (damage := _damage(table, some_neighbors, some_similarity)) is not None:
        raise FileFormatError(f"{path} is damaged: {damage}. {remedy}")
    return table


def _read(file: h5py.File, path: Path) -> NegativeTable:
    """What the file holds; what the ranking does not need may be missing."""
    neighbors = _array(file, "neighbors", 2, "<i4")
    rows = np.zeros(len(neighbors), np.int32)
    return NegativeTable(
        path=path,
        mapped=MappedFile(file, path),
        **{name: str(file.attrs[name]) for name in ("fingerprint", "dataset_fingerprint", "dataset_name")},
        **{name: str(file.attrs[name]) for name in ("model", "pretrained", "weights_hash")},
        depth=int(file.attrs["depth"]),
        batch_size=int(file.attrs.get("batch_size", 0)),
        **{name: str(file.attrs.get(name, "unknown")) for name in ("method", "encoder")},
        exclusions=[str(text) for text in json.loads(file.attrs["exclusions"])],
        neighbors=neighbors,
        similarity=_array(file, "similarity", 2, "<f4", "<f2"),
        text_embedding=_array(file, "text_embedding", 2, "<f4"),
        image_embedding=_array(file, "image_embedding", 2, "<f4"),
        own_rank=_array(file, "own_rank", 1, "<i4") if "own_rank" in file else rows,
        recall=_array(file, "recall", 2, "<f8") if "recall" in file else np.empty((0, 2)),
        progress=_array(file, "progress", 1, "<i8") if "progress" in file else np.full(3, len(rows)),
    )


def _array(file: h5py.File, name: str, dimensions: int, *dtypes: str) -> npt.NDArray[Any]:
    array = file[name]
    if (
        not isinstance(array, h5py.Dataset)
        or array.ndim != dimensions
        or 0 in array.shape
        or array.dtype not in [np.dtype(d) for d in dtypes]
    ):
        what = "matrix" if dimensions == 2 else "column"
        raise ValueError(f"/{name} is not a {what} of type {' or '.join(dtypes)}")
    return map_array(array)


def _damage(table: NegativeTable, neighbors: npt.NDArray[np.int32], similarity: npt.NDArray[np.float32]) -> str | None:
    """The first contradiction in the shapes, or in some of the rows, or None."""
    sentences, width = table.neighbors.shape
    photos = len(table.image_embedding)
    if table.depth < 1 or width != min(table.depth, photos - 1):
        return f"/neighbors is {width} wide, which does not fit depth {table.depth} of {photos} photos"
    if table.similarity.shape != table.neighbors.shape:
        return "/similarity is not as large as /neighbors"
    if table.text_embedding.shape != (sentences, table.image_embedding.shape[1]):
        return "/text_embedding does not fit /neighbors and /image_embedding"
    if len(table.own_rank) != sentences:
        return "/own_rank is not as long as /neighbors"
    if len(neighbors) and (neighbors.min() < -1 or neighbors.max() >= photos):
        return "/neighbors has a photo row out of range"
    if not (similarity[:, 1:] <= similarity[:, :-1]).all() or np.isnan(similarity[:, 0]).any():
        return "a row of /similarity does not descend"
    if not np.array_equal(neighbors < 0, np.isneginf(similarity)):
        return "the rows of /neighbors and /similarity end at different columns"
    return None


def _fingerprint(
    neighbors: npt.NDArray[np.int32],
    similarity: npt.NDArray[np.floating[Any]],
    dataset_fingerprint: str,
    weights_hash: str,
    exclusions: list[str],
) -> str:
    """Over what the plan depends on; names and file names of the model may differ for the same content."""
    return fingerprint(
        {
            "neighbors": neighbors,
            "similarity": similarity,
            "dataset_fingerprint": dataset_fingerprint,
            "weights_hash": weights_hash,
            "exclusions": exclusions,
        }
    )


def _done(table: NegativeTable) -> str:
    """How much of an unfinished table is done; "" for nothing."""
    photos, sentences, ranked = table.progress[:-1:2].sum(), table.progress[1:-1:2].sum(), table.progress[-1]
    if not table.progress.any():
        return ""
    return f"{photos} photos and {sentences} sentences are embedded and {ranked} sentences are ranked"


def begin_table(
    path: str | Path,
    *,
    sentences: int,
    photos: int,
    width: int,
    attributes: dict[str, Any],
    models: int = 1,
    recalls: int = 0,
) -> AbstractContextManager[Unfinished[NegativeTable]]:
    """A table to be filled, or one to go on with; see ``io.resumable.unfinished``.

    Args:
        sentences, photos: S and M.
        width: D, of the embeddings.
        attributes: ``dataset_fingerprint``, ``dataset_name``, ``model``, ``pretrained``, ``weights_hash``, ``depth``,
            ``exclusions``, ``method``, ``batch_size`` and ``encoder``.
        models: how many make the embeddings.
        recalls: rows of ``/recall``.
    """
    ranking = sentences, min(attributes["depth"], photos - 1)
    return unfinished(
        Path(path).absolute(),
        format=FORMAT,
        version=VERSION,
        attributes=attributes,
        arrays={
            "text_embedding": ("<f4", (sentences, width)),
            "image_embedding": ("<f4", (photos, width)),
            "neighbors": ("<i4", ranking),
            "similarity": ("<f4", ranking),
            "own_rank": ("<i4", (sentences,)),
            **({"recall": ("<f8", (recalls, 2))} if recalls else {}),
            "progress": ("<i8", (2 * models + 1,)),
        },
        read=read_table,
        done=_done,
    )


def finish_table(made: Unfinished[NegativeTable]) -> str:
    """Put the fingerprint into a table whose rows are all there, and return it."""
    table = made.file
    arrays = [table.text_embedding, table.image_embedding, table.neighbors, table.similarity, table.own_rank]
    digest = table.content_fingerprint()
    made.finish(digest, min(map(offset, arrays)))
    return digest


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
) -> str:
    """Write a table whose rows arrive in blocks, so that it is never held in memory; return its fingerprint.

    Args:
        blocks: ``(neighbors int32 [b, N], similarity float32 [b, N])`` for consecutive sentences, S rows in all, with
            N = min(depth, M - 1); short rows end in -1 and -inf.
        text_embedding: float32 [S, D].
        image_embedding: float32 [M, D].

    Raises:
        FileFormatError: the file cannot be written.
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
        "method": "given",
        "batch_size": 0,
        "encoder": "none",
    }
    photos = len(image_embedding)
    with begin_table(path, sentences=sentences, photos=photos, width=width, attributes=attributes) as made:
        made.writable(made.file.text_embedding)[:] = text_embedding
        made.writable(made.file.image_embedding)[:] = image_embedding
        neighbors, similarity = made.writable(made.file.neighbors), made.writable(made.file.similarity)
        row = 0
        for some_neighbors, some_similarity in blocks:
            neighbors[row : row + len(some_neighbors)] = some_neighbors
            similarity[row : row + len(some_neighbors)] = some_similarity
            row += len(some_neighbors)
        if row != sentences:
            raise ValueError(f"blocks ({row} rows) must have one row for each of {sentences} sentences")
        for stage, rows in enumerate((photos, sentences, sentences)):
            made.record(made.file.progress, stage, rows.to_bytes(8, "little"))
        return finish_table(made)
