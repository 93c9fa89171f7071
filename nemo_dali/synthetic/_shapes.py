"""The things in generated photos: each kind as a handful of polygons, and the brush that draws it.

Shapes live in unit coordinates, x to the right and y down, with the thing's full height from -1 to 1. Everything is
drawn at ``SUPERSAMPLE`` times the resolution and averaged, so edges are smooth.
"""

import itertools
import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFilter

Points = npt.NDArray[np.float64]  # [n, 2] x, y
RGB = tuple[int, int, int]

SUPERSAMPLE = 3
PAINTS: dict[str, RGB] = {
    "red": (214, 44, 48),
    "orange": (240, 132, 32),
    "yellow": (247, 206, 52),
    "green": (52, 158, 78),
    "blue": (46, 106, 214),
    "purple": (132, 68, 184),
    "pink": (246, 138, 182),
    "white": (244, 243, 238),
    "black": (52, 52, 60),
}


@dataclass(frozen=True, eq=False)
class Part:
    """One filled polygon of a thing.

    ``tone`` is a fixed colour, or a factor on the thing's own paint: below 1 darker, above 1 as much nearer to white.
    A part that is not a ``body`` decorates the bodies beneath it and adds nothing to the outline.
    """

    points: Points
    tone: float | RGB = 1.0
    body: bool = True


@dataclass(frozen=True, eq=False)
class Kind:
    """A kind of thing: its parts, its usual half height as a share of the photo, and how it is shaded and turned."""

    parts: tuple[Part, ...]
    half: float
    round: bool = False
    tilt: float = 0.0  # largest turn either way, degrees
    mirrors: bool = False  # has a front, and may look either way


def _oval(x: float, y: float, rx: float, ry: float, start: float = 0, stop: float = 360, n: int = 40) -> Points:
    angle = np.radians(np.linspace(start, stop, n, endpoint=stop - start < 360))
    return np.stack([x + rx * np.cos(angle), y + ry * np.sin(angle)], axis=1)


def _poly(*points: tuple[float, float]) -> Points:
    return np.array(points, float)


def _block(x0: float, y0: float, x1: float, y1: float, r: float = 0.0) -> Points:
    if r == 0:
        return _poly((x0, y0), (x1, y0), (x1, y1), (x0, y1))
    corners = ((x1 - r, y0 + r, -90), (x1 - r, y1 - r, 0), (x0 + r, y1 - r, 90), (x0 + r, y0 + r, 180))
    return np.concatenate([_oval(x, y, r, r, a, a + 90, 7) for x, y, a in corners])


def _strip(path: Points, width: float) -> Points:
    """A line of the given width along ``path``."""
    along = np.gradient(path, axis=0)
    side = np.stack([-along[:, 1], along[:, 0]], axis=1) / np.linalg.norm(along, axis=1, keepdims=True) * width / 2
    return np.concatenate([path + side, (path - side)[::-1]])


def _star(r: float, inner: float) -> Points:
    radius = np.tile([r, inner], 5)
    angle = np.radians(np.arange(10) * 36 - 90)
    return np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1)


