"""Passes of a training step over the model, forward and backward, and the update of its weights.

On a GPU each is a CUDA graph where it can be: of a small model Python and the driver start the kernels more slowly than
the GPU runs them. There a batch is filled up to a bucket, whether graphs are used or not, so that dropout draws the
same masks; what fills it up has no part in the loss, and its gradients are zero.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from fastrank.kernels.accumulation import accumulate_in_place
from fastrank.model import CrossEncoder
from fastrank.model.gpu_layers import can_run
from fastrank.model.graphs import Bucket, fill, find_bucket, record, run_before_recording
from fastrank.packing import PackedBatch

__all__ = ["Passes", "Update"]

MOST_TOKENS = 131072  # of a pass by graphs: more keep a GPU busy without
MOST_GRAPHS = 48
UNRECORDED = 2  # passes of a bucket, and updates, before a graph of them is recorded: it takes some tenths of a second

# Of gradients by a graph from those without, relative to their norm: bf16 rounds by .004, and another mask of dropout's
# would change the first digit.
FURTHEST_APART = 0.05

GoBack = Callable[[Tensor], None]


@dataclass(frozen=True)
class _Recorded:
    """The graphs of a bucket, and the places that they read from and write to."""

    forward: torch.cuda.CUDAGraph
    backward: torch.cuda.CUDAGraph
    inputs: PackedBatch
    scores: Tensor
    slopes: Tensor


class Passes:
    """Scores batches, and adds to the gradients of the model's weights what the gradients of the scores make of them.

    Args:
        model: Which weights learn must not change any more.
        device: Where it lies.
        filler: Token id and token type of what fills a batch up.
        uses_graphs: Not where layers compute again what they gave away, which reads the generator's state back.
        unrecorded: How often a bucket goes without a graph at first.
    """

    def __init__(
        self,
        model: CrossEncoder,
        device: torch.device,
        *,
        filler: tuple[int, int],
        uses_graphs: bool = True,
        unrecorded: int = UNRECORDED,
    ):
        self._model, self._device, self._filler = model, device, filler
        self._learning = [one for one in model.parameters() if one.requires_grad]
        encoder = model.encoder
        self._fills = device.type == "cuda" and can_run(encoder.layers, device.type, encoder.precision)
        self.uses_graphs = self._keeps_gradients = uses_graphs and self._fills
        self._unrecorded = unrecorded
        self._met: Counter[Bucket] = Counter()
        self._recorded: dict[Bucket, _Recorded] = {}
        self._pool = None
        self._scores: Tensor | None = None  # of the last forward without a graph
        self._number = 0  # of forwards

    def clear_gradients(self) -> None:
        """To be called before the first pass of a step. Where graphs are used gradients stay where they are."""
        if not self._keeps_gradients:
            for one in self._learning:
                one.grad = None
        elif self._learning:
            if self._learning[0].grad is None:  # graphs add to what lies there
                for one in self._learning:
                    one.grad = torch.empty_like(one)
            torch._foreach_zero_([one.grad for one in self._learning])

    def forward(self, batch: PackedBatch, seed: int) -> tuple[Tensor, GoBack]:
        """Scores (pairs,) of a batch that lies on the CPU, and what takes their gradient (pairs,) and adds to those of
        the weights: to be called at most once, before the next forward, and not where gradients are disabled.

        seed: of dropout's masks.
        """
        # A graph of autograd's that lives on ties the weights to the stream that it was made on, and nothing can be
        # recorded on another one.
        self._scores = None
        self._number += 1
        bucket = self._find_bucket(batch)
        filled = batch if bucket is None else fill(batch, bucket, self._filler)
        if bucket is not None and self.uses_graphs:
            self._met[bucket] += 1
            if bucket not in self._recorded and self._unrecorded < self._met[bucket]:
                self._try_to_record(bucket, filled, seed)
        recorded = self._recorded.get(bucket)
        torch.manual_seed(seed)
        if recorded is None:
            self._scores = scores = self._score(filled.to(self._device))
        else:
            filled.copy_to(recorded.inputs)
            recorded.forward.replay()
            scores = recorded.scores.clone()
        number = self._number

        def go_back(slopes: Tensor) -> None:
            if number != self._number:
                raise RuntimeError("Another batch has been scored since.")
            missing = filled.num_pairs - len(slopes)
            if recorded is not None:
                recorded.slopes[: len(slopes)].copy_(slopes)
                recorded.slopes[len(slopes) :].zero_()
                recorded.backward.replay()
            else:
                made, self._scores = self._scores, None
                self._add_gradients(made, torch.cat([slopes, slopes.new_zeros(missing)]) if missing else slopes)

        return scores.detach()[: batch.num_pairs], go_back

    def _find_bucket(self, batch: PackedBatch) -> Bucket | None:
        if not self._fills:
            return None
        bucket = find_bucket(batch.num_tokens, batch.num_pairs, batch.max_pair_tokens, most_tokens=MOST_TOKENS)
        return None if bucket is None or bucket.longest > self._model.max_pair_tokens else bucket

    def _score(self, inputs: PackedBatch) -> Tensor:
        """Scores for _add_gradients()."""
        with accumulate_in_place(self._keeps_gradients):
            return self._model.score(inputs)

    def _add_gradients(self, scores: Tensor, slopes: Tensor) -> None:
        if not self._keeps_gradients:
            scores.backward(slopes)
            return
        # To where graphs add, too. Large weights' are there by now; autograd has the others, which take few launches.
        found = torch.autograd.grad(scores, self._learning, slopes, allow_unused=True)
        left = [(one.grad, new) for one, new in zip(self._learning, found, strict=True) if new is not None]
        if left:
            torch._foreach_add_(*zip(*left, strict=True))

    def _try_to_record(self, bucket: Bucket, filled: PackedBatch, seed: int) -> None:
        """Records a bucket, and compares it with what it is a record of; where they differ, graphs are given up."""
        if len(self._recorded) >= MOST_GRAPHS:
            return
        kept = []
        try:
            kept += (one.grad.clone() for one in self._learning)
            with torch.enable_grad():
                inputs = filled.to(self._device)
                slopes = torch.linspace(-1, 1, filled.num_pairs, device=self._device)
                # First, so that the memory of a pass and that of a graph are not needed at once.
                exact = self._pass(inputs, slopes, seed)
                recorded = self._record(inputs, slopes)
                apart = self._compare(recorded, seed, exact)
            if not apart < FURTHEST_APART:  # NaN is not
                raise RuntimeError(f"gradients by a graph are off by {apart:.2g}")
            self._recorded[bucket] = recorded
        except torch.cuda.OutOfMemoryError:
            self._met[bucket] = -(2**62)  # it is not tried again
            warnings.warn(f"There is no memory for a CUDA graph of {bucket.num_tokens} tokens.", stacklevel=2)
        except RuntimeError as error:
            self.uses_graphs, self._recorded = False, {}
            warnings.warn(f"Training goes on without CUDA graphs: {error}", stacklevel=2)
        for one, gradient in zip(self._learning, kept, strict=False):  # fewer where there was no memory for them
            one.grad.copy_(gradient)

    def _pass(self, inputs: PackedBatch, slopes: Tensor, seed: int) -> list[Tensor]:
        """Scores and the gradients of all weights, all of them as autograd gives them."""
        torch.manual_seed(seed)
        scores = self._model.score(inputs)
        return [scores.detach(), *torch.autograd.grad(scores, self._learning, slopes)]

    def _record(self, inputs: PackedBatch, slopes: Tensor) -> _Recorded:
        """The graphs read their slopes from where these lie."""
        run_before_recording(lambda: self._add_gradients(self._score(inputs), slopes))
        torch.cuda.empty_cache()
        forward, scores = record(lambda: self._score(inputs), self._pool)
        self._pool = self._pool or forward.pool()
        backward, _ = record(lambda: self._add_gradients(scores, slopes), self._pool)
        return _Recorded(forward, backward, inputs, scores.detach(), slopes)

    def _compare(self, recorded: _Recorded, seed: int, exact: list[Tensor]) -> float:
        """How far the scores and gradients by a graph are from those of _pass(), relative to their norm."""
        gradients = [one.grad for one in self._learning]
        torch._foreach_zero_(gradients)
        torch.manual_seed(seed)
        recorded.forward.replay()
        recorded.backward.replay()
        found = [recorded.scores.clone(), *gradients]
        torch._foreach_sub_(found, exact)
        apart, size = (torch.stack(torch._foreach_norm(tensors)).norm() for tensors in (found, exact))
        return float(apart / size)


class Update:
    """An optimizer's step with clipped gradients; as a graph where `uses_graphs` says so, from the third time on.

    Each of the optimizer's groups has its learning rate at its peak in "peak".
    """

    def __init__(
        self, model: CrossEncoder, optimizer: torch.optim.Optimizer, max_grad_norm: float, *, uses_graphs: bool
    ):
        self._learning = [one for one in model.parameters() if one.requires_grad]
        self._optimizer, self._max_grad_norm = optimizer, max_grad_norm
        self._is_fused = all(group.get("fused") for group in optimizer.param_groups)
        self._uses_graphs, self._graph, self._count = uses_graphs, None, 0
        self._peaks = torch.tensor([group["peak"] for group in optimizer.param_groups], dtype=torch.float64)
        self._rates = None
        if uses_graphs:  # which read the rates from where they lie
            self._rates = self._peaks.float().to(self._learning[0].device)
            for group, rate in zip(optimizer.param_groups, self._rates, strict=True):
                group["lr"], group["capturable"] = rate, True

    def __call__(self, rate_factor: float) -> None:
        """rate_factor: share of the peak rates."""
        rates = self._peaks * rate_factor
        if self._rates is None:
            for group, rate in zip(self._optimizer.param_groups, rates.tolist(), strict=True):
                group["lr"] = rate
        else:
            self._rates.copy_(rates.float().pin_memory(), non_blocking=True)
        self._count += 1
        # The first runs have made the moments.
        if self._uses_graphs and self._graph is None and self._count > UNRECORDED:
            try:
                self._graph, _ = record(self._run, None)
            except RuntimeError as error:  # nothing has run yet
                self._uses_graphs = False
                warnings.warn(f"Weights are updated without a CUDA graph: {error}", stacklevel=2)
        if self._graph is None:
            self._run()
        else:
            self._graph.replay()

    def _run(self) -> None:
        if self._max_grad_norm > 0:
            norm = get_total_norm([one.grad for one in self._learning if one.grad is not None])
            if self._is_fused:  # it divides by a scale, as of mixed precision, where it reads the gradients anyway
                self._optimizer.grad_scale = ((norm + 1e-6) / self._max_grad_norm).clamp(min=1.0)
            else:
                clip_grads_with_norm_(self._learning, self._max_grad_norm, norm)
        try:
            self._optimizer.step()
        finally:
            if self._is_fused:
                self._optimizer.grad_scale = None
