"""``truth.json``: what is in every photo, and what every sentence says. ``docs/datasets.md`` describes its keys.

A sentence about one thing or none has one expression. "every ball" also has one, which fits all of its things, and "red
cup and blue boat" has two: the kind of both is "several".
"""

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any, NamedTuple

from nemo_dali._checks import short_repr
from nemo_dali.synthetic._scenes import (
    EXPRESSION_KINDS,
    PLACES,
    RANKS,
    RELATIONS,
    ZONES,
    Expression,
    Scene,
    Sentence,
    Thing,
    expression_kind,
    normalise,
)
from nemo_dali.synthetic._shapes import KINDS, PAINTS

FORMAT, VERSION = "nemo-dali/truth", 1
TRUTH_FILE = "truth.json"  # beside the annotations
SEVERAL = "several"
SENTENCE_KINDS = (*EXPRESSION_KINDS, SEVERAL)
COLOURS, SIZES = (*PAINTS, "grey"), ("small", "medium", "big")


def photo_record(image_id: int, scene: Scene, ann_ids: Mapping[int, int]) -> dict[str, Any]:
    """What the file says about a photo; ``ann_ids``: those of its things that can be seen, by their numbers."""
    return {
        "id": image_id,
        "theme": scene.theme,
        "horizon": scene.horizon,
        "width": scene.width,
        "height": scene.height,
        "grey": scene.grey,
        "things": [
            {
                "ann_id": ann_ids.get(i),
                "kind": thing.kind,
                "colour": thing.colour,
                "size": thing.size,
                "zone": thing.zone,
                "box": list(thing.box),
                "visible": thing.visible,
            }
            for i, thing in enumerate(scene.things)
        ],
        "hides": sorted(map(list, scene.hides)),
    }


def sentence_record(sent_id: int, image_id: int, things: Sequence[int], sentence: Sentence) -> dict[str, Any]:
    """What the file says about a sentence; ``things``: the numbers of the things that it is about."""
    said = [asdict(one, dict_factory=_without_none) for one in sentence.says]
    return {
        "sent_id": sent_id,
        "image_id": image_id,
        "sent": normalise(sentence.raw),
        "things": list(things),
        "expressions": said,
        "expression_kind": SEVERAL if len(things) > 1 else expression_kind(sentence.says[0]),
    }


def truth_content(images: list[dict[str, Any]], sentences: list[dict[str, Any]]) -> bytes:
    """The content of the file."""
    return json.dumps({"format": FORMAT, "version": VERSION, "images": images, "sentences": sentences}).encode()


def _without_none(items: list[tuple[str, Any]]) -> dict[str, Any]:
    return {name: value for name, value in items if value is not None}


# --- reading ---------------------------------------------------------------------------------------------------------


class Parsed(NamedTuple):
    """What a file says, in its order; ``kinds`` are indices into ``SENTENCE_KINDS``."""

    image_id: list[int]
    scenes: list[Scene]
    seen: list[tuple[int, ...]]  # the numbers of the things of which anything can be seen
    sent_id: list[int]
    sent: list[str]
    kinds: list[int]
    says: list[tuple[Expression, ...]]  # one or two each


def parse_truth(content: bytes) -> Parsed:
    """What a file says.

    Raises:
        ValueError: it is not such a file, is of another version, or is damaged; the text says which and where.
    """
    try:
        truth = json.loads(content)
    except RecursionError as error:
        raise ValueError("it nests values too deeply") from error
    if not isinstance(truth, dict) or truth.get("format") != FORMAT:
        raise ValueError("it is not the truth of a generated data set")
    if truth.get("version") != VERSION:
        raise ValueError(f"it has version {short_repr(truth.get('version'))}, and version {VERSION} is read")
    image_id, scenes, seen, sent_id, sent, kinds, says = found = Parsed([], [], [], [], [], [], [])
    for row, record in enumerate(_list(truth, "images")):
        with _damage(f"image {row}"):
            image_id.append(_whole(record["id"]))
            scenes.append(_scene(record))
            seen.append(tuple(i for i, thing in enumerate(record["things"]) if thing["ann_id"] is not None))
    for row, record in enumerate(_list(truth, "sentences")):
        with _damage(f"sentence {row}"):
            sent_id.append(_whole(record["sent_id"]))
            sent.append(_text(record["sent"]))
            kinds.append(SENTENCE_KINDS.index(record["expression_kind"]))
            says.append(tuple(map(_expression, record["expressions"])))
            if len(says[-1]) not in (1, 2):
                raise ValueError("a sentence says one thing or two")
    return found


@contextmanager
def _damage(where: str) -> Iterator[None]:
    try:
        yield
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, OverflowError) as error:
        raise ValueError(f"it is damaged at {where}") from error


def _list(content: dict[str, Any], name: str) -> list[Any]:
    values = content.get(name)
    if not isinstance(values, list) or not values:
        raise ValueError(f"it has no {name}")
    return values


def _scene(record: dict[str, Any]) -> Scene:
    things = tuple(
        Thing(
            kind=_one_of(thing["kind"], KINDS),
            colour=_one_of(thing["colour"], COLOURS),
            size=_one_of(thing["size"], SIZES),
            zone=_one_of(thing["zone"], ZONES),
            box=_box(thing["box"]),
            visible=float(thing["visible"]),
        )
        for thing in record["things"]
    )
    width, height = (_whole(record[name], least=1) for name in ("width", "height"))
    hides = frozenset((_whole(i), _whole(j)) for i, j in record["hides"])
    return Scene(width, height, _text(record["theme"]), _whole(record["horizon"]), bool(record["grey"]), things, hides)


def _expression(record: dict[str, Any], *, landmark: bool = False) -> Expression:
    its_landmark = record.get("landmark")
    if landmark and "where" in record:
        raise ValueError("a landmark has no place")
    words = {} if landmark else RELATIONS if its_landmark is not None else PLACES | ZONES | RANKS
    return Expression(
        kind=_one_of(record["kind"], KINDS),
        colour=_one_of(record["colour"], PAINTS) if "colour" in record else None,
        size=_one_of(record["size"], SIZES) if "size" in record else None,
        where=_one_of(record["where"], words) if "where" in record or its_landmark is not None else None,
        landmark=None if its_landmark is None else _expression(its_landmark, landmark=True),
    )


def _box(values: list[Any]) -> tuple[int, int, int, int]:
    x0, y0, x1, y1 = map(_whole, values)
    return x0, y0, x1, y1


def _one_of(value: Any, values: Collection[str]) -> str:
    if not isinstance(value, str) or value not in values:
        raise ValueError(short_repr(value))
    return value


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(short_repr(value))
    return value


def _whole(value: Any, least: int = 0) -> int:
    if type(value) is not int or not least <= value < 2**62:
        raise ValueError(short_repr(value))
    return value
