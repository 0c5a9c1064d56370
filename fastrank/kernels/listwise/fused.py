"""The one autograd function of all fused listwise losses.

The forward pass writes sums, terms and the gradients of the sums; the backward pass only multiplies each list's
gradients by what comes from upstream.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# (scores, labels, list_offsets, options) -> sums (lists,), terms (lists,), gradients of the sums (documents,)
Kernel = Callable[[Tensor, Tensor, Tensor, Mapping[str, object]], tuple[Tensor, Tensor, Tensor]]


class FusedLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, scores: Tensor, labels: Tensor, list_offsets: Tensor, kernel: Kernel, options: Mapping[str, object]
    ) -> tuple[Tensor, Tensor]:
        sums, terms, gradients = kernel(scores.detach(), labels, list_offsets, options)
        ctx.save_for_backward(gradients, list_offsets)
        ctx.mark_non_differentiable(terms)
        return sums, terms

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream: Tensor, _terms: Tensor | None):
        gradients, list_offsets = ctx.saved_tensors
        if upstream.stride() == (0,) and len(upstream):  # one number for all lists, as sum() hands it down
            each = upstream[:1]
        else:
            each = upstream.repeat_interleave(list_offsets.diff(), output_size=len(gradients))
        return gradients * each, None, None, None, None
