"""What an encoder sees: a data set's photos and its distinct sentences, in micro-batches."""

from collections.abc import Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from copy import copy
from itertools import chain, groupby, islice
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

from nemo_dali._checks import short_repr
from nemo_dali.data.dataset import Dataset
from nemo_dali.errors import NemoError
from nemo_dali.mining.clip import Clip
from nemo_dali.mining.crops import CROPS, crop_box
from nemo_dali.pipeline.graphs import StreamPipeline
from nemo_dali.pipeline.overlap import Fed, in_flight
from nemo_dali.pipeline.paths import encode_path
from nemo_dali.text.tokens import encode, too_long

if TYPE_CHECKING:
    import torch

F32 = npt.NDArray[np.float32]
U8 = npt.NDArray[np.uint8]
DECODED = 16  # photos that DALI decodes together, at least; at 12 megapixels each they take 0.6 GB of memory


class Inputs(Protocol):
    """What an encoder sees, in the order in which it is cut into micro-batches."""

    what: str
    unit: str
    rows: int

    def batches(self, numbers: Sequence[int]) -> Generator[Any, None, None]:
        """The micro-batches with these numbers, filled up."""
        ...

    def encode(self, batch: Any) -> "torch.Tensor":
        """Features [batch size, D], of any length."""
        ...

    def name(self, row: int) -> str:
        """What to call a row in messages."""
        ...

    def place(self, vectors: F32, begin: int, embedding: F32) -> None:
        """Put the vectors of the rows from ``begin`` on where they belong in an embedding."""
        ...


