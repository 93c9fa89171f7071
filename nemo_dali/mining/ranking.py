"""Ranking: for each sentence the photos most similar to it, exactly, in blocks of any size and on any device.

    text_embedding [S, D] ──┐ matrix product   scores [b, P]   exact similarities
    image_embedding [M, D] ─┴───────────────▶ proposed only ──▶ of the best ──▶ neighbors, similarity [b, N]

What is multiplied where changes no byte of the result: see ``kernels.ranking.topk``.
"""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from nemo_dali.io.threads import thread_count
from nemo_dali.mining._precision import exact_float32

if TYPE_CHECKING:
    import torch

    from nemo_dali.kernels.ranking.ranking import Ranking
    from nemo_dali.kernels.ranking.rules import Rules

F32 = npt.NDArray[np.float32]
I32 = npt.NDArray[np.int32]

BLOCK_BYTES = 64 << 20  # of similarities held at once: a thousand sentences against 17,000 photos
BLOCK_PHOTOS = 1 << 17  # at most, so that a block of very many photos still has enough rows for a fast matrix product
CHECKED_ROWS = 1 << 16  # checked at a time, for NaN and for lengths


class RankedBlock(NamedTuple):
    """The ranking for the sentences from row ``begin`` on; N = min(depth, M - 1)."""

    begin: int
    neighbors: I32  # [b, N], -1 after the last
    similarity: F32  # [b, N], -inf after the last
    own_rank: I32  # [b], the own photo's place among all M, from 1


@dataclass(frozen=True, eq=False, kw_only=True)
class Excluded:
    """Which photos a sentence does not get, apart from its own.

    Attributes:
        never: bool [M], photos that no sentence gets; None: there are none.
        twins: int32 [M], equal for photos of the same content: a sentence does not get copies of its own photo; None:
            there are no copies.
        shown: bool [M, C], which categories a photo shows; None: categories do not matter.
        category: int32 [S], the target's category, a column of ``shown``: photos that show it are left out; -1 unknown.
        similar_above: photos more similar than this to the sentence's own photo are left out; None: none.
        siblings_above: photos more similar than this to another sentence of the same ref are left out; None: none.
        crops_margin: photos with a crop less than this below the best crop of the sentence's own photo, in similarity
            to the sentence, are left out; None: none.
    """

    never: npt.NDArray[np.bool_] | None = None
    twins: I32 | None = None
    shown: npt.NDArray[np.bool_] | None = None
    category: I32 | None = None
    similar_above: float | None = None
    siblings_above: float | None = None
    crops_margin: float | None = None


def first_not_finite(array: F32) -> int | None:
    """The first row that holds NaN or infinity."""
    for begin in range(0, len(array), CHECKED_ROWS):
        bad = ~np.isfinite(array[begin : begin + CHECKED_ROWS]).all(axis=1)
        if bad.any():
            return begin + int(bad.argmax())
    return None


