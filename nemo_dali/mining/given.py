"""A negative table from scores computed elsewhere, without a model: see ``scores`` for what is read.

    scores, piece by piece ──▶ rows of the data set ──▶ less what is excluded ──▶ the best of each sentence, in place

Only one piece is held in memory: the table on the disk has its full size from the start and takes the candidates as
they come, in any order; at the end each row is sorted.
"""

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from nemo_dali._checks import MOST, integer
from nemo_dali.data.dataset import Dataset
from nemo_dali.distributed.ranks import joined_ranks
from nemo_dali.errors import NemoError
from nemo_dali.io.files import open_regular
from nemo_dali.io.output import check_inputs
from nemo_dali.io.progress import progress
from nemo_dali.mining.exclusions import Exclusions
from nemo_dali.mining.ranking import Excluded
from nemo_dali.mining.scores import Scores, check_scores_path, read_scores
from nemo_dali.mining.table_writer import begin_table, finish_table, write_excluded

F32 = npt.NDArray[np.float32]
I32 = npt.NDArray[np.int32]
I64 = npt.NDArray[np.int64]

SORTED_CELLS = 1 << 22  # of the table sorted at a time
SHARING = 16  # sentences that may share an id: gRefCOCO has refs twice


@dataclass(frozen=True)
class ScoresReport:
    """What ``mine`` wrote from given scores."""

    output: Path
    fingerprint: str
    scores: Path
    photos: int
    sentences: int
    neighbors: int  # per sentence
    read: int  # scores in the file
    unknown: int  # of these, of a sentence or a photo that the data set does not have
    excluded: int  # of these, of photos that the sentence does not get
    lowest: float
    highest: float
    short: int  # sentences with fewer candidates than neighbors
    empty: int  # of these, sentences without any

    def __str__(self) -> str:
        lines = [
            f"{self.output}: {'up to ' if self.short else ''}{self.neighbors} negatives for each of {self.sentences} "
            f"sentences, from {self.photos} photos",
            f"{self.read:,} scores read from {self.scores.name}: {self.unknown:,} of sentences or photos that the data "
            f"set does not have, {self.excluded:,} of photos left out for their sentences; the others are "
            f"{self.lowest:g} to {self.highest:g}",
        ]
        if self.short:
            lines.append(
                f"{self.short} sentences have fewer candidates than {self.neighbors}, {self.empty} of them none"
            )
        if self.lowest < -1 or self.highest > 1:
            lines.append(
                "scores lie outside -1 to 1, the range of MosaicPolicy's max_similarity: top_k works as it is; divide "
                "the scores by a number to bound them"
            )
        lines.append(
            "a table of given scores has no embeddings, which 'tune' and 'report' need: write a policy file by hand, "
            "and look at what it draws with 'inspect --max-similarity' and 'preview --policy'"
        )
        return "\n".join(lines)


def mine_scores(
    dataset_path: str | Path,
    scores: str | Path,
    *,
    output: str | Path,
    depth: int = 1000,
    exclusions: Exclusions | None = None,
) -> ScoresReport:
    """Write a .neg.h5 file from a file of scores. Under torchrun, rank 0 does the work and the others wait for it.

    Args:
        dataset_path: a .ris.h5 file.
        scores: Parquet, CSV or TSV with columns ``sent_id``, ``image_id`` and ``score``, or an LMDB as NeMo's release
            reads it. Pairs of other data sets are ignored.
        output: the table; an existing one is replaced only when the new one is complete.
        depth: photos kept per sentence, at most all but its own.
        exclusions: photos that a sentence does not get, by rules that do not compare embeddings; None: only its own,
            and copies of it.

    Raises:
        ValueError: an argument out of range, the file's kind is unknown, or an exclusion needs embeddings.
        NemoError: the file cannot be used, or has no score for any sentence.
        FileFormatError: the data set cannot be read, or the table cannot be written.
    """
    scores, output, exclusions = Path(scores), Path(output), exclusions or Exclusions()
    depth = integer("depth", depth, least=1, most=MOST)
    check_scores_path(scores)
    for name in ("similar_photos", "siblings", "crops"):
        if (bound := getattr(exclusions, name)) is not None:
            raise ValueError(f"{name} ({bound}) must be None with scores, as it compares embeddings")
    with joined_ranks() as ranks:

        def work() -> ScoresReport | None:
            if ranks.rank:
                return None
            check_inputs(output, [dataset_path, scores, *exclusions.photos_of])
            return _mine_scores(dataset_path, scores, output=output, depth=depth, exclusions=exclusions)

        report = ranks.share(ranks.attempt(work))[0]
        assert report is not None
        return report


