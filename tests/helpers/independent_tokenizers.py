"""CLIP's byte-pair encoding and BERT's WordPiece, written from their papers and vocabularies: what ours must equal."""

import functools
import gzip
import html
import itertools
import unicodedata
from pathlib import Path

import ftfy
import open_clip
import regex

HAN = [(0x4E00, 0x9FFF), (0x3400, 0x4DBF), (0x20000, 0x2A6DF), (0x2A700, 0x2CEAF), (0xF900, 0xFAFF), (0x2F800, 0x2FA1F)]
WORDS = regex.compile(
    r"<\|startoftext\|>|<\|endoftext\|>|'(?:s|t|re|ve|m|ll|d)|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+", regex.IGNORECASE
)


def cut(begin, tokens, end, length, keep_end):
    """What the repositories do with a sentence's tokens: a row of ``length`` and how many of it are text."""
    row = [begin, *tokens, end]
    if len(row) > length:
        row = row[:length]
        if keep_end:
            row[-1] = end
    return row + [0] * (length - len(row)), len(row)


@functools.cache
def clip_vocabulary():
    """Characters that stand for bytes, ranks of merges and ids of tokens, in the order that CLIP gave them."""
    shown = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    order = shown + [byte for byte in range(256) if byte not in shown]
    letters = [chr(byte) for byte in shown] + [chr(256 + k) for k in range(256 - len(shown))]
    with gzip.open(Path(open_clip.__path__[0]) / "bpe_simple_vocab_16e6.txt.gz") as file:
        lines = file.read().decode().split("\n")
    merges = [tuple(line.split()) for line in lines[1 : 49152 - 256 - 2 + 1]]
    tokens = letters + [letter + "</w>" for letter in letters] + ["".join(pair) for pair in merges]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    ids = {token: row for row, token in enumerate(tokens)}
    return dict(zip(order, letters, strict=True)), {pair: rank for rank, pair in enumerate(merges)}, ids


@functools.cache
def clip_word(word):
    letters, ranks, ids = clip_vocabulary()
    if word in ids and word.startswith("<|"):
        return [ids[word]]
    parts = [letters[byte] for byte in word.encode()]
    parts[-1] += "</w>"
    while len(parts) > 1:
        best = min(itertools.pairwise(parts), key=lambda pair: ranks.get(pair, len(ranks)))
        if best not in ranks:
            break
        joined, at = [], 0
        while at < len(parts):
            both = tuple(parts[at : at + 2]) == best
            joined.append("".join(parts[at : at + 1 + both]))
            at += 1 + both
        parts = joined
    return [ids[part] for part in parts]


def clip_row(sentence, length, keep_end=True):
    cleaned = html.unescape(html.unescape(ftfy.fix_text(sentence))).strip()
    cleaned = regex.sub(r"\s+", " ", cleaned).strip().lower()
    ids = clip_vocabulary()[2]
    tokens = [token for word in WORDS.findall(cleaned) for token in clip_word(word)]
    return cut(ids["<|startoftext|>"], tokens, ids["<|endoftext|>"], length, keep_end)


def bert_words(sentence):
    spaced = ""
    for character in sentence:
        category = unicodedata.category(character)
        if character in " \t\n\r" or category == "Zs":
            spaced += " "
        elif character in "\0\ufffd" or category.startswith("C"):
            continue
        elif any(first <= ord(character) <= last for first, last in HAN):
            spaced += f" {character} "
        else:
            spaced += character
    words = []
    for word in spaced.split():
        plain = unicodedata.normalize("NFD", word.lower())
        split = ""
        for character in plain:
            category = unicodedata.category(character)
            if category == "Mn":
                continue
            ascii_symbol = "!" <= character <= "~" and not character.isalnum()
            split += f" {character} " if ascii_symbol or category.startswith("P") else character
        words += split.split()
    return words


def bert_word(word, ids):
    found, at = [], 0
    while at < len(word) <= 100:
        pieces = [("##" if at else "") + word[at:end] for end in range(len(word), at, -1)]
        piece = next((piece for piece in pieces if piece in ids), None)
        if piece is None:
            break
        found.append(ids[piece])
        at += len(piece) - (2 if at else 0)
    return found if at == len(word) else [ids["[UNK]"]]


def bert_row(sentence, ids, length, keep_end):
    tokens = [token for word in bert_words(sentence) for token in bert_word(word, ids)]
    return cut(ids["[CLS]"], tokens, ids["[SEP]"], length, keep_end)


def bert_vocabulary(words):
    """Tokens of a vocabulary made from words: the words, their beginnings and ends, letters, symbols."""
    tokens = dict.fromkeys(
        ["[PAD]", "[unused0]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~"]
    )
    letters = "abcdefghijklmnoprstuvwxyz0123456789"  # no q: words with it are unknown, unless it is in a piece
    tokens |= dict.fromkeys([*letters, *(f"##{letter}" for letter in letters)])
    for word in words:
        tokens |= dict.fromkeys(
            [word, *(word[:n] for n in (2, 3, 4)), *(f"##{word[n:]}" for n in (1, 2, 3) if word[n:])]
        )
    return list(tokens)