class Ranker:
    """Ranks the photos for any sentences of a data set.

    Args:
        text_embedding: float32 [S, D] of unit length.
        image_embedding: float32 [M, D] of unit length, M >= 2.
        own_image: integer [S], the photo row that a sentence belongs to.
        depth: photos kept per sentence; there are at most M - 1.
        ref: integer [S], ascending: the ref that a sentence belongs to, whose sentences share photo and category; None:
            each has its own.
        excluded: further photos that sentences do not get.
        crop_embedding: float32 [M * C, D] of unit length, C crops of each photo, for ``crops_margin``.
        device: "cpu", or a CUDA device for the matrix products.
        threads: those that select photos; None: the cores this process may use.

    Raises:
        ValueError: arrays of other shapes, out of range or not finite.
    """

    def __init__(
        self,
        text_embedding: F32,
        image_embedding: F32,
        own_image: npt.ArrayLike,
        *,
        depth: int,
        ref: npt.ArrayLike | None = None,
        excluded: Excluded | None = None,
        crop_embedding: F32 | None = None,
        device: "str | torch.device" = "cpu",
        threads: int | None = None,
    ) -> None:
        text, image, own = text_embedding, image_embedding, np.asarray(own_image)
        sentences, photos = len(text), len(image)
        if photos < 2:
            raise ValueError(f"image_embedding ({photos} photos) must have at least 2")
        if depth < 1:
            raise ValueError(f"depth ({depth}) must be at least 1")
        if text.ndim != 2 or image.ndim != 2 or text.shape[1] != image.shape[1] or own.shape != (sentences,):
            raise ValueError(
                f"text_embedding {text.shape}, image_embedding {image.shape} and own_image {own.shape} must be "
                "[S, D], [M, D] and [S]"
            )
        if sentences and not (own.min() >= 0 and own.max() < photos):
            raise ValueError(f"own_image ({own.min()} to {own.max()}) must be rows of {photos} photos")
        for name, array in (("text_embedding", text), ("image_embedding", image)):
            if (row := first_not_finite(array)) is not None:
                raise ValueError(f"{name} (row {row}) must be finite")
        if ref is not None and (np.diff(own)[np.diff(ref) == 0] != 0).any():
            raise ValueError("own_image (of sentences of one ref) must be equal")
        self.depth = min(depth, photos - 1)
        self._text, self._image = (padded(array) for array in (text, image))
        self._own = own.astype(np.int32)
        self._ref = np.arange(sentences) if ref is None else np.asarray(ref)
        self._excluded = excluded = excluded or Excluded()
        self._shown = None if excluded.shown is None else _as_bits(excluded.shown)
        self._crop = np.empty((0, self._image.shape[1]), np.float32)
        if excluded.crops_margin is not None:
            shape = None if crop_embedding is None else crop_embedding.shape
            if crop_embedding is None or len(crop_embedding) % photos or shape != (len(crop_embedding), image.shape[1]):
                raise ValueError(f"crop_embedding {shape} must be [M * C, D] for crops_margin")
            self._crop = padded(crop_embedding)
        self._lengths = _longest(self._text), max(_longest(self._image), _longest(self._crop))
        self.threads = threads or thread_count()
        self._product = _Product(self._image, device)
        crops = len(self._crop) // photos
        self._crop_products = [_Product(self._crop[place::crops], device) for place in range(crops)]

    def blocks(self, *, begin: int = 0, most_rows: int | None = None) -> list[tuple[int, int]]:
        """Where blocks of whole refs begin and end, from a sentence on.

        Args:
            begin: the first sentence of a ref.
            most_rows: sentences in a block, unless one ref has more; None: as many as make ``BLOCK_BYTES``.
        """
        rows = most_rows or max(1, BLOCK_BYTES // (4 * min(len(self._image), BLOCK_PHOTOS)))
        ends = np.flatnonzero(np.diff(self._ref, append=-1)) + 1  # of refs
        blocks = []
        while begin < len(self._text):
            next_ref, last_fitting = np.searchsorted(ends, [begin, begin + rows], side="right") - [0, 1]
            end = int(ends[max(next_ref, last_fitting)])
            blocks.append((begin, end))
            begin = end
        return blocks

    def rank(self, begin: int, end: int) -> RankedBlock:
        """Rank all photos for the sentences of whole refs, rows [begin, end)."""
        from nemo_dali.kernels.ranking.ranking import slack_of

        photos, width = self._image.shape
        text, own = self._text[begin:end], self._own[begin:end]
        own_photos, own_row = np.unique(own, return_inverse=True)
        bound = self._excluded.similar_above
        slack = slack_of(max(self._lengths), self._lengths[1], width)
        with ThreadPoolExecutor(self.threads) as pool:
            ranking, groups = self._begin(begin, end, pool)
            above = self._crops_above(ranking)
            step = min(photos, BLOCK_PHOTOS)
            for first in range(0, photos, step):
                last = min(first + step, photos)
                rules = self._rules(begin, groups, first, last)
                if above is not None:
                    rules = self._crop_rules(rules, text, above, first, last)
                if bound is not None:
                    rules = rules._replace(
                        similar=self._product(self._image[own_photos], first, last),
                        similar_row=own_row[groups[:-1]].astype(np.int32),
                        similar_image=self._image[own_photos],
                        similar_above=float(bound),
                    )
                ranking.take(self._product(text, first, last), first, slack, rules)
            return RankedBlock(begin, *ranking.result())

    def rank_among(self, begin: int, end: int, candidates: npt.NDArray[np.int64]) -> RankedBlock:
        """Rank only given photos for sentences, rows [begin, end) of whole refs.

        Args:
            candidates: int64 [end - begin, C], distinct photo rows, -1 where there is none.

        Returns:
            Like ``rank``; ``own_rank`` counts among the candidates.
        """
        with ThreadPoolExecutor(self.threads) as pool:
            ranking, groups = self._begin(begin, end, pool)
            rules = self._rules(begin, groups, 0, len(self._image))
            if self._excluded.similar_above is not None:
                rules = rules._replace(similar_above=float(self._excluded.similar_above))
            if (above := self._crops_above(ranking)) is not None:
                rules = rules._replace(crop=self._crop, best_above=above)
            ranking.take_candidates(candidates, rules)
            return RankedBlock(begin, *ranking.result())

    def near_identical(self, bound: float, *, most: int) -> tuple[int, int]:
        """How many photos are at least this similar to another of different content, and how many were looked at.

        Args:
            bound: the least cosine of the two.
            most: photos to look at, evenly spread, each compared with all others.
        """
        photos, twins = len(self._image), self._excluded.twins
        rows = np.unique(np.linspace(0, photos - 1, min(photos, most)).astype(np.int64))
        content = np.arange(photos) if twins is None else twins
        step, found = max(1, BLOCK_BYTES // (4 * min(photos, BLOCK_PHOTOS))), np.zeros(len(rows), bool)
        for first in range(0, photos, BLOCK_PHOTOS):
            last = min(first + BLOCK_PHOTOS, photos)
            for begin in range(0, len(rows), step):
                some = rows[begin : begin + step]
                near = self._product(self._image[some], first, last) >= bound
                near &= content[some, None] != content[first:last]
                found[begin : begin + step] |= near.any(axis=1)
        return int(found.sum()), len(rows)

    def _begin(self, begin: int, end: int, pool: ThreadPoolExecutor) -> "tuple[Ranking, npt.NDArray[np.int64]]":
        """A ranking without photos, and where its groups begin."""
        from nemo_dali.kernels.ranking.ranking import Ranking

        starts = np.flatnonzero(np.diff(self._ref[begin:end], prepend=-1))
        groups = np.append(starts, end - begin).astype(np.int64)
        text, own = np.ascontiguousarray(self._text[begin:end]), self._own[begin:end]
        ranking = Ranking(text, self._image, own, groups, depth=self.depth, pool=pool, threads=self.threads)
        return ranking, groups

    def _crops_above(self, ranking: "Ranking") -> npt.NDArray[np.float64] | None:
        """float64 [rows]: photos with a crop more similar than this are left out; None: none are."""
        if (margin := self._excluded.crops_margin) is None:
            return None
        return ranking.own_bests(self._crop, len(self._crop_products)).astype(np.float64) - margin

    def _crop_rules(self, rules: "Rules", text: F32, above: npt.NDArray[np.float64], first: int, last: int) -> "Rules":
        """Add what ``crops_margin`` excludes of the photos from row ``first`` to ``last``."""
        count, (product, *others) = len(self._crop_products), self._crop_products
        best = product(text, first, last)
        for product in others:
            np.maximum(best, product(text, first, last), out=best)
        return rules._replace(crop=self._crop[first * count : last * count], best=best, best_above=above)

    def _rules(self, begin: int, groups: npt.NDArray[np.int64], first: int, last: int) -> "Rules":
        """What is excluded of the photos from row ``first`` to ``last``, except for similar ones."""
        from nemo_dali.kernels.ranking.rules import no_rules

        excluded, rules = self._excluded, no_rules()
        if excluded.never is not None:
            rules = rules._replace(never=excluded.never[first:last].view(np.uint8))
        if excluded.twins is not None:
            own = self._own[begin + groups[:-1]]
            rules = rules._replace(twin=excluded.twins[first:last], own_twin=excluded.twins[own])
        if self._shown is not None and excluded.category is not None:
            rules = rules._replace(
                shown=self._shown[first:last], category=excluded.category[begin + groups[:-1]].astype(np.int32)
            )
        if excluded.siblings_above is not None:
            rules = rules._replace(siblings_above=float(excluded.siblings_above))
        return rules


def rank(text_embedding: F32, image_embedding: F32, own_image: npt.ArrayLike, *, depth: int) -> tuple[I32, F32]:
    """Exact top-N of all photos but the own one, for each sentence; equal similarities go to the lower row.

    Args:
        text_embedding: float32 [S, D] of unit length.
        image_embedding: float32 [M, D] of unit length, M >= 2.
        own_image: integer [S], the photo row that a sentence belongs to.
        depth: photos per sentence; there are at most M - 1.

    Returns:
        ``(neighbors int32 [S, N], similarity float32 [S, N])``, N = min(depth, M - 1), most similar first.
    """
    ranker = Ranker(text_embedding, image_embedding, own_image, depth=depth)
    blocks = [ranker.rank(*block) for block in ranker.blocks()]
    return np.concatenate([b.neighbors for b in blocks]), np.concatenate([b.similarity for b in blocks])


def padded(array: F32) -> F32:
    """Pad rows with zeros, which change no sum, as the kernel takes multiples of 32."""
    missing = -array.shape[1] % 32
    return np.ascontiguousarray(np.pad(array, ((0, 0), (0, missing))) if missing else array, np.float32)


def _as_bits(shown: npt.NDArray[np.bool_]) -> npt.NDArray[np.uint64]:
    """uint64 [M, ceil(C / 64)]: bit c % 64 of word c // 64 is category c."""
    photos, categories = shown.shape
    padded = np.zeros((photos, max(-(-categories // 64), 1) * 64), bool)
    padded[:, :categories] = shown
    return np.packbits(padded, axis=1, bitorder="little").view("<u8").astype(np.uint64)


def _longest(array: F32) -> float:
    """The largest Euclidean length of a row."""
    longest = 0.0
    for begin in range(0, len(array), CHECKED_ROWS):
        rows = array[begin : begin + CHECKED_ROWS]
        longest = max(longest, float(np.sqrt(np.einsum("ij,ij->i", rows, rows).max())))
    return longest


class _Product:
    """Matrix products with blocks of photos, float32 without shortcuts."""

    def __init__(self, image: F32, device: "str | torch.device") -> None:
        self._image, self._device = image, str(device)
        self._kept: tuple[tuple[int, int], Any] | None = None  # the block that is on the device

    def __call__(self, left: F32, first: int, last: int) -> F32:
        """float32 [R, last - first]: ``left`` [R, D] times the photos from row ``first`` to ``last``."""
        if self._device == "cpu":
            product: F32 = left @ self._image[first:last].T
            return product
        import torch

        if self._kept is None or self._kept[0] != (first, last):
            self._kept = (first, last), torch.from_numpy(np.array(self._image[first:last])).to(self._device)
        with exact_float32():
            scores = torch.from_numpy(np.array(left)).to(self._device) @ self._kept[1].T
        on_host: F32 = scores.cpu().numpy()
        return on_host
