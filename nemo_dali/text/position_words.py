"""Position words in a referring expression, and the mosaic cells in which the expression stays true.

"left man" is false once his photo is in the right half of a mosaic; "man left of the woman" is true in every cell,
because the woman comes along. The rules:

1. Only whole words count: left, right, top, upper, bottom, lower, middle, center, with "leftmost", "bottomleft" and the
   misspellings people make, unless they are other words ("lift", "tight"). Depth (front, back, near) does not count,
   and neither does "up" or "high"; but "furthest up" is the top, as "highest" is.
2. Uses that say nothing about a place in the photo are crossed out, by kind in the table below: clothing ("tank top"),
   body parts ("in his left hand"), directions of looking and moving ("facing left"), the adverb ("right behind"), the
   verb ("left over"), what is denied ("not the one on the left").
3. "<place> of <thing>" is relative to the thing and is crossed out ("left of the woman", "top back of the chair",
   "right half of the sandwich"), unless the thing is the photo ("left of pic") or a group that the target belongs to
   ("right of the two"), or the expression begins with it: "right of the left couple" is about the right one, but
   "right of the woman's hat" is beside the hat. A "top part" or "bottom part" is relative to a thing as well.
4. Of the remaining words the first decides, axis by axis: "left phone near the right man" is left. Words about another
   thing count if none about the target does, as both are in the same photo: "man behind the left woman" is left.
   "middle" yields to a side: "middle chair on the left" is in the left column.
5. Counting starts at a side of the whole mosaic, however far it goes: "third from left" is left.

A word that can be read in two ways is taken for a place: a narrower choice of cells keeps both readings true.
Of 100 random expressions with such a word, checked by hand against the boxes, 2 were wrong: "top" of a stack of things.
They are from the val splits of RefCOCO and RefCOCOg, on which the rules were made: expect more errors elsewhere. Others
seen there: glued words ("leftguy"), "not my puppy on right".
"""

import re
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

from nemo_dali._choices import GRIDS

_SIDES = {"left": (-1, None), "right": (1, None), "top": (None, -1), "bottom": (None, 1)}
_SIDES |= {"upper": _SIDES["top"], "lower": _SIDES["bottom"]}


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


def _any(words: frozenset[str]) -> str:
    return rf"(?:{'|'.join(sorted(words))})\b"


_KEYS = ("qwertyuiop", "asdfghjkl", "zxcvbnm")


def _near(letter: str) -> str:
    """The keys beside a letter's."""
    row = next(i for i, keys in enumerate(_KEYS) if letter in keys)
    place = _KEYS[row].index(letter)
    steps = ((0, -1), (0, 1), (-1, 0), (-1, 1), (1, -1), (1, 0))
    return "".join(
        _KEYS[row + down][place + along : place + along + 1]
        for down, along in steps
        if 0 <= row + down < len(_KEYS) and place + along >= 0
    )


def _slips(word: str) -> Iterator[str]:
    """What a slip of a finger makes of a word: a letter missing, doubled, swapped, or a wrong one instead or added."""
    for i, letter in enumerate(word):
        before, behind = word[:i], word[i + 1 :]
        yield before + behind
        yield before + 2 * letter + behind
        yield before[:-1] + letter + before[-1:] + behind
        for other in _near(letter):
            yield before + other + behind
            yield before + other + letter + behind
            yield before + letter + other + behind
        if letter in "aeiou":
            yield from (before + other + behind for other in "aeiou")


# The words themselves, and slips of them that are words with another meaning.
_NO_SLIPS = _words("left eft lect lefty let lett lift loft right dight eight fight fright tight bottom")

