"""Sentences that say more or less of the same things, and what follows from their words by definition."""

from nemo_dali.text.content_words import content_words

SENTENCES = ("red kite", "the kite on the left", "small red kite", "kite not red", "left", "blue kite at the top")


def say(refs, _):
    for number, ref in enumerate(refs):
        for place, sentence in enumerate(ref["sentences"]):
            sentence["sent"] = SENTENCES[(number * 7 + place * 3) % len(SENTENCES)]


def by_definition(dataset, sentence):
    """Rows of photos, from the words of every pair of sentences; None: nothing can be said."""
    ref, words = dataset.sentences.ref, [content_words(text) for text in dataset.sentences.text]
    category = dataset.refs.category[ref]
    if words[sentence] is None or category[sentence] < 0:
        return None
    return sorted(
        {
            int(dataset.refs.image[ref[other]])
            for other in range(len(ref))
            if words[other] is not None and words[sentence] <= words[other] and category[other] == category[sentence]
        }
    )