class Photos:
    """A data set's photos, read and decoded by DALI, as the model's own preprocessing gives them.

    Args:
        clip: the model.
        dataset: whose photos.
        batch_size: photos of a micro-batch.
        num_threads: threads of DALI, and as many for the preprocessing.
    """

    what, unit = "embedding photos", "photo"
    of_each = 1  # rows of a photo

    def __init__(self, clip: Clip, dataset: Dataset, *, batch_size: int, num_threads: int) -> None:
        self._clip, self._dataset = clip, dataset
        self._batch_size, self._num_threads = batch_size, num_threads
        self.rows = len(dataset.images.id) * self.of_each

    def batches(self, numbers: Sequence[int]) -> Generator[Any, None, None]:
        """float32 [batch size, 3, size, size] each.

        Raises:
            PhotoError: a photo is missing, cannot be decoded or has changed its size.
        """
        import torch

        size = self._batch_size
        rows = [row for n in numbers for row in range(n * size, min((n + 1) * size, self.rows))]
        with closing(self._preprocessed(rows)) as photos:
            for _ in numbers:
                batch = list(islice(photos, size))
                yield torch.stack(batch + batch[-1:] * (size - len(batch)))

    def _preprocessed(self, rows: list[int]) -> Generator[Any, None, None]:
        if not rows:
            return
        dataset, count = self._dataset, max(DECODED, 4 * self._num_threads)
        wanted = {photo: list(its) for photo, its in groupby(rows, lambda row: row // self.of_each)}
        photos_of = [*wanted]
        batches = [photos_of[i : i + count] for i in range(0, len(photos_of), count)]
        prefetch = min(2, len(batches))
        turns = bool((dataset.turn > 1).any())
        pipeline = _PhotoPipeline(max_cells=count, num_threads=self._num_threads, prefetch=prefetch, turns=turns)
        sizes = np.stack([dataset.images.height, dataset.images.width], axis=1)

        def fed(batch: list[int]) -> Fed[list[int]]:
            paths = [encode_path(dataset.photo_path(row)) for row in batch]
            return Fed(paths, sizes[batch], batch, dataset.turn[batch] if turns else None)

        def check(batch: list[int], photos: list[U8]) -> None:
            if (np.array([photo.shape[:2] for photo in photos]) != sizes[batch]).any():
                raise dataset.batch_error(batch, "a photo has a different size than annotated")

        made = in_flight(pipeline, map(fed, batches), prefetch=prefetch, land=check, failed=dataset.batch_error)
        with closing(pipeline), ThreadPoolExecutor(self._num_threads) as pool:
            for batch, photos in made:
                seen = pool.map(self._seen, photos, [wanted[photo] for photo in batch])
                yield from chain.from_iterable(seen)

    def _seen(self, photo: U8, rows: list[int]) -> list[Any]:
        """What the model sees of a decoded photo, for its rows."""
        from PIL import Image

        return [self._clip.transform(Image.fromarray(photo))] * len(rows)

    def encode(self, batch: Any) -> "torch.Tensor":
        features: torch.Tensor = self._clip.network.encode_image(batch)
        return features

    def name(self, row: int) -> str:
        return self._dataset.photo_path(row // self.of_each)

    def place(self, vectors: F32, begin: int, embedding: F32) -> None:
        embedding[begin : begin + len(vectors)] = vectors


class Crops(Photos):
    """The crops of a data set's photos, photo by photo."""

    what, unit = "embedding crops of photos", "crop"
    of_each = CROPS

    def _seen(self, photo: U8, rows: list[int]) -> list[Any]:
        from PIL import Image

        image = Image.fromarray(photo)
        boxes = [crop_box(image.width, image.height, row % CROPS) for row in rows]
        return [self._clip.transform(image.crop(box)) for box in boxes]


class _PhotoPipeline(StreamPipeline[list[int]]):
    """Reads and decodes photos; ``wait`` gives them as uint8 [height, width, 3].

    ``feed`` takes as work the heights and widths that they should have, int32 [photos, 2].
    """

    def _write(self, encoded: Any) -> Any:
        return self._photos(encoded)

    def _feed(self, work: Any) -> None:
        pass

    def _photo_sizes(self, work: Any) -> Any:
        return work

    def _result(self, outputs: Any) -> Any:
        (photos,) = outputs
        return [np.array(photos.at(i)) for i in range(len(photos))]


class Sentences:
    """Distinct sentences, shortest first, so that a micro-batch needs few tokens.

    A text encoder that only looks at earlier tokens is given no more tokens than a micro-batch has: this is ten times
    as fast for generated sentences, and changes results only by rounding.

    Args:
        clip: the model.
        texts: of all sentences.
        batch_size: sentences of a micro-batch.

    Attributes:
        cut: sentences with more tokens than the model takes; only their first tokens are used.
        trims: whether micro-batches are given only as many tokens as they have.

    Raises:
        NemoError: a sentence has no text.
    """

    what, unit = "embedding sentences", "sentence"

    def __init__(self, clip: Clip, texts: Sequence[str], *, batch_size: int) -> None:
        self._clip, self._batch_size = clip, batch_size
        distinct: dict[str, int] = {}
        place = np.array([distinct.setdefault(text, len(distinct)) for text in texts])
        self._texts = list(distinct)
        for text in self._texts:
            if not text.strip():
                row = texts.index(text)
                raise NemoError(f"Sentence {row} of the data set has no text. Take it out of the annotations.")
        packed = encode(clip.tokenizer, self._texts)
        tokens, length = packed[:, :-1], packed[:, -1]
        longest = np.flatnonzero(length == tokens.shape[1])
        self.cut = [self._texts[longest[i]] for i in too_long(clip.tokenizer, [self._texts[row] for row in longest])]
        self._order = np.argsort(length, kind="stable")
        self._tokens, self._length = tokens[self._order], length[self._order]
        self.rows = len(distinct)
        # The sentences that share a distinct text: those of row r are sentence[first[r] : first[r + 1]].
        row_of = np.argsort(self._order)[place]
        self._sentence = np.argsort(row_of, kind="stable")
        self._row_of = row_of
        self._first = np.searchsorted(row_of[self._sentence], np.arange(self.rows + 1))
        self._shortened: dict[int, Any] = {}
        self.trims = _causal(clip.network)

    def batches(self, numbers: Sequence[int]) -> Generator[Any, None, None]:
        """int64 [batch size, tokens] each."""
        import torch

        for n in numbers:
            begin, end = n * self._batch_size, min((n + 1) * self._batch_size, self.rows)
            rows = np.minimum(np.arange(begin, begin + self._batch_size), self.rows - 1)
            length = int(self._length[end - 1]) if self.trims else self._tokens.shape[1]
            yield torch.from_numpy(self._tokens[rows, :length].astype(np.int64))

    def encode(self, batch: Any) -> "torch.Tensor":
        network, length = self._clip.network, batch.shape[1]
        if length < self._tokens.shape[1]:
            if length not in self._shortened:
                self._shortened[length] = _shortened(network, length)
            network = self._shortened[length]
        features: torch.Tensor = network.encode_text(batch)
        return features

    def name(self, row: int) -> str:
        return short_repr(self._texts[self._order[row]])

    def place(self, vectors: F32, begin: int, embedding: F32) -> None:
        rows = self._sentence[self._first[begin] : self._first[begin + len(vectors)]]
        embedding[rows] = vectors[self._row_of[rows] - begin]


def _causal(network: Any) -> bool:
    """Whether a text encoder only looks at earlier tokens and takes its output at the end token."""
    import open_clip

    return (
        type(network) is open_clip.CLIP
        and network.text_pool_type == "argmax"
        and network.attn_mask is not None
        and bool((network.attn_mask.triu(1)[network.attn_mask.triu(1) != 0] == float("-inf")).all())
    )


def _shortened(network: Any, length: int) -> Any:
    """The same network, with the same weights, for ``length`` tokens."""
    import torch

    short = copy(network)
    position = torch.nn.Parameter(network.positional_embedding[:length], requires_grad=False)
    short._parameters = network._parameters | {"positional_embedding": position}
    short._buffers = network._buffers | {"attn_mask": network.attn_mask[:length, :length]}
    return short