# Slips, words run together, superlatives, British, short and wrong spellings. Not "lt" (light) or "bot" (often a boy).
# "top" is too close to other words to have slips of its own.
_SPELLINGS = {
    **{slip: word for word in ("left", "right", "bottom") for slip in _slips(word) if slip not in _NO_SLIPS},
    **dict.fromkeys(_words("tpo topp ttop"), "top"),
    **dict.fromkeys(_words("leftmost leftest leftish leftside farleft"), "left"),
    **dict.fromkeys(_words("rightmost rightest rightish rightside righty farright rt rite"), "right"),
    **dict.fromkeys(_words("topmost uppermost highest"), "top"),
    **dict.fromkeys(_words("bottommost lowest bottome bottow bootom btoom btm"), "bottom"),
    **dict.fromkeys(_words("middlemost midle midlle middel midde middlr midd mid"), "middle"),
    **dict.fromkeys(_words("centre central centermost centerish ctr"), "center"),
    **{
        a + b: f"{a} {b}"
        for one, other in [("left right", "top bottom upper lower"), ("left right top bottom", "middle center")]
        for x in one.split()
        for y in other.split()
        for a, b in [(x, y), (y, x)]
    },
    "lefthand": "left hand",
    "righthand": "right hand",
    "tanktop": "tank top",
    "ontop": "on top",
}
_PLACES = frozenset([*_SIDES, "middle", "center"])
_TRIGGERS = (
    _PLACES | frozenset(_SPELLINGS) | {"eft", "furthest", "farthest"}
)  # half of all expressions have none of these, and nothing is done with them

_PICTURE = _words("photo photograph pic pict picture image img screen frame shot scene view page room middle center")
_GROUP = _words(
    "two three four five six seven both couple pair trio group row line bunch herd pile stack crowd them us"
)
_OTHER = _words("other others more additional smaller larger bigger")
_PART = _words("hand side sides half part portion section area quarter end edge corner level")
_DEPTH = _words("back front rear inside outside inner outer")
_BODY = _words(
    "hand arm forearm elbow wrist shoulder leg knee thigh foot ankle eye ear cheek hip finger thumb breast body torso "
    "lip jaw sleeve shoe sock boot glove paw wing tusk horn"
)
_GARMENTS = _words("tank crop halter tube bikini sports pajama")
_COLORS = _words(
    "red blue green yellow white black pink purple grey gray orange brown tan teal gold silver dark light striped "
    "plaid floral table counter desk stove roof lap hill mountain flat hard muffin"
)
_WITH = _words("with in has had have having wearing showing")
_LOOK = _words(
    "face facing faces look looking looks point pointing pointed points turned turning heading headed leaning leans "
    "moving going goes staring stares gazing tilted tilting tipped bending"
)
_HIS = _words("his her him its their s")
_BEHIND = _words("next behind beside besides by above below beneath under underneath against before after there now")
_WAS = _words("has had have was were been being got")
_OVER = _words("over overs alone unattended uneaten untouched open")
_NOT = _words("not except isn isnt")
_AGED = _words("aged age finger eastern school size sized handed field fielder")

_P = _any(_PLACES)
_LR = r"(?:left|right)\b"
_UP_DOWN = r"(?:top|bottom|upper|lower)\b"
_THE = _any(_words("the a an this that these those our my your whole entire very far most all"))
_ON_THE = "on to at in from the far very way front back down up top bottom upper lower".split()
_INTRODUCED = "".join(rf"(?<!\b{w} )" for w in _ON_THE)

# An "eft" that cannot be a newt: "bottom eft corner", "far eft", "eft side".
_EFT = re.compile(rf"\b(far |{_any(_PLACES)} )eft\b|\beft(?= (?:most\b|of\b|{_any(_PART)}))")
# "the kite furthest up"; not "furthest down the road", which is depth.
_FURTHEST = re.compile(rf"\b(?:furthest|farthest) (up|down)\b(?! {_THE} (?!{_any(_PICTURE)}))")
# "the woman's hat", "the crowd's noise"; not "the photo's center". Apostrophes are spaces here.
_OWNED = rf" s (?!{_any(_PICTURE | _PART)})"

_HER = r"(?:his|its|their|her(?! (?:on|in|at|by|and|with|near|next)\b)) \w"

