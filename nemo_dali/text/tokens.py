"""Tokenizers: a data set's sentences become one int32 array, made once and kept on disk.

What is kept is int32 [sentences, context_length + 2]: the tokens, then their number, and a checksum of the row, which
is compared when the row is first used, so that a start reads none of it; ``io.cache`` says where and how.
"""

import difflib
import functools
from collections.abc import Callable, Sequence
from importlib.metadata import version
from typing import Any

import numpy as np
import numpy.typing as npt

from nemo_dali._checks import integer
from nemo_dali._lazy import extra
from nemo_dali.errors import NemoError
from nemo_dali.io.cache import cached, name_for, renewed
from nemo_dali.text.wordpiece import CONTEXT_LENGTH, PREFIX, Vocabulary, WordPiece, read_vocabulary

TOKENS_VERSION = 4  # of the cached array; part of its name
MAX_CONTEXT_LENGTH = 4096  # of any text encoder known; bounds the memory that a mistyped number could take

Tokenizer = Callable[[list[str]], npt.ArrayLike]
Int32 = npt.NDArray[np.int32]

BLOCK = 1 << 16  # rows checked together
_FIRST = np.uint32(0x9E3779B9)  # added to every sum, so that a row of zeros does not pass
# Odd numbers, so that one changed number always changes the sum.
_FACTORS = np.random.Philox(key=0).random_raw(MAX_CONTEXT_LENGTH + 1).astype(np.uint32) | np.uint32(1)


def tokenize(
    sentences: Sequence[str],
    *,
    tokenizer: str | Tokenizer = "clip",
    context_length: int | None = None,
    keep_end: bool = True,
    fingerprint: str | None = None,
) -> tuple[Int32, Int32]:
    """Tokenise all sentences of a data set.

    ``tokenizer="clip"`` gives what ``utils/dataset.py`` of CRIS, ETRIS and DETRIS makes (17 tokens, 22 for RefCOCOg in
    CRIS and ETRIS): begin and end token, padding 0; a sentence that is cut still ends with the end token.
    ``tokenizer="bert:...", keep_end=False`` gives what ``data/dataset_refer_bert.py`` of LAVT, CARIS and MaskRIS,
    ``utils/dataset.py`` of CGFormer, ``data/dataset.py`` of DMMI and ``refcoco_mapper.py`` of ReLA make: [CLS], words,
    [SEP], the first 20 of these, padding 0, and attention on all but the padding.

    Args:
        sentences: if the cache already holds their tokens, only the number of sentences is used.
        tokenizer: ``"clip"`` (vocabulary inside open_clip, nothing is downloaded), a model's name as
            ``open_clip.get_tokenizer`` takes it (``"ViT-B-32"``, ``"hf-hub:..."``, ``"local-dir:..."``),
            ``"bert:..."`` for the WordPiece of an uncased BERT, followed by a vocab.txt, a tokenizer.json, a folder
            with one of them, or a name on the Hugging Face Hub (``"bert:bert-base-uncased"``), or a callable that
            turns S strings into integers [S, L] padded with 0; a callable's result is not cached.
        context_length: tokens per sentence, begin and end included. Longer sentences are cut. None: the tokenizer's
            own, 77 for CLIP; 20 for BERT.
        keep_end: whether a sentence that is cut still ends with its end token. False is possible with ``"clip"``,
            models with CLIP's tokenizer and ``"bert:..."`` only.
        fingerprint: identifies exactly these sentences, such as the data set's fingerprint and which of its texts was
            used. None: the cache is neither read nor written.

    Returns:
        tokens int32 [S, L] and lengths int32 [S]. The first ``lengths[i]`` tokens of a row are text, the last of them
        its end token if it was kept; the others are padding. (A token's value does not show which: CLIP pads with 0,
        and 0 is its "!".)
        Both may be read-only views of a mapped file.

    Raises:
        ValueError: no such tokenizer, a bad context length, ``keep_end=False`` with a tokenizer that truncates by
            itself, or a callable's result with the wrong shape or type.
        NemoError: the tokenizer needs a package that is not installed, or BERT's vocabulary is missing, cannot be
            downloaded, or is not that of an uncased BERT whose [PAD] is token 0.
    """
    rows = token_rows(
        sentences,
        tokenizer=tokenizer,
        context_length=context_length,
        keep_end=keep_end,
        fingerprint=fingerprint,
    )
    rows.check_all()
    return rows.tokens, rows.lengths


