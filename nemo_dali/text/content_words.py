"""The words of a sentence that say what a thing is, not where it is in its photo."""

import re

_WORD = re.compile(r"[a-z0-9]+(?:'[a-z]+)?")
_PLACES = {"left", "right", "top", "bottom", "upper", "lower", "middle", "center", "centre", "side", "corner", "half"}
_PLACES |= {f"{place}most" for place in ("left", "right", "top", "bottom", "upper", "lower")}
_PLACES |= {"most", "far", "furthest", "farthest", "up", "down", "highest", "lowest"}
_FUNCTION = {"a", "an", "the", "of", "in", "on", "at", "to", "is", "are", "it", "its", "one", "that", "this", "and"}
_DENIALS = {"not", "no", "without", "nor", "except", "isn't", "aren't", "doesn't"}


def content_words(sentence: str) -> frozenset[str] | None:
    """The words without places, articles and so on; None if there are none, or the sentence denies something."""
    words = frozenset(_WORD.findall(sentence.lower()))
    left = words - _PLACES - _FUNCTION
    return None if words & _DENIALS or not left else left
