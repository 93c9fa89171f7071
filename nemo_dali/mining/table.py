"""The negative table (.neg.h5): for each sentence the photos that a CLIP model finds closest to it.

    similarity   .41  .38  .33  .31  .30  .27  .22 ...     descending
                           ^begin          ^end
                   > tau   |  the pool     |  too easy     here tau = .35 and K = 4

Neither tau nor K is stored: the pool for both is a window of the row.

An unfinished table is called F.neg.h5.partial; ``/progress`` says how many rows of each stage are done.
"""

import logging
import math
import threading
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from nemo_dali.data.columns import have_twins, twins
from nemo_dali.errors import FileFormatError, NemoError
from nemo_dali.io.h5 import CheckedRows, MappedFile, fingerprint
from nemo_dali.io.index import UNFINISHED
from nemo_dali.mining.crops import CROPS

if TYPE_CHECKING:
    from nemo_dali.data.dataset import Dataset

FORMAT = "nemo-dali/neg"
VERSION = 2
BY_ROW = (  # arrays with a checksum for each row
    *("neighbors", "similarity", "text_embedding", "image_embedding"),
    "crop_embedding",  # where there is one
)
OFF_LENGTH = 0.01  # how far an embedding's length may be from 1; float32 makes it 1e-6
BLOCK = 1 << 14  # rows checked at a time
COPIES_CELLS = 1 << 22  # of rows checked for copies of their own photo, roughly: a few milliseconds

logger = logging.getLogger("nemo_dali")
_checking = threading.Lock()


