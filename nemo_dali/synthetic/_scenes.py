"""The language of generated photos: what a scene holds, what an expression says, and which thing it means.

An expression is kept for a thing only if it surely fits it and surely fits no other one (``refers_to``). Judgement has
three values, because people differ on what is "left" near the middle: what is unsure neither describes a thing nor
rules it out.
"""

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from random import Random

from nemo_dali.synthetic._shapes import KINDS, PAINTS, RGB


@dataclass(frozen=True)
class Thing:
    """One object of a scene, as a speaker sees it and as the brush draws it."""

    kind: str
    colour: str
    size: str
    zone: str  # the theme's word for the part of the photo where it is
    paint: RGB = (0, 0, 0)
    x: float = 0.0  # its centre in pixels, before anything hides it
    y: float = 0.0
    half: float = 0.0  # half its height in pixels
    tilt: float = 0.0
    mirror: bool = False
    box: tuple[int, int, int, int] = (0, 0, 0, 0)  # of its visible pixels: x0, y0, x1, y1, the last two exclusive
    visible: float = 1.0  # the share of it that nothing hides


@dataclass(frozen=True)
class Scene:
    """A photo's content; things come in the order of drawing, far to near."""

    width: int
    height: int
    theme: str
    horizon: int  # the row at which the lower zone begins
    grey: bool
    things: tuple[Thing, ...]
    hides: frozenset[tuple[int, int]] = frozenset()  # (i, j): thing i visibly hides a part of thing j


@dataclass(frozen=True)
class Expression:
    """What a sentence says.

    ``where`` is a place ("left", "top right"), a zone ("sky"), a rank among the things that the other words fit
    ("leftmost") or, with a landmark, a relation to it ("in front of").
    """

    kind: str
    colour: str | None = None
    size: str | None = None
    where: str | None = None
    landmark: "Expression | None" = None


@dataclass(frozen=True)
class Sentence:
    """A sentence as said, and what it says: one expression, or one for each of the two things that it joins."""

    raw: str
    says: tuple[Expression, ...]


PLACES = {  # every wording of a place; the first position word of each is the key's
    "left": ("on the left", "left", "to the left", "on the left side"),
    "right": ("on the right", "right", "to the right", "on the right side"),
    "middle": ("in the middle", "middle", "in the center"),
    "top": ("at the top", "top"),
    "bottom": ("at the bottom", "bottom"),
    "top left": ("top left", "at the top left", "upper left"),
    "top right": ("top right", "at the top right", "upper right"),
    "bottom left": ("bottom left", "at the bottom left", "lower left"),
    "bottom right": ("bottom right", "at the bottom right", "lower right"),
}
ZONES = {
    "sky": ("in the sky",),
    "wall": ("on the wall",),
    "water": ("in the water",),
    "grass": ("on the grass", "in the grass"),
    "sand": ("on the sand",),
    "road": ("on the road",),
    "table": ("on the table",),
    "snow": ("in the snow", "on the snow"),
}
RANKS = {  # the axis (0: x), and which way along it; then the wordings before and after the noun
    "leftmost": (0, -1, ("leftmost", "left most"), ("furthest left",)),
    "rightmost": (0, 1, ("rightmost", "right most"), ("furthest right",)),
    "highest": (1, -1, ("highest", "topmost"), ("furthest up",)),
    "lowest": (1, 1, ("lowest",), ("furthest down",)),
}
RELATIONS = {
    "left of": ("left of", "to the left of"),
    "right of": ("right of", "to the right of"),
    "above": ("above", "over"),
    "below": ("below", "under"),
    "in front of": ("in front of",),
    "behind": ("behind",),
}
SIZE_WORDS = {"small": ("small", "small", "little"), "big": ("big", "large")}

EXPRESSION_KINDS = ("attribute", "place", "zone", "rank", "relation")

YES, UNSURE, NO = 1, 0, -1


def expression_kind(expression: Expression) -> str:
    """One of ``EXPRESSION_KINDS``: whether an expression has only attributes (kind, colour, size), or what else."""
    where = expression.where
    if where is None:
        return "attribute"
    if expression.landmark is not None:
        return "relation"
    return "rank" if where in RANKS else "zone" if where in ZONES else "place"


