"""BERT's WordPiece: the vocabulary is found, checked, and made into a tokenizer.

A sentence becomes what ``BertTokenizer.from_pretrained("bert-base-uncased")`` makes of it: control characters are
removed, Chinese characters stand alone, words lose capitals and accents, punctuation is split off, and each word is cut
greedily into the longest pieces that the vocabulary has. LAVT, CARIS, CGFormer, DMMI and MaskRIS bring an old copy of
that class (``bert/tokenization_bert.py``), which leaves control characters, including zero-width ones, in the words;
these then become [UNK] there. The library used here differs from that class in the last letter of Greek words in
capitals and in characters newer than its Unicode tables; all 15,730 val sentences of RefCOCO and RefCOCOg give the same
tokens.
"""

import functools
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_dali.errors import NemoError

PREFIX = "bert:"
CONTEXT_LENGTH = 20  # of every loader for referring expressions that uses BERT
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")
_FILES = ("vocab.txt", "tokenizer.json")
_WANTED = "a vocab.txt, a tokenizer.json, a folder with one of them, or a name on the Hugging Face Hub"
_GET = "download vocab.txt of bert-base-uncased where there is a network and say 'bert:FOLDER/vocab.txt'"


@dataclass(frozen=True, eq=False)
class Vocabulary:
    """A vocabulary file as it is on disk, not yet parsed.

    Attributes:
        path: a vocab.txt (one token per line) or tokenizer.json.
        content: its bytes.
    """

    path: Path
    content: bytes

    @functools.cached_property
    def hash(self) -> str:
        """sha256 over the file."""
        return hashlib.sha256(self.content).hexdigest()

    @functools.cached_property
    def ids(self) -> dict[str, int]:
        """The id of every token.

        Raises:
            NemoError: not the vocabulary of an uncased BERT whose [PAD] is token 0.
        """
        ids = self._from_json() if self.path.suffix == ".json" else self._from_lines()
        absent = [token for token in SPECIAL if token not in ids]
        if absent:
            raise NemoError(f"'{self.path}' lacks {', '.join(absent)}: it is not a BERT vocabulary; {_GET}.")
        if ids["[PAD]"] != 0:
            raise NemoError(
                f"'{self.path}' has [PAD] as token {ids['[PAD]']}, but batches are padded with 0; use a vocabulary "
                "that begins with [PAD], as that of bert-base-uncased does."
            )
        cased = next((token for token in ids if token != token.lower() and not token.startswith("[")), None)
        if cased is not None:
            raise NemoError(
                f"'{self.path}' is the vocabulary of a cased model (it has '{cased}'), but sentences are lower-cased; "
                "use an uncased model's, such as bert-base-uncased's."
            )
        return ids

    def _from_lines(self) -> dict[str, int]:
        try:
            text = self.content.decode("utf-8")
        except UnicodeDecodeError as error:
            raise NemoError(f"'{self.path}' is not UTF-8 text: it is not a BERT vocabulary; {_GET}.") from error
        # Only line feeds end a token: vocabularies hold other characters at which splitlines() would split.
        return {line.removesuffix("\r"): row for row, line in enumerate(text.removesuffix("\n").split("\n"))}

    def _from_json(self) -> dict[str, int]:
        try:
            made = json.loads(self.content)
            ids = made["model"]["vocab"]
            piecewise = made["model"].get("type", "WordPiece") == "WordPiece"
            cased = (made.get("normalizer") or {}).get("lowercase", True) is False
            if not all(type(row) is int and 0 <= row < 2**31 for row in ids.values()):
                raise ValueError("an id is not a number below 2**31")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise NemoError(f"'{self.path}' is not a Hugging Face tokenizer.json ({error!r}); {_GET}.") from error
        if not piecewise:
            raise NemoError(
                f"'{self.path}' is a tokenizer.json of type {made['model']['type']}, not WordPiece; {_GET}."
            )
        if cased:
            raise NemoError(
                f"'{self.path}' is of a cased model (its normalizer does not lower-case), but sentences are "
                "lower-cased; use an uncased model's, such as bert-base-uncased's."
            )
        return dict(ids)


def read_vocabulary(name: str) -> Vocabulary:
    """Find and read a vocabulary; it is parsed when its ``ids`` are asked for.

    Args:
        name: a vocab.txt, a tokenizer.json, a folder with one of them (vocab.txt first), or a name on the Hugging Face
            hub such as ``bert-base-uncased``. A file or folder with that name comes first. The hub is asked only for
            what its cache on this machine does not hold.

    Raises:
        ValueError: an empty name, or a file that is neither .txt nor .json.
        NemoError: no such file, or the hub cannot be reached or has nothing under that name.
    """
    if not name:
        raise ValueError(f"tokenizer ('{PREFIX}') must be '{PREFIX}' and {_WANTED}")
    path = Path(name).expanduser()
    if path.is_dir():
        found = next((path / file for file in _FILES if (path / file).is_file()), None)
        if found is None:
            raise NemoError(f"Folder '{name}' has neither {' nor '.join(_FILES)}; {_GET}.")
        path = found
    elif not path.is_file():
        if path.is_absolute() or name.startswith((".", "~")) or path.suffix in (".txt", ".json"):
            raise NemoError(f"There is no vocabulary '{name}'; {_GET}.")
        path = _from_hub(name)
    if path.suffix not in (".txt", ".json"):
        raise ValueError(f"tokenizer ('{PREFIX}{name}') must be '{PREFIX}' and {_WANTED}")
    try:
        return Vocabulary(path, path.read_bytes())
    except OSError as error:
        raise NemoError(f"Vocabulary '{path}' cannot be read ({error.strerror}); {_GET}.") from error


def _from_hub(name: str) -> Path:
    import huggingface_hub
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    try:
        for file in _FILES:
            cached = huggingface_hub.try_to_load_from_cache(name, file)
            if isinstance(cached, str):
                return Path(cached)
        for file in _FILES:
            try:
                return Path(huggingface_hub.hf_hub_download(name, file))
            except LocalEntryNotFoundError:  # no network; a kind of EntryNotFoundError
                raise
            except EntryNotFoundError as error:
                missing = error
        raise missing
    except Exception as error:  # of several HTTP libraries, by version; none of them is this program's fault
        if isinstance(error, LocalEntryNotFoundError):
            why = "the Hugging Face Hub cannot be reached"
        else:
            why = f"the Hugging Face Hub gives none ({str(error).strip().partition(chr(10))[0].rstrip('.:')})"
        raise NemoError(f"There is no vocabulary '{name}' on this machine, and {why}; {_GET}.") from error


class WordPiece:
    """A tokenizer with those methods of open_clip's tokenizers that ``text`` uses.

    Attributes:
        context_length: tokens per sentence, [CLS] and [SEP] included.
        sot_token_id, eot_token_id: ids of [CLS] and [SEP].
    """

    def __init__(self, vocabulary: Vocabulary, context_length: int) -> None:
        # Imported here, as a hit in the token cache does not need it.
        from tokenizers import BertWordPieceTokenizer

        ids = vocabulary.ids
        self._tokenizer: Any = BertWordPieceTokenizer(vocab=ids, lowercase=True)
        self.context_length = context_length
        self.sot_token_id, self.eot_token_id = ids["[CLS]"], ids["[SEP]"]

    def encode(self, text: str) -> list[int]:
        """The ids of a text without [CLS] and [SEP], however many."""
        # One by one: encoding in batches starts threads, which tokenizers complains about when a process forks later.
        made: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return made
