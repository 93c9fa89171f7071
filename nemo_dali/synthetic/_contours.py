"""Masks as polygons along the edges of their pixels, which COCO's rules rasterise to the same mask again."""

import numpy as np
import numpy.typing as npt

Mask = npt.NDArray[np.bool_]  # [H, W]


def traced(mask: Mask) -> list[list[float]]:
    """The mask as COCO's polygons: x, y, x, y, ... of each part.

    Parts that touch only at a corner are separate. COCO's polygons have no holes: a part with one is cut in two where
    the hole begins.
    """
    loops = _loops(mask)
    hole = next((loop for loop in loops if _area(loop) < 0), None)
    if hole is None:
        return [[float(value) for corner in loop for value in corner] for loop in loops]
    edge = min(x for x, _ in hole)
    left, right = mask.copy(), mask.copy()
    left[:, edge:], right[:, :edge] = False, False
    return traced(left) + traced(right)


def _loops(mask: Mask) -> list[list[tuple[int, int]]]:
    """The corners of every closed line between the mask and the rest, in the order that keeps the mask on the right."""
    inside = np.pad(mask, 1)
    here, above, before = inside[1:, 1:], inside[:-1, 1:], inside[1:, :-1]
    ways: dict[tuple[int, int], set[tuple[int, int]]] = {}  # from a point, the steps to the next ones
    for edges, (x, y), step in (
        (here & ~above, (0, 0), (1, 0)),
        (~here & above, (1, 0), (-1, 0)),
        (~here & before, (0, 0), (0, 1)),
        (here & ~before, (0, 1), (0, -1)),
    ):
        for row, column in np.argwhere(edges).tolist():
            ways.setdefault((column + x, row + y), set()).add(step)
    loops = []
    while ways:
        point = first = next(iter(ways))
        begun = step = next(iter(ways[first]))
        loop = [first]
        while True:
            ways[point].remove(step)
            if not ways[point]:
                del ways[point]
            point = (point[0] + step[0], point[1] + step[1])
            right = (-step[1], step[0])
            if point == first and (right == begun or point not in ways):
                break
            on = right if right in ways[point] else next(iter(ways[point]))  # right, where two parts touch
            if on != step:
                loop.append(point)
            step = on
        loops.append(loop)
    return loops


def _area(loop: list[tuple[int, int]]) -> int:
    """Twice the area of a polygon; negative around a hole."""
    return sum(x * v - u * y for (x, y), (u, v) in zip(loop, loop[1:] + loop[:1], strict=True))