# What an expression begins with is about the target: "right of the left couple", "left hand" (one that reaches in); not
# "right of the woman's hat".
_BEGINNING = re.compile(
    rf"(?:{_THE} )*(?:{_P} )*{_LR} (?:of\b(?!(?: {_THE})*(?: {_HER}|(?: \w+){{1,2}}?{_OWNED}))"
    rf"|{_any(_BODY)}(?! (?:of|{_any(_PART)})))"
)

# Words of which a rule needs at least one to apply (so most rules cost nothing), and what it crosses out.
_RULES = [
    (words, re.compile(pattern))
    for words, pattern in [
        # "on top of the car", "on top of two boxes"; not "on top of the screen"
        (_words("of"), rf"\bon (?:{_THE} )?top of (?!(?:{_THE} )*{_any(_PICTURE)})"),
        # "left of the woman", "right half of the sandwich", "left of two other men"; not "left of pic"
        (
            _words("of"),
            rf"\b(?:{_P} )+(?:most )?(?:{_any(_PART | _BODY)} )*of\b"
            rf"(?!(?: {_THE})*(?: {_P})* (?:\d+\b|{_any(_PICTURE | _GROUP)})(?! {_any(_OTHER)})(?!{_OWNED}))(?!$)",
        ),
        # "top back of the chair", "top front edge of the box"; not "right back of the zebra", "top front of the photo"
        (
            _words("of"),
            rf"\b(?:{_P} )*{_UP_DOWN} {_any(_DEPTH)}(?: {_any(_PART)})? of\b(?! (?:{_THE} )*{_any(_PICTURE | _GROUP)})",
        ),
        # "the top overhanging part", "upper part"; not "top right part", "top part of the photo"
        (
            _words("part portion"),
            rf"\b{_UP_DOWN} (?:\w+ing )?(?:part|portion)\b(?! (?:of (?:{_THE} )*{_any(_PICTURE | _GROUP)}|{_P}))",
        ),
        # "black tank top", "red top", "table top"; not "white top left"
        (_GARMENTS, rf"\b{_any(_GARMENTS)} top\b"),
        (_COLORS, rf"\b{_any(_COLORS)} top\b(?! (?:corner|row|{_P}))"),
        (_words("top"), r"\btop (?:hat|bun|knot|notch)\b"),
        # "wearing a pretty top", "with a wooden top", "with cherries on top"; not "with a hat on the top"
        (
            _WITH,
            rf"\b(?:wearing|(?:with|in|has|had) an?) (?:\w+ ){{0,2}}(?:top|bottom)\b(?! (?:\w+ of|row|shelf|{_P}))",
        ),
        (_WITH, rf"\b(?!in\b){_any(_WITH)} (?:\w+ ){{0,6}}on top\b(?! (?:of|row|shelf|bunk|{_P}))"),
        # "left knee", "lower lip"; not "right hand side", "top right arm"
        (
            _BODY,
            r"(?<!\bfar )(?<!\bfrom )(?<!\bfront )(?<!\bback )(?<!\btop )(?<!\bbottom )(?<!\bupper )(?<!\blower )"
            rf"\b(?!middle|center){_P} {_any(_BODY)}(?! {_any(_PICTURE | _PART | {'row', 'panel'})})",
        ),
        # "his left", "on the woman's right"
        (_HIS, rf"\b{_any(_HIS)} {_LR}(?! most)"),
        # "facing left", "looking to the right", "going left to right"; not "looking at the left one"
        (
            _LOOK,
            rf"\b{_any(_LOOK)}(?: (?:slightly|back|down|up|off|away))?(?: (?:to|towards?))?(?: {_THE}){{0,2}} {_LR}"
            rf"(?: to (?:the )?{_LR})?",
        ),
        # "right behind", "right in front of"; not "on right behind the fence"
        (_BEHIND, rf"(?=right ){_INTRODUCED}\bright (?={_any(_BEHIND)})"),
        (
            _words("in on"),
            rf"(?=right ){_INTRODUCED}\bright (?=(?:in front of|in between|in (?:the )?{_P}|on (?:the )?edge)\b)",
        ),
        (_words("up"), r"\bright side up\b"),
        # "has left", "left over"; not "is left of"
        (_WAS, rf"\b{_any(_WAS)} left\b(?! (?:of|{_any(_PART)}))"),
        (_OVER, rf"(?=left ){_INTRODUCED}\bleft {_any(_OVER)}"),
        # "not the one on the left", "not your left"; not "not playing on the left"
        (
            _NOT,
            rf"\b{_any(_NOT)}(?: (?:for|the|ones?|on|in|at|to|your|my|far|very))*(?: (?!\w+ing\b)\w+)?"
            rf"(?: (?:the|one|on|in|at|to|far|very))*(?: {_P})+",
        ),
        # "middle aged", "left handed"
        (_AGED, rf"\b{_P} {_any(_AGED)}"),
    ]
]
_MIDDLE_ROW = re.compile(
    rf"\b(?:middle|center) (?:row|shelf|tier|rack|level|bunk|drawer|{_LR})|{_LR} (?:middle|center)\b"
)
_WORD = re.compile(r"[a-z0-9]+")
_FIND_PLACES = re.compile(rf"\b{_P}")