class TokenRows:
    """Tokens of all sentences, each row checked when it is first used. May be used by several threads.

    Before you read rows, call ``check``, which may replace both arrays: if a row is damaged, all are made again.

    Args:
        packed: int32 [S, L + 1], or with a checksum as a further column.
        make: makes ``packed`` again, without that column; None: ``packed`` has none, and is trusted.
        name: of the array in the cache.

    Attributes:
        tokens: int32 [S, L], padded with 0; lengths: int32 [S]: see ``tokenize``.
    """

    def __init__(self, packed: Int32, make: Callable[[], Int32] | None = None, name: str = "") -> None:
        self._make, self._name = make, name
        self._sound = None if make is None else np.zeros(len(packed), bool)
        self._take(packed)

    def _take(self, packed: Int32) -> None:
        columns = packed if self._make is None else packed[:, :-1]
        self.tokens, self.lengths = columns[:, :-1], columns[:, -1]
        self._packed = packed  # last: a thread that finds its rows sound by then reads the new columns, too

    @classmethod
    def joined(cls, parts: "Sequence[TokenRows]") -> "TokenRows":
        """The rows of several data sets, one after the other."""
        for part in parts:
            part.check_all()
        return cls(np.concatenate([np.column_stack([part.tokens, part.lengths]) for part in parts]))

    def check(self, rows: npt.NDArray[np.integer[Any]]) -> None:
        """Check rows, each once; later calls cost nothing.

        Raises:
            NemoError: one is damaged, and the tokenizer now makes other tokens than those of the cache.
        """
        sound, make = self._sound, self._make
        if sound is None or make is None or sound[rows].all():
            return
        unseen = rows[~sound[rows]]
        new = self._packed[unseen]
        longest = new.shape[1] - 2
        if ((new[:, -1] != _sums(new[:, :-1], unseen)) | (new[:, -2] < 0) | (new[:, -2] > longest)).any():
            made = renewed(self._name, "its checksum does not match", make=lambda: _summed(make()))
            if made.shape != self._packed.shape:
                raise NemoError(
                    f"The cached tokens are damaged, and the tokenizer makes {made.shape[1] - 2} tokens a sentence "
                    f"where they had {longest}. Make the Loader again, which takes the new ones."
                )
            self._take(made)
            sound[:] = True
        sound[rows] = True

    def check_all(self) -> None:
        """Check all rows."""
        for begin in range(0, len(self._packed), BLOCK):
            self.check(np.arange(begin, min(begin + BLOCK, len(self._packed))))


def _sums(packed: Int32, rows: npt.NDArray[np.integer[Any]]) -> Int32:
    """A checksum of each row, int32 [n]: its numbers and which row it is, each times an odd number, modulo 2^32."""
    numbers: npt.NDArray[np.uint32] = packed.view(np.uint32) @ _FACTORS[: packed.shape[1]]
    return (numbers + _FIRST * (1 + rows.astype(np.uint32))).view(np.int32)


def _summed(packed: Int32) -> Int32:
    return np.concatenate([packed, _sums(packed, np.arange(len(packed)))[:, None]], axis=1)


def _has_its_width(packed: Int32) -> bool:
    """Whether the cache's header gives the right number of columns, as far as the first row can tell."""
    if not 3 <= packed.shape[1] <= len(_FACTORS) + 1:
        return False
    first = packed[:1]
    return bool((first[:, -1] == _sums(first[:, :-1], np.arange(len(first)))).all())


