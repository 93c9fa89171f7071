"""What a sentence says of a thing, places aside."""

import pytest

from nemo_dali.text.content_words import content_words


@pytest.mark.parametrize(
    ("sentence", "words"),
    [
        ("the red cup", {"red", "cup"}),
        ("Red cup on the LEFT.", {"red", "cup"}),
        ("leftmost man's hat", {"man's", "hat"}),
        ("cup left of the small ball", {"cup", "small", "ball"}),
        ("left one", None),
        ("", None),
        ("man not in red", None),
        ("the one that isn't red", None),
        ("zebra number 7", {"zebra", "number", "7"}),
    ],
)
def test_words(sentence, words):
    assert content_words(sentence) == (None if words is None else frozenset(words))