def fits(scene: Scene, index: int, expression: Expression) -> int:
    """Whether an expression fits a thing of the scene: ``YES``, ``NO``, or ``UNSURE`` where people would differ."""
    thing = scene.things[index]
    if (
        thing.kind != expression.kind
        or expression.colour not in (None, thing.colour)
        or expression.size not in (None, thing.size)
    ):
        return NO
    where = expression.where
    if where is None:
        return YES
    if expression.landmark is not None:
        landmark = refers_to(scene, expression.landmark)
        return NO if landmark in (None, index) else _related(scene, index, where, landmark)
    if where in ZONES:
        return YES if thing.zone == where else NO
    if where in RANKS:
        axis, sign, *_ = RANKS[where]
        rest = replace(expression, where=None)
        others = [i for i in range(len(scene.things)) if i != index and fits(scene, i, rest) == YES]
        lead = min((sign * (_centre(scene, index)[axis] - _centre(scene, i)[axis]) for i in others), default=-1.0)
        return YES if lead > 0.06 else NO if lead < -0.02 else UNSURE
    return min(_placed(*_centre(scene, index), word) for word in where.split())


def refers_to(scene: Scene, expression: Expression) -> int | None:
    """The one thing that an expression means: it surely fits, and no other may fit. None if there is no such thing."""
    may = [i for i in range(len(scene.things)) if fits(scene, i, expression) != NO]
    return may[0] if len(may) == 1 and fits(scene, may[0], expression) == YES else None


def similar(scene: Scene, index: int) -> int:
    """How many other things of the scene are of the same kind and share the thing's colour or size."""
    thing = scene.things[index]
    return sum(
        i != index and o.kind == thing.kind and (o.colour == thing.colour or o.size == thing.size)
        for i, o in enumerate(scene.things)
    )


def _centre(scene: Scene, index: int) -> tuple[float, float]:
    x0, y0, x1, y1 = scene.things[index].box
    return (x0 + x1) / 2 / scene.width, (y0 + y1) / 2 / scene.height


def _placed(x: float, y: float, word: str) -> int:
    if word == "middle":
        off = abs(x - 0.5)
        return YES if off < 0.09 else NO if off > 0.17 else UNSURE
    share = {"left": x, "right": 1 - x, "top": y, "bottom": 1 - y}[word]
    return YES if share < 0.37 else NO if share > 0.46 else UNSURE


def _related(scene: Scene, index: int, relation: str, landmark: int) -> int:
    x0, y0, x1, y1 = scene.things[index].box
    u0, v0, u1, v1 = scene.things[landmark].box
    if relation in ("in front of", "behind"):
        front, back = (index, landmark) if relation == "in front of" else (landmark, index)
        apart = x1 <= u0 or u1 <= x0 or y1 <= v0 or v1 <= y0
        return YES if (front, back) in scene.hides else NO if apart or (back, front) in scene.hides else UNSURE
    if relation in ("left of", "above"):
        dx, dy = (u0 + u1 - x0 - x1) / 2, (v0 + v1 - y0 - y1) / 2
    else:
        dx, dy = (x0 + x1 - u0 - u1) / 2, (y0 + y1 - v0 - v1) / 2
    clear = {"left of": x1 <= u0, "right of": x0 >= u1, "above": y1 <= v0, "below": y0 >= v1}[relation]
    along, across = (dx, dy) if relation in ("left of", "right of") else (dy, dx)
    return YES if clear and abs(across) < 0.7 * along else NO if along <= 0 or abs(across) > 2 * along else UNSURE


def describe(
    scene: Scene, index: int, random: Random, count: int, weights: Mapping[str, float] | None = None
) -> list[Sentence]:
    """Sentences that mean one thing of the scene and no other.

    Without weights, the first needs every one of its words for that. With weights of the kinds of expression, the kind
    of each is drawn among those that allow it, and the first of a kind is as short as that kind can be.

    Returns an empty list where no such sentence is found.
    """
    good = _unambiguous(scene, index)
    if weights is not None:
        return _of_drawn_kinds(good, random, count, weights)
    if not good:
        return []
    least = min(map(_length, good))
    good = [e for e in good if _length(e) <= least + 2]
    # The shortest first; then any, but mostly with a colour and without "leftmost", which needs no other words.
    liking = {e: random.random() + 0.5 * (e.where in RANKS) + 0.4 * (e.colour is None) for e in good}
    good.sort(key=lambda e: (_length(e) > least, liking[e]))
    sentences: dict[str, Sentence] = {}
    for expression in itertools.chain(good, itertools.repeat(good[0], 20)):
        raw = _say(expression, random)
        sentences.setdefault(normalise(raw), Sentence(raw, (expression,)))
        if len(sentences) == count:
            break
    return list(sentences.values())


