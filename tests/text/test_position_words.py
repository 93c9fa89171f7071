import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from open_clip.tokenizer import SimpleTokenizer

from nemo_dali.synthetic._scenes import PLACES as PLACES_SAID
from nemo_dali.synthetic._scenes import RANKS
from nemo_dali.text.position_words import _SPELLINGS, allowed_cells, placement

L, R, T, B, M, N = -1, 1, -1, 1, 0, None

PLACES = {
    # plain
    "left man": (L, N),
    "Man on the LEFT.": (L, N),
    "girl in red on right": (R, N),
    "right one": (R, N),
    "far left": (L, N),
    "all the way to the right": (R, N),
    "leftmost kid": (L, N),
    "the right - most hot dog": (R, N),
    "top right": (R, T),
    "bottom left corner": (L, B),
    "bottomleft bowl": (L, B),
    "white pot upper right corner": (R, T),
    "lower donut": (N, B),
    "dog at the bottom": (N, B),
    "bus in the middle": (M, N),
    "bus in center": (M, M),
    "centre cow": (M, M),
    "top middle donut": (M, T),
    "middle left piece": (L, M),
    "middle row, second from right": (R, M),
    "glass in the middle row": (N, M),
    "middle chair on the left": (L, N),
    # misspelt or shortened
    "guy on rigth": (R, N),
    "lft zebra": (L, N),
    "rt guy": (R, N),
    "botom right": (R, B),
    "midlle elephant": (M, N),
    "man in lt blue": (N, N),
    "rght": (R, N),
    "man in the front ight": (R, N),
    "lweft guy": (L, N),
    "bttom rightt": (R, B),
    "bittom plate": (N, B),
    "bootom far left guy": (L, B),
    "bottom eft corner": (L, B),
    "far eft": (L, N),
    "eft side": (L, N),
    # as far as it goes
    "kite furthest up": (N, T),
    "the boat furthest down": (N, B),
    "one farthest down on the left": (L, B),
    "furthest up the picture": (N, T),
    "car furthest down the road": (N, N),
    "furthest man going up": (N, N),
    # misspelt as words of another meaning
    "an eft on a rock": (N, N),
    "let the man by the lift fight": (N, N),
    "girl in tight pants with eight buttons": (N, N),
    "two bottles to tow": (N, N),
    # position words inside other words
    "yellow flower on the pillow": (N, N),
    "laptop by the bright desktop": (N, N),
    "leftover pizza": (N, N),
    "cat beside the stop sign": (N, N),
    "upright suitcase": (N, N),
    "no position here": (N, N),
    "": (N, N),
    # counting
    "second from left": (L, N),
    "third person from the right": (R, N),
    "second guy left to right": (L, N),
    "second from the top": (N, T),
    "closest to right edge": (R, N),
    # relative to a thing, to the photo, to a group
    "man left of the woman": (N, N),
    "man to the left of the woman": (N, N),
    "bird on the right of another bird": (N, N),
    "cup on the left side of the table": (N, N),
    "red bear to the left of two other bears": (N, N),
    "bear on top of the box": (N, N),
    "bear on top of two boxes": (N, N),
    "left of the woman": (L, N),
    "top left of the pizza": (L, T),
    "top of the man's head": (N, N),
    "bottom half of the pizza": (N, N),
    "person in the middle of the bench": (N, N),
    "man left of pic": (L, N),
    "chair on the right side of the photo": (R, N),
    "bus on top of screen": (N, T),
    "cow bottom left of the picture": (L, B),
    "orange slightly right of center": (R, N),
    "the cow on the far right of the herd": (R, N),
    "dog on the left of the two": (L, N),
    "middle of the three zebras": (M, N),
    "right of the woman's hat": (N, N),
    "the left of a tall man ' s head": (N, N),
    "left of her hand": (N, N),
    "right of her on the couch": (R, N),
    "man to the right of the couple's table": (N, N),
    "top left of the room's door": (N, N),
    "right of the photo's center": (R, N),
    "top back of the chair": (N, N),
    "upper front edge of the box": (N, N),
    "dip top back": (N, T),
    "top back of the photo": (N, T),
    "right back of zebra": (R, N),
    "the top overhanging part": (N, N),
    "far left girl upper part": (L, N),
    "upper part of the picture": (N, T),
    "top right part": (R, T),
    # conflicts
    "right of the left couple": (R, N),
    "the woman on the right of the left couple": (R, N),
    "left of the right pair": (L, N),
    "far left phone right of guy in blue": (L, N),
    "left guy next to the man on the right": (L, N),
    "right half of the left sandwich": (L, N),
    "clear container to right of tea on left": (L, N),
    "man behind the left woman": (L, N),
    "box to the right of the bottom red one": (N, B),
    "right bike not your left": (R, N),
    "first umbrella, not the one in upper right": (N, N),
    "guy not playing on the right": (R, N),
    # clothing
    "girl in red top": (N, N),
    "woman in a blue tank top": (N, N),
    "woman in tanktop on the left": (L, N),
    "wearing a pretty top": (N, N),
    "man in top hat": (N, N),
    "white cup top left": (L, T),
    "cake with cherries on top": (N, N),
    "plate on the table top": (N, N),
    # body
    "man with a bat in his left hand": (N, N),
    "boy with left hand under chin": (N, N),
    "woman with purse on her right shoulder": (N, N),
    "the man ' s right foot": (N, N),
    "carrot with onions to its right": (N, N),
    "guy whose upper body is visible": (N, N),
    "left hand": (L, N),
    "person on the right hand side": (R, N),
    "far left leg": (L, N),
    "top right hand picture": (R, T),
    # directions, adverb, verb, compounds
    "sheep facing left": (N, N),
    "man looking to the right": (N, N),
    "bus going left to right": (N, N),
    "left person that is looking right": (L, N),
    "guy right behind the meter": (N, N),
    "blurry guy right next to zombie": (N, N),
    "guy right in middle of screen": (M, N),
    "car on right next to the mouse": (R, N),
    "man in black right": (R, N),
    "pizza that was left on the plate": (N, N),
    "left over pizza": (N, N),
    "cup that is right side up": (N, N),
    "middle aged man": (N, N),
}


