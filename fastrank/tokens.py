"""Texts in, token ids out: every text is tokenized once, then queries and documents are joined into pairs.

The one idea: what a tokenizer puts around a pair (BERT `[CLS] q [SEP] d [SEP]` with types 0 and 1, RoBERTa
`<s> q </s></s> d </s>` without) is read off one probe pair, so that joining is plain array work and every family
works. Ids, types and truncation equal `tokenizer(query, document, truncation="longest_first")` of transformers.
WordPiece runs in C++ (fastrank.wordpiece), everything else in Hugging Face's tokenizer, which is the reference.
"""

from __future__ import annotations

import copy
import itertools
import json
import math
import os
import re
import threading
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from fastrank import wordpiece
from fastrank.packing import EncodedTexts, Pairs, _cpu

BACKENDS = ("auto", "cpu", "reference")
MAX_TOKEN_ID = 2**31 - 1  # ids are int32
MAX_TOKENS = 2**31 - 1  # of a pair: a tokenizer without a limit says 10**30
SURROGATES = re.compile("[\ud800-\udfff]")
# Between two ASCII letters or digits a single space ends a word for every pre-tokenizer named below.
WORD_BREAK = re.compile("(?<=[0-9A-Za-z]) (?=[0-9A-Za-z])")
SPLITTING_PRE_TOKENIZERS = {"BertPreTokenizer", "ByteLevel", "Metaspace", "Whitespace", "WhitespaceSplit"}
LOCAL_NORMALIZERS = {"BertNormalizer", "Lowercase", "NFC", "NFD", "NFKC", "NFKD", "Nmt", "Precompiled", "StripAccents"}
CHARACTERS_PER_TOKEN = 8  # how much text is tried first for one wanted token; English takes about 4.5


