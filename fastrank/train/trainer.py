"""Model, tokenizer and optimizer of a run, and one optimizer step: ranking lists in, loss out.

A step packs its lists and back-propagates one loss, normalised over all of them. max_batch_tokens cuts a step into
passes of whole lists; each pass adds the sum of its terms over the step's number of terms, which the labels alone
tell, so the cut never shows in the gradient. What cannot be cut that way (a list over the budget, a user's own loss)
is scored first and back-propagated in a second pass: gradient caching, Gao et al. 2021, arXiv 2101.06983.
"""

from __future__ import annotations

import hashlib
import itertools
import resource
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fastrank.data import RankingList
from fastrank.losses import Loss, WeightedSum, count_terms, resolve_loss
from fastrank.model import CrossEncoder
from fastrank.model.settings import Settings
from fastrank.packing import Pair, pack_pairs, plan_chunks, send_together
from fastrank.reranker import Reranker, default_dtype, find_device, load_parts
from fastrank.tokens import find_unique

from .config import TrainConfig
from .passes import GoBack, Passes, Update
from .processes import Processes

__all__ = ["Prepared", "Trainer"]

DEFAULT_MAX_BATCH_TOKENS = {"float32": 8192, "bf16": 16384}  # on a CPU: as much memory in either
MOST_BATCH_TOKENS = 131072  # on a GPU, which more do not make faster