def token_rows(
    sentences: Sequence[str],
    *,
    tokenizer: str | Tokenizer = "clip",
    context_length: int | None = None,
    keep_end: bool = True,
    fingerprint: str | None = None,
) -> TokenRows:
    """The same as ``tokenize``, but rows of the cache are checked when they are first used."""
    if context_length is not None:
        context_length = integer("context_length", context_length, least=3, most=MAX_CONTEXT_LENGTH)
    source: str | Tokenizer | Vocabulary = tokenizer
    if isinstance(tokenizer, str) and tokenizer.startswith(PREFIX):
        source = read_vocabulary(tokenizer.removeprefix(PREFIX))
        context_length = context_length or CONTEXT_LENGTH
    if fingerprint is None or callable(source):
        return TokenRows(_make(sentences, source, context_length, keep_end))
    # A hit must not import open_clip, which takes seconds: hence its version from the metadata.
    if isinstance(source, Vocabulary):
        made_by = [f"{PREFIX}{source.hash}", version("tokenizers")]
    else:
        with extra("mining", f"Tokenizer '{source}'"):
            made_by = [source, version("open_clip_torch")]
    parts = [TOKENS_VERSION, *made_by, context_length, fingerprint, *([] if keep_end else ["end may be cut"])]
    name = name_for("tokens", parts)

    def make() -> Int32:
        return _make(sentences, source, context_length, keep_end)

    packed = cached(
        name,
        np.int32,
        (len(sentences), None if context_length is None else context_length + 2),
        make=lambda: _summed(make()),
        fits=_has_its_width,
        compare=False,
    )
    return TokenRows(packed, make, name)


def _make(
    sentences: Sequence[str], source: str | Tokenizer | Vocabulary, context_length: int | None, keep_end: bool
) -> Int32:
    """Tokens and, as the last column, lengths: int32 [S, L + 1]."""
    rows: dict[str, int] = {}
    row = [rows.setdefault(sentence, len(rows)) for sentence in sentences]
    distinct = list(rows)
    if isinstance(source, Vocabulary):
        packed = encode(WordPiece(source, context_length or CONTEXT_LENGTH), distinct, keep_end)
    elif isinstance(source, str):
        packed = encode(_load(source, context_length), distinct, keep_end)
    else:
        _check_keeps_end(keep_end)
        packed = _pack(_call(source, distinct, context_length), pad=0, end=None)
    return packed[np.asarray(row, np.int64)]


def encode(tokenizer: Any, sentences: list[str], keep_end: bool = True) -> Int32:
    """Tokens by BERT's or one of open_clip's tokenizers and, as the last column, lengths: int32 [S, L + 1]."""
    # open_clip's SimpleTokenizer, without random masking
    if isinstance(tokenizer, WordPiece) or getattr(tokenizer, "reduction_fn", True) is None:
        return _encode_by_word(tokenizer, sentences, keep_end)
    _check_keeps_end(keep_end)
    return _encode_whole(tokenizer, sentences, tokenizer)


def _check_keeps_end(keep_end: bool) -> None:
    if not keep_end:
        raise ValueError(
            f"keep_end ({keep_end}) must be True with this tokenizer, which cuts sentences by itself; only CLIP's and "
            "BERT's can do without the end token"
        )


def too_long(tokenizer: Any, sentences: list[str]) -> list[int]:
    """Which sentences have more tokens than one of open_clip's tokenizers keeps, by their places in the list."""
    length = tokenizer.context_length
    packed = _encode_whole(lambda texts: tokenizer(texts, context_length=length + 1), sentences, tokenizer)
    return np.flatnonzero(packed[:, -1] > length).tolist()


