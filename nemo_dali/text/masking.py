"""Sentences with words masked: MaskRIS's masked tokens and DMMI's masked nouns.

Both are made per batch from the tokens that ``text.tokenize`` returned, and both are pure functions of (seed, epoch,
position), like the plan. Their random words are those of ``numpy.random.Philox(key=[seed, epoch], counter=[0,
position, 1, 0])``; the plan's have 0 in place of the 1. A number below n is the high word of ``word * n``; a share is
the upper 53 bits of a word.

    word          use
    2 i           what is done with token i: ``mask_tokens``
    2 i + 1       the token that takes the place of token i: ``mask_tokens``
    8192          the nouns that are masked: ``mask_nouns``
"""

from collections.abc import Callable, Iterable, Sequence
from importlib.metadata import version
from typing import Any

import numpy as np
import numpy.typing as npt

from nemo_dali._checks import integer
from nemo_dali._lazy import extra
from nemo_dali.errors import NemoError
from nemo_dali.io.cache import cached, name_for
from nemo_dali.kernels.plan.masking import replace_nouns, replace_tokens
from nemo_dali.text.tokens import MAX_CONTEXT_LENGTH

RUNS_VERSION = 2  # of the cached array; part of its name
MASK = 103  # [MASK] of bert-base-uncased
SPECIAL = (0, 100, 101, 102, 103)  # its [PAD], [UNK], [CLS], [SEP] and [MASK]
VOCABULARY_SIZE = 30522  # its tokens

Integers = npt.NDArray[np.integer[Any]]
Int64 = npt.NDArray[np.int64]
Nouns = Callable[[str], Iterable[int]]


def mask_tokens(
    tokens: Integers,
    *,
    seed: int,
    epoch: int,
    positions: Integers,
    share: float = 0.15,
    masked: float = 0.8,
    replaced: float = 0.1,
    mask: int = MASK,
    special: Sequence[int] = SPECIAL,
    vocabulary_size: int = VOCABULARY_SIZE,
) -> Int64:
    """Mask words as MaskRIS does: ``random_word`` in its ``data/dataset_refer_bert.py``.

    Every token that is not special is chosen with probability ``share``. Of the chosen, ``masked`` become [MASK],
    ``replaced`` become any token of the vocabulary, special ones included, and the others stay. The attention mask
    does not change. The defaults are those of ``scripts/script.sh``, whereas its parser's are 0 for ``share`` and 0.2
    for ``replaced``; the ids are those of bert-base-uncased.

    Args:
        tokens: integers [B, L], padded with a special token.
        seed, epoch: integers in [0, 2**64).
        positions: integers [B], each sample's place in the epoch: a plan's ``position``.
        share, masked, replaced: probabilities; ``masked + replaced`` is at most 1.
        mask: the id of [MASK].
        special: ids that are left alone.
        vocabulary_size: random tokens are below it.

    Returns:
        int64 [B, L].

    Raises:
        ValueError: an argument out of its range, or arrays of the wrong shapes.
    """
    made = _check(tokens, seed, epoch, positions)
    for name, value in (("share", share), ("masked", masked), ("replaced", replaced)):
        if not 0 <= value <= 1:
            raise ValueError(f"{name} ({value}) must be from 0 to 1")
    if masked + replaced > 1 + 1e-9:  # 0.7 + 0.3 may be a little more
        raise ValueError(f"masked + replaced ({masked + replaced}) must be at most 1")
    if vocabulary_size < 1:
        raise ValueError(f"vocabulary_size ({vocabulary_size}) must be at least 1")
    replace_tokens(
        np.uint64(seed),
        np.uint64(epoch),
        np.ascontiguousarray(positions, np.int64),
        float(share),
        float(masked),
        float(masked + replaced),
        mask,
        np.asarray(special, np.int64),
        vocabulary_size,
        made,
    )
    return made


def mask_nouns(
    tokens: Integers,
    lengths: Integers,
    runs: Integers,
    *,
    seed: int,
    epoch: int,
    positions: Integers,
    mask: int = 0,
) -> Int64:
    """Mask one run of nouns per sentence as DMMI does: ``data/dataset.py`` and ``data/dataset_zom.py``.

    DMMI writes 0, which is [PAD], not [MASK], and leaves the attention mask as it was. It draws a sentence's run when
    the data set is loaded and keeps it; with the plan's epoch and positions it is drawn again for every sample. To do
    as DMMI does, give ``epoch=0`` and the sentences' rows as ``positions``.

    Args:
        tokens: integers [B, L].
        lengths: integers [B], how many tokens of each row are text; those after them are left alone.
        runs: integers [B, R, 2], the batch's rows of what ``noun_runs`` returned.
        seed, epoch: integers in [0, 2**64).
        positions: integers [B], each sample's place in the epoch: a plan's ``position``.
        mask: the token that replaces the nouns.

    Returns:
        int64 [B, L]. A sentence without nouns is unchanged.

    Raises:
        ValueError: an argument out of its range, or arrays of the wrong shapes.
    """
    made = _check(tokens, seed, epoch, positions)
    if np.shape(lengths) != (len(made),):
        raise ValueError(f"lengths ({list(np.shape(lengths))}) must be [{len(made)}], one per sample")
    if np.ndim(runs) != 3 or (len(runs), np.shape(runs)[-1]) != (len(made), 2):
        raise ValueError(f"runs ({list(np.shape(runs))}) must be [{len(made)}, R, 2], begin and end")
    replace_nouns(
        np.uint64(seed),
        np.uint64(epoch),
        np.ascontiguousarray(positions, np.int64),
        np.ascontiguousarray(np.minimum(lengths, made.shape[1]), np.int64),
        np.ascontiguousarray(runs, np.int64),
        mask,
        made,
    )
    return made


