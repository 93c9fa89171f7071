"""Truth: what is in the photos of a generated data set, what its sentences say, and which of them fits which photo."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from nemo_dali.data.dataset import Dataset
from nemo_dali.errors import AnnotationError
from nemo_dali.io.files import read_regular
from nemo_dali.synthetic._scenes import NO, Expression, Scene, fits
from nemo_dali.synthetic._shapes import KINDS
from nemo_dali.synthetic._truth_file import COLOURS, SENTENCE_KINDS, SIZES, TRUTH_FILE, parse_truth
from nemo_dali.synthetic.layouts import LAYOUTS

MAX_FILE_BYTES = 4 << 30  # 2 KB a photo
REMEDY = "Give the folder that 'nemo-dali synth' wrote; with the same arguments it writes the same data set again."

Rows = npt.NDArray[np.integer[Any]]


def expression_kinds(folder: str | Path, dataset: str | Path) -> list[str]:
    """The kind of expression of each sentence of generated data, for example to group metrics by.

    Args:
        folder: what ``synthesize`` wrote.
        dataset: a .ris.h5 file indexed from it.

    Returns:
        By row of the data set's sentences, as ``plan["sentence"]`` counts them: "attribute", "place", "zone", "rank",
        "relation", or "several" for expressions about several things.

    Raises:
        AnnotationError: the folder has no truth of generated data, or not of these photos and sentences.
    """
    truth = Truth.read(folder).of(Dataset.open(dataset))
    return [truth.kind_names[kind] for kind in truth.kind]


@dataclass(frozen=True, eq=False, repr=False)
class Truth:
    """What is in photos, and what sentences say, by row: those of the file, or of a data set (``of``).

    Attributes:
        path: the file.
        image_id: int64 [photos]. sent_id: int64 [sentences].
        scenes: of the photos.
        seen: for each photo, the numbers of its things of which anything can be seen.
        sent: the sentences.
        kind: uint8 [sentences], the kind of expression: indices into ``kind_names``.
        said: int32 [sentences, 2], what a sentence says: indices into ``expressions``, the same twice if it says one.
        expressions: distinct ones.
    """

    path: Path
    image_id: npt.NDArray[np.int64]
    scenes: Sequence[Scene]
    seen: Sequence[tuple[int, ...]]
    sent_id: npt.NDArray[np.int64]
    sent: Sequence[str]
    kind: npt.NDArray[np.uint8]
    said: npt.NDArray[np.int32]
    expressions: Sequence[Expression]

    @property
    def kind_names(self) -> tuple[str, ...]:
        """The kinds of expression: attribute, place, zone, rank, relation; and several, about several things."""
        return SENTENCE_KINDS

    @staticmethod
    def read(path: str | Path) -> "Truth":
        """Read a truth.json.

        Args:
            path: the file, or the folder that ``synthesize`` wrote.

        Raises:
            AnnotationError: there is none, or it is something else, of another version or damaged.
        """
        given = Path(path)
        found = [given]
        if given.is_dir():
            inside = (given, *(given / layout.folder for layout in LAYOUTS.values()))
            found = [folder / TRUTH_FILE for folder in inside if (folder / TRUTH_FILE).exists()]
            if not found:
                raise AnnotationError(f"{given} has no {TRUTH_FILE} of a generated data set. {REMEDY}")
        try:
            parsed = parse_truth(read_regular(found[0], MAX_FILE_BYTES))
        except OSError as error:
            raise AnnotationError(f"{found[0]} cannot be read: {error.strerror}. {REMEDY}") from error
        except ValueError as error:
            raise AnnotationError(f"{found[0]} cannot be used: {error}. {REMEDY}") from error
        place = {expression: i for i, expression in enumerate(dict.fromkeys(itertools.chain(*parsed.says)))}
        return Truth(
            path=found[0],
            image_id=np.array(parsed.image_id, np.int64),
            scenes=parsed.scenes,
            seen=parsed.seen,
            sent_id=np.array(parsed.sent_id, np.int64),
            sent=parsed.sent,
            kind=np.array(parsed.kinds, np.uint8),
            said=np.array([(place[says[0]], place[says[-1]]) for says in parsed.says], np.int32),
            expressions=[*place],
        )

    def of(self, dataset: Dataset) -> "Truth":
        """The same with the photos and sentences of a data set file as rows.

        Raises:
            AnnotationError: some of them are not in the file, or are different there.
        """
        photos = self._found("photo", dataset, self.image_id, dataset.images.id)
        sentences = self._found("sentence", dataset, self.sent_id, dataset.sentences.sent_id)
        scenes, sent = [self.scenes[row] for row in photos], [self.sent[row] for row in sentences]
        sides = np.array([(scene.width, scene.height) for scene in scenes], np.int64)
        other = (sides != np.stack([dataset.images.width, dataset.images.height], axis=1)).any(axis=1)
        if other.any():
            raise self._another("photo", dataset, int(self.image_id[photos[other.argmax()]]))
        for row, (own, text) in enumerate(zip(sent, dataset.sentences.text, strict=True)):
            if own != text:
                raise self._another("sentence", dataset, int(self.sent_id[sentences[row]]))
        return replace(
            self,
            image_id=self.image_id[photos],
            scenes=scenes,
            seen=[self.seen[row] for row in photos],
            sent_id=self.sent_id[sentences],
            sent=sent,
            kind=self.kind[sentences],
            said=self.said[sentences],
        )

    def fits_words(self, sentences: Rows, photos: Rows) -> npt.NDArray[np.bool_]:
        """Whether a photo shows a thing that a sentence's own words fit: kind, colour and size, wherever it is.

        For a sentence that says two things it must show both.

        Args:
            sentences, photos: rows, integer [n] each.

        Returns:
            bool [n].

        Raises:
            ValueError: rows that do not exist.
        """
        _check_rows("sentences", sentences, len(self.said))
        _check_rows("photos", photos, len(self.scenes))
        words = self._words[self.said[sentences]]
        return np.asarray(self._shown[words, photos[:, None]].all(axis=1))

    def fits(self, sentences: Rows, photos: Rows) -> npt.NDArray[np.int8]:
        """Whether all that a sentence says fits a thing that a photo shows, as in the photo's own frame.

        So "left" is the left of that photo, "leftmost" needs others of which the thing is the first, and a landmark
        must be the only one of its kind there.

        Args:
            sentences, photos: rows, integer [n] each.

        Returns:
            int8 [n]: 1 yes, 0 unsure (people would differ), -1 no.

        Raises:
            ValueError: rows that do not exist.
        """
        answer = np.full(len(sentences), NO, np.int8)
        likely = np.flatnonzero(self.fits_words(sentences, photos))
        pairs = self.said[sentences[likely]] * np.int64(len(self.scenes)) + photos[likely, None]
        distinct, place = np.unique(pairs.ravel(), return_inverse=True)
        judged = [self._judged(*divmod(pair, len(self.scenes))) for pair in distinct.tolist()]
        answer[likely] = np.array(judged, np.int8)[place].reshape(-1, 2).min(axis=1)
        return answer

    def _judged(self, expression: int, photo: int) -> int:
        scene, said = self.scenes[photo], self.expressions[expression]
        return max((fits(scene, i, said) for i in self.seen[photo]), default=NO)

    @cached_property
    def _words(self) -> npt.NDArray[np.int32]:
        """int32 [expressions], rows of ``_shown``."""
        return np.array([_word_row(e.kind, e.colour, e.size) for e in self.expressions], np.int32)

    @cached_property
    def _shown(self) -> npt.NDArray[np.bool_]:
        """bool [kinds x colours x sizes, photos]: which descriptions fit a thing that a photo shows."""
        every = enumerate(zip(self.scenes, self.seen, strict=True))
        things = [(scene.things[i], photo) for photo, (scene, seen) in every for i in seen]
        rows = [(_KIND[thing.kind], _COLOUR[thing.colour], _SIZE[thing.size], photo) for thing, photo in things]
        kind, colour, size, photo = np.array(rows, np.int64).reshape(-1, 4).T
        shown = np.zeros((len(KINDS), len(COLOURS) + 1, len(SIZES) + 1, len(self.scenes)), bool)
        any_colour, any_size = np.full_like(colour, len(COLOURS)), np.full_like(size, len(SIZES))
        for its_colour, its_size in itertools.product((colour, any_colour), (size, any_size)):
            shown[kind, its_colour, its_size, photo] = True
        return shown.reshape(-1, len(self.scenes))

    def _found(
        self, what: str, dataset: Dataset, ids: npt.NDArray[np.int64], wanted: npt.NDArray[np.int64]
    ) -> npt.NDArray[np.int64]:
        """The row of each id that is wanted."""
        order = np.argsort(ids, kind="stable")
        place = np.minimum(np.searchsorted(ids[order], wanted), len(ids) - 1)
        rows: npt.NDArray[np.int64] = order[place]
        if (missing := ids[rows] != wanted).any():
            raise AnnotationError(
                f"{self.path} does not have {missing.sum():,} of the {len(wanted):,} {what}s of {dataset.path}, such "
                f"as that with the id {wanted[missing.argmax()]}. {REMEDY}"
            )
        return rows

    def _another(self, what: str, dataset: Dataset, id: int) -> AnnotationError:
        return AnnotationError(
            f"{self.path} is of a different data set than {dataset.path}: its {what} {id} is not the same. {REMEDY}"
        )


_KIND, _COLOUR, _SIZE = ({name: i for i, name in enumerate(names)} for names in (KINDS, COLOURS, SIZES))


def _word_row(kind: str, colour: str | None, size: str | None) -> int:
    """The row of a description; the last colour and the last size stand for any."""
    its_colour = len(COLOURS) if colour is None else _COLOUR[colour]
    its_size = len(SIZES) if size is None else _SIZE[size]
    return (_KIND[kind] * (len(COLOURS) + 1) + its_colour) * (len(SIZES) + 1) + its_size


def _check_rows(name: str, rows: Rows, count: int) -> None:
    if len(rows) and not (rows.min() >= 0 and rows.max() < count):
        raise ValueError(f"{name} must be rows from 0 to {count - 1}, not from {rows.min()} to {rows.max()}")