@dataclass(frozen=True, eq=False, repr=False)
class NegativeTable:
    """An open table of S sentences and M photos: mapped arrays.

    Rows of the large ones are checked against their checksums when they are first used: before reading some, call
    ``check_rows`` or ``check_embeddings``.

    Attributes:
        neighbors: int32 [S, N], photo rows by descending similarity, -1 after the last one; N = min(depth, M - 1).
        similarity: float32 or float16 [S, N], -inf after the last one.
        text_embedding: float32 [S, D], of unit length; D is 0 in a table that was made from scores.
        image_embedding: float32 [M, D], of unit length.
        crop_embedding: float32 [M * CROPS, D], each photo's crops, of unit length; empty if none were embedded.
        own_rank: int32 [S], the rank of a sentence's own photo among all M, from 1; 0 where unknown.
        recall: float64 [n, 2], rows (N, the share of the exact first N that an approximate search found); n may be 0.
        progress: int64, the rows done in each stage: for each model, photos and sentences embedded; for each model,
            crops embedded, if any; then sentences ranked.
        excluded_photos: bool [M], photos that no sentence may be shown with.
        exclude_category: whether photos that show the target's category are excluded.
        exclude_similar_photos: photos more similar than this to the sentence's own are excluded; None: none.
        model, pretrained: for an ensemble, all of them, joined by " + ".
        weights_hash: sha256 of the model's tensors, whatever file they came from.
        exclusions: what was left out of every row, in words.
        method: how photos were searched: "exact", or with which first stage.
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
    crop_embedding: npt.NDArray[np.float32]
    own_rank: npt.NDArray[np.int32]
    recall: npt.NDArray[np.float64]
    progress: npt.NDArray[np.int64]
    excluded_photos: npt.NDArray[np.bool_]
    exclude_category: bool
    exclude_similar_photos: float | None

    @staticmethod
    def open(path: str | Path) -> "NegativeTable":
        """Open a table in milliseconds, whatever its size.

        Raises:
            FileFormatError: not a negative table, truncated, half built, or damaged.
        """
        table = read_table(path)
        if table.fingerprint == UNFINISHED:
            raise FileFormatError(
                f"{table.path} is half built: {done(table) or 'nothing is done'}. Repeat the command that began it."
            )
        return table

    def __reduce__(self) -> tuple[Any, ...]:
        return NegativeTable.open, (self.path,)  # a mapped array would pickle as its bytes

    def content_fingerprint(self) -> str:
        """The fingerprint of what the file holds now; reads all of it."""
        return fingerprint(
            {name: getattr(self, name) for name in ("neighbors", "similarity", "excluded_photos", "exclusions")}
            | {"dataset_fingerprint": self.dataset_fingerprint, "weights_hash": self.weights_hash}
        )

    @property
    def has_embeddings(self) -> bool:
        """Whether it was made by a model, not from scores."""
        return bool(self.image_embedding.shape[1])

    @cached_property
    def _rows(self) -> dict[str, CheckedRows]:
        return {name: self.mapped.rows(name) for name in BY_ROW if name in self.mapped.index.arrays}

    @cached_property
    def _sound(self) -> npt.NDArray[np.bool_]:
        """bool [S], sentences whose candidates were looked at."""
        return np.zeros(len(self.neighbors), bool)

    @cached_property
    def _seen(self) -> npt.NDArray[np.int32]:
        """Scratch space for ``first_bad_row``."""
        return np.zeros(len(self.image_embedding) + 1, np.int32)

    def check_rows(self, rows: npt.NDArray[np.integer[Any]], own: npt.NDArray[np.integer[Any]] | None = None) -> None:
        """Check the candidates of sentences before they are read; only once for each sentence: later it costs nothing.

        Several threads may call it.

        Args:
            rows: of sentences.
            own: int [the same], the sentences' own photos, which must not be among their candidates.

        Raises:
            FileFormatError: not as they were written, photos that do not exist or occur twice, or similarities that do
                not descend.
        """
        if not self._sound[rows].all():
            with _checking:
                self._check(np.asarray(rows, np.int64), None if own is None else np.asarray(own, np.int64))

    def _check(self, rows: npt.NDArray[np.int64], own: npt.NDArray[np.int64] | None) -> None:
        """One thread at a time: ``_seen`` is shared."""
        from nemo_dali.kernels.ranking.checks import first_bad_row

        new = ~self._sound[rows]
        some = rows[new]
        self._rows["neighbors"].check(some)
        self._rows["similarity"].check(some)
        others = np.full(len(some), -1, np.int64) if own is None else own[new]
        if self.similarity.dtype == np.float32:
            bad = first_bad_row(some, others, self.neighbors, self.similarity, self._seen)
        else:  # Numba has no float16 on the CPU
            widened = self.similarity[some].astype(np.float32)
            bad = first_bad_row(np.arange(len(some)), others, self.neighbors[some], widened, self._seen)
        if bad >= 0:
            raise self.mapped.damage(
                f"the candidates of sentence {some[bad]} are not distinct photos by descending similarity"
            )
        if self.excluded_photos.any():
            shown = self.neighbors[some]
            if self.excluded_photos[shown[shown >= 0]].any():
                raise self.mapped.damage("a sentence has a photo among its candidates that is excluded for all")
        self._sound[some] = True

    def check_all_rows(self) -> None:
        """``check_rows`` for every sentence; this reads all candidates."""
        for begin in range(0, len(self.neighbors), BLOCK):
            self.check_rows(np.arange(begin, min(begin + BLOCK, len(self.neighbors))))

    def check_embeddings(self, *names: str) -> None:
        """Check all embeddings, or those in ``names``, before they are read.

        Raises:
            FileFormatError: not as they were written, or not finite and of unit length.
            NemoError: there are none, because the table was made from scores.
        """
        if not self.has_embeddings:
            raise NemoError(
                f"{self.path} was made from scores and has no embeddings, which 'tune', 'report' and 'mine "
                "--embeddings' need. Write a policy file by hand and look at what it draws with 'nemo-dali preview "
                "--policy', or mine with a model."
            )
        for name in names or ("text_embedding", "image_embedding"):
            self._rows[name].check_all()
            array = getattr(self, name)
            for begin in range(0, len(array), BLOCK):
                length = np.einsum("ij,ij->i", block := array[begin : begin + BLOCK], block)
                if not (np.abs(length - 1) < 2 * OFF_LENGTH).all():
                    raise self.mapped.damage(f"/{name} has a row that is not of unit length")

    def check_dataset(self, dataset: "Dataset") -> None:
        """Refuse a data set other than the one that this table was mined for.

        Raises:
            FileFormatError: naming both fingerprints.
        """
        rows = len(self.neighbors), len(self.image_embedding)
        if self.dataset_fingerprint != dataset.fingerprint:
            raise FileFormatError(
                f"{self.path} was mined for a different data set ({self.dataset_name}, "
                f"{self.dataset_fingerprint[:12]}) than {dataset.path} ({dataset.name}, {dataset.fingerprint[:12]}). "
                f"Mine this one with: nemo-dali mine {dataset.path} {self._made_with()} -o {self.path}"
            )
        if rows != (len(dataset.sentences.ref), len(dataset.images.id)):
            raise FileFormatError(
                f"{self.path} is damaged: it has {rows[0]} sentences and {rows[1]} photos, unlike {dataset.path}. "
                "Mine it again."
            )

    def warn_of_copies(self, dataset: "Dataset") -> None:
        """Warn if rows hold a copy of their sentence's own photo, as old tables or tables made elsewhere may.

        Raises:
            FileFormatError: such a row is damaged.
        """
        content = twins(dataset.photo_files)
        how = f"--embeddings {self.path}" if self.has_embeddings else self._made_with()
        own = dataset.refs.image[dataset.sentences.ref]
        rows = np.flatnonzero(have_twins(content)[own])
        rows = rows[:: -(-len(rows) * self.neighbors.shape[1] // COPIES_CELLS) or 1]
        self.check_rows(rows, own[rows])
        found = self.neighbors[rows]
        if ((content[found] == content[own[rows], None]) & (found >= 0)).any():
            logger.warning(
                "%s has copies of sentences' own photos among their negatives. Mine it again, which leaves copies out: "
                "nemo-dali mine %s %s -o NEW.neg.h5",
                self.path,
                dataset.path,
                how,
            )

    def _made_with(self) -> str:
        """Options of ``mine`` that make such a table for another data set."""
        if not self.has_embeddings:
            return f"--scores {self.pretrained}"
        return f"--model {self.model} --pretrained {self.pretrained}"

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
        from nemo_dali.kernels.plan.pools import pools

        self.check_all_rows()
        return pools(self.similarity, math.inf if max_similarity is None else max_similarity, top_k)

    def pool_sizes(self, max_similarity: float | None, top_k: int) -> dict[str, Any]:
        """How many candidates the sentences have for this tau and K, as JSON values.

        ``fewer_than_3`` and ``fewer_than_8`` count the sentences whose pool does not fill a 2x2 or a 3x3 mosaic;
        ``quantiles`` are those of the pool size, at 0, 5, 25, 50, 75, 95 and 100 %.
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