def _kinds() -> dict[str, Kind]:
    glass, dark, cream, bark, leaf = (188, 222, 240), (44, 46, 54), (250, 238, 214), (122, 84, 56), (74, 150, 70)
    star = _star(1, 0.46)
    facets = [Part(np.array([[0, 0], star[i], star[(i + 1) % 10]]), 0.84, False) for i in range(0, 10, 2)]
    petals = [
        _oval(0.4 * math.cos(a), -0.42 + 0.4 * math.sin(a), 0.27, 0.27, n=24) for a in np.radians(range(-90, 270, 60))
    ]
    arc = np.radians(np.linspace(180, 360, 6))
    ribs = [(math.cos(a), -0.16) for a in arc]
    scallops = np.concatenate(
        [
            _oval((p[0] + q[0]) / 2, -0.16, abs(q[0] - p[0]) / 2, 0.1, 0, -180, 9)[::-1]
            for p, q in itertools.pairwise(ribs)
        ]
    )[::-1]
    canopy = np.concatenate([_oval(0, -0.16, 1, 0.84, 180, 360, 31), scallops])
    wheels = [
        Part(_oval(x, 0.62, r, r, n=28), tone)
        for x in (-0.98, 0.98)
        for r, tone in ((0.38, dark), (0.19, (206, 208, 212)))
    ]
    return {
        "ball": Kind(
            (
                Part(_oval(0, 0, 1, 1)),
                Part(_oval(0, 0, 0.4, 1), 1.55, False),
                Part(_oval(0, -0.96, 0.3, 0.16), 0.7, False),
            ),
            0.085,
            True,
            35,
        ),
        "star": Kind((Part(star), *facets), 0.095, tilt=16),
        "cup": Kind(
            (
                Part(_strip(_oval(0.66, 0.02, 0.44, 0.46, -80, 80, 17), 0.17), 0.9),
                Part(
                    np.concatenate(
                        [
                            _poly((0.8, -0.78)),
                            _oval(0, 0.72, 0.56, 0.24, 10, 170, 17),
                            _poly((-0.8, -0.78)),
                            _oval(0, -0.78, 0.8, 0.2, 180, 360, 19),
                        ]
                    )
                ),
                Part(_oval(0, -0.78, 0.8, 0.19), 1.45, False),
                Part(_oval(0, -0.75, 0.68, 0.13), (92, 58, 40), False),
                Part(_block(-0.6, -0.34, -0.46, 0.46, 0.06), 1.4, False),
            ),
            0.085,
            mirrors=True,
        ),
        "house": Kind(
            (
                Part(_block(0.46, -0.92, 0.7, -0.3), (150, 86, 72)),
                Part(_block(-0.92, -0.22, 0.92, 1)),
                Part(_poly((-1.14, -0.14), (0, -1), (1.14, -0.14)), 0.62),
                Part(_block(-0.22, 0.3, 0.2, 1, 0.04), (104, 70, 52), False),
                Part(_oval(0.12, 0.68, 0.04, 0.04, n=12), cream, False),
                *(Part(_block(x - 0.21, 0.04, x + 0.21, 0.44), cream, False) for x in (-0.56, 0.56)),
                *(Part(_block(x - 0.16, 0.09, x + 0.16, 0.39), glass, False) for x in (-0.56, 0.56)),
                Part(_oval(0, -0.5, 0.14, 0.14, n=24), glass, False),
            ),
            0.15,
        ),
        "tree": Kind(
            (
                Part(_poly((-0.13, 0.1), (0.13, 0.1), (0.2, 1), (-0.2, 1)), bark),
                *(
                    Part(_oval(x, y, r, r * 0.94), tone)
                    for x, y, r, tone in (
                        (-0.36, -0.02, 0.4, 0.84),
                        (0.38, -0.04, 0.38, 0.8),
                        (0, -0.16, 0.42, 0.9),
                        (-0.2, -0.4, 0.42, 0.96),
                        (0.2, -0.46, 0.4, 1.0),
                        (0, -0.64, 0.36, 1.1),
                    )
                ),
                *(
                    Part(_oval(x, y, 0.13, 0.09, n=20), 1.2, False)
                    for x, y in ((-0.3, -0.5), (0.12, -0.76), (0.3, -0.44), (-0.06, -0.26), (-0.46, -0.12))
                ),
            ),
            0.16,
        ),
        "car": Kind(
            (
                Part(
                    np.concatenate(
                        [
                            _poly((-1.02, -0.1)),
                            _oval(-0.46, -0.72, 0.24, 0.24, 190, 270, 9),
                            _oval(0.34, -0.72, 0.3, 0.24, 270, 340, 9),
                            _poly((1.08, -0.1)),
                        ]
                    ),
                    0.9,
                ),
                Part(_block(-1.6, -0.22, 1.62, 0.62, 0.26)),
                Part(_poly((-0.82, -0.18), (-0.52, -0.74), (-0.08, -0.74), (-0.08, -0.18)), glass, False),
                Part(_poly((0.06, -0.18), (0.06, -0.74), (0.4, -0.74), (0.84, -0.18)), glass, False),
                Part(_block(-1.6, 0.4, 1.62, 0.62, 0.08), 0.66, False),
                Part(_oval(1.46, 0.06, 0.13, 0.15, n=20), (255, 240, 170), False),
                Part(_block(-1.58, -0.04, -1.42, 0.2, 0.05), (190, 40, 40), False),
                Part(_block(-0.26, 0.02, -0.02, 0.09, 0.03), 0.66, False),
                *wheels,
            ),
            0.085,
            mirrors=True,
        ),
        "fish": Kind(
            (
                Part(_poly((-0.8, 0.02), (-1.6, -0.62), (-1.42, 0.02), (-1.6, 0.66)), 0.82),
                Part(_poly((-0.3, -0.6), (0.1, -1), (0.5, -0.86), (0.44, -0.56)), 0.78),
                Part(_poly((-0.1, 0.62), (-0.3, 1), (0.24, 0.72)), 0.78),
                Part(
                    np.concatenate(
                        [_oval(0.2, 0.95, 1.34, 1.68, 209, 331, 22), _oval(0.2, -0.93, 1.34, 1.68, 29, 151, 22)]
                    )
                ),
                Part(_oval(-0.06, 0, 0.13, 0.66), 1.5, False),
                Part(_oval(-0.52, 0, 0.1, 0.46), 1.5, False),
                Part(_oval(0.86, -0.16, 0.15, 0.15, n=22), (252, 252, 250), False),
                Part(_oval(0.9, -0.16, 0.075, 0.075, n=16), dark, False),
                Part(_strip(_oval(0.5, 0.02, 0.16, 0.4, -60, 60, 9), 0.06), 0.72, False),
            ),
            0.075,
            tilt=10,
            mirrors=True,
        ),
        "flower": Kind(
            (
                Part(_strip(_poly((0.06, 1), (0.08, 0.6), (0.03, 0.2), (0, -0.4)), 0.11), leaf),
                Part(
                    np.concatenate([_oval(0.06, 0.16, 0.6, 0.6, 20, 80, 9), _oval(0.72, 0.94, 0.6, 0.6, 200, 262, 9)]),
                    leaf,
                ),
                Part(
                    np.concatenate(
                        [_oval(0.02, 0.3, 0.56, 0.56, 100, 160, 9), _oval(-0.6, 1.02, 0.56, 0.56, 282, 340, 9)]
                    ),
                    (60, 132, 62),
                ),
                *(Part(petal, 1.0 - 0.09 * (i % 2)) for i, petal in enumerate(petals)),
                Part(_oval(0, -0.42, 0.26, 0.26, n=24), (252, 196, 60)),
                Part(_oval(0, -0.4, 0.15, 0.15, n=20), (214, 140, 40), False),
            ),
            0.1,
            tilt=7,
        ),
        "boat": Kind(
            (
                Part(_block(-0.06, -1, 0.04, 0.5), bark),
                Part(np.concatenate([_poly((0.1, 0.34), (0.1, -0.9)), _oval(0.1, 0.34, 0.94, 1.2, 285, 352, 9)]), 1.78),
                Part(_poly((-0.12, 0.34), (-0.12, -0.74), (-0.86, 0.34)), 1.6),
                Part(
                    np.concatenate(
                        [
                            _poly((-1.22, 0.42), (1.34, 0.42)),
                            _oval(0.62, 0.36, 0.56, 0.64, 30, 90, 7),
                            _oval(-0.62, 0.4, 0.5, 0.6, 90, 150, 7),
                        ]
                    )
                ),
                Part(_poly((-1.22, 0.42), (1.34, 0.42), (1.26, 0.55), (-1.16, 0.55)), 1.5, False),
                *(Part(_oval(x, 0.72, 0.075, 0.075, n=16), glass, False) for x in (-0.4, 0, 0.4)),
            ),
            0.13,
            mirrors=True,
        ),
        "balloon": Kind(
            (
                Part(
                    _strip(np.stack([0.07 * np.sin(np.linspace(0, 6, 15)), np.linspace(0.38, 1, 15)], axis=1), 0.05),
                    (150, 150, 156),
                ),
                Part(_poly((0, 0.3), (0.1, 0.46), (-0.1, 0.46)), 0.75),
                Part(
                    np.concatenate(
                        [
                            _oval(0, -0.42, 0.56, 0.58, 170, 370, 31),
                            _poly((0.42, 0.02), (0.1, 0.35), (-0.1, 0.35), (-0.42, 0.02)),
                        ]
                    )
                ),
                Part(_oval(-0.22, -0.66, 0.1, 0.17, n=20), 1.6, False),
            ),
            0.14,
            True,
            8,
        ),
        "mushroom": Kind(
            (
                Part(np.concatenate([_poly((-0.26, -0.2), (0.26, -0.2)), _oval(0, 0.8, 0.4, 0.2, 0, 180, 15)]), cream),
                Part(np.concatenate([_oval(0, -0.04, 1, 0.96, 180, 360, 27), _oval(0, -0.04, 1, 0.2, 0, 180, 15)])),
                Part(_oval(0, 0.06, 0.5, 0.075), (226, 206, 176), False),
                *(
                    Part(_oval(x, y, r, r * 0.8, n=22), 1.82, False)
                    for x, y, r in ((-0.08, -0.66, 0.18), (-0.56, -0.32, 0.15), (0.46, -0.38, 0.17), (0.02, -0.2, 0.11))
                ),
            ),
            0.09,
            tilt=5,
        ),
        "umbrella": Kind(
            (
                Part(_block(-0.04, -1, 0.04, -0.7), dark),
                Part(
                    _strip(
                        np.concatenate(
                            [_poly((0, -0.3), (0, 0.2), (0, 0.6)), _oval(0.14, 0.82, 0.14, 0.16, 180, 20, 11)]
                        ),
                        0.07,
                    ),
                    (128, 92, 62),
                ),
                Part(canopy),
                *(
                    Part(
                        np.concatenate(
                            [
                                _poly((0, -1)),
                                _oval(
                                    (ribs[i][0] + ribs[i + 1][0]) / 2,
                                    -0.16,
                                    (ribs[i + 1][0] - ribs[i][0]) / 2,
                                    0.1,
                                    180,
                                    360,
                                    9,
                                )[[0, *range(9)]],
                            ]
                        ),
                        1.5,
                        False,
                    )
                    for i in (1, 3)
                ),
            ),
            0.13,
            tilt=9,
        ),
    }


