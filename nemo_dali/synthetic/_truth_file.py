"""``truth.json``: what is in every photo, and what every sentence says. ``docs/datasets.md`` tells its keys.

A sentence of one thing or of none has one expression. "every ball" has one, too, which fits all of its things, and "red
cup and blue boat" has two: both are several.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from nemo_dali.synthetic._scenes import EXPRESSION_KINDS, Scene, Sentence, expression_kind, normalise

FORMAT, VERSION = "nemo-dali/truth", 1
TRUTH_FILE = "truth.json"  # beside the annotations
SEVERAL = "several"
SENTENCE_KINDS = (*EXPRESSION_KINDS, SEVERAL)


def photo_record(image_id: int, scene: Scene, ann_ids: Mapping[int, int]) -> dict[str, Any]:
    """What the file says of a photo; ``ann_ids``: of those of its things that can be seen."""
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
    """What the file says of a sentence; ``things``: the numbers of those that it is about."""
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
    """The file."""
    return json.dumps({"format": FORMAT, "version": VERSION, "images": images, "sentences": sentences}).encode()


def _without_none(items: list[tuple[str, Any]]) -> dict[str, Any]:
    return {name: value for name, value in items if value is not None}
