"""The backdrops of generated photos: themes of an upper and a lower zone, painted with gradients and textures.

Backdrops are painted at half size and enlarged, which is quick and looks like the depth of field of a camera.
All randomness comes from a ``random.Random``.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

Floats = npt.NDArray[np.floating[Any]]
RGB = tuple[int, int, int]
Painter = Callable[[Random, int, int], Floats]  # (random, height, width) -> [height, width, 3], 0 to 255


def _noise(random: Random, height: int, width: int, tall: float, wide: float) -> Floats:
    """Smooth noise in -1 to 1, float32 [height, width], whose grains are ``tall`` x ``wide`` pixels."""
    h, w = max(2, round(height / tall)), max(2, round(width / wide))
    grains = Image.frombytes("L", (w, h), random.randbytes(w * h))
    return np.asarray(grains.resize((width, height), Image.Resampling.BICUBIC), np.float32) / 127.5 - 1


def _fade(height: int, *stops: RGB) -> Floats:
    """A gradient from the first colour at the top to the last at the bottom, float32 [height, 1, 3]."""
    at = np.linspace(0, len(stops) - 1, height)
    return np.stack([np.interp(at, range(len(stops)), [s[c] for s in stops]) for c in range(3)], -1)[:, None].astype(
        np.float32
    )


def _over(canvas: Floats, cover: Floats, colour: RGB | Floats) -> Floats:
    """Lay a colour over the canvas where ``cover`` (0 to 1, [h, w] or broadcastable) says so."""
    return canvas + cover[..., None] * (np.asarray(colour, np.float32) - canvas)


def _grid(height: int, width: int) -> tuple[Floats, Floats]:
    return np.arange(height, dtype=np.float32)[:, None], np.arange(width, dtype=np.float32)[None]


def _ridge(random: Random, width: int, level: float, swing: float) -> Floats:
    """The rows at which hills begin, float32 [1, width]."""
    x = np.arange(width, dtype=np.float32) / width * 2 * math.pi
    waves = sum(
        random.uniform(0.3, 1) / k * np.sin(k * x * random.uniform(0.5, 1.1) + random.uniform(0, 6.3))
        for k in (1, 2, 4)
    )
    return (level + swing * np.asarray(waves, np.float32))[None]


def _below(height: int, ridge: Floats) -> Floats:
    return np.clip(np.arange(height, dtype=np.float32)[:, None] - ridge + 0.5, 0, 1)


def _sky(random: Random, height: int, width: int, tops: tuple[RGB, ...], horizon: RGB) -> Floats:
    canvas = np.broadcast_to(_fade(height, random.choice(tops), horizon), (height, width, 3))
    y, x = _grid(height, width)
    sun_x, sun_y = random.uniform(0.1, 0.9) * width, random.uniform(0.1, 0.5) * height
    glow = np.exp(-((x - sun_x) ** 2 + (y - sun_y) ** 2) / (0.22 * width) ** 2) * 0.5
    canvas = _over(canvas, glow, (255, 250, 226))
    clouds = (
        _noise(random, height, width, 26, 62) + 0.5 * _noise(random, height, width, 9, 20) - random.uniform(0.15, 0.7)
    )
    return _over(canvas, np.clip(clouds * 1.2, 0, 0.8) * np.clip(1.3 - y / height, 0, 1), (255, 255, 255))


def _day(random: Random, height: int, width: int) -> Floats:
    return _sky(
        random, height, width, ((96, 168, 228), (122, 186, 236), (84, 150, 214), (142, 178, 214)), (222, 238, 246)
    )


def _hills(random: Random, height: int, width: int) -> Floats:
    canvas = _day(random, height, width)
    for level, colour in ((0.72, (158, 190, 196)), (0.88, (126, 170, 148))):
        canvas = _over(canvas, _below(height, _ridge(random, width, level * height, 0.07 * height)), colour)
    return canvas


def _ocean(random: Random, height: int, width: int) -> Floats:
    canvas = _day(random, height, width)
    sea = (
        _fade(height, (70, 150, 190), (70, 150, 190), (58, 140, 186), (120, 200, 206))
        + _noise(random, height, width, 2, 18)[..., None] * 7
    )
    return _over(canvas, _below(height, np.full((1, width), 0.72 * height, np.float32)), sea)


def _peaks(random: Random, height: int, width: int) -> Floats:
    canvas = _sky(random, height, width, ((150, 176, 214), (172, 168, 206), (134, 170, 204)), (242, 228, 224))
    for level, colour, tall in ((0.62, (178, 190, 214), 0.3), (0.8, (206, 216, 232), 0.16)):
        x = np.arange(width, dtype=np.float32) / width
        folds = sum(abs(((x * k + random.random()) % 1) - 0.5) * 2 / k for k in (2.3, 4.7, 9.1))
        ridge = ((level + tall * (0.5 - np.asarray(folds))) * height).astype(np.float32)[None]
        snow = _noise(random, height, width, 8, 5)[..., None] * 8
        canvas = _over(canvas, _below(height, ridge), np.asarray(colour, np.float32) + snow)
    return canvas


def _bricks(random: Random, height: int, width: int) -> Floats:
    tone = random.choice(((176, 104, 84), (190, 150, 122), (150, 138, 134), (202, 178, 150)))
    tall, long = 11, 26
    y, x = _grid(height, width)
    row = np.floor(y / tall)
    along = x + (row % 2) * long / 2
    shade = np.sin(row * 12.9 + np.floor(along / long) * 78.2) * 43758.5
    brick = np.asarray(tone, np.float32) + ((shade % 1) * 26 - 13 + _noise(random, height, width, 2, 2) * 5)[..., None]
    seam = np.maximum((y % tall < 1.5) * np.ones_like(x), along % long < 1.5)
    return _over(brick, seam * np.float32(0.6), (222, 214, 204))


def _wallpaper(random: Random, height: int, width: int) -> Floats:
    tone = np.asarray(
        random.choice(((226, 214, 190), (190, 208, 204), (214, 196, 206), (200, 206, 222), (222, 222, 214))), np.float32
    )
    y, x = _grid(height, width)
    gap = random.choice((22, 30, 40))
    if random.random() < 0.5:
        pattern = (x % gap < gap / 2) * np.ones_like(y)
    else:
        row = np.floor(y / gap)
        dot = ((x + row % 2 * gap / 2) % gap - gap / 2) ** 2 + (y % gap - gap / 2) ** 2
        pattern = np.clip(gap / 6 + 0.5 - np.sqrt(dot), 0, 1)
    canvas = _over(np.broadcast_to(tone, (height, width, 3)), pattern * np.float32(0.35), np.minimum(tone + 34, 255))
    side = random.uniform(0.1, 0.9) * width
    light = 0.9 + 0.16 * np.exp(-(((x - side) / (0.6 * width)) ** 2)) - 0.1 * y / height
    rail = _below(height, np.full((1, width), height - 5, np.float32))
    return _over(canvas * light[..., None], rail, tone * 0.72)


def _depths(random: Random, height: int, width: int) -> Floats:
    top = random.choice(((96, 196, 206), (110, 190, 224), (80, 180, 190)))
    canvas = np.broadcast_to(_fade(height, top, (30, 112, 158)), (height, width, 3))
    y, x = _grid(height, width)
    slant, gap = random.uniform(-0.6, 0.6), random.uniform(40, 80)
    rays = np.sin((x + slant * y) / gap * 2 * math.pi) + np.sin((x + slant * y) / gap * 3.7 + 1)
    canvas = _over(canvas, np.clip(rays * 0.11, 0, 1) * (1 - y / height), (240, 255, 250))
    for _ in range(random.randint(6, 14)):
        bx, by, r = random.uniform(0, width), random.uniform(0, height), random.uniform(1.5, 4)
        ring = np.abs(np.sqrt((x - bx) ** 2 + (y - by) ** 2) - r)
        canvas = _over(canvas, np.clip(1 - ring, 0, 1) * np.float32(0.6), (236, 252, 255))
    return canvas


def _textured(near: tuple[tuple[RGB, ...], ...], *grains: tuple[float, float, float]) -> Painter:
    """A ground that runs from a far colour to a near one, with layers of noise (tall, wide, strength)."""

    def paint(random: Random, height: int, width: int) -> Floats:
        canvas = np.broadcast_to(_fade(height, *random.choice(near)), (height, width, 3))
        depth = np.linspace(0.5, 1.2, height, dtype=np.float32)[:, None]  # what is near shows more of its grain
        for tall, wide, strength in grains:
            canvas = canvas + (_noise(random, height, width, tall, wide) * depth * strength)[..., None]
        return canvas

    return paint


def _road(random: Random, height: int, width: int) -> Floats:
    canvas = _textured(
        (((128, 128, 134), (92, 92, 100)), ((142, 138, 134), (108, 104, 102))), (1.5, 1.5, 9), (20, 60, 6)
    )(random, height, width)
    y, x = _grid(height, width)
    kerb = 1 - _below(height, np.full((1, width), 0.13 * height, np.float32))
    canvas = _over(canvas, kerb, (190, 186, 178))
    dash = np.clip(2.5 + y * 0.01 - np.abs(y - 0.6 * height), 0, 1) * ((x + random.uniform(0, 60)) % 62 < 36)
    return _over(canvas, dash * np.float32(0.85), (238, 232, 210))


def _planks(random: Random, height: int, width: int) -> Floats:
    tone = np.asarray(random.choice(((190, 142, 96), (160, 112, 74), (208, 172, 126))), np.float32)
    y, x = _grid(height, width)
    edge = (y / height) ** 0.7 * random.choice((3, 4))
    board = np.floor(edge)
    grain = _noise(random, height, width, 2, 70) * 9 + _noise(random, height, width, 5, 140) * 8
    canvas = tone + (grain + (board * 37 % 3 - 1) * 5)[..., None] + 0 * x[..., None]
    canvas = canvas * np.linspace(0.94, 1.06, height, dtype=np.float32)[:, None, None]
    return _over(canvas, (edge - board < 0.03) * np.full_like(x, 0.4), tone * 0.5)


@dataclass(frozen=True)
class Theme:
    """A place: its two zones as a speaker calls them, how each is painted, and the kinds of things found in it."""

    upper: str
    lower: str
    back: Painter
    ground: Painter
    floating: tuple[str, ...]  # kinds in the upper zone
    standing: tuple[str, ...]  # kinds in the lower zone


THEMES: dict[str, Theme] = {
    "meadow": Theme(
        "sky",
        "grass",
        _hills,
        _textured((((150, 190, 104), (92, 152, 66)), ((170, 186, 100), (112, 146, 62))), (5, 1.2, 13), (14, 40, 9)),
        ("balloon",),
        ("tree", "house", "flower", "mushroom", "ball", "umbrella"),
    ),
    "beach": Theme(
        "sky",
        "sand",
        _ocean,
        _textured((((214, 190, 146), (238, 216, 172)), ((226, 204, 170), (244, 228, 196))), (1.2, 1.2, 8), (6, 40, 8)),
        ("balloon", "star"),
        ("umbrella", "ball", "cup", "boat", "fish"),
    ),
    "lake": Theme(
        "sky",
        "water",
        _hills,
        _textured((((126, 184, 204), (58, 128, 172)), ((140, 186, 190), (64, 124, 140))), (2, 30, 12), (4, 60, 8)),
        ("balloon",),
        ("boat", "ball", "fish", "flower"),
    ),
    "street": Theme("wall", "road", _bricks, _road, ("balloon", "star"), ("car", "tree", "umbrella", "ball", "house")),
    "room": Theme(
        "wall", "table", _wallpaper, _planks, ("star", "balloon"), ("cup", "flower", "ball", "mushroom", "car", "fish")
    ),
    "reef": Theme(
        "water",
        "sand",
        _depths,
        _textured(
            (((52, 130, 164), (136, 184, 168), (206, 206, 164)), ((46, 126, 160), (120, 172, 172), (176, 198, 170))),
            (2, 2, 6),
            (5, 34, 9),
        ),
        ("fish",),
        ("star", "ball", "boat", "cup", "mushroom"),
    ),
    "winter": Theme(
        "sky",
        "snow",
        _peaks,
        _textured((((222, 230, 242), (246, 249, 253)), ((226, 226, 240), (250, 248, 250))), (10, 34, 6), (1.5, 1.5, 2)),
        ("balloon", "star"),
        ("house", "tree", "car", "ball", "umbrella"),
    ),
}


def backdrop(theme: str, width: int, height: int, horizon: int, random: Random) -> Image.Image:
    """Paint a theme, RGB of the given size in pixels; the lower zone begins at row ``horizon``."""
    w, h, line = (width + 1) // 2, (height + 1) // 2, horizon // 2
    place = THEMES[theme]
    zones = np.concatenate([place.back(random, line, w), place.ground(random, h - line, w)])
    small = Image.fromarray(np.clip(zones, 0, 255).astype(np.uint8))
    photo = small.resize((width, height), Image.Resampling.BILINEAR)
    grain = Image.frombytes("L", (width, height), random.randbytes(width * height)).convert("RGB")
    return Image.blend(photo, grain, 0.035)