def placement(sentence: str) -> tuple[int | None, int | None]:
    """Where the expression says that its target is: (horizontal, vertical).

    Returns:
        horizontal: -1 left, 0 middle, 1 right; vertical: -1 top, 0 middle, 1 bottom; None where it does not say.
    """
    words = _WORD.findall(sentence.lower())
    if _TRIGGERS.isdisjoint(words):
        return None, None
    text = " ".join([_SPELLINGS.get(word, word) for word in words])
    if "eft" in words:
        text = _EFT.sub(r"\1left", text)
    text = _FURTHEST.sub(lambda found: "top" if found[1] == "up" else "bottom", text)
    words = text.split()
    beginning = _BEGINNING.match(text)
    begin = beginning.end() if beginning else 0
    for needed, pattern in _RULES:
        if not needed.isdisjoint(words):
            text = text[:begin] + pattern.sub(",", text[begin:])
    horizontal: int | None = None
    vertical: int | None = None
    middle = ""
    for word in _FIND_PLACES.findall(text):
        if word in _SIDES:
            x, y = _SIDES[word]
            horizontal = x if horizontal is None else horizontal
            vertical = y if vertical is None else vertical
        else:
            middle = middle or word
    if middle:
        if vertical is None and (_MIDDLE_ROW.search(text) or (middle == "center" and horizontal is None)):
            vertical = 0
        if horizontal is None and not (vertical == 0 and middle == "middle"):
            horizontal = 0
    return horizontal, vertical


def placed_share(sentences: Sequence[str]) -> float:
    """The share of the expressions that say where their target is; there must be at least one expression."""
    return sum(placement(sentence) != (None, None) for sentence in sentences) / len(sentences)


def allowed_cells(sentences: Sequence[str], grid: int) -> npt.NDArray[np.uint16]:
    """The cells of a grid x grid mosaic in which each expression stays true when its photo is there.

    Args:
        grid: cells along a side: 1, 2 or 3. Two have no middle: there "middle" allows both.

    Returns:
        uint16 [S]: bit c is set where row-major cell c is allowed. Never 0; all bits without a position word.
    """
    if grid not in GRIDS:
        raise ValueError(f"grid ({grid}) must be 1, 2 or 3")
    everywhere = range(grid)
    spans = {None: everywhere, -1: everywhere[:1], 0: everywhere[1:2] if grid == 3 else everywhere, 1: everywhere[-1:]}
    masks = {
        (x, y): sum(1 << row * grid + column for row in spans[y] for column in spans[x]) for x in spans for y in spans
    }
    return np.array([masks[placement(sentence)] for sentence in sentences], np.uint16)
