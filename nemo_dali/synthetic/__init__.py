"""A generated data set: photos of many things, and expressions that single out one of them, several, or none.

A photo is a pure function of (seed, its number, distractors, expressions): a scene is laid out, drawn, measured as
drawn (what something else hides is not part of a mask), and only then described.
"""

import io
import itertools
import json
import math
import pickle
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageFilter

from nemo_dali._checks import short_repr
from nemo_dali.errors import NemoError
from nemo_dali.io.output import cannot_write, write_own
from nemo_dali.io.progress import progress
from nemo_dali.synthetic._backdrops import THEMES, Theme, backdrop
from nemo_dali.synthetic._contours import traced
from nemo_dali.synthetic._scenes import EXPRESSION_KINDS, Scene, Sentence, Thing, describe, normalise, similar
from nemo_dali.synthetic._shapes import KINDS, PAINTS, RGB, outlines, sprite
from nemo_dali.synthetic._truth_file import TRUTH_FILE, photo_record, sentence_record, truth_content
from nemo_dali.synthetic.layouts import LAYOUTS, Layout, compressed
from nemo_dali.synthetic.truth import expression_kinds

__all__ = ["expression_kinds", "synthesize"]

SIZES = {"small": 0.64, "medium": 1.0, "big": 1.5}  # factors on a kind's usual size; nobody says "medium"
MOST_DISTRACTORS = 5
LARGEST_WEIGHT = 1e6  # of a kind of expression
ATTEMPTS = 1000  # at a photo that has what was asked for
MOST_OVERLAP = 0.3  # of two things, as a share of the smaller one's box
LEAST_VISIBLE = 0.5  # a thing of which less can be seen is never described
GREY_PHOTOS = 0.03
SOLID = 170  # of 255: what counts as covered. Two thirds, as Pillow draws polygons a few tenths of a subpixel too wide


@dataclass(frozen=True, eq=False)
class Photo:
    """One generated photo, before it is compressed.

    ``labels`` says which thing each pixel shows: uint8 [H, W], 0 for none, else its number in ``scene.things`` plus 1.
    ``sentences`` maps the number of every thing that is referred to to its sentences.
    """

    scene: Scene
    image: Image.Image
    labels: npt.NDArray[np.uint8]
    sentences: dict[int, list[Sentence]]


def make_photo(
    *,
    seed: int,
    number: int,
    distractors: tuple[int, int] = (0, 3),
    expressions: Mapping[str, float] | None = None,
) -> Photo:
    """Make photo ``number``; what is referred to has a number of distractors in the given range (both ends included).

    A distractor is another thing of the same kind that shares its colour or its size. ``expressions``: see
    ``synthesize``.
    """
    for attempt in range(ATTEMPTS):
        random = Random(f"{seed}/{number}/{attempt}")
        scene = _lay_out(random, random.randint(*distractors))
        image, labels, scene = draw(scene, seed=random.getrandbits(64))
        wanted = random.choice((1, 2, 3))
        sentences: dict[int, list[Sentence]] = {}
        for i in random.sample(range(len(scene.things)), len(scene.things)):
            if scene.things[i].visible < LEAST_VISIBLE or not distractors[0] <= similar(scene, i) <= distractors[1]:
                continue
            if len(sentences) < wanted and (said := describe(scene, i, random, random.choice((2, 3, 3)), expressions)):
                sentences[i] = said
        if sentences:
            return Photo(scene, image, labels, sentences)
    kinds = "" if expressions is None else ", or for further kinds of expression"
    raise NemoError(f"No photo with {distractors[0]} distractors could be laid out; ask for fewer{kinds}.")