class PairTokenizer:
    """Tokenizes queries and documents and joins them into pairs.

    Arguments:
        tokenizer: a fast Hugging Face tokenizer; what is changed in it later changes nothing here.
        max_length: tokens a pair may have, special tokens included; default: the tokenizer's `model_max_length`.
        max_query_tokens, max_document_tokens: cut each side to so many tokens before pairs are truncated.
        num_embeddings: token ids that the model knows; default: all of the tokenizer's.
        backend: "reference" is Hugging Face's tokenizer, "cpu" the C++ WordPiece with the same ids, "auto" that where
            it can stand in; `backend` then says which, and `refusals` why not the C++ one.

    Raises ValueError for a tokenizer that is not fast, limits that leave no room, and a backend that cannot run.
    It may be used from several threads at once.
    """

    def __init__(
        self,
        tokenizer,
        *,
        max_length: int | None = None,
        max_query_tokens: int | None = None,
        max_document_tokens: int | None = None,
        num_embeddings: int | None = None,
        backend: str = "auto",
    ):
        if not getattr(tokenizer, "is_fast", False):
            raise ValueError(
                f"{type(tokenizer).__name__} is not a fast tokenizer; the folder needs a "
                "tokenizer.json (load it once in transformers and save it with save_pretrained)."
            )
        if len(tokenizer) <= len(tokenizer.all_special_tokens):
            # What transformers makes of a folder without tokenizer files.
            raise ValueError("The tokenizer has no vocabulary; the folder needs a tokenizer.json.")
        self._tokenizer = tokenizer
        self._num_embeddings = math.inf if num_embeddings is None else num_embeddings
        if (largest := max(tokenizer.backend_tokenizer.get_vocab().values())) > MAX_TOKEN_ID:
            raise ValueError(f"The tokenizer has the token id {largest}; ids must be at most {MAX_TOKEN_ID}.")
        # A copy, since its owner may set truncation, padding or tokens; calls from several threads are safe because
        # nothing here changes it after these lines.
        self._backend = copy.deepcopy(tokenizer.backend_tokenizer)
        self._backend.no_truncation()
        self._backend.no_padding()
        self._probe()
        num_special = len(self._prefix) + len(self._middle) + len(self._suffix)
        self.max_length = int(tokenizer.model_max_length if max_length is None else max_length)
        self.max_query_tokens = max_query_tokens
        self.max_document_tokens = max_document_tokens
        for name in ("max_query_tokens", "max_document_tokens"):
            limit = getattr(self, name)
            if limit is not None and limit < 1:
                raise ValueError(f"{name} is {limit}; it must be at least 1.")
        if self.max_length <= num_special:
            raise ValueError(
                f"max_length is {self.max_length}, but the special tokens of a pair alone take "
                f"{num_special}; give at least {num_special + 1}."
            )
        self._budget = min(self.max_length - num_special, MAX_TOKENS)
        self._keep_end = tokenizer.truncation_side == "left"
        self._can_cut_text = not self._keep_end and self._words_are_independent()
        self._lock = threading.Lock()
        self._num_truncated = 0
        self._num_left_to_reference = 0
        self.refusals = self._find_refusals()
        if backend not in BACKENDS:
            raise ValueError(f"There is no backend {backend!r} of tokenizers; known are {', '.join(BACKENDS)}.")
        if backend == "cpu" and self.refusals:
            raise ValueError(f"The backend 'cpu' cannot run this tokenizer: {' '.join(self.refusals)}")
        self.backend = "reference" if self.refusals or backend == "reference" else "cpu"
        self._wordpiece = wordpiece.WordPiece(self._backend) if self.backend == "cpu" else None

    @classmethod
    def load(
        cls,
        name_or_path: str | Path,
        *,
        num_positions: int | None = None,
        num_embeddings: int | None = None,
        max_length: int | None = None,
        max_query_tokens: int | None = None,
        max_document_tokens: int | None = None,
        revision: str | None = None,
        token: str | bool | None = None,
        local_files_only: bool = False,
        backend: str = "auto",
    ) -> PairTokenizer:
        """Loads the tokenizer of a checkpoint.

        Arguments:
            name_or_path: a local folder or a name on the Hugging Face hub.
            num_positions: tokens of the longest pair that the model takes; default: no such limit.
            num_embeddings, backend: as above.
            max_length: default: the smaller of the tokenizer's `model_max_length` and `num_positions`.
            revision, token, local_files_only: as in transformers.

        Raises OSError where nothing loads, ValueError where `max_length` passes the model's positions.
        """
        import transformers
        from transformers.models.auto.tokenization_auto import get_tokenizer_config

        hub = {"revision": revision, "token": token, "local_files_only": local_files_only}
        name = os.path.expanduser(name_or_path)
        looks_local = name.count("/") > 1 or name.startswith((".", "/", "~"))
        if not Path(name).is_dir() and (looks_local or Path(name).exists()):
            raise OSError(f"{name} is not a folder; give the folder of a checkpoint or a name on the Hugging Face hub.")
        try:
            # Lightning-IR stores a class of its own beside the one that it builds on.
            stored = get_tokenizer_config(name, **hub).get("backbone_tokenizer_class") or ""
            tokenizer = getattr(transformers, stored, transformers.AutoTokenizer).from_pretrained(name, **hub)
        except Exception as error:  # transformers passes on whatever its parsing ran into
            advice = (
                "the folder needs a tokenizer.json"
                if Path(name).is_dir()
                else "where there is no network, download it elsewhere and give the path of its folder"
            )
            first_line = str(error).strip().split("\n")[0]
            raise OSError(f"No tokenizer could be loaded from {name}: {advice} ({first_line})") from error
        if max_length is None:
            max_length = int(min(tokenizer.model_max_length, num_positions or math.inf))
        elif num_positions is not None and max_length > num_positions:
            raise ValueError(
                f"max_length is {max_length}, but {name} has only {num_positions} positions; give at most that."
            )
        try:
            return cls(
                tokenizer,
                max_length=max_length,
                max_query_tokens=max_query_tokens,
                max_document_tokens=max_document_tokens,
                num_embeddings=num_embeddings,
                backend=backend,
            )
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error

    @property
    def vocab_size(self) -> int:
        """Number of token ids, added tokens included."""
        return len(self._tokenizer)

    @property
    def word_ids(self) -> np.ndarray:
        """Token ids of texts that the model knows, int32: all but special tokens."""
        ids = np.fromiter(self._backend.get_vocab().values(), np.int32)
        return np.setdiff1d(ids[ids < self._num_embeddings], np.array(self._tokenizer.all_special_ids, np.int32))

    @property
    def limits(self) -> str:
        """What texts are cut to, in words."""
        given = [f"max_length={self.max_length}"]
        for name in ("max_query_tokens", "max_document_tokens"):
            if (limit := getattr(self, name)) is not None:
                given.append(f"{name}={limit}")
        return ", ".join(given)

    @property
    def num_truncated(self) -> int:
        """Pairs joined so far in which a query or a document lost tokens."""
        return self._num_truncated

    @property
    def num_left_to_reference(self) -> int:
        """Texts so far that the C++ backend left to Hugging Face's tokenizer."""
        return self._num_left_to_reference

    @property
    def num_token_types(self) -> int:
        """Number of token types that pairs have."""
        return int(self._type_values.max()) + 1

    def encode(self, texts: Sequence[str], *, enough: int | None = None) -> list[np.ndarray]:
        """Tokenizes texts, each once and without special tokens.

        Arguments:
            texts: str; lone surrogates become U+FFFD, everything else is the tokenizer's own business.
            enough: where given, ids past this many may be left out. Only very long texts make use of it: reading a
                megabyte for the 512 tokens that a pair holds is slow.

        Returns one int32 array (tokens,) per text. Raises TypeError naming the position of what is not a str.
        """
        return list(self.encode_together(texts, enough=enough))

    def encode_together(self, texts: Sequence[str], *, enough: int | None = None) -> EncodedTexts:
        """encode(), whose arrays are views of one."""
        texts = list(texts)
        if self._wordpiece is None or not texts:
            encoded = EncodedTexts.join(self._encode_in_reference(texts, range(len(texts)), enough) if texts else [])
        else:
            ids, ends, left = self._wordpiece.encode(texts, enough=enough if self._can_cut_text else None)
            encoded = EncodedTexts(ids, ends)
            if left:
                encoded = encoded.insert(left, self._encode_in_reference([texts[i] for i in left], left, enough))
                with self._lock:
                    self._num_left_to_reference += len(left)
        self._check_embeddings(texts, encoded)
        return encoded

    def enough_tokens(self, longest_query: int) -> int | None:
        """The `enough` with which `encode` leaves every pair as it is, for documents.

        Arguments:
            longest_query: tokens of the longest query that the documents will meet.

        Returns None where nothing may be left out: beside a query as long as that, the document's whole length decides
        which of the two keeps the odd token.
        """
        if min(longest_query, self.max_query_tokens or longest_query) > self._budget:
            return None
        return min(self.max_document_tokens or self._budget, self._budget) + 1

    def pair(self, query_ids: np.ndarray, document_ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Joins one query and one document, truncated `longest_first` to `max_length`.

        Arguments:
            query_ids, document_ids: int32 (tokens,) from `encode`.

        Returns ids and token types, both int32 (tokens of the pair,).
        """
        return self.pairs([query_ids], [document_ids])[0]

    def pairs(self, queries: Sequence[np.ndarray], documents: Sequence[np.ndarray]) -> Pairs:
        """pair() of each query and its document: made at once, since thousands of small arrays take longer than
        tokenizing."""
        if not len(documents):
            return Pairs.join([])
        given = np.array([[*map(len, queries)], [*map(len, documents)]])
        kept = np.stack(self.kept_tokens(*given))
        if (cut := (kept != given).any(0).nonzero()[0]).size:
            queries, documents = list(queries), list(documents)
            for i in cut.tolist():
                queries[i], documents[i] = self._cut(queries[i], kept[0, i]), self._cut(documents[i], kept[1, i])
            with self._lock:
                self._num_truncated += cut.size
        around = (itertools.repeat(part) for part in (self._prefix, self._middle, self._suffix))
        before, between, after = around
        parts = zip(before, queries, between, documents, after)  # noqa: B905, three of them never end
        counts = np.tile(self._type_counts, (len(documents), 1))
        counts[:, [self._query_place, self._document_place]] = kept.T
        types = np.tile(self._type_values, len(documents)).repeat(counts.ravel())
        return Pairs(np.concatenate([*itertools.chain.from_iterable(parts)]), types, counts.sum(1).cumsum())

    def join(
        self, queries: EncodedTexts, query_of: np.ndarray, documents: EncodedTexts, document_of: np.ndarray
    ) -> Pairs:
        """pairs() of queries[query_of[i]] and documents[document_of[i]] for every i; query_of, document_of: int
        (pairs,)."""
        if _cpu is None:
            return self.pairs([queries[i] for i in query_of], [documents[i] for i in document_of])
        given = queries.lengths[query_of], documents.lengths[document_of]
        kept = self.kept_tokens(*given)
        begins = [queries.begins[query_of], documents.begins[document_of]]
        lost = [length - left for length, left in zip(given, kept, strict=True)]
        if num_cut := int(np.count_nonzero(lost[0] | lost[1])):
            if self._keep_end:
                begins = [begin + some for begin, some in zip(begins, lost, strict=True)]
            with self._lock:
                self._num_truncated += num_cut
        types = self._type_values[[self._query_place, self._document_place]].tolist()
        spans = queries.ids, begins[0], kept[0], documents.ids, begins[1], kept[1]
        return Pairs(*_cpu.join_pairs(*spans, self._frame, *types))

    def kept_tokens(self, num_query: np.ndarray, num_document: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """How many tokens of queries and of documents stay in their pairs, int (pairs,) each.

        Each side's own limit comes first. What is then too long together loses tokens of the longer text until both
        are equally long, then of both by turns; the odd token stays with the longer text, with the document on a tie.
        """
        if self.max_query_tokens is not None:
            num_query = np.minimum(num_query, min(self.max_query_tokens, MAX_TOKENS))
        if self.max_document_tokens is not None:
            num_document = np.minimum(num_document, min(self.max_document_tokens, MAX_TOKENS))
        shorter = np.minimum(np.minimum(num_query, num_document), self._budget // 2)
        longer = np.minimum(np.maximum(num_query, num_document), self._budget - shorter)
        query_is_longer = num_query > num_document
        return np.where(query_is_longer, longer, shorter), np.where(query_is_longer, shorter, longer)

    def save(self, folder: str | Path) -> None:
        """Writes the tokenizer's files to a folder; `max_length` becomes its `model_max_length`."""
        stored = self._tokenizer.model_max_length
        self._tokenizer.model_max_length = self.max_length
        try:
            self._tokenizer.save_pretrained(str(folder))
        finally:
            self._tokenizer.model_max_length = stored

    def _cut(self, ids: np.ndarray, count: int) -> np.ndarray:
        return ids[len(ids) - count :] if self._keep_end else ids[:count]

    def _find_refusals(self) -> list[str]:
        normalizer, pre_tokenizer = (
            [part["type"] for part in _flatten(component)]
            for component in (self._backend.normalizer, self._backend.pre_tokenizer)
        )
        return wordpiece.refusals(self._backend, normalizer, pre_tokenizer)

    def _check_embeddings(self, texts: list[str], encoded: EncodedTexts) -> None:
        if encoded.ids.max(initial=-1) < self._num_embeddings or self._num_embeddings >= len(self._tokenizer):
            return
        for text, one in zip(texts, encoded, strict=True):
            if one.max(initial=-1) >= self._num_embeddings:
                raise ValueError(
                    f"The text {text[:60]!r} has the token id {one.max()}, but the model has embeddings for "
                    f"{self._num_embeddings}: the tokenizer is another model's."
                )

    def _encode_in_reference(self, texts: list[str], positions: Sequence[int], enough: int | None) -> list[np.ndarray]:
        cut: dict[int, str] = {}
        if enough is not None and self._can_cut_text:
            cut = {i: text for i, text in enumerate(texts) if isinstance(text, str) and len(text) > 16 * enough}
        ids = self._encode_whole(["" if i in cut else text for i, text in enumerate(texts)], positions)
        for i, text in cut.items():
            ids[i] = self._encode_start(text, enough)
        return ids

    def _encode_whole(self, texts: list[str], positions: Sequence[int]) -> list[np.ndarray]:
        try:
            encodings = self._backend.encode_batch_fast(texts, add_special_tokens=False)
        except TypeError:  # how the Rust side answers both a lone surrogate and a text that is no str
            texts = [_without_surrogates(text, i) for i, text in zip(positions, texts, strict=True)]
            encodings = self._backend.encode_batch_fast(texts, add_special_tokens=False)
        return [np.array(encoding.ids, dtype=np.int32) for encoding in encodings]

    def _encode_start(self, text: str, enough: int) -> np.ndarray:
        size = CHARACTERS_PER_TOKEN * enough
        while (found := WORD_BREAK.search(text, size)) and found.start() < len(text) // 2:
            (ids,) = self._encode_whole([text[: found.start()]], [0])
            if len(ids) >= enough:
                return ids
            size = 4 * found.start()
        return self._encode_whole([text], [0])[0]

    def _words_are_independent(self) -> bool:
        """Whether cutting a text at WORD_BREAK leaves the ids before the cut as they were."""
        if any(" " in str(added) for added in self._backend.get_added_tokens_decoder().values()):
            return False
        splitters = _flatten(self._backend.pre_tokenizer)
        normalizers = _flatten(self._backend.normalizer)
        return (
            any(part["type"] in SPLITTING_PRE_TOKENIZERS for part in splitters)
            and all(part["type"] in SPLITTING_PRE_TOKENIZERS | {"Punctuation", "Digits"} for part in splitters)
            and all(part.get("use_regex", True) and part.get("split", True) for part in splitters)
            and all(part["type"] in LOCAL_NORMALIZERS for part in normalizers)
        )

    def _probe(self) -> None:
        """Reads special tokens and token types off one pair."""
        try:
            encoding = self._backend.encode("a", "a")
        except Exception as error:  # the Rust side raises no narrower class
            raise ValueError(f"The tokenizer cannot encode the text 'a': {error}") from error
        sides = np.array([-1 if side is None else side for side in encoding.sequence_ids])
        ids = np.array(encoding.ids, dtype=np.int32)
        types = np.array(encoding.type_ids, dtype=np.int32)
        if "token_type_ids" not in self._tokenizer.model_input_names:
            types = np.zeros_like(types)
        query, document = np.flatnonzero(sides == 0), np.flatnonzero(sides == 1)
        if len(query) == 0 or len(document) == 0 or query[-1] > document[0]:
            raise ValueError(
                f"{type(self._tokenizer).__name__} does not encode a pair as its query followed by "
                "its document, so pairs cannot be built with it."
            )
        self._prefix, self._middle, self._suffix = (
            ids[: query[0]],
            ids[query[-1] + 1 : document[0]],
            ids[document[-1] + 1 :],
        )
        # The types of a pair: one for each special token, and one each for the query and the document, repeated.
        self._type_values = np.delete(types, [*query[1:], *document[1:]])
        self._type_counts = np.ones(len(self._type_values), dtype=np.int64)
        self._query_place = len(self._prefix)
        self._document_place = self._query_place + 1 + len(self._middle)
        values = np.delete(self._type_values, [self._query_place, self._document_place])
        cuts = np.cumsum([len(self._prefix), len(self._middle)])
        self._frame = list(zip((self._prefix, self._middle, self._suffix), np.split(values, cuts), strict=True))


def find_unique(texts: Sequence[str]) -> tuple[np.ndarray, list[str]]:
    """Which of the different texts each one is, int64 (texts,), and these, in order of appearance."""
    places = dict.fromkeys(texts)
    unique = list(places)
    if len(unique) == len(texts):
        return np.arange(len(texts)), unique
    places.update(zip(unique, itertools.count(), strict=False))
    return np.fromiter(map(places.__getitem__, texts), np.int64, len(texts)), unique


def _without_surrogates(text: str, position: int) -> str:
    if not isinstance(text, str):
        raise TypeError(f"Text {position} is {type(text).__name__}, not str.")
    if not SURROGATES.search(text):
        return text
    # UTF-16 joins a high and a low surrogate that stand together into their character; the lone ones are replaced.
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def _flatten(component) -> list[dict]:
    """The parts of a normalizer or pre-tokenizer, as the dictionaries of tokenizer.json."""
    if component is None:
        return []
    state = json.loads(component.__getstate__())
    parts = state.get("pretokenizers") or state.get("normalizers")
    return [state] if parts is None else parts