def noun_runs(
    sentences: Sequence[str],
    *,
    nouns: str | Nouns = "textblob",
    context_length: int = 20,
    fingerprint: str | None = None,
) -> npt.NDArray[np.int32]:
    """Where each sentence has nouns: runs of neighbouring ones are masked together (DMMI's ``get_adjacent_word``).

    Args:
        nouns: ``"textblob"`` for ``textblob_nouns``, or a callable that gives the places of a sentence's nouns among
            its tokens, [CLS] being place 0, in ascending order. A callable's result is not cached.
        context_length: places at or beyond it are left out.
        fingerprint: identifies exactly these sentences; None: the cache is neither read nor written.

    Returns:
        int32 [S, R, 2]: the first place of every run and the place after its last, where R is the most runs that any
        sentence has; (0, 0) fills the rows of the others. May be a read-only view of a mapped file.

    Raises:
        ValueError: any string but "textblob", a bad context length, or places that do not ascend from 1 or more.
        NemoError: TextBlob or its data is not installed.
    """
    context_length = integer("context_length", context_length, least=3, most=MAX_CONTEXT_LENGTH)
    if callable(nouns):
        return _runs(sentences, nouns, context_length)
    if nouns != "textblob":
        raise ValueError(f"nouns ({nouns!r}) must be 'textblob' or a callable")
    if fingerprint is None:
        return _runs(sentences, textblob_nouns, context_length)
    with extra("nouns", "Masking nouns"):
        parts = [RUNS_VERSION, nouns, version("textblob"), version("nltk"), context_length, fingerprint]
    return cached(
        name_for("nouns", parts),
        np.int32,
        (len(sentences), None, 2),
        make=lambda: _runs(sentences, textblob_nouns, context_length),
        fits=lambda runs: bool(((runs >= 0) & (runs <= context_length)).all()),
    )


def textblob_nouns(sentence: str) -> list[int]:
    """The places that DMMI takes for nouns: words that TextBlob tags NN or NNS, its n-th word standing for place n.

    TextBlob counts words, without punctuation, where BERT counts pieces of words and punctuation. So in a sentence
    with either, the wrong tokens are masked, in DMMI and here; a callable of your own may do better.

    Tried with TextBlob 0.20 and its PatternTagger. Its default tagger, DMMI's, needs data that must be downloaded and
    has not been tried.

    Raises:
        NemoError: TextBlob or the data of its tagger is not installed.
    """
    with extra("nouns", "Masking nouns"):
        import textblob
        import textblob.exceptions
    try:
        tags = textblob.TextBlob(sentence.lower()).tags
    except textblob.exceptions.MissingCorpusError as error:
        raise NemoError(
            "TextBlob's tagger has no data on this machine. Download it with `python -m textblob.download_corpora "
            "lite`, or give `nouns` a callable of your own."
        ) from error
    return [place for place, (_, tag) in enumerate(tags, start=1) if tag in ("NN", "NNS")]


def _runs(sentences: Sequence[str], nouns: Nouns, context_length: int) -> npt.NDArray[np.int32]:
    known: dict[str, list[list[int]]] = {}
    for sentence in sentences:
        if sentence in known:
            continue
        found = known[sentence] = []
        last = 0
        for place in nouns(sentence):
            if place <= last:
                raise ValueError(f"nouns ({place} after {last} for {sentence!r}) must give ascending places from 1 on")
            last = place
            if place >= context_length:
                continue
            if found and found[-1][1] == place:
                found[-1][1] = place + 1
            else:
                found.append([place, place + 1])
    made = np.zeros((len(sentences), max(map(len, known.values()), default=0), 2), np.int32)
    for row, sentence in zip(made, sentences, strict=True):
        runs = known[sentence]
        row[: len(runs)] = np.reshape(runs, (-1, 2))
    return made


def _check(tokens: Integers, seed: int, epoch: int, positions: Integers) -> Int64:
    """A copy of the tokens, after all arguments are checked."""
    tokens = np.asarray(tokens)
    if tokens.ndim != 2 or tokens.dtype.kind not in "iu" or tokens.shape[1] > MAX_CONTEXT_LENGTH:
        raise ValueError(
            f"tokens ({tokens.dtype} {list(tokens.shape)}) must be integers [B, L], L at most {MAX_CONTEXT_LENGTH}"
        )
    if np.shape(positions) != (len(tokens),):
        raise ValueError(f"positions ({list(np.shape(positions))}) must be [{len(tokens)}], one per sample")
    for name, value in (("seed", seed), ("epoch", epoch)):
        if not 0 <= value < 2**64:
            raise ValueError(f"{name} ({value}) must be in [0, 2**64)")
    return np.array(tokens, np.int64, order="C")