def _lay_out(random: Random, alike: int) -> Scene:
    long = random.randint(320, 640)
    short = max(200, round(long * random.choice((0.56, 0.667, 0.75, 0.75, 0.75, 0.85, 1.0))))
    width, height = (short, long) if random.random() < 0.3 else (long, short)
    name, grey = random.choice(list(THEMES)), random.random() < GREY_PHOTOS
    theme, horizon = THEMES[name], round(height * random.uniform(0.34, 0.5))
    count = random.randint(max(4, alike + 2), 9)
    scale = math.sqrt(width * height) * random.uniform(1.2, 1.4) * (1 - 0.04 * (count - 4))
    things: list[Thing] = []
    boxes: list[npt.NDArray[np.float64]] = []
    for kind, colour, size in _cast(random, theme, grey, alike, count):
        floats = kind in theme.floating and (kind not in theme.standing or random.random() < 0.5)
        half = KINDS[kind].half * SIZES[size] * random.uniform(0.94, 1.06) * scale
        tilt, mirror = random.uniform(-1, 1) * KINDS[kind].tilt, KINDS[kind].mirrors and random.random() < 0.5
        corners = np.concatenate(outlines(kind, 0, 0, half, tilt, mirror))
        box = np.concatenate([corners.min(0), corners.max(0)])  # x0, y0, x1, y1 around the centre
        top, bottom = (0.0, horizon + 0.3 * half) if floats else (horizon + 0.08 * height, float(height))
        for _ in range(60):  # tries; if there is no room, the thing is left out
            x = random.uniform(1 - box[0], width - 1 - box[2])
            y = random.uniform(top + 1 - box[1] if floats else max(top - box[3], 1 - box[1]), bottom - 1 - box[3])
            here = box + np.array((x, y, x, y))
            if here[1] > 0 and here[3] < height and all(_overlap(here, other) < MOST_OVERLAP for other in boxes):
                zone = theme.upper if floats else theme.lower
                paint = _toned(PAINTS[colour], random)
                things.append(Thing(kind, "grey" if grey else colour, size, zone, paint, x, y, half, tilt, mirror))
                boxes.append(here)
                break
    things.sort(key=lambda thing: thing.y + thing.half)
    return Scene(width, height, name, horizon, grey, tuple(things))


def _cast(random: Random, theme: Theme, grey: bool, alike: int, count: int) -> list[tuple[str, str, str]]:
    """Kind, colour and size of ``count`` things: the first has exactly ``alike`` distractors among the others."""

    def one() -> tuple[str, str, str]:
        return random.choice(theme.floating + theme.standing), random.choice(list(PAINTS)), random.choice(list(SIZES))

    first = kind, colour, size = one()
    others: list[tuple[str, str, str]] = []
    while len(others) < count - 1:
        k, c, s = one()
        if len(others) < alike:
            shared = random.choice(("colour", "size", "both"))
            others.append((kind, c if shared == "size" else colour, s if shared == "colour" else size))
        elif k != kind or (not grey and c != colour and s != size):
            others.append((k, c, s))
    return [first, *others]


def _overlap(a: npt.NDArray[np.float64], b: npt.NDArray[np.float64]) -> float:
    """The part of the smaller box that both share."""
    common = np.maximum(np.minimum(a[2:], b[2:]) - np.maximum(a[:2], b[:2]), 0).prod()
    return float(common / min((a[2:] - a[:2]).prod(), (b[2:] - b[:2]).prod()))


def _toned(paint: RGB, random: Random) -> RGB:
    shift = random.uniform(-8, 8)
    r, g, b = (min(255, max(0, round(c + shift + random.uniform(-6, 6)))) for c in paint)
    return r, g, b