def _mine_scores(
    dataset_path: str | Path, scores: Path, *, output: Path, depth: int, exclusions: Exclusions
) -> ScoresReport:
    """See ``mine_scores``."""
    dataset = Dataset.open(dataset_path)
    photos, sentences = len(dataset.images.id), len(dataset.sentences.ref)
    if photos < 2:
        raise NemoError(f"{dataset.path} has only one photo, so there are no negatives. Index more photos.")
    excluded, rules = exclusions.of(dataset)
    rows = _RowsOf(dataset, excluded)
    attributes = {
        "dataset_fingerprint": dataset.fingerprint,
        "dataset_name": dataset.name,
        "model": "scores",
        "pretrained": scores.name,
        "weights_hash": _sha256(scores),
        "depth": depth,
        **rules,
        "method": "given scores",
        "batch_size": 0,
        "encoder": "none",
    }
    with begin_table(output, sentences=sentences, photos=photos, width=0, attributes=attributes) as made:
        write_excluded(made, excluded.never)
        best = _Best(made.writable("neighbors"), made.writable("similarity"), dataset)
        lowest, highest = np.inf, -np.inf
        for piece in progress(read_scores(scores), total=None, what="reading scores", unit="piece"):
            found = rows.of(piece)
            if len(score := found[2]):
                best.take(*found)
                lowest, highest = min(lowest, float(score.min())), max(highest, float(score.max()))
        if not best.count.any():
            raise NemoError(
                f"None of the {rows.read:,} scores in {scores} is of a sentence and another photo of {dataset.path}: "
                f"{rows.unknown:,} are of none of its sentences or photos. Check that sent_id and image_id are its ids."
            )
        best.sort()
        made.record("progress", 2, sentences.to_bytes(8, "little"))
        table = finish_table(made)
    width = table.neighbors.shape[1]
    return ScoresReport(
        output=output,
        fingerprint=table.fingerprint,
        scores=scores,
        photos=photos,
        sentences=sentences,
        neighbors=width,
        read=rows.read,
        unknown=rows.unknown,
        excluded=rows.excluded,
        lowest=lowest,
        highest=highest,
        short=int((best.count < width).sum()),
        empty=int((best.count == 0).sum()),
    )


