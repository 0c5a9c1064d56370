"""A query and documents in, a Ranking out: `rerank` for one call, `Reranker` for a model that stays loaded.

The one idea: all pairs of all queries of a call are sorted by length and packed under one token budget, and ranked on
raw float32 scores; an activation only changes the numbers that are shown, so that no saturated sigmoid makes ties.
"""

from __future__ import annotations

import contextlib
import math
import operator
import os
import sys
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from fastrank.agreement import kendall_tau, made_up_lists
from fastrank.checkpoint import WEIGHT_FILES, load_model, score_activation
from fastrank.command_line import MAX_THREADS
from fastrank.model import CrossEncoder
from fastrank.model.gpu_layers import can_run, has_fp8
from fastrank.model.graphs import MOST_TOKENS, Bucket, Graphs, plan_one_shape
from fastrank.packing import Pair, Pairs, pack_pairs, plan_batches, plan_even_batches, restore_order
from fastrank.quantized import FILE as INT8_FILE
from fastrank.quantized import load_int8
from fastrank.ranking import RankedDocument, Ranking, describe, document_id, document_text
from fastrank.tokens import PairTokenizer, find_unique

if TYPE_CHECKING:
    from fastrank.data import RankingList

DEFAULT_MODEL = "cross-encoder/ms-marco-MiniLM-L6-v2"
# Of a batch. A small model needs more tokens to keep a GPU busy while Python launches kernels; on a CPU threads wait
# less often for the last of them. A CPU's q, k and v stay just below 32 MiB, from where malloc asks the system for
# memory anew, and has it cleared, every time.
HIDDEN_NUMBERS = {"cuda": 2**26, "cpu": 6144 * 384}
# Pairs that a GPU is given at once: enough for several batches of one length each; with graphs, which start at once, no
# more than keep it busy while the next ones are tokenized, which at first are few, so that it starts early.
PART_PAIRS, FIRST_PART_PAIRS_BY_GRAPHS, PART_PAIRS_BY_GRAPHS = 8192, 256, 1024
DTYPES = {
    "float32": "float32",
    "fp32": "float32",
    torch.float32: "float32",
    "bf16": "bf16",
    "bfloat16": "bf16",
    torch.bfloat16: "bf16",
    "fp16": "fp16",
    "float16": "fp16",
    torch.float16: "fp16",
    "int8": "int8",
    torch.int8: "int8",
    "fp8": "fp8",
    torch.float8_e4m3fn: "fp8",
}
AVAILABLE_DTYPES = ("float32", "bf16", "fp16", "int8", "fp8")
LEAST_AGREEMENT = 0.9  # Kendall's tau of fp8 beside bf16


