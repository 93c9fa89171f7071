"""One or more data sets with their tables, as one: rows of photos, refs and sentences count across all of them."""

from collections.abc import Callable, Sequence
from functools import cached_property, partial
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from nemo_dali._checks import PathLike
from nemo_dali.data.columns import have_twins, twins
from nemo_dali.data.dataset import Dataset
from nemo_dali.loader.format import TextField
from nemo_dali.mining.ranking import padded
from nemo_dali.mining.table import NegativeTable
from nemo_dali.plan.part import Part
from nemo_dali.text.masking import Nouns, noun_runs
from nemo_dali.text.position_words import allowed_cells
from nemo_dali.text.tokens import Tokenizer, TokenRows, token_rows

T = TypeVar("T", bound=np.generic)


class Corpus:
    """The data behind a loader.

    Args:
        datasets: .ris.h5 files.
        tables: .neg.h5 files, one per data set in the same order, or none at all.
        images: image roots in place of the recorded ones, one per data set, None to keep it; or none at all.

    Attributes:
        photo_width, photo_height: int32 [photos], as annotated.
        photo_turn: uint8 [photos], see ``Dataset.turn``; None: no photo is to be turned.

    Raises:
        ValueError: lists of different lengths, or an image root that is an address but not s3://bucket/prefix.
        FileFormatError: a file is not what it should be, or a table was made for another data set.
    """

    def __init__(
        self, datasets: Sequence[PathLike], tables: Sequence[PathLike], images: Sequence[PathLike | None]
    ) -> None:
        if not datasets:
            raise ValueError("dataset ([]) must name at least one file")
        for name, given in (("negatives", tables), ("images", images)):
            if given and len(given) != len(datasets):
                raise ValueError(f"{name} ({len(given)} given) must be one per data set ({len(datasets)})")
        roots = images or [None] * len(datasets)
        self._made_of = (tuple(datasets), tuple(tables), tuple(images))
        self.datasets = [Dataset.open(path, images=root) for path, root in zip(datasets, roots, strict=True)]
        self.tables = [NegativeTable.open(path) for path in tables]
        for dataset, table in zip(self.datasets, self.tables, strict=False):
            table.check_dataset(dataset)
            table.warn_of_copies(dataset)
        self.photo_width = self._joined(lambda d: d.images.width)
        self.photo_height = self._joined(lambda d: d.images.height)
        turn = self._joined(lambda d: d.turn)
        self.photo_turn = turn if (turn > 1).any() else None
        self._ref_offset = np.cumsum([0, *(len(d.refs.ref_id) for d in self.datasets)])
        self._photo_offset = np.cumsum([0, *(len(d.images.id) for d in self.datasets)])
        self._sentence_offset = np.cumsum([0, *(len(d.sentences.ref) for d in self.datasets)])

    def __reduce__(self) -> Any:
        return Corpus, self._made_of  # addresses and mappings are this process's own

    def _joined(self, column: Callable[[Dataset], npt.NDArray[T]]) -> npt.NDArray[T]:
        return np.concatenate([column(dataset) for dataset in self.datasets])

    def _owner(self, offset: npt.NDArray[np.int64], row: int) -> tuple[Dataset, int]:
        """The data set that a row belongs to, and its row there."""
        owner = int(np.searchsorted(offset, row, side="right")) - 1
        return self.datasets[owner], row - int(offset[owner])

    @cached_property
    def ref_id(self) -> npt.NDArray[np.int64]:
        """int64 [refs], the publisher's ids."""
        return self._joined(lambda d: d.refs.ref_id)

    @cached_property
    def sent_id(self) -> npt.NDArray[np.int64]:
        """int64 [sentences], the publisher's ids."""
        return self._joined(lambda d: d.sentences.sent_id)

    @cached_property
    def empty(self) -> npt.NDArray[np.uint8]:
        """uint8 [refs], 1 where nothing in the photo fits the expressions."""
        return self._joined(lambda d: d.refs.empty)

    @cached_property
    def distractors(self) -> npt.NDArray[np.int32]:
        """int32 [refs], objects like the target in its photo; -1 where unknown."""
        return self._joined(lambda d: d.refs.distractors)

    @cached_property
    def category(self) -> npt.NDArray[np.int32]:
        """int32 [refs], rows of each data set's own categories; -1 where unknown."""
        return self._joined(lambda d: d.refs.category)

    @cached_property
    def category_id(self) -> npt.NDArray[np.int64]:
        """int64 [refs], the publisher's ids; -1 where unknown."""
        return self._joined(lambda d: np.append(d.category_id, -1)[d.refs.category])

    @cached_property
    def image_id(self) -> npt.NDArray[np.int64]:
        """int64 [photos], the publisher's ids."""
        return self._joined(lambda d: d.images.id)

    def fingerprints(self) -> dict[str, list[str]]:
        """Fingerprints of the files, in order."""
        return {
            "dataset": [dataset.fingerprint for dataset in self.datasets],
            "negatives": [table.fingerprint for table in self.tables],
        }

    def check_files(self) -> None:
        """Check whether a file was cut short while mapped; takes a microsecond each.

        Raises:
            FileFormatError: it was, and the next step might end the process.
        """
        for mapped in [dataset.mapped for dataset in self.datasets] + [table.mapped for table in self.tables]:
            mapped.check()

    def photo_path(self, row: int) -> str:
        """Path or address of a photo."""
        dataset, row = self._owner(self._photo_offset, row)
        return dataset.photo_path(row)

    def runs_of(self, row: int) -> npt.NDArray[np.uint32]:
        """A ref's run lengths, uint32 [n]."""
        dataset, row = self._owner(self._ref_offset, row)
        return dataset.runs_of(row)

    def runs_at(self, rows: npt.NDArray[np.integer[Any]]) -> tuple[npt.NDArray[np.uint64], npt.NDArray[np.int64]]:
        """Where the run lengths of refs are: their addresses, uint64 [n], and how many there are, int64 [n].

        Raises:
            FileFormatError: some are damaged.
        """
        address, count = np.empty(len(rows), np.uint64), np.empty(len(rows), np.int64)
        owner = np.searchsorted(self._ref_offset, rows, side="right") - 1
        for index, dataset in enumerate(self.datasets):
            theirs = owner == index
            refs = rows[theirs] - self._ref_offset[index]
            dataset.check_masks(refs)
            address[theirs] = dataset.rle_counts.ctypes.data + 4 * dataset.refs.rle_begin[refs].astype(np.uint64)
            count[theirs] = dataset.refs.rle_count[refs]
        return address, count

    def sentence(self, row: int) -> str:
        """A referring expression."""
        dataset, row = self._owner(self._sentence_offset, row)
        return dataset.sentences.text[row]

    def nouns(self, nouns: str | Nouns, *, text: TextField, context_length: int) -> npt.NDArray[np.int32]:
        """Runs of nouns, int32 [sentences, R, 2]: see ``text.noun_runs``."""
        made = [
            noun_runs(
                dataset.sentences.text if text == "sent" else dataset.sentences.raw,
                nouns=nouns,
                context_length=context_length,
                fingerprint=f"{dataset.fingerprint} {text}",
            )
            for dataset in self.datasets
        ]
        most = max(runs.shape[1] for runs in made)
        return np.concatenate([np.pad(runs, ((0, 0), (0, most - runs.shape[1]), (0, 0))) for runs in made])

    def source(self, row: int) -> str:
        """Where a ref came from, "" if the files do not say."""
        dataset, row = self._owner(self._ref_offset, row)
        return dataset.refs.source[row]

    def mask(self, row: int) -> npt.NDArray[np.uint8]:
        """uint8 [height, width] in {0, 1}: a ref's mask at its photo's size."""
        dataset, row = self._owner(self._ref_offset, row)
        return dataset.mask(row)

    def parts(self) -> list[Part]:
        """What the plan must know about each data set, whatever the policy."""
        parts = []
        for index, dataset in enumerate(self.datasets):
            table = self.tables[index] if self.tables else None
            content = twins(dataset.photo_files)
            by_category = table is not None and table.exclude_category
            parts.append(
                Part(
                    ref_image=dataset.refs.image,
                    empty=dataset.refs.empty,
                    sentence_begin=dataset.refs.sentence_begin,
                    sentence_count=dataset.refs.sentence_count,
                    sentences=len(dataset.sentences.ref),
                    sentence_ref=dataset.sentences.ref,
                    photos=len(dataset.images.id),
                    neighbors=table.neighbors if table else None,
                    similarity=table.similarity if table else None,
                    check_rows=table.check_rows if table else None,
                    excluded=table.excluded_photos if table else None,
                    category=dataset.refs.category if by_category else None,
                    shown=dataset.shown_categories() if by_category else None,
                    twins=content if have_twins(content).any() else None,
                    **_similar(table),
                    positional=partial(allowed_cells, dataset.sentences.text),
                )
            )
        return parts

    def tokens(
        self, tokenizer: str | Tokenizer, context_length: int | None, *, keep_end: bool = True, text: TextField = "sent"
    ) -> TokenRows:
        """The tokens of all sentences."""
        made = [
            token_rows(
                dataset.sentences.text if text == "sent" else dataset.sentences.raw,
                tokenizer=tokenizer,
                context_length=context_length,
                keep_end=keep_end,
                fingerprint=f"{dataset.fingerprint} {'text' if text == 'sent' else 'raw'}",
            )
            for dataset in self.datasets
        ]
        return made[0] if len(made) == 1 else TokenRows.joined(made)


def _similar(table: NegativeTable | None) -> dict[str, Any]:
    """What the plan needs to leave out photos similar to a ref's own."""
    if table is None or table.exclude_similar_photos is None:
        return {}
    table.check_embeddings("image_embedding")
    return {"embedding": padded(table.image_embedding), "similar_above": table.exclude_similar_photos}