def draw(scene: Scene, *, seed: int) -> tuple[Image.Image, npt.NDArray[np.uint8], Scene]:
    """Draw a scene.

    Returns:
        The photo (RGB, or L for a grey one), its labels (see ``Photo``), and the scene with what can be seen measured:
        ``box``, ``visible`` and ``hides``.
    """
    random = Random(seed)
    photo = backdrop(scene.theme, scene.width, scene.height, scene.horizon, random)
    label_map = Image.new("L", photo.size)
    whole: list[int] = []
    covered: dict[tuple[int, int], int] = {}
    windows: list[tuple[int, int, int, int]] = []
    for i, thing in enumerate(scene.things):
        colours, cover, (x, y) = sprite(thing.kind, thing.paint, thing.x, thing.y, thing.half, thing.tilt, thing.mirror)
        _cast_shadow(photo, thing, cover, x, y)
        photo.paste(colours, (x, y), cover)
        solid = cover.point([255 * (value >= SOLID) for value in range(256)])
        windows.append((max(x, 0), max(y, 0), x + cover.width, y + cover.height))
        beneath = np.asarray(label_map.crop((x, y, x + cover.width, y + cover.height)))[np.asarray(solid) > 0]
        whole.append(beneath.size)
        for j in np.unique(beneath[beneath > 0]).tolist():
            covered[i, j - 1] = int((beneath == j).sum())
        label_map.paste(i + 1, (x, y), solid)
    labels = np.array(label_map)
    seen = np.bincount(labels.ravel(), minlength=len(whole) + 1)[1:]
    things = []
    for i, thing in enumerate(scene.things):
        x0, y0, x1, y1 = windows[i]
        rows, columns = np.nonzero(labels[y0:y1, x0:x1] == i + 1)
        box = (x0, y0, x0, y0)
        if rows.size:
            box = (x0 + int(columns.min()), y0 + int(rows.min()), x0 + int(columns.max()) + 1, y0 + int(rows.max()) + 1)
        things.append(replace(thing, box=box, visible=float(seen[i] / whole[i])))
    hides = frozenset((i, j) for (i, j), n in covered.items() if n > 0.04 * whole[j] and things[j].visible > 0.3)
    gains = [random.uniform(0.93, 1.05) for _ in "rgb"]
    photo = photo.point([min(255, round(value * gain)) for gain in gains for value in range(256)])
    return photo.convert("L") if scene.grey else photo, labels, replace(scene, things=tuple(things), hides=hides)