class Reranker:
    """A cross-encoder that scores (query, document) pairs; it may be called from several threads.

    Arguments:
        model: a local folder, a name on the Hugging Face hub, or "demo" for the checkpoint that the demo trained.
        device: "cpu", "cuda", "cuda:1" ...; default: a GPU where torch finds one.
        dtype: "float32", "bf16", "fp16" and "fp8" (on a GPU) or "int8" (on a CPU): what matrix products are computed
            in, and on a GPU what lies between them; sums and the head are float32. "auto" is float32 on a CPU and bf16
            on a GPU. On a CPU bf16 is faster where the processor has an instruction or matrix units (AMX) for it
            (`python -m fastrank backends`), and elsewhere saves memory. For int8 weights are quantised here,
            activations as they come, both with a scale for 64 neighbours, without calibration; with AMX such weights
            are multiplied as bf16, and take its memory. fp8 (e4m3) is for GPUs of compute capability 8.9 or more:
            products of all tokens in fp8, weights quantised with a scale for each output, tokens with one each as they
            come, the rest in bf16; models of a hidden size below 768 gain nothing. Its rounding is coarse, so a model
            that is loaded so first scores made-up pairs in bf16 and in fp8, and warns where their orders agree too
            little: `fp8_agreement`.
        max_length: tokens of a pair, special tokens included; default: what tokenizer and model allow.
        max_query_tokens, max_document_tokens: cut each side first; default: no such cut.
        max_batch_tokens: tokens of one forward pass; more need more memory.
        num_threads: CPU threads of the calls; default: torch's setting.
        activation: "none" for raw scores, "sigmoid"; default: what the checkpoint's config says, looked up as
            sentence-transformers does. The raw score of a model with two labels is log_softmax(logits)[1].
        deterministic: a document's score has the same bits whatever else is in the call. On a CPU every pair is scored
            in a batch of its own, about 1.6 times slower for passages of 80 tokens; on a GPU every batch is filled up
            to one shape, at least 8,192 tokens in 512 pairs, which costs a single query the most. Without it the same
            call with the same number of threads gives the same bits.
        cuda_graphs: on a GPU, record the forward of batches of up to 65,536 tokens, in buckets of like batches, and
            replay it, which starts faster than kernels one by one: True the first time that a bucket is met, which
            takes some tenths of a second, False never; default: the third time, in half precision.
        revision, token, local_files_only: as in transformers.

    A document's score depends on its pair alone, not on the other documents of the call, up to rounding: products of
    matrices with very few rows round differently. On a CPU in float32 that moved MiniLM-L6's scores by at most 1e-5 of
    their spread (standard deviation).

    Attributes:
        fp8_agreement: with dtype="fp8", Kendall's tau of made-up pairs' order in fp8 beside that in bf16, the mean over
            8 lists of 16 pairs; below 0.9 the Reranker warned when it was made. None with any other dtype.

    Raises OSError where no checkpoint is found, ValueError for one that cannot be used and for bad options.
    """

    fp8_agreement: float | None = None

    def __init__(
        self,
        model: str | os.PathLike[str],
        *,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype = "auto",
        max_length: int | None = None,
        max_query_tokens: int | None = None,
        max_document_tokens: int | None = None,
        max_batch_tokens: int | None = None,
        num_threads: int | None = None,
        activation: str | None = None,
        deterministic: bool = False,
        cuda_graphs: bool | None = None,
        revision: str | None = None,
        token: str | bool | None = None,
        local_files_only: bool = False,
    ):
        place = find_device(device)
        precision = _find_dtype(dtype, place)
        _check_activation(activation)
        if cuda_graphs and place.type != "cuda":
            raise ValueError(f"cuda_graphs need a GPU, but the device is {place}.")
        loaded, tokenizer = load_parts(
            model,
            head="required",
            limits={
                "max_length": max_length,
                "max_query_tokens": max_query_tokens,
                "max_document_tokens": max_document_tokens,
            },
            hub={"revision": revision, "token": token, "local_files_only": local_files_only},
            prefer_int8=precision == "int8",
        )
        loaded.requires_grad_(False)
        if place.type == "cpu":
            if not loaded.is_frozen:
                loaded.freeze(precision, keep_weights=False)
        else:
            loaded.to(place).to_precision(precision)
        self._set_up(
            loaded,
            tokenizer,
            max_batch_tokens=max_batch_tokens,
            num_threads=num_threads,
            activation=activation or score_activation(loaded.config),
            deterministic=deterministic,
        )
        if precision == "fp8":
            self.fp8_agreement = self._compare_with_bf16()
        encoder = loaded.encoder
        # Other kernels than ours may read something back, which cannot be recorded.
        by_itself = place.type == "cuda" and can_run(encoder.layers, place.type, encoder.precision)
        if by_itself if cuda_graphs is None else cuda_graphs:
            self._graphs = Graphs(
                loaded.score,
                place,
                longest=loaded.max_pair_tokens,
                filler=self._filler,
                parameters=list(loaded.parameters()),
                unrecorded=0 if cuda_graphs else 2,
            )

    @classmethod
    def from_parts(
        cls,
        model: CrossEncoder,
        tokenizer: PairTokenizer,
        *,
        max_batch_tokens: int | None = None,
        num_threads: int | None = None,
        activation: str = "none",
        deterministic: bool = False,
    ) -> Reranker:
        """A Reranker of a model in memory, used as it is: device, precision and eval mode are the caller's business."""
        _check_activation(activation)
        self = cls.__new__(cls)
        self._set_up(
            model,
            tokenizer,
            max_batch_tokens=max_batch_tokens,
            num_threads=num_threads,
            activation=activation,
            deterministic=deterministic,
        )
        return self

    def _set_up(self, model, tokenizer, *, max_batch_tokens, num_threads, activation, deterministic) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.device = next(model.parameters()).device
        if max_batch_tokens is None:
            kind = "cuda" if self.device.type == "cuda" else "cpu"
            max_batch_tokens = max(1, HIDDEN_NUMBERS[kind] // model.settings.hidden_size)
        check_count("max_batch_tokens", max_batch_tokens)
        check_count("num_threads", num_threads, MAX_THREADS)
        self.max_batch_tokens = max_batch_tokens
        self.num_threads = num_threads
        self.activation = activation
        self.deterministic = deterministic
        self._has_warned = False
        self._graphs: Graphs | None = None

    @property
    def num_truncated(self) -> int:
        """Pairs scored so far whose query or document was cut to fit; the first one also warns."""
        return self.tokenizer.num_truncated

    def rank(
        self,
        query: str | Sequence[str],
        documents: Iterable[Any],
        *,
        top_k: int | None = None,
        top_n: int | None = None,
        activation: str | None = None,
    ) -> Ranking | list[Ranking]:
        """Ranks documents for one query, or a list of documents for each of many queries.

        Arguments:
            query: a str, or a list of them.
            documents: str, mappings with `text` or `content` (other keys, a title too, are not read), objects with
                `.text` or `.page_content`; for a list of queries one such list each. No documents: an empty ranking.
            top_k, top_n: return only so many documents a query; two names for one thing.
            activation: replaces the Reranker's for this call.

        Returns a Ranking, for a list of queries a list of them. Raises TypeError with the position of what is no text,
        ValueError for a NaN score.
        """
        limit = _find_limit(top_k, top_n)
        activation = self._choose_activation(activation)
        if isinstance(query, str):
            lists = [_as_list(documents, "documents")]
            return self._rank_lists([query], lists, limit, activation, several=False)[0]
        if query is None or isinstance(query, (bytes, int, float)):
            raise TypeError(f"query must be a str, or a list of them, not {describe(query)}.")
        queries = _as_list(query, "query")
        lists = [_as_list(one, f"documents[{i}]") for i, one in enumerate(_as_list(documents, "documents"))]
        if len(lists) != len(queries):
            raise ValueError(f"{len(queries)} queries need {len(queries)} lists of documents; {len(lists)} were given.")
        return self._rank_lists(queries, lists, limit, activation, several=True)

    def predict(self, pairs: Iterable[tuple[str, Any]], *, activation: str | None = None) -> np.ndarray:
        """Scores (query, document) pairs.

        Arguments:
            pairs: a query (str) and a document (as in `rank`) each; a pair may come more than once.
            activation: replaces the Reranker's for this call.

        Returns float32 (pairs,), in order. Raises as `rank` does.
        """
        activation = self._choose_activation(activation)
        queries, documents = [], []
        for i, pair in enumerate(_as_list(pairs, "pairs")):
            if isinstance(pair, (str, bytes, Mapping, Set)) or not hasattr(pair, "__len__") or len(pair) != 2:
                raise TypeError(f"Pair {i} must be a query and a document, not {describe(pair)}.")
            queries.append(_query_text(pair[0], f"The query of pair {i}"))
            documents.append([document_text(pair[1], lambda i=i: f"The document of pair {i}")])
        return _activate(self._score(queries, documents, lambda i, _: f"pair {i}"), activation)

    def score_lists(self, lists: Sequence[RankingList]) -> list[np.ndarray]:
        """Raw scores of the documents of ranking lists, all packed together: float32 (documents,) a list."""
        raw = self._score(
            [one.query for one in lists],
            [list(one.documents) for one in lists],
            lambda i, j: f"document {j} of list {i}",
        )
        return np.split(raw, np.cumsum([len(one.documents) for one in lists])[:-1]) if lists else []

    def _rank_lists(self, queries, lists, limit, activation, *, several) -> list[Ranking]:
        def name(i: int, j: int) -> str:
            return f"document {j} of query {i}" if several else f"document {j}"

        texts = [
            [
                document
                if isinstance(document, str)
                else document_text(document, lambda i=i, j=j: name(i, j).capitalize())
                for j, document in enumerate(documents)
            ]
            for i, documents in enumerate(lists)
        ]
        queries = [_query_text(query, f"Query {i}") for i, query in enumerate(queries)]
        rankings = []
        for part, raw in self._score_parts(queries, texts, name):
            start = 0
            for query, documents in zip(queries[part.start : part.stop], lists[part.start : part.stop], strict=True):
                scores = raw[start : start + len(documents)]
                start += len(documents)
                best = np.argsort(-scores, kind="stable")[:limit]
                shown = _activate(scores[best], activation).tolist()
                best = best.tolist()
                chosen = [documents[i] for i in best]
                rankings.append(Ranking(query, map(RankedDocument, best, shown, chosen, map(document_id, chosen))))
        return rankings

    def _score(self, queries: list[str], documents: list[list[str]], name: Callable[[int, int], str]) -> np.ndarray:
        """Raw scores of every query with its documents, float32, one list after the other."""
        return np.concatenate([scores for _, scores in self._score_parts(queries, documents, name)])

    def _score_parts(
        self, queries: list[str], documents: list[list[str]], name: Callable[[int, int], str]
    ) -> Iterator[tuple[range, np.ndarray]]:
        """The same part by part: which lists, and their scores. A GPU is at the next part when one is yielded."""
        before = None
        for part in self._parts(documents):
            pairs = self._encode(queries[part.start : part.stop], documents[part.start : part.stop])
            self._warn_of_truncation()
            started = part, self._start(pairs)
            if before is not None:
                yield before[0], self._finish_part(*before, queries, documents, name)
            before = started
        yield before[0], self._finish_part(*before, queries, documents, name)

    def _finish_part(self, part, started, queries, documents, name) -> np.ndarray:
        scores = self._finish(*started)
        if np.isnan(scores).any():
            position = int(np.flatnonzero(np.isnan(scores))[0])
            places = [(i, j) for i in part for j in range(len(documents[i]))]
            i, j = places[position]
            raise ValueError(
                f"The score of {name(i, j)} is NaN (query {queries[i][:60]!r}, document {documents[i][j][:60]!r}): "
                "look for NaN or infinite weights in the checkpoint, and try dtype='float32'."
            )
        return scores

    def _parts(self, documents: list[list[str]]) -> list[range]:
        """Whole lists that are tokenized at once: all of them on a CPU, at least so many pairs on a GPU."""
        if self.device.type == "cpu":
            return [range(len(documents))]
        if self._graphs is None:
            enough = most = PART_PAIRS
        else:
            enough, most = FIRST_PART_PAIRS_BY_GRAPHS, PART_PAIRS_BY_GRAPHS
        parts, start, size = [], 0, 0
        for i, texts in enumerate(documents):
            size += len(texts)
            if size >= enough:
                parts.append(range(start, i + 1))
                start, size, enough = i + 1, 0, min(2 * enough, most)
        if start < len(documents) or not parts:
            parts.append(range(start, len(documents)))
        return parts

    def _encode(self, queries: list[str], documents: list[list[str]]) -> Pairs:
        query_of, unique_queries = find_unique(queries)
        document_of, unique_documents = find_unique([text for texts in documents for text in texts])
        with _cpu_threads(self.num_threads):
            of_queries = self.tokenizer.encode_together(unique_queries)
            enough = self.tokenizer.enough_tokens(int(of_queries.lengths.max(initial=0)))
            of_documents = self.tokenizer.encode_together(unique_documents, enough=enough)
        return self.tokenizer.join(of_queries, query_of.repeat([*map(len, documents)]), of_documents, document_of)

    def score_pairs(self, pairs: Sequence[Pair]) -> np.ndarray:
        """Raw scores of pairs of token ids and token types, as PairTokenizer.pair gives them: float32 (pairs,)."""
        return self._finish(*self._start(Pairs.join(pairs)))

    def _start(self, pairs: Pairs) -> tuple[np.ndarray, list[np.ndarray], torch.Tensor, torch.cuda.Event | None]:
        """Begins to score pairs: which of the distinct ones each is, how these are batched, and the batches' scores on
        the CPU, which are there when a GPU has come to the event."""
        # Equal pairs must tie, and rows of one matrix product may round differently: each is scored once (in a part).
        place, distinct = pairs.find_distinct()
        # In order of length the largest batch comes first, so that a lack of memory shows at once.
        lengths = pairs.lengths[distinct]
        shape = None
        if self.deterministic and self.device.type == "cuda":
            plan, shape = plan_one_shape(lengths, self.model.max_pair_tokens)
        elif self._graphs is not None and not self.deterministic:
            plan = plan_even_batches(lengths, min(self.max_batch_tokens, MOST_TOKENS))
        else:
            plan = plan_batches(lengths, 1 if self.deterministic else self.max_batch_tokens)
        with torch.inference_mode(), _cpu_threads(self.num_threads):
            parts = [self._score_batch(pairs, distinct[batch], shape) for batch in plan]
            scores = torch.cat(parts) if len(parts) > 1 else parts[0] if parts else torch.zeros(0)
            if not scores.is_cuda:
                return place, plan, scores, None
            # Copied by the GPU itself, which else would be waited for until it has done what follows, too.
            on_cpu = torch.empty_like(scores, device="cpu", pin_memory=True)
            on_cpu.copy_(scores, non_blocking=True)
            return place, plan, on_cpu, torch.cuda.current_stream(self.device).record_event()

    def _score_batch(self, pairs: Pairs, order: np.ndarray, shape: Bucket | None) -> torch.Tensor:
        """Scores of some pairs in that order, (pairs,) on the device; shape: what to fill their batch up to."""
        if shape is None and self._graphs is not None and (scores := self._graphs.score(pairs, order)) is not None:
            return scores
        on_gpu = self.device.type == "cuda"
        batch = pack_pairs(pairs, order, bucket=shape, filler=self._filler, pin_memory=on_gpu)
        return self.model.score(batch.to(self.device))[: len(order)]

    def _compare_with_bf16(self) -> float:
        """Kendall's tau of made-up lists in fp8, in which the model is left, beside bf16; warns where it is low."""
        lists = made_up_lists(self.tokenizer)
        cuts = np.cumsum([len(one) for one in lists])[:-1]
        found = {}
        for precision in ("bf16", "fp8"):  # the last one stays
            self.model.to_precision(precision)
            try:
                found[precision] = np.split(self.score_pairs([pair for one in lists for pair in one]), cuts)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:  # torch has no such product for every GPU that has fp8
                if precision != "fp8":
                    raise
                reason = str(error).strip().split("\n")[0]
                raise ValueError(f"dtype fp8 does not run here; choose dtype='bf16' ({reason}).") from error
        tau = float(np.mean([kendall_tau(one, other) for one, other in zip(*found.values(), strict=True)]))
        if not tau >= LEAST_AGREEMENT:
            warnings.warn(
                f"In fp8 this model ranks made-up pairs otherwise than in bf16 (Kendall's tau {tau:.3f}, below "
                f"{LEAST_AGREEMENT}): compare both on your data, or choose dtype='bf16'.",
                stacklevel=_callers_level(),
            )
        return tau

    @property
    def _filler(self) -> tuple[int, int]:
        """Token id and type of what fills a batch up: any but padding, from whose place RoBERTa counts on."""
        return self.model.settings.first_position, 0

    @staticmethod
    def _finish(
        place: np.ndarray, plan: list[np.ndarray], scores: torch.Tensor, ready: torch.cuda.Event | None
    ) -> np.ndarray:
        """What _start() began: raw scores of the pairs, float32 (pairs,)."""
        if ready is not None:
            ready.synchronize()
        cuts = np.cumsum([len(batch) for batch in plan])[:-1]
        return restore_order(plan, np.split(scores.numpy(), cuts) if plan else [])[place]

    def _warn_of_truncation(self) -> None:
        if self._has_warned or not self.num_truncated:
            return
        self._has_warned = True
        warnings.warn(
            f"Some texts are too long and are cut ({self.tokenizer.limits}); Reranker.num_truncated counts the pairs. "
            "This is said once.",
            stacklevel=_callers_level(),
        )

    def _choose_activation(self, activation: str | None) -> str:
        _check_activation(activation)
        return activation or self.activation


def rerank(
    query: str | Sequence[str],
    documents: Iterable[Any],
    *,
    model: str | os.PathLike[str] = DEFAULT_MODEL,
    top_k: int | None = None,
    top_n: int | None = None,
    **reranker_options,
) -> Ranking | list[Ranking]:
    """Ranks documents for a query, or a list of documents for each of many queries; keeps the last loaded model.

    Arguments:
        query, documents, top_k, top_n: as in Reranker.rank.
        model, reranker_options: as in Reranker. The model is loaded again when these change, or its folder does.

    Returns a Ranking, for a list of queries a list of them.
    """
    # What every call may choose anew does not belong to the loaded model.
    activation = reranker_options.pop("activation", None)
    reranker = _keep_loaded(model, reranker_options)
    return reranker.rank(query, documents, top_k=top_k, top_n=top_n, activation=activation)


def demo_folder() -> Path:
    """The folder of the checkpoint that the demo trained: the environment variable FASTRANK_DEMO, else runs/demo."""
    folder = Path(os.environ.get("FASTRANK_DEMO") or "runs/demo")
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(
            f"There is no demo checkpoint in {folder}: run `python -m fastrank.train --demo` in this folder, or let "
            "the environment variable FASTRANK_DEMO name the checkpoint's folder."
        )
    return folder


_loaded: tuple[object, Reranker] | None = None
_loading = threading.Lock()


def _keep_loaded(model: str | os.PathLike[str], options: dict[str, Any]) -> Reranker:
    global _loaded
    folder = demo_folder() if model == "demo" else Path(model)
    # A folder that was trained again under the same name holds another model.
    state = [_changed_at(folder / name) for name in ("config.json", "tokenizer.json", *WEIGHT_FILES, INT8_FILE)]
    wanted = (str(folder.absolute()) if folder.is_dir() else str(model), state, options)
    with _loading:
        if _loaded is None or _loaded[0] != wanted:
            _loaded = None  # the old model's memory is free before the new one needs any
            _loaded = (wanted, Reranker(model, **options))
        return _loaded[1]


def _changed_at(path: Path) -> int | None:
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return None


_threads_lock = threading.Lock()
_threads_in_use: list[int] = []  # the numbers of the blocks that are running
_threads_outside = 0


@contextlib.contextmanager
def _cpu_threads(count: int | None) -> Iterator[None]:
    """Lets torch use `count` CPU threads inside the block; None changes nothing."""
    global _threads_outside
    if count is None:
        yield
        return
    # Torch keeps the number per thread, but a new thread begins with the number that was set last in any other. A
    # thread that stands at the number of a running block has it from there, so it goes back to the one before.
    with _threads_lock:
        before = torch.get_num_threads()
        if before in _threads_in_use:
            before = _threads_outside
        else:
            _threads_outside = before
        _threads_in_use.append(count)
        torch.set_num_threads(count)
    try:
        yield
    finally:
        with _threads_lock:
            _threads_in_use.remove(count)
            torch.set_num_threads(before)


def _callers_level() -> int:
    """The stacklevel with which the caller of this function warns at the line that called into fastrank."""
    frame, level = sys._getframe(1), 1
    while frame.f_back is not None and frame.f_globals.get("__name__", "").startswith("fastrank."):
        frame, level = frame.f_back, level + 1
    return level


def _query_text(query: Any, where: str) -> str:
    if not isinstance(query, str):
        raise TypeError(f"{where} must be a str, not {describe(query)}.")
    return query


def _as_list(values: Any, name: str) -> list:
    if isinstance(values, (str, bytes, Mapping)) or not isinstance(values, Iterable):
        raise TypeError(f"{name} must be a list, not {describe(values)}.")
    return list(values)


def _find_limit(top_k: int | None, top_n: int | None) -> int | None:
    if top_k is not None and top_n is not None and top_k != top_n:
        raise ValueError(f"top_k ({top_k}) and top_n ({top_n}) are two names for one thing; give one of them.")
    limit = top_k if top_k is not None else top_n
    if limit is None:
        return None
    limit = _whole("top_k", limit)
    if limit < 0:
        raise ValueError(f"top_k is {limit}; it cannot be negative.")
    return limit


def load_parts(
    model: str | os.PathLike[str],
    *,
    limits: Mapping[str, int | None],
    hub: Mapping[str, Any],
    prefer_int8: bool = False,
    **model_options,
) -> tuple[CrossEncoder, PairTokenizer]:
    """The model and the tokenizer of a folder, of a hub name or of "demo", made to fit each other.

    Arguments:
        limits: max_length, max_query_tokens, max_document_tokens as in Reranker.
        hub: revision, token, local_files_only as in Reranker.
        prefer_int8: take the stored int8 weights where there are any, frozen and without float32 weights.
        model_options: as in fastrank.checkpoint.load_model.
    """
    if not isinstance(model, (str, os.PathLike)):
        raise TypeError(f"model must be a folder or a name on the Hugging Face hub, not {describe(model)}.")
    for name, value in limits.items():
        check_count(name, value)
    name = os.fspath(demo_folder() if model == "demo" else model)
    loaded = (load_int8(name, **hub) if prefer_int8 else None) or load_model(name, **model_options, **hub)
    settings = loaded.settings
    tokenizer = PairTokenizer.load(
        name, num_positions=loaded.max_pair_tokens, num_embeddings=settings.vocab_size, **limits, **hub
    )
    if tokenizer.num_token_types > settings.num_token_types:
        raise ValueError(
            f"{name}: the tokenizer has {tokenizer.num_token_types} token types, but the model has embeddings for "
            f"{settings.num_token_types}."
        )
    return loaded, tokenizer


def check_count(name: str, value: Any, largest: float = math.inf) -> None:
    """Refuses what is neither None nor a whole number from 1 to `largest`."""
    if value is None:
        return
    if not 1 <= _whole(name, value) <= largest:
        at_most = "" if largest == math.inf else f" and at most {largest}"
        raise ValueError(f"{name} is {value}; it must be at least 1{at_most}.")


def _whole(name: str, value: Any) -> int:
    try:
        return operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be a whole number, not {value!r}.") from None


def find_device(device: str | torch.device | None) -> torch.device:
    """The device of that name, by default a GPU where torch finds one; ValueError for one that is not here."""
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"device {device!r} is unknown; give 'cpu' or 'cuda'.") from error
    if found.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device is {device!r}, but torch finds no GPU here; give device='cpu'.")
    if found.type not in ("cpu", "cuda"):
        raise ValueError(f"device {device!r} is not supported; give 'cpu' or 'cuda'.")
    return found


