"""Which photos certainly show what a sentence describes, because another sentence says so.

If a sentence about a thing in a photo has all the words of this one, places aside, and both are about things of the
same category, the photo shows what this one describes: "red cup" fits where there is a "small red cup on the left".
Most things have no sentence, and sentences leave words out, so many more photos fit than are found this way.
"""

import numpy as np
import numpy.typing as npt

from nemo_dali.data.dataset import Dataset
from nemo_dali.text.content_words import content_words


class Said:
    """The sentences of a data set by their words and categories."""

    def __init__(self, dataset: Dataset) -> None:
        ref = dataset.sentences.ref
        self._photo, self._category = dataset.refs.image[ref], dataset.refs.category[ref]
        of_text: dict[str, frozenset[str] | None] = {}
        self._words = [
            of_text[text] if text in of_text else of_text.setdefault(text, content_words(text))
            for text in dataset.sentences.text
        ]
        having: dict[str, list[int]] = {}
        for sentence, words in enumerate(self._words):
            for word in words or ():
                having.setdefault(word, []).append(sentence)
        self._having = {word: np.array(sentences) for word, sentences in having.items()}

    def photos(self, sentence: int) -> npt.NDArray[np.int64] | None:
        """Rows of photos that certainly show what a sentence describes, including its own.

        None where nothing can be said: its target's category is not known, or its only words are places.
        """
        words, category = self._words[sentence], self._category[sentence]
        if words is None or category < 0:
            return None
        fewest, *others = sorted((self._having[word] for word in words), key=len)
        found = fewest[self._category[fewest] == category]
        for sentences in others:
            found = found[np.isin(found, sentences, assume_unique=True)]
        return np.unique(self._photo[found]).astype(np.int64)