def _unambiguous(scene: Scene, index: int) -> list[Expression]:
    """All expressions that mean one thing of the scene and no other."""
    thing = scene.things[index]
    wheres: list[tuple[str | None, Expression | None]] = [(None, None), (thing.zone, None)]
    wheres += [(w, None) for w in (*PLACES, *RANKS)]
    for i, other in enumerate(scene.things):
        landmark = Expression(other.kind, None if scene.grey else other.colour)
        if i != index and other.visible > 0.5 and refers_to(scene, landmark) == i:
            wheres += [(relation, landmark) for relation in RELATIONS if _related(scene, index, relation, i) == YES]
    colours = (None,) if scene.grey else (None, thing.colour)
    sizes = (None,) if thing.size == "medium" else (None, thing.size)
    said = [Expression(thing.kind, c, s, *w) for c, s, w in itertools.product(colours, sizes, wheres)]
    return [e for e in said if refers_to(scene, e) == index]


def _of_drawn_kinds(good: list[Expression], random: Random, count: int, weights: Mapping[str, float]) -> list[Sentence]:
    """Sentences whose kinds of expression are drawn by weight; fewer where a kind has no further wording."""
    ready: dict[str, Iterator[Expression]] = {}
    for kind in EXPRESSION_KINDS:
        own = [e for e in good if expression_kind(e) == kind]
        if own and weights.get(kind, 0) > 0:
            least = min(map(_length, own))
            liking = {e: random.random() + 0.4 * (e.colour is None) for e in own}
            own.sort(key=lambda e: (_length(e) > least, liking[e]))
            ready[kind] = itertools.chain(own, itertools.repeat(own[0], 20))
    sentences: dict[str, Sentence] = {}
    drawn = random.choices([*ready], [weights[kind] for kind in ready], k=count) if ready else []
    for kind in drawn:
        for expression in ready[kind]:
            raw = _say(expression, random)
            if normalise(raw) not in sentences:
                sentences[normalise(raw)] = Sentence(raw, (expression,))
                break
    return [*sentences.values()]


def describe_several(
    scene: Scene, sentences: dict[int, list[Sentence]], shown: list[int], random: Random
) -> tuple[list[int], list[Sentence]] | None:
    """Two or more things, and sentences that mean exactly these; None if the scene has no such things.

    Args:
        sentences: of single things, that mean them and no other.
        shown: the things of which anything can be seen.
    """
    alike: dict[str, list[int]] = {}
    for i in shown:
        alike.setdefault(scene.things[i].kind, []).append(i)
    groups = [kind for kind, things in alike.items() if len(things) > 1]
    if groups and (len(sentences) < 2 or random.random() < 0.5):
        kind = random.choice(groups)
        plural = kind if kind == "fish" else f"{kind}s"
        raws = [f"every {kind}", f"All {plural}.", f"all of the {plural}"][: random.choice((1, 2, 3))]
        return alike[kind], [Sentence(raw, (Expression(kind),)) for raw in raws]
    if len(sentences) < 2:
        return None
    pair = random.sample(sorted(sentences), 2)
    first, second = (random.choice(sentences[i]) for i in pair)
    return pair, [Sentence(f"{normalise(first.raw)} and {normalise(second.raw)}", first.says + second.says)]


def describe_none(scene: Scene, random: Random) -> list[Sentence]:
    """A sentence that surely fits nothing in the scene: a kind, or a kind and colour, that the scene does not have."""
    kinds = list(KINDS)
    colours = [None] if scene.grey else [None, *PAINTS]
    said = [Expression(kind, colour) for kind in kinds for colour in colours]
    absent = [e for e in said if all(fits(scene, i, e) == NO for i in range(len(scene.things)))]
    near = [e for e in absent if e.colour is not None and any(thing.kind == e.kind for thing in scene.things)]
    expression = random.choice(near or absent)
    return [Sentence(_say(expression, random), (expression,))]


def normalise(raw: str) -> str:
    """The ``sent`` of a ``raw`` sentence: lower case, no full stop."""
    return raw.lower().removesuffix(".")


def _length(expression: Expression) -> int:
    return sum(part is not None for part in (expression.colour, expression.size, expression.where))


def _say(expression: Expression, random: Random) -> str:
    noun = _noun(expression, random)
    the, where = random.choice(("", "", "the ")), expression.where
    if where is None:
        text = the + noun
    elif expression.landmark is not None:
        text = f"{the}{noun} {random.choice(RELATIONS[where])} the {_noun(expression.landmark, random)}"
    elif where in RANKS:
        before, after = RANKS[where][2:]
        text = (
            f"{the}{random.choice(before)} {noun}" if random.random() < 0.7 else f"{the}{noun} {random.choice(after)}"
        )
    else:
        text = f"{the}{noun} {random.choice((PLACES | ZONES)[where])}"
    return text[0].upper() + text[1:] + "." if random.random() < 0.2 else text


def _noun(expression: Expression, random: Random) -> str:
    size = random.choice(SIZE_WORDS[expression.size]) if expression.size else None
    return " ".join(filter(None, (size, expression.colour, expression.kind)))
