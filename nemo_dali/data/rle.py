"""COCO's masks ▸ run lengths: down the columns, beginning with a (possibly empty) run of background."""

from typing import Any

import numpy as np
import numpy.typing as npt
from pycocotools import mask as coco_mask

MAX_OUTLINE = (
    4_000_000  # pixels along a polygon: pycocotools takes 40 bytes for each, and does not check that it got them
)
_NUMBERS = frozenset({int, float})  # text among them would make every element of an array as wide as the longest
MAX_COUNT_CHARACTERS = 7  # a difference of two uint32 in groups of five bits


def run_lengths(segmentation: Any, *, width: int, height: int) -> npt.NDArray[np.uint32]:
    """Run lengths of one annotation's mask: polygons, or run lengths as a list or a compressed string; several merged.

    Args:
        segmentation: COCO's ``segmentation``, or RefCLEF's, a list of run lengths. Polygons of fewer than three points
            hold no pixel and are left out.
        width, height: the photo's size in pixels.

    Returns:
        uint32 [runs], down the columns, background first; they add up to ``width * height``.

    Raises:
        ValueError: it is neither, is of another size, or does not add up.
    """
    if isinstance(segmentation, dict):
        return _checked_counts(segmentation, width=width, height=height)
    if not isinstance(segmentation, list) or not segmentation:
        raise ValueError("it is neither a list of polygons nor run lengths")
    if any(isinstance(part, dict) for part in segmentation):
        if not all(isinstance(part, dict) for part in segmentation):
            raise ValueError("it mixes polygons and run lengths")
        return union(
            [_checked_counts(part, width=width, height=height) for part in segmentation], width=width, height=height
        )
    parts = [_polygon(part, width=width, height=height) for part in segmentation]
    parts = [part for part in parts if len(part) >= 6]
    if not parts:
        raise ValueError("none of its polygons has three points")
    merged = coco_mask.merge(coco_mask.frPyObjects(parts, height, width))
    return decode_counts(merged["counts"]).astype(np.uint32)


def union(masks: list[npt.NDArray[np.uint32]], *, width: int, height: int) -> npt.NDArray[np.uint32]:
    """Run lengths of the union of masks.

    Args:
        masks: at least one, uint32 [runs] each, that add up to ``width * height``.
    """
    if len(masks) == 1:
        return masks[0]
    size = [height, width]
    parts = [coco_mask.frPyObjects({"size": size, "counts": runs.tolist()}, height, width) for runs in masks]
    return decode_counts(coco_mask.merge(parts)["counts"]).astype(np.uint32)


def of_pixels(mask: npt.NDArray[np.bool_]) -> npt.NDArray[np.uint32]:
    """Run lengths of a mask given by its pixels, bool [height, width]."""
    down_columns = mask.ravel(order="F")
    edges = np.flatnonzero(down_columns[1:] != down_columns[:-1]) + 1
    runs = np.diff(edges, prepend=0, append=down_columns.size)
    return np.concatenate([[0] if down_columns[0] else [], runs]).astype(np.uint32)


def area(runs: npt.NDArray[np.uint32]) -> int:
    """How many pixels a mask covers."""
    return int(runs[1::2].sum(dtype=np.int64))


def _polygon(part: Any, *, width: int, height: int) -> npt.NDArray[np.float64]:
    if not isinstance(part, list) or not _NUMBERS.issuperset(map(type, part)) or len(part) % 2:
        raise ValueError("a polygon is not a flat list of x and y")
    if not part:
        return np.empty(0)
    numbers = np.asarray(part)
    if numbers.dtype.kind not in "iuf":  # a number that no 64-bit type holds
        raise ValueError("a polygon is not a flat list of x and y")
    points = numbers.astype(np.float64).reshape(-1, 2)
    size = np.array([width, height])
    if not ((-size <= points) & (points <= 2 * size)).all():  # false for NaN too
        raise ValueError("a polygon reaches more than a photo's size beyond its border")
    if np.abs(points - np.roll(points, 1, axis=0)).max(axis=1).sum() > MAX_OUTLINE:
        raise ValueError(f"a polygon's outline is longer than {MAX_OUTLINE:,} pixels")
    return points.ravel()


def _checked_counts(rle: dict[Any, Any], *, width: int, height: int) -> npt.NDArray[np.uint32]:
    size, counts = rle.get("size"), rle.get("counts")
    if size != [height, width]:
        raise ValueError(f"its run lengths are not for the photo's {width}x{height} pixels")
    if isinstance(counts, str):
        counts = counts.encode("ascii", "replace")
    if isinstance(counts, bytes):
        runs = decode_counts(counts)
    elif isinstance(counts, list) and set(map(type, counts)) == {int}:
        runs = np.asarray(counts)
    else:
        raise ValueError("its run lengths are not a list of whole numbers within the photo")
    if runs.dtype.kind not in "iu" or runs.min(initial=0) < 0 or runs.max(initial=0) > width * height:
        raise ValueError("its run lengths are not a list of whole numbers within the photo")
    if int(runs.sum(dtype=np.int64)) != width * height:
        raise ValueError(f"its run lengths do not add up to the photo's {width * height} pixels")
    return runs.astype(np.uint32)


def decode_counts(compressed: bytes) -> npt.NDArray[np.int64]:
    """Run lengths from COCO's compressed form.

    A number is written in groups of five bits, the lowest first, as characters from '0' on; 32 marks that more follow,
    16 in the last group is the sign. From the fourth on, a number is the difference from the one two places before it.

    Raises:
        ValueError: a character out of range, or the last number is cut short.
    """
    groups = np.frombuffer(compressed, np.uint8).astype(np.int64) - ord("0")
    if groups.min(initial=0) < 0 or groups.max(initial=0) > 63 or (len(groups) and groups[-1] & 32):
        raise ValueError("its compressed run lengths are damaged")
    last = np.flatnonzero(groups & 32 == 0)
    length = np.diff(last, prepend=-1)
    if length.max(initial=0) > MAX_COUNT_CHARACTERS:
        raise ValueError("its compressed run lengths are damaged")
    first = last - length + 1
    place = np.arange(len(groups)) - np.repeat(first, length)
    counts: npt.NDArray[np.int64] = np.zeros(len(first), np.int64)
    if len(first):
        counts[:] = np.add.reduceat((groups & 31) << (5 * place), first)
    counts -= (groups[last] >> 4 & 1) << (5 * length)
    counts[1::2] = np.cumsum(counts[1::2])
    counts[2::2] = np.cumsum(counts[2::2])
    return counts