def _encode_whole(call: Tokenizer, sentences: list[str], tokenizer: Any) -> Int32:
    inner = getattr(tokenizer, "tokenizer", None)  # of Hugging Face, with its own padding
    pad, end = (inner.pad_token_id, inner.eos_token_id) if inner else (0, None)
    return _pack(_call(call, sentences, None), pad=pad, end=end)


def _encode_by_word(tokenizer: Any, sentences: list[str], keep_end: bool) -> Int32:
    """What ``tokenizer(sentences)`` gives, 8 times as fast: a word's tokens do not depend on its neighbours.

    That holds where cleaning (mojibake, HTML entities, case) goes word by word, which is so for printable ASCII without
    an entity; other sentences are encoded whole.
    """
    encode = functools.cache(tokenizer.encode)
    length = tokenizer.context_length
    packed = np.zeros((len(sentences), length + 1), np.int32)
    for row, sentence in zip(packed, sentences, strict=True):
        plain = sentence.isascii() and sentence.isprintable() and "&" not in sentence
        tokens = [token for word in sentence.split() for token in encode(word)] if plain else encode(sentence)
        if keep_end:
            tokens = tokens[: length - 2]
        tokens = [tokenizer.sot_token_id, *tokens, tokenizer.eot_token_id][:length]
        row[: len(tokens)] = tokens
        row[length] = len(tokens)
    return packed


def _call(tokenizer: Tokenizer, sentences: list[str], context_length: int | None) -> npt.NDArray[Any]:
    if not sentences:
        return np.zeros((0, context_length or 3), np.int32)
    tokens = np.asarray(tokenizer(sentences))
    if tokens.ndim != 2 or len(tokens) != len(sentences) or tokens.dtype.kind not in "iu":
        raise ValueError(
            f"tokenizer (a callable giving {tokens.dtype} {list(tokens.shape)} for {len(sentences)} strings) must give "
            f"integers [{len(sentences)}, L]"
        )
    if context_length not in (None, tokens.shape[1]):
        raise ValueError(
            f"context_length ({context_length}) must be None or {tokens.shape[1]}, which the given tokenizer makes"
        )
    return tokens


def _pack(tokens: npt.NDArray[Any], *, pad: int, end: int | None) -> Int32:
    """Add the lengths: all but the padding at a row's end, of which the first counts where it is also the end token."""
    length = tokens.shape[1]
    text = tokens[:, ::-1] != pad
    lengths = np.where(text.any(1), length - text.argmax(1), 0)
    if pad == end:
        lengths = np.minimum(lengths + 1, length)
    return np.concatenate([tokens, lengths[:, None]], 1).astype(np.int32)


def _load(name: str, context_length: int | None) -> Any:
    with extra("mining", f"Tokenizer '{name}'"):
        import open_clip
    if name == "clip":
        return open_clip.SimpleTokenizer(context_length=context_length or open_clip.tokenizer.DEFAULT_CONTEXT_LENGTH)
    # get_tokenizer itself takes any unknown name for CLIP's.
    if not name.startswith(("hf-hub:", "local-dir:")) and open_clip.get_model_config(name) is None:
        close = difflib.get_close_matches(name, ["clip", *open_clip.list_models()], n=3) or ["ViT-B-32"]
        raise ValueError(
            f"tokenizer ({name!r}) must be 'clip', a model of open_clip.list_models() such as {', '.join(close)}, "
            "'hf-hub:ORGANISATION/NAME', 'local-dir:FOLDER', 'bert:VOCABULARY' or a callable"
        )
    try:
        return open_clip.get_tokenizer(name, context_length=context_length)
    except ImportError as error:
        raise NemoError(
            f"Tokenizer '{name}' needs the package '{error.name or 'transformers'}'. Install it with "
            f"`pip install {error.name or 'transformers'}`, or use tokenizer 'clip'."
        ) from error
    except (OSError, ValueError) as error:
        raise ValueError(f"tokenizer ({name!r}) must be one that can be loaded: {error}") from error