def _cast_shadow(photo: Image.Image, thing: Thing, cover: Image.Image, x: int, y: int) -> None:
    if thing.zone == "sky" or (thing.zone == "water" and thing.kind == "fish"):
        return
    if thing.zone == "wall":
        soft = cover.filter(ImageFilter.GaussianBlur(2)).point([v * 70 // 255 for v in range(256)])
        photo.paste((30, 26, 30), (x + 3, y + 4), soft)
        return
    wide, flat = round(cover.width * 1.1), max(4, round(cover.height * 0.16))
    soft = _SHADOW.resize((wide, flat))
    photo.paste((24, 28, 36), (x + (cover.width - wide) // 2, y + cover.height - 1 - round(0.62 * flat)), soft)


def _blob() -> Image.Image:
    v, u = np.mgrid[-1:1:32j, -1:1:64j]
    return Image.fromarray((130 * np.clip(1 - u * u - v * v, 0, 1) ** 0.8).astype(np.uint8))


_SHADOW = _blob()


def synthesize(
    folder: str | Path,
    *,
    images: int = 500,
    seed: int = 0,
    distractors: tuple[int, int] = (0, 3),
    expressions: Mapping[str, float] | None = None,
    layout: str = "refcoco",
) -> dict[str, int]:
    """Write a data set: ``refcoco/{instances.json,truth.json,refs(unc).p}``, and JPEGs below ``images/``.

    The layout, the keys and the splits (train, val, testA, testB) are RefCOCO's: use it as such, with ``--dataset
    refcoco --split-by unc``; every ref has one more key, ``distractors``. ``truth.json`` says what is in the photos,
    and what the sentences say about it. The same arguments give the same bytes, and a larger ``images`` adds photos to
    those of a smaller one. The refs are written last: a folder that has them is complete. Other layouts have the same
    photos and refs of single things; gRefCOCO's and Ref-ZOM's also have refs of several things and of none.

    Args:
        layout: ``refcoco``, ``refclef``, ``grefcoco`` or ``ref-zom``: which data set's files, folders and keys.
        distractors: the fewest and the most things like the referent (of its kind, sharing its colour or size).
        expressions: weights of the kinds of expression (attribute, place, zone, rank, relation) in sentences about one
            thing; a kind that is left out is never used. Each sentence's kind is drawn among those that tell its thing
            from all others; a thing without any is not referred to. None: the shortest expression first, of any kind.

    Returns:
        How many "images", "refs", "sentences" and "annotations" were written.

    Raises:
        ValueError: ``images`` < 1, ``distractors`` are not 0 <= fewest <= most <= 5, ``expressions`` are not weights,
            or the layout is unknown.
        NemoError: the folder already holds a data set or a part of one, or cannot be written.
    """
    if images < 1:
        raise ValueError(f"images ({images}) must be at least 1")
    if not 0 <= distractors[0] <= distractors[1] <= MOST_DISTRACTORS:
        raise ValueError(f"distractors {distractors} must be 0 <= fewest <= most <= {MOST_DISTRACTORS}")
    weights = None if expressions is None else _checked_weights(expressions)
    if layout not in LAYOUTS:
        raise ValueError(f"layout ({layout}) must be one of {', '.join(LAYOUTS)}")
    folder, its = Path(folder), LAYOUTS[layout]
    annotations, photos = folder / its.folder, folder / its.photos
    try:
        if taken := next((path for path in (annotations, folder / "images") if path.exists()), None):
            whole = "a data set" if (annotations / its.refs_file).exists() else "an unfinished data set"
            raise NemoError(f"{taken} exists already, of {whole}. Remove {folder} first or choose another folder.")
        photos.mkdir(parents=True)
        annotations.mkdir()
        wanted = {"distractors": distractors, "expressions": weights}
        return _write(annotations, photos, its, images, seed, wanted)
    except OSError as error:
        raise cannot_write(folder, error, "Choose another folder or free some space.") from error


def _checked_weights(expressions: Mapping[str, float]) -> dict[str, float]:
    """The weights of the kinds that are to be used, in the order of ``EXPRESSION_KINDS``."""
    kinds = ", ".join(EXPRESSION_KINDS)
    if not isinstance(expressions, Mapping):
        raise ValueError(f"expressions ({short_repr(expressions)}) must be a mapping of weights, of {kinds}")
    for kind, weight in expressions.items():
        if kind not in EXPRESSION_KINDS:
            raise ValueError(f"expressions ({short_repr(kind)}) must be weights of {kinds}")
        if not isinstance(weight, int | float) or not 0 <= weight <= LARGEST_WEIGHT:
            raise ValueError(
                f"expressions ({kind}={short_repr(weight)}) must have weights from 0 to {LARGEST_WEIGHT:g}"
            )
    if not any(expressions.values()):
        raise ValueError(f"expressions ({short_repr(expressions)}) must have a weight > 0, of {kinds}")
    return {kind: float(expressions[kind]) for kind in EXPRESSION_KINDS if expressions.get(kind, 0) > 0}


def _write(
    annotations: Path, photos: Path, layout: Layout, images: int, seed: int, wanted: dict[str, Any]
) -> dict[str, int]:
    """Write the files; ``wanted``: the options of ``make_photo``."""
    category = {kind: i for i, kind in enumerate(KINDS, 1)}
    made_with = {name: value for name, value in wanted.items() if value is not None}
    instances: dict[str, Any] = {
        "info": {"description": "generated by nemo-dali synth", "seed": seed, **made_with},
        "licenses": [],
        "images": [],
        "annotations": [],
        "categories": [{"id": i, "name": kind, "supercategory": "thing"} for kind, i in category.items()],
    }
    refs: list[dict[str, Any]] = []
    photos_told: list[dict[str, Any]] = []  # for truth.json
    sentences_told: list[dict[str, Any]] = []
    sent_ids = itertools.count(1)
    for number in progress(range(images), total=images, what="generating photos", unit="photo"):
        photo = make_photo(seed=seed, number=number, **wanted)
        image_id = number + 1
        name = layout.photo_name.format(image_id)
        write_own(photos / f"{name}.jpg", _jpeg(photo.image, Random(f"{seed}/{number}/jpeg")))
        width, height = photo.image.size
        instances["images"].append({"id": image_id, "file_name": f"{name}.jpg", "width": width, "height": height})
        here: dict[int, dict[str, Any]] = {}  # the annotation of each thing that can be seen
        for i, thing in enumerate(photo.scene.things):
            visible = photo.labels == i + 1
            if not visible.any():
                continue
            x0, y0, x1, y1 = thing.box
            here[i] = {
                "id": len(instances["annotations"]) + 1,
                "image_id": image_id,
                "category_id": category[thing.kind],
                "bbox": [x0, y0, x1 - x0, y1 - y0],
                "area": int(visible.sum()),
                "iscrowd": 0,
                "segmentation": compressed(visible) if layout.compressed else segmentation(photo, i),
            }
            instances["annotations"].append(here[i])
        random = Random(f"{seed}/{number}/refs")
        photos_told.append(photo_record(image_id, photo.scene, {i: seen["id"] for i, seen in here.items()}))
        for things, said in layout.said(photo.scene, photo.sentences, list(here), random):
            sentences = []
            for sentence in said:
                sent_id, sent = next(sent_ids), normalise(sentence.raw)
                sentences.append({"sent_id": sent_id, "sent": sent, "raw": sentence.raw, "tokens": sent.split()})
                sentences_told.append(sentence_record(sent_id, image_id, things, sentence))
            own = layout.ref([here[i] for i in things], list(here.values()))
            ending = f"_{here[things[0]]['id']}" if things else ""
            refs.append({
                "ref_id": len(refs) + 1,
                "ann_id": own.pop("ann_id"),
                "category_id": own.pop("category_id"),
                "image_id": image_id,
                "split": layout.split(number),
                "file_name": f"{name}{ending}.jpg",
                "sent_ids": [s["sent_id"] for s in sentences],
                "sentences": sentences,
                **({"distractors": similar(photo.scene, things[0])} if layout.folder == "refcoco" else own),
            })  # fmt: skip
    write_own(annotations / "instances.json", json.dumps(instances).encode())
    write_own(annotations / TRUTH_FILE, truth_content(photos_told, sentences_told))
    is_json = layout.refs_file.endswith(".json")
    # Last: its presence says that the data set is complete.
    write_own(annotations / layout.refs_file, json.dumps(refs).encode() if is_json else pickle.dumps(refs, protocol=2))
    return {
        "images": images,
        "refs": len(refs),
        "sentences": next(sent_ids) - 1,
        "annotations": len(instances["annotations"]),
    }


def _jpeg(image: Image.Image, random: Random) -> bytes:
    buffer = io.BytesIO()
    quality, subsampling = random.randint(70, 95), random.choice(("4:2:0", "4:2:0", "4:2:2", "4:4:4"))
    image.save(buffer, "JPEG", quality=quality, subsampling=subsampling, progressive=random.random() < 0.1)
    return buffer.getvalue()


def segmentation(photo: Photo, index: int) -> list[list[float]]:
    """The mask of a thing as COCO stores those of anything but crowds, as polygons: x, y, x, y, ... of each part.

    They are the thing's own shapes if nothing hides a part of it, or else follow the edges of the pixels that show it.
    """
    thing = photo.scene.things[index]
    if thing.visible == 1:
        shape = outlines(thing.kind, thing.x, thing.y, thing.half, thing.tilt, thing.mirror)
        return [np.round(points, 2).ravel().tolist() for points in shape]
    return traced(photo.labels == index + 1)
