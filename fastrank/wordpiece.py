"""Texts in, WordPiece ids out, in C++: exactly those of Hugging Face's tokenizer, which remains the definition.

The one idea: what a normalizer and a pre-tokenizer make of a single character is read off Hugging Face's own, 256
characters at a time and only when a text has one of them; C++ knows no Unicode. Texts in which a character's neighbours
matter, or in which an added token ("[SEP]") is spelled out, are left to the reference.
"""

from __future__ import annotations

import importlib.util
import itertools
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from tokenizers import Tokenizer, models, normalizers

# Each of these works on one character after the other, decompositions up to the order of combining characters.
NORMALIZERS = {"BertNormalizer", "Lowercase", "NFD", "NFKD", "StripAccents"}
WORD_END, ALONE, DEPENDS = b"\xff", b"\xfe", b"\xfd"  # as in csrc/wordpiece.hpp
PAGE_SIZE = 256
SURROGATES = range(0xD800, 0xE000)
MAX_VOCABULARY_BYTES = 2**24 - 1  # what ByteTree in csrc/wordpiece.hpp can number


def refusals(tokenizer: Tokenizer, normalizer: Sequence[str], pre_tokenizer: Sequence[str]) -> list[str]:
    """Why C++ cannot stand in for a tokenizer, in sentences; an empty list means that it can.

    normalizer, pre_tokenizer: the types of their parts, as in tokenizer.json.
    """
    model = tokenizer.model
    if not isinstance(model, models.WordPiece):
        return [f"Its model is {type(model).__name__}; only WordPiece is written in C++."]
    sentences = []
    if importlib.util.find_spec("fastrank._cpu") is None:
        sentences.append("The C++ extension fastrank._cpu is not built.")
    if model.token_to_id(model.unk_token) is None:
        sentences.append(f"Its unknown token {model.unk_token!r} is not in the vocabulary.")
    if sum(len(word.encode()) for word in tokenizer.get_vocab(with_added_tokens=False)) > MAX_VOCABULARY_BYTES:
        sentences.append(f"Its vocabulary has more than {MAX_VOCABULARY_BYTES} bytes.")
    if unknown := [name for name in normalizer if name not in NORMALIZERS]:
        sentences.append(f"The normalizer {unknown[0]} is not known.")
    if list(pre_tokenizer) != ["BertPreTokenizer"]:
        sentences.append(f"The pre-tokenizer is {' + '.join(pre_tokenizer) or 'none'}, not BertPreTokenizer.")
    if normalized := [added.content for added in tokenizer.get_added_tokens_decoder().values() if added.normalized]:
        sentences.append(f"The added token {normalized[0]!r} is looked for in normalized text.")
    return sentences


class WordPiece:
    """The C++ twin of a tokenizer that `refusals` has nothing against; several threads may use it at once."""

    def __init__(self, tokenizer: Tokenizer):
        from fastrank import _cpu  # where it is wanted, since everything else runs without the extension

        self._normalizer = tokenizer.normalizer
        self._pre_tokenizer = tokenizer.pre_tokenizer
        self._decomposes = self._normalizer is not None and self._normalizer.normalize_str("\u00e9") != "\u00e9"
        model = tokenizer.model
        self._encoder = _cpu.WordPiece(
            list(tokenizer.get_vocab(with_added_tokens=False).items()),
            model.continuing_subword_prefix,
            model.token_to_id(model.unk_token),
            min(model.max_input_chars_per_word, 2**63 - 1),
            [added.content for added in tokenizer.get_added_tokens_decoder().values()],
        )
        self._set_page(0)

    def encode(self, texts: list[str], *, enough: int | None) -> tuple[np.ndarray, np.ndarray, list[int]]:
        """Tokenizes texts with torch's number of threads.

        Arguments:
            enough: ids of a text past this many may be left out; None: all are wanted.

        Returns all texts' ids, int32 (tokens,), where each text ends there, int64 (texts,), and the positions of those
        that are left to the reference, which have no ids: beside the texts named above what is not a str or has a lone
        surrogate.
        """
        while True:
            ids, ends, pages, left = self._encoder.encode(
                texts, -1 if enough is None else enough, torch.get_num_threads()
            )
            if not pages:
                return ids, ends, left
            for page in pages:  # never again for this tokenizer, so that all texts may be read once more
                self._set_page(page)

    def _set_page(self, page: int) -> None:
        normalized = []
        for character in range(PAGE_SIZE * page, PAGE_SIZE * (page + 1)):
            text = "" if character in SURROGATES else chr(character)  # no UTF-8 text has a surrogate
            normalized.append(text if self._normalizer is None else self._normalizer.normalize_str(text))
        places = self._find_places("".join(normalized))
        self._encoder.set_page(page, [b"".join(itertools.islice(places, len(text))) for text in normalized])

    def _find_places(self, characters: str) -> Iterator[bytes]:
        """What words make of normalized characters, each for itself: in UTF-8, marked by one of the bytes above."""
        # "a" is a letter everywhere: what happens to a character between two of them happens to it anywhere.
        pieces = self._pre_tokenizer.pre_tokenize_str("".join(f"a{character}a " for character in characters))
        in_words = np.zeros(4 * len(characters), bool)
        alone = np.zeros(4 * len(characters), bool)
        for _, (begin, end) in pieces:
            in_words[begin:end] = True
            alone[begin] = end - begin == 1
        for character, may_move, in_word, is_alone in zip(
            characters, self._find_movable(characters), in_words[1::4].tolist(), alone[1::4].tolist(), strict=True
        ):
            if may_move:
                yield DEPENDS
            elif not in_word:
                yield WORD_END
            else:
                yield (ALONE if is_alone else b"") + character.encode()

    def _find_movable(self, characters: str) -> list[bool]:
        """Which decomposed characters canonical ordering may move past a neighbour: those with a combining class."""
        if not self._decomposes:
            return [False] * len(characters)
        # Of a neighbour of class 240 and one of class 1, one changes places with a character of any class.
        given = [f"a\u0345{character}\u0334" for character in characters]
        ordered = normalizers.NFD().normalize_str("".join(given))
        return [ordered[4 * i : 4 * i + 4] != text for i, text in enumerate(given)]