def read_table(path: str | Path) -> NegativeTable:
    """Open a table, finished or not.

    Raises:
        FileFormatError: not a negative table, cut short, or damaged.
    """
    path = Path(path).absolute()
    remedy = f"Make it with: nemo-dali mine F.ris.h5 --model NAME --pretrained TAG_OR_FILE -o {path}"
    file = MappedFile(path, format=FORMAT, version=VERSION, remedy=remedy, unfinished=True)
    depth = file.integer("depth", least=1)
    neighbors = file.array("neighbors", "<i4", (None, None))
    sentences = len(neighbors)
    image = file.array("image_embedding", "<f4", (None, None))
    photos = len(image)
    if not sentences or neighbors.shape[1] != min(depth, photos - 1) or photos < 2:
        raise file.damage(f"/neighbors is {list(neighbors.shape)}, which does not fit depth {depth} of {photos} photos")
    crops = (CROPS * photos, image.shape[1]) if "crop_embedding" in file.index.arrays else None
    excluded = file.array("excluded_photos", "|u1", (-(-photos // 8),))
    table = NegativeTable(
        path=path,
        mapped=file,
        fingerprint=file.index.fingerprint,
        **{name: file.text(name) for name in ("dataset_fingerprint", "dataset_name", "model", "pretrained")},
        **{name: file.text(name) for name in ("weights_hash", "method", "encoder")},
        depth=depth,
        batch_size=file.integer("batch_size", least=0),
        exclusions=file.texts("exclusions"),
        neighbors=neighbors,
        similarity=file.array("similarity", ("<f4", "<f2"), neighbors.shape),
        text_embedding=file.array("text_embedding", "<f4", (sentences, image.shape[1])),
        image_embedding=image,
        crop_embedding=file.array("crop_embedding", "<f4", crops) if crops else np.empty((0, image.shape[1]), "<f4"),
        own_rank=file.array("own_rank", "<i4", (sentences,)),
        recall=file.array("recall", "<f8", (None, 2)) if "recall" in file.index.arrays else np.empty((0, 2)),
        progress=file.array("progress", "<i8", (None,)),
        excluded_photos=np.unpackbits(excluded, count=photos, bitorder="little").astype(bool),
        exclude_category=bool(file.integer("exclude_category", least=0, most=1)),
        exclude_similar_photos=file.bound("exclude_similar_photos"),
    )
    if table.fingerprint == UNFINISHED:
        return table
    if table.own_rank.min() < 0 or table.own_rank.max() > photos:
        raise file.damage("/own_rank has a value out of range")
    if not (table.recall >= 0).all() or not (table.recall <= max(photos, 1)).all():
        raise file.damage("/recall has a value out of range")
    return table


def done(table: NegativeTable) -> str:
    """How much of an unfinished table is done; "" for nothing."""
    if not table.progress.any():
        return ""
    stages, crops, ranked = table.progress[:-1], "", table.progress[-1]
    if len(table.crop_embedding):
        stages, of_crops = np.split(stages, [len(stages) // 3 * 2])
        crops = f", {of_crops.sum()} crops"
    photos, sentences = stages[::2].sum(), stages[1::2].sum()
    return f"{photos} photos{crops} and {sentences} sentences are embedded and {ranked} sentences are ranked"