def default_dtype(device: torch.device) -> str:
    """What "auto" means there."""
    return "bf16" if device.type == "cuda" else "float32"


def _find_dtype(dtype: str | torch.dtype, device: torch.device) -> str:
    if isinstance(dtype, str) and dtype == "auto":
        return default_dtype(device)
    name = DTYPES.get(dtype) if isinstance(dtype, (str, torch.dtype)) else None
    if name is None:
        raise ValueError(f"dtype {dtype!r} is unknown; available are auto, {', '.join(AVAILABLE_DTYPES)}.")
    if name == "int8" and device.type != "cpu":
        raise ValueError(f"dtype int8 runs on a CPU, not on {device}; choose auto, float32, bf16 or fp16 there.")
    if name in ("fp16", "fp8") and device.type == "cpu":
        raise ValueError(f"dtype {name} runs on a GPU, not on a CPU; choose auto, float32, bf16 or int8 there.")
    if name == "fp8" and not has_fp8(device):
        found = ".".join(map(str, torch.cuda.get_device_capability(device)))
        raise ValueError(
            f"dtype fp8 needs Triton and a GPU of compute capability 8.9 or more ({device} has {found}); choose auto, "
            "float32, bf16 or fp16."
        )
    return name


def _check_activation(activation: str | None) -> None:
    if activation not in (None, "none", "sigmoid"):
        raise ValueError(f"activation {activation!r} is unknown; give 'none', 'sigmoid', or None for the checkpoint's.")


def _activate(scores: np.ndarray, activation: str) -> np.ndarray:
    # torch's sigmoid of float32 gives the last numbers of an array other bits than the ones before; float64 hides that.
    return torch.from_numpy(scores).double().sigmoid().float().numpy() if activation == "sigmoid" else scores