def _sha256(path: Path) -> str:
    path = path / "data.mdb" if path.is_dir() else path
    try:
        with os.fdopen(open_regular(path), "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise NemoError(f"{path} cannot be read: {error.strerror}. Check the path.") from error


def sentence_ids(dataset: Dataset) -> I64:
    """int64 [S], the publisher's ids; row numbers where there are none, as in JSON lines."""
    ids = dataset.sentences.sent_id
    return ids if (ids >= 0).any() else np.arange(len(ids))


class _RowsOf:
    """Turns scores by id into scores by a data set's rows; leaves out unknown and excluded pairs, and counts them.

    Raises:
        NemoError: many sentences of the data set share an id.
    """

    def __init__(self, dataset: Dataset, excluded: Excluded) -> None:
        self._dataset, self._rules = dataset, excluded
        self._own = dataset.refs.image[dataset.sentences.ref]
        sent_id = sentence_ids(dataset)
        self._by_sentence, self._by_photo = (np.argsort(ids, kind="stable") for ids in (sent_id, dataset.images.id))
        self._sent_id = sent_id[self._by_sentence]
        self._image_id = dataset.images.id[self._by_photo]
        if (many := int(np.unique(self._sent_id, return_counts=True)[1].max())) > SHARING:
            raise NemoError(
                f"{many} sentences of {dataset.path} have one id, so their scores cannot be told apart. Index the data "
                "set from other files, or mine it with a model."
            )
        self.read = self.unknown = self.excluded = 0

    def of(self, piece: Scores) -> tuple[I64, I32, F32]:
        """Rows of sentences, rows of photos and scores of a piece.

        Raises:
            NemoError: a score is not finite.
        """
        with np.errstate(over="ignore"):
            score = piece.score.astype(np.float32) + np.float32(0)  # + 0: no negative zero
        if (bad := ~np.isfinite(score)).any():
            at = int(bad.argmax())
            raise NemoError(
                f"The score of sentence {piece.sent_id[at]} and photo {piece.image_id[at]} is not a finite number in "
                "32 bits. Leave such pairs out of the file."
            )
        self.read += len(score)
        begin, end = (np.searchsorted(self._sent_id, piece.sent_id, side) for side in ("left", "right"))
        place = np.minimum(np.searchsorted(self._image_id, piece.image_id), len(self._image_id) - 1)
        known = (begin < end) & (self._image_id[place] == piece.image_id)
        self.unknown += int((~known).sum())
        begin, times = begin[known], (end - begin)[known]
        photo, score = (np.repeat(column[known], times) for column in (self._by_photo[place].astype(np.int32), score))
        first = np.repeat(begin - np.cumsum(times) + times, times)  # so that first + a running number is in its range
        sentence = self._by_sentence[first + np.arange(len(first))]
        out = self._left_out(sentence, photo)
        self.excluded += int(out.sum())
        return sentence[~out], photo[~out], score[~out]

    def _left_out(self, sentence: I64, photo: I32) -> npt.NDArray[np.bool_]:
        rules, own = self._rules, self._own[sentence]
        out = photo == own
        if rules.twins is not None:
            out |= rules.twins[photo] == rules.twins[own]
        if rules.never is not None:
            out |= rules.never[photo]
        if rules.shown is not None and rules.category is not None:
            category = rules.category[sentence]
            out |= (category >= 0) & rules.shown[photo, category]
        found: npt.NDArray[np.bool_] = out
        return found


class _Best:
    """The best candidates of each sentence so far, in the table's own arrays, [S, N]; unsorted until ``sort``."""

    def __init__(self, neighbors: I32, similarity: F32, dataset: Dataset) -> None:
        self._neighbors, self._similarity = neighbors.view(np.ndarray), similarity.view(np.ndarray)  # memmaps are slow
        self._dataset = dataset
        self.count = np.zeros(len(neighbors), np.int64)
        self._least = np.full(len(neighbors), -np.inf, np.float32)  # in a full row
        self._sent_id = sentence_ids(dataset)

    def take(self, sentence: I64, photo: I32, score: F32) -> None:
        """Add candidates, int64 [n], int32 [n] and float32 [n].

        Raises:
            NemoError: a pair has two scores.
        """
        order = np.argsort(sentence, kind="stable")
        order = order[score[order] >= self._least[sentence[order]]]
        sentence, photo, score = sentence[order], photo[order], score[order]
        begin = np.flatnonzero(np.diff(sentence, prepend=-1))
        size = np.diff(np.append(begin, len(sentence)))
        place = self.count[sentence] + np.arange(len(sentence)) - np.repeat(begin, size)
        width = self._neighbors.shape[1]
        fits = np.repeat(self.count[sentence[begin]] + size <= width, size)
        self._neighbors[sentence[fits], place[fits]] = photo[fits]
        self._similarity[sentence[fits], place[fits]] = score[fits]
        for first, last in zip(begin.tolist(), (begin + size).tolist(), strict=True):
            if not fits[first]:
                self._merge(int(sentence[first]), photo[first:last], score[first:last])
        self.count[sentence[begin]] = np.minimum(self.count[sentence[begin]] + size, width)

    def _merge(self, row: int, photo: I32, score: F32) -> None:
        """Add more candidates of a sentence than its row has room for."""
        there, width = int(self.count[row]), self._neighbors.shape[1]
        photo = np.concatenate([self._neighbors[row, :there], photo])
        score = np.concatenate([self._similarity[row, :there], score])
        self._check_distinct(row, photo)
        best = np.lexsort((photo, -score))[:width]
        self._neighbors[row], self._similarity[row] = photo[best], score[best]
        self._least[row] = score[best[-1]]

    def sort(self) -> None:
        """Sort every row by descending score, equal scores by photo row; -1 and -inf after the last."""
        rows, width = self._neighbors.shape
        step = max(SORTED_CELLS // width, 1)
        for begin in range(0, rows, step):
            block = slice(begin, begin + step)
            behind = np.arange(width) >= self.count[block, None]
            photo = np.where(behind, -1, self._neighbors[block])
            score = np.where(behind, np.float32(-np.inf), self._similarity[block])
            ascending = np.sort(photo, axis=1)
            twice = (ascending[:, 1:] == ascending[:, :-1]) & (ascending[:, 1:] >= 0)
            if twice.any():
                row = int(twice.any(axis=1).argmax())
                self._check_distinct(begin + row, photo[row, : self.count[begin + row]])
            order = np.lexsort((photo, -score), axis=1)
            self._neighbors[block] = np.take_along_axis(photo, order, axis=1)
            self._similarity[block] = np.take_along_axis(score, order, axis=1)

    def _check_distinct(self, row: int, photo: I32) -> None:
        ascending = np.sort(photo)
        twice = np.flatnonzero(ascending[1:] == ascending[:-1])
        if len(twice):
            raise NemoError(
                f"The file has two scores for sentence {self._sent_id[row]} and photo "
                f"{self._dataset.images.id[ascending[twice[0]]]}. Leave one out."
            )