@pytest.mark.parametrize("sentence", PLACES)
def test_placement(sentence):
    assert placement(sentence) == PLACES[sentence]


@pytest.mark.parametrize(
    "sentence, cells_of_2, cells_of_3",
    [
        ("left man", [0, 2], [0, 3, 6]),
        ("right man", [1, 3], [2, 5, 8]),
        ("top man", [0, 1], [0, 1, 2]),
        ("bottom man", [2, 3], [6, 7, 8]),
        ("top right", [1], [2]),
        ("bottom left", [2], [6]),
        ("middle man", [0, 1, 2, 3], [1, 4, 7]),
        ("center", [0, 1, 2, 3], [4]),
        ("middle left", [0, 2], [3]),
        ("bottom middle", [2, 3], [7]),
        ("middle row", [0, 1, 2, 3], [3, 4, 5]),
        ("man left of the woman", [0, 1, 2, 3], list(range(9))),
        ("man", [0, 1, 2, 3], list(range(9))),
    ],
)
def test_cells(sentence, cells_of_2, cells_of_3):
    for grid, cells in [(1, [0]), (2, cells_of_2), (3, cells_of_3)]:
        masks = allowed_cells([sentence], grid)
        assert masks.dtype == np.uint16
        assert [cell for cell in range(16) if masks[0] >> cell & 1] == cells


def test_every_rank_and_place_that_generated_expressions_say_is_a_position():
    sides = {"leftmost": (L, N), "rightmost": (R, N), "highest": (N, T), "lowest": (N, B)}
    for rank, (_, _, before, after) in RANKS.items():
        for sentence in [f"the {wording} cup" for wording in before] + [f"cup {wording}" for wording in after]:
            assert placement(sentence) == sides[rank], sentence
    for place, wordings in PLACES_SAID.items():
        for wording in wordings:
            found = placement(f"red cup {wording}")
            assert found[0] == placement(place)[0] and found != (N, N), wording


def test_no_sentences_and_bad_grid():
    assert allowed_cells([], 2).shape == (0,)
    with pytest.raises(ValueError, match=r"grid \(4\) must be 1, 2 or 3"):
        allowed_cells(["left"], 4)


WORDS = (
    "left right top bottom upper lower middle center of the on to hand side two not facing his tank row man , next 3"
)


@given(st.lists(st.sampled_from(WORDS.split()), max_size=12).map(" ".join) | st.text(max_size=60))
def test_some_cell_is_always_allowed(sentence):
    for grid in (1, 2, 3):
        mask = int(allowed_cells([sentence], grid)[0])
        assert 0 < mask < 1 << grid * grid


@given(st.sampled_from(["left", "right", "top", "bottom", "middle", "center", "low", "up"]), st.sampled_from("bkqz"))
def test_words_inside_words_do_not_count(word, letter):
    for hidden in (f"{letter}x{word}", f"{word}x{letter}", f"{letter}x{word}x{letter}"):
        assert placement(f"the {hidden} man") == (None, None)


def test_no_misspelling_is_a_word_that_clip_knows():
    """Its vocabulary has the 30,000 most frequent words; those taken for places are listed."""
    known = {token.removesuffix("</w>") for token in SimpleTokenizer().encoder if token.endswith("</w>")}
    taken = set("topmost uppermost highest lowest mid central centre ctr rite rt ight tright".split())
    assert {word for word in _SPELLINGS if word in known} <= taken


@given(st.permutations(["zebra", "on", "grass", "near", "water"]), st.sampled_from(["left", "right"]))
def test_mirrored_sentences_are_placed_mirrored(words, side):
    words.insert(2, side)
    other = {"left": "right", "right": "left"}
    mirrored = [other.get(word, word) for word in words]
    here, there = placement(" ".join(words))[0], placement(" ".join(mirrored))[0]
    assert here == -there == {"left": -1, "right": 1}[side]