def fitting_tokens(memory: int, settings: Settings, size: int, *, recomputes: bool) -> int:
    """Tokens of a pass that takes so many bytes, for hidden numbers of `size` bytes; at most MOST_BATCH_TOKENS.

    Of each token a layer keeps about 18 numbers a hidden unit, or only what goes into it where it recomputes; the one
    that the backward pass is in has 12 more, or all 30 of them.
    """
    numbers = settings.num_layers + 30 if recomputes else 18 * settings.num_layers + 12
    tokens = memory // (numbers * settings.hidden_size * size)
    return max(1024, min(MOST_BATCH_TOKENS, tokens // 1024 * 1024))


@dataclass(frozen=True)
class Prepared:
    """A step's lists with what can be made of them whatever the weights are.

    Attributes:
        lists, labels: Of the whole step.
        encoded: The pairs of this process's share of the lists.
        num_terms: Of the whole step's loss, at least 1; None for a user's own loss.
        num_without_terms: Lists that give the loss none.
        num_truncated: Pairs of this process's share that the limits cut.
    """

    lists: Sequence[RankingList]
    labels: list[Tensor]
    encoded: list[list[Pair]]
    num_terms: int | None
    num_without_terms: int
    num_truncated: int


class Trainer:
    """Takes optimizer steps; which lists, how many and at which rate is the loop's business.

    Args:
        config: The run.

    Raises:
        ValueError: An unusable model, loss or key.
        OSError: A model that is not there.
    """

    def __init__(self, config: TrainConfig):
        self.config = config
        self.processes = Processes(config.device)
        if config.num_threads:
            torch.set_num_threads(config.num_threads)
        self.device = find_device(None if config.device == "auto" else config.device)
        self.loss = resolve_loss(config.loss, config.loss_options)
        # A weighted sum has them inside; those of one loss are looked at now rather than in the first step.
        self.loss_options = {} if isinstance(self.loss, WeightedSum) else config.loss_options
        if isinstance(self.loss, Loss):
            self.loss.fill(self.loss_options)
        model, self.tokenizer = load_parts(
            config.model,
            limits={name: getattr(config, name) for name in ("max_length", "max_query_tokens", "max_document_tokens")},
            hub={},
            head="initialise",
            seed=config.seed,
            dropout=config.dropout,
        )
        self.model = model.to(self.device)
        self.precision = default_dtype(self.device) if config.precision == "auto" else config.precision
        if self.precision != "float32":
            self.model.to_precision(self.precision)
        self.max_batch_tokens = config.max_batch_tokens or self._default_max_batch_tokens()
        self.model.encoder.recomputes = config.gradient_checkpointing
        _freeze(self.model, config.freeze_layers)
        self.optimizer = self._make_optimizer()
        # What fills a batch up may be any token but padding, from whose place RoBERTa counts on.
        self._passes = Passes(
            self.model,
            self.device,
            filler=(self.model.settings.first_position, 0),
            uses_graphs=config.cuda_graphs and not config.gradient_checkpointing,
        )
        self._update = Update(self.model, self.optimizer, config.max_grad_norm, uses_graphs=self._passes.uses_graphs)
        self.num_lists_without_terms = self.num_truncated = 0  # in all steps; truncated pairs in this process
        self._reranker = Reranker.from_parts(self.model, self.tokenizer, max_batch_tokens=self.max_batch_tokens)

    def _default_max_batch_tokens(self) -> int:
        """On a GPU as many as a third of its memory takes beside weights, gradients and moments: graphs hold as much as
        their largest pass, and beside them a pass without one must have room."""
        if self.device.type != "cuda":
            return DEFAULT_MAX_BATCH_TOKENS.get(self.precision, 8192)
        learned = 16 * sum(one.numel() for one in self.model.parameters())
        memory = torch.cuda.get_device_properties(self.device).total_memory - learned
        size = 4 if self.precision == "float32" else 2
        return fitting_tokens(memory // 3, self.model.settings, size, recomputes=self.config.gradient_checkpointing)

    def _make_optimizer(self) -> torch.optim.Optimizer:
        config = self.config
        head_rate = config.learning_rate if config.head_learning_rate is None else config.head_learning_rate
        groups: dict[tuple[bool, bool], list[torch.nn.Parameter]] = {}
        for name, value in self.model.named_parameters():
            if value.requires_grad:
                # Biases and LayerNorm weights are the vectors: decay would pull them to zero for no reason.
                groups.setdefault((name.startswith("head."), value.ndim > 1), []).append(value)
        return torch.optim.AdamW(
            [
                {
                    "params": values,
                    "peak": head_rate if in_head else config.learning_rate,
                    "weight_decay": config.weight_decay if decays else 0.0,
                }
                for (in_head, decays), values in groups.items()
            ],
            lr=config.learning_rate,
            betas=(config.adam_beta1, config.adam_beta2),
            eps=config.adam_epsilon,
            fused=True,
        )

    def prepare(self, lists: Sequence[RankingList]) -> Prepared:
        """Everything about a step but the step; may run in another thread than step().

        Raises:
            ValueError: Labels that the loss refuses.
        """
        # Our losses tell labels apart that are one number in float32; a user's gets what it computes in.
        known = isinstance(self.loss, Loss)
        labels = [torch.tensor(one.labels, dtype=torch.float64 if known else torch.float32) for one in lists]
        num_terms, without = None, 0
        if known:
            terms = count_terms(self.loss.name, torch.cat(labels), _offsets(labels), **self.loss_options)
            num_terms, without = max(1, int(terms.sum())), int((terms == 0).sum())
        before = self.tokenizer.num_truncated
        encoded = self.tokenize(self.processes.share(lists))
        return Prepared(lists, labels, encoded, num_terms, without, self.tokenizer.num_truncated - before)

    def step(self, lists: Sequence[RankingList] | Prepared, number: int, *, rate_factor: float = 1.0) -> Tensor:
        """One optimizer step over labelled lists; returns its loss, one number on the device. Nothing waits for a
        GPU, but a user's own loss in several processes.

        Args:
            lists: The step's lists, of any length each, or what prepare() made of them.
            number: Index of the step in the run: with the seed it decides dropout's masks.
            rate_factor: Share of the peak learning rates.

        Raises:
            ValueError: A score that is NaN, naming its pair (checked on a CPU only), or what the loss refuses.
        """
        made = lists if isinstance(lists, Prepared) else self.prepare(lists)
        self.model.train()
        self._passes.clear_gradients()
        self.num_lists_without_terms += made.num_without_terms
        self.num_truncated += made.num_truncated
        own = self.processes.share(made.lists)
        if made.num_terms is not None or self.processes.count == 1:
            own_labels = self.processes.share(made.labels)
            loss = self.processes.sum(self._backward(own, made.encoded, own_labels, made.num_terms, number))
        else:
            loss = self._backward_of_whole_step(own, made.encoded, made.labels, number)
        self.processes.sum_gradients(self.model.parameters())
        self._update(rate_factor)
        return loss

    def _backward(
        self, lists, encoded: list[list[Pair]], labels: list[Tensor], num_terms: int | None, number: int
    ) -> Tensor:
        """Lists packed as far as memory goes; returns their part of the loss."""
        sizes = [sum(len(ids) for ids, _ in one) for one in encoded]
        budget = self.max_batch_tokens
        loss, num_passes = torch.zeros((), device=self.device), 0
        for chunk in plan_chunks(sizes, budget) if num_terms is not None else [range(len(lists))]:
            part = [[values[i] for i in chunk] for values in (lists, encoded, labels)]
            if sum(sizes[i] for i in chunk) <= budget:
                scores, go_back = self._forward(part[1], number, num_passes)
                num_passes += 1
                self._refuse_nan(scores, part[0])
                value, gradient = self._loss_and_gradient(scores, part[2], num_terms)
                go_back(gradient)
            else:
                value, num_passes = self._backward_in_two_passes(*part, num_terms, number, num_passes)
            loss = loss + value
        return loss

    def _loss_and_gradient(self, scores: Tensor, labels: list[Tensor], num_terms: int | None) -> tuple[Tensor, Tensor]:
        """Of scores (pairs,) that are a leaf."""
        loss = self._loss(scores.requires_grad_(), labels, num_terms)
        (gradient,) = torch.autograd.grad(loss, scores)
        return loss.detach(), gradient

    def _loss(self, scores: Tensor, labels: list[Tensor], num_terms: int | None) -> Tensor:
        arguments = send_together((torch.cat(labels), _offsets(labels)), self.device)
        if num_terms is None:  # a user's own loss may write into the scores, which autograd forbids in a leaf
            return self.loss(scores.clone(), *arguments, **self.loss_options)
        return self.loss(scores, *arguments, reduction="sum", **self.loss_options) / num_terms

    def _backward_in_two_passes(
        self, lists, encoded: list[list[Pair]], labels: list[Tensor], num_terms: int | None, number: int, first: int
    ) -> tuple[Tensor, int]:
        """first: index of the first pass. Returns the loss and the index after the last pass."""
        passes = self._cut(encoded)
        scores = self._score_passes(lists, passes, number, first)
        loss, gradient = self._loss_and_gradient(scores, labels, num_terms)
        self._backward_passes(passes, gradient, number, first)
        return loss, first + len(passes)

    def _backward_of_whole_step(self, own, encoded: list[list[Pair]], labels: list[Tensor], number: int) -> Tensor:
        """For a loss that only the scores of all processes tell: each computes it whole and goes back through its own.

        Returns the whole loss.
        """
        passes = self._cut(encoded)
        scores = self._score_passes(own, passes, number, 0) if passes else torch.zeros(0, device=self.device)
        parts = self.processes.gather([part.cpu() for part in scores.split([len(one) for one in encoded])])
        whole = torch.cat(parts).to(self.device)
        loss, gradient = self._loss_and_gradient(whole, labels, None)
        slopes = self.processes.share(gradient.split([len(part) for part in parts]))
        if passes:
            self._backward_passes(passes, torch.cat(slopes), number, 0)
        return loss

    def _cut(self, encoded: list[list[Pair]]) -> list[list[Pair]]:
        """The pairs of all lists, cut for memory."""
        pairs = [pair for one in encoded for pair in one]
        parts = plan_chunks([len(ids) for ids, _ in pairs], self.max_batch_tokens)
        return [[pairs[i] for i in part] for part in parts]

    def _score_passes(self, lists, passes: list[list[Pair]], number: int, first: int) -> Tensor:
        with torch.no_grad():
            scores = torch.cat([self._forward([part], number, index)[0] for index, part in enumerate(passes, first)])
        self._refuse_nan(scores, lists)
        return scores

    def _backward_passes(self, passes: list[list[Pair]], gradient: Tensor, number: int, first: int) -> None:
        slopes = gradient.split([len(part) for part in passes])
        for index, (part, slope) in enumerate(zip(passes, slopes, strict=True), first):
            _, go_back = self._forward([part], number, index)
            go_back(slope)

    def _forward(self, encoded: list[list[Pair]], number: int, index: int) -> tuple[Tensor, GoBack]:
        # Dropout's masks follow from where the pass stands in the run, so a resumed run draws the same ones.
        place = f"{self.config.seed} {number} {index}" + (f" {self.processes.rank}" if self.processes.rank else "")
        digest = hashlib.blake2b(place.encode(), digest_size=8).digest()
        pairs = [pair for one in encoded for pair in one]
        return self._passes.forward(pack_pairs(pairs), int.from_bytes(digest, "little") >> 1)

    def _refuse_nan(self, scores: Tensor, lists: Sequence[RankingList]) -> None:
        if scores.device.type != "cpu" or not torch.isnan(scores).any():
            return
        position = int(torch.isnan(scores.detach()).nonzero()[0])
        for one in lists:
            if position < len(one.documents):
                document = one.document_ids[position] if one.document_ids else position
                raise ValueError(
                    f"The score of query {one.query_id or one.query[:60]!r} with document {document!r} is NaN: the "
                    "weights have diverged; lower the learning rate."
                )
            position -= len(one.documents)

    def time_a_pass(self, lists: Sequence[RankingList]) -> tuple[int, float]:
        """Tokens and seconds of one forward and backward pass over the first pairs that max_batch_tokens allows."""
        pairs = [pair for one in self.tokenize(lists) for pair in one]
        first = next(iter(plan_chunks([len(ids) for ids, _ in pairs], self.max_batch_tokens)))
        self.model.train()
        for _ in range(2):  # the first one makes what is made once
            started = time.perf_counter()
            self._passes.clear_gradients()
            scores, go_back = self._forward([[pairs[i] for i in first]], 0, 0)
            go_back(torch.ones_like(scores))
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            seconds = time.perf_counter() - started
        self._passes.clear_gradients()
        return sum(len(pairs[i][0]) for i in first), seconds

    def peak_memory(self) -> int:
        """Bytes that this process held at most (on a GPU: allocated there), AdamW's moments to come included."""
        moments = sum(2 * one.nbytes for one in self.model.parameters() if one.requires_grad)
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) + moments
        return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss + moments

    def tokenize(self, lists: Sequence[RankingList]) -> list[list[Pair]]:
        """Each list's pairs as (token ids, token types)."""
        text_of, unique = find_unique(
            [*(one.query for one in lists), *(text for one in lists for text in one.documents)]
        )
        query_of, document_of = np.split(text_of, [len(lists)])
        texts = self.tokenizer.encode_together(unique)
        sizes = [len(one.documents) for one in lists]
        pairs = iter(self.tokenizer.join(texts, query_of.repeat(sizes), texts, document_of))
        return [list(itertools.islice(pairs, len(one.documents))) for one in lists]

    def scores(self, lists: Sequence[RankingList]) -> list[np.ndarray]:
        """Scores of every list's documents without a gradient, each float32 (documents,)."""
        self.model.eval()
        own = self.processes.share(lists)
        scores = self._reranker.score_pairs([pair for one in self.tokenize(own) for pair in one])
        self._refuse_nan(torch.from_numpy(scores), own)
        return self.processes.gather(
            np.split(scores, np.cumsum([len(one.documents) for one in own])[:-1]) if own else []
        )


def _freeze(model: CrossEncoder, layers: int) -> None:
    """Stops the embeddings and the first `layers` layers from learning; -1 stops nothing."""
    if layers > len(model.encoder.layers):
        raise ValueError(f"freeze_layers={layers}: the model has {len(model.encoder.layers)} layers.")
    frozen = [] if layers < 0 else [model.encoder.embeddings, *model.encoder.layers[:layers]]
    for module in frozen:
        module.requires_grad_(False)


def _offsets(labels: list[Tensor]) -> Tensor:
    return torch.tensor([0, *np.cumsum([len(one) for one in labels])], dtype=torch.int32)
