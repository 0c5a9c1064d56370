"""Every matrix product of the encoder goes through this one layer: hidden states in and out in their own dtype, weights
kept in float32.

The product runs in `precision` by torch, or, once the weights are frozen for inference, by fastrank.ops.linear.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastrank import ops

PRECISIONS = {
    "float32": torch.float32,
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "bfloat16": torch.bfloat16,
    "fp16": torch.float16,
    "float16": torch.float16,
}


class Linear(nn.Linear):
    """y = x W^T + b, computed in `precision`."""

    precision: torch.dtype = torch.float32
    frozen: ops.LinearWeights | None = None
    _cast: tuple[tuple, Tensor, Tensor] | None = None

    def reset_parameters(self) -> None:
        """Weights come from a checkpoint; drawing random ones first would take longer than reading them."""

    def forward(self, x: Tensor) -> Tensor:
        """x: (rows, in_features); returns (rows, out_features) of x's dtype."""
        if self.frozen is not None:
            return ops.linear(x, self.frozen)
        if self.precision == torch.float32:
            return F.linear(x, self.weight, self.bias)
        weight, bias = self._cast_weights()
        return F.linear(x.to(self.precision), weight, bias).to(x.dtype)

    def in_groups(self, x: Tensor, groups: int) -> Tensor:
        """forward() as (rows, groups, columns of a group); frozen weights write each group by itself where they can."""
        if self.frozen is not None and self.out_features % (groups * ops.GROUP_COLUMNS) == 0:
            return ops.linear(x, self.frozen, groups=groups)
        return self(x).unflatten(1, (groups, -1))

    def multiply(self, x: Tensor) -> Tensor:
        """x W^T alone, for an operation that adds the bias itself."""
        if self.precision == torch.float32:
            return F.linear(x, self.weight)
        learns = self.weight.requires_grad
        weight = self.weight.to(self.precision) if learns else self._cast_weights()[0]
        return F.linear(x.to(self.precision), weight).to(x.dtype)

    def _load_from_state_dict(self, *arguments: object) -> None:
        """New weights undo freezing, as to_precision() does."""
        if self.frozen is not None:
            self.require_weights()
            self.frozen = None
        super()._load_from_state_dict(*arguments)

    def release_weights(self) -> None:
        """Give back the memory of all weights but the frozen ones, in the form in which they are computed with."""
        ops.release_linear(self.frozen)
        self.weight = nn.Parameter(self.weight.to("meta"), requires_grad=False)

    def require_weights(self) -> None:
        """Raise a ValueError where the float32 weights were given back."""
        if self.weight.is_meta:
            raise ValueError("The model was frozen and has given its float32 weights back: load it again.")

    def _cast_weights(self) -> tuple[Tensor, Tensor]:
        if (
            self.weight.requires_grad or self.bias.requires_grad
        ):  # an optimizer may change it, and a fused one does not count versions up
            return self.weight.to(self.precision), self.bias.to(self.precision)
        # Frozen weights are cast once, until a move or an edit in place changes them. Those that were made in
        # inference mode count no versions.
        version = None if self.weight.is_inference() else (self.weight._version, self.bias._version)
        state = (version, self.weight.data_ptr(), self.precision)
        cast = self._cast
        if cast is None or cast[0] != state:
            with torch.inference_mode(False):  # a later backward may save them
                weight, bias = self.weight.detach(), self.bias.detach()
                cast = self._cast = (state, weight.to(self.precision), bias.to(self.precision))
        return cast[1], cast[2]


def linears(model: nn.Module) -> list[tuple[str, Linear]]:
    """Every Linear inside the model, with its name there."""
    return [(name, module) for name, module in model.named_modules() if isinstance(module, Linear)]


def find_precision(precision: str | torch.dtype) -> torch.dtype:
    """The dtype of a name of PRECISIONS; raises ValueError for any other."""
    dtype = PRECISIONS.get(precision, precision)
    if dtype not in PRECISIONS.values():
        raise ValueError(f"The model does not run in precision {precision!r}; choose one of {', '.join(PRECISIONS)}.")
    return dtype


def set_precision(model: nn.Module, dtype: torch.dtype) -> None:
    """Make every Linear inside the model compute in this dtype."""
    for _, module in linears(model):
        module.require_weights()
        module.precision = dtype
        module._cast = module.frozen = None


def freeze(model: nn.Module, precision: str, *, keep_weights: bool = True) -> None:
    """Freeze the weights of every Linear inside the model as they are now, as "float32", "bf16" or "int8": for
    inference."""
    modules = [module for _, module in linears(model)]
    for module in modules:
        module.require_weights()
    # All before any: weights that cannot be frozen leave the model as it was.
    frozen = [ops.freeze_linear(module.weight, module.bias, precision, copy=keep_weights) for module in modules]
    for module, weights in zip(modules, frozen, strict=True):
        module.frozen = weights
        if not keep_weights:
            module.release_weights()
