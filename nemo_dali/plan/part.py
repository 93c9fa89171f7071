"""What the plan must know about one data set."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from nemo_dali.errors import NemoError
from nemo_dali.kernels.plan.draws import Columns
from nemo_dali.kernels.plan.exclusions import Exclusions
from nemo_dali.plan.policy import MosaicPolicy

Samples = Literal["refs", "sentences", "first", "last"]


@dataclass(frozen=True, eq=False, kw_only=True)
class Part:
    """What the plan must know about one data set.

    Attributes:
        ref_image: int32 [refs], photo row of each ref.
        sentence_begin: int64 [refs], first sentence row of each ref.
        sentence_count: int32 [refs], at least 1: how many sentences, from that one on, are drawn from.
        sentences: how many there are in all.
        photos: number of photos.
        neighbors: int32 [sentences, N], photo rows by descending similarity, -1 where there is none; None: no table.
        similarity: float32 or float16 [sentences, N], -inf where there is none.
        check_rows: called with sentence rows, integer [n], and their own photos, integer [n]; raises if their
            candidates are damaged. None: they are trusted.
        empty: uint8 [refs], 1 where nothing in the photo fits the expressions.
        sentence_ref: int32 [sentences], the ref of each, where every sentence is a sample; None: every ref is one.
        excluded: bool [photos], those that are never negatives of any kind; None: none are. Rows of ``neighbors`` do
            not contain them.
        category: int32 [refs], the target's; photos that show it are not random negatives; -1: unknown; None: any may
            be.
        shown: bool [photos, categories], which a photo shows; given with ``category``.
        twins: int32 [photos], equal for photos with the same content, which are not negatives of each other; None: all
            differ.
        embedding: float32 [photos, D] of unit length, D a multiple of 32; given with ``similar_above``.
        similar_above: photos more similar than this to a ref's own are not its random negatives; None: any may be.
        positional: for grid 2 or 3, uint16 [sentences] with bit c set where a target in cell c keeps the expression
            true. None: not needed.
        cells: the same by grid, for the grids that need it; in others a target may be in any cell.
    """

    ref_image: npt.NDArray[np.int32]
    sentence_begin: npt.NDArray[np.int64]
    sentence_count: npt.NDArray[np.int32]
    sentences: int
    photos: int
    empty: npt.NDArray[np.uint8]
    sentence_ref: npt.NDArray[np.int32] | None = None
    neighbors: npt.NDArray[np.int32] | None = None
    similarity: npt.NDArray[Any] | None = None
    check_rows: Callable[[npt.NDArray[Any], npt.NDArray[Any]], None] | None = None
    excluded: npt.NDArray[np.bool_] | None = None
    category: npt.NDArray[np.int32] | None = None
    shown: npt.NDArray[np.bool_] | None = None
    twins: npt.NDArray[np.int32] | None = None
    embedding: npt.NDArray[np.float32] | None = None
    similar_above: float | None = None
    positional: Callable[[int], npt.NDArray[np.uint16]] | None = None
    cells: Mapping[int, npt.NDArray[np.uint16]] = field(default_factory=dict)

    def under(self, policy: MosaicPolicy, *, samples: Samples) -> "Part":
        """The same with what a policy needs; ``samples`` as in ``Loader``. ``sentence_ref`` must be given."""
        begin, count = self.sentence_begin, self.sentence_count
        if samples in ("first", "last"):
            begin, count = begin if samples == "first" else begin + count - 1, np.ones_like(count)
        grids = [grid for grid in (2, 3) if policy.target_cell == "positional" and policy.grids.get(grid, 0) > 0]
        return replace(
            self,
            sentence_begin=begin,
            sentence_count=count,
            sentence_ref=self.sentence_ref if samples == "sentences" else None,
            cells={grid: self.positional(grid) for grid in grids if self.positional is not None},
        )

    @property
    def length(self) -> int:
        """Samples of an epoch."""
        return len(self.ref_image if self.sentence_ref is None else self.sentence_ref)

    @property
    def excludes_by_ref(self) -> bool:
        """Whether the excluded photos depend on the ref, so that too few may be left for a mosaic."""
        return self.category is not None or self.similar_above is not None

    def columns(self) -> Columns:
        """What rows are drawn from, as the kernels take it."""
        nothing, anywhere = np.empty(0, np.int32), np.empty(0, np.uint16)
        neighbors, similarity = self.neighbors, self.similarity
        if neighbors is None or similarity is None:
            neighbors, similarity = np.empty((0, 0), np.int32), np.empty((0, 0), np.float32)
        if similarity.dtype == np.float16:
            similarity = similarity.view(np.uint16)  # the kernels widen it: Numba has no float16 on the CPU
        return Columns(
            ref_image=self.ref_image,
            empty=self.empty,
            sentence_begin=self.sentence_begin,
            sentence_count=self.sentence_count,
            sentence_ref=nothing if self.sentence_ref is None else self.sentence_ref,
            photos=self.photos,
            neighbors=neighbors,
            similarity=similarity,
            cells2=self.cells.get(2, anywhere),
            cells3=self.cells.get(3, anywhere),
        )

    def exclusions(self) -> Exclusions:
        """The rules for random negatives, as the kernels take them."""
        allowed = np.empty(0, np.int32)
        if self.excluded is not None and self.excluded.any():
            allowed = np.flatnonzero(~self.excluded).astype(np.int32)
        begin, shown = np.zeros(1, np.int64), np.empty(0, np.int32)
        if self.shown is not None:
            category, place = np.nonzero((self.shown[allowed] if allowed.size else self.shown).T)
            begin = np.searchsorted(category, np.arange(self.shown.shape[1] + 1))
            shown = place.astype(np.int32)
        return Exclusions(
            allowed=allowed,
            category=np.empty(0, np.int32) if self.category is None else self.category,
            begin=begin,
            shown=shown,
            twins=np.empty(0, np.int32) if self.twins is None else self.twins,
            embedding=np.empty((0, 0), np.float32) if self.embedding is None else self.embedding,
            similar_above=np.inf if self.similar_above is None else float(self.similar_above),
        )

    def check_photos(self, policy: MosaicPolicy) -> None:
        """Refuse a data set with too few photos for a policy's mosaics.

        Raises:
            NemoError: saying why they are too few.
        """
        need = policy.most_negatives
        mosaic = f"A {policy.largest_grid}x{policy.largest_grid} mosaic needs {need + 1} photos"
        remedy = "use more photos or a smaller grid, or p_mined=0 and p_random=0."
        if self.photos <= need:
            raise NemoError(f"{mosaic}, but a data set has {self.photos}. {remedy.capitalize()}")
        allowed = np.ones(self.photos, bool) if self.excluded is None else ~self.excluded
        left = int(allowed.sum())
        if left <= need > 0:
            raise NemoError(
                f"{mosaic}, but a negative table excludes {self.photos - left} of its data set's {self.photos}. Mine "
                f"it with fewer exclusions, {remedy}"
            )
        if self.twins is not None and left:
            most = int(np.bincount(self.twins[allowed]).max())
            if left - most < need:
                raise NemoError(
                    f"{mosaic}, but of the {left} that a data set has {most} are one and the same. "
                    f"{remedy.capitalize()}"
                )