KINDS = _kinds()


def outlines(kind: str, x: float, y: float, half: float, tilt: float = 0.0, mirror: bool = False) -> list[Points]:
    """The polygons whose union a thing covers, float64 [n, 2] in pixels of the photo (pixel k spans [k, k + 1))."""
    turn = _turn(half, tilt, mirror)
    return [part.points @ turn + (x, y) for part in KINDS[kind].parts if part.body]


def _turn(half: float, tilt: float, mirror: bool) -> Points:
    c, s = half * math.cos(math.radians(tilt)), half * math.sin(math.radians(tilt))
    return np.array([[-c, -s] if mirror else [c, s], [-s, c]])


def sprite(
    kind: str, paint: RGB, x: float, y: float, half: float, tilt: float = 0.0, mirror: bool = False
) -> tuple[Image.Image, Image.Image, tuple[int, int]]:
    """Draw one thing.

    Returns:
        Its colours (RGB), its coverage (L, 0 to 255) and the photo's pixel (x, y) at their upper left corner.
    """
    turn = _turn(half, tilt, mirror)
    shapes = [(part, part.points @ turn + (x, y)) for part in KINDS[kind].parts]
    corners = np.concatenate([points for part, points in shapes if part.body])
    low, high = np.floor(corners.min(0)).astype(int) - 1, np.ceil(corners.max(0)).astype(int) + 1
    size = (int(high[0] - low[0]), int(high[1] - low[1]))
    big = (size[0] * SUPERSAMPLE, size[1] * SUPERSAMPLE)
    colours, cover = Image.new("RGB", big, _toned(paint, 0.8)), Image.new("L", big)
    on_colours, on_cover = ImageDraw.Draw(colours), ImageDraw.Draw(cover)
    for part, points in shapes:
        flat = ((points - low) * SUPERSAMPLE).ravel().tolist()
        on_colours.polygon(flat, part.tone if isinstance(part.tone, tuple) else _toned(paint, part.tone))
        if part.body:
            on_cover.polygon(flat, 255)
    colours, cover = colours.reduce(SUPERSAMPLE), cover.reduce(SUPERSAMPLE)
    rim = np.asarray(cover.filter(ImageFilter.MinFilter(3)), np.float32)[..., None] / 255
    u, v = np.linspace(0, 1, size[0], dtype=np.float32), np.linspace(0, 1, size[1], dtype=np.float32)[:, None]
    if KINDS[kind].round:
        light = 1.2 - 0.62 * ((u - 0.34) ** 2 + (v - 0.28) ** 2)
    else:
        light = 1.12 - 0.1 * u - 0.16 * v
    lit = np.asarray(colours, np.float32) * (light[..., None] * (0.72 + 0.28 * rim))
    return Image.fromarray(np.clip(lit, 0, 255).astype(np.uint8)), cover, (int(low[0]), int(low[1]))


def _toned(paint: RGB, tone: float) -> RGB:
    if tone <= 1:
        r, g, b = (round(c * tone) for c in paint)
    else:
        r, g, b = (round(c + (255 - c) * min(tone - 1, 1)) for c in paint)
    return r, g, b
