"""The transformer encoder that BERT, ELECTRA and RoBERTa share: a PackedBatch comes in, one vector a pair goes out.

Layer normalisation stands after each residual sum (post-LN), positions are learned vectors. Only a pair's first token
is ever scored, so the last layer computes keys and values for all tokens and everything else for the first tokens
alone, in training too: the loss sees nothing else, hence the gradients are the same. Dropout acts on hidden states;
attention weights are never dropped. Source: Vaswani et al. 2017; Devlin et al. 2019.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from fastrank import ops
from fastrank.model import cpu_layers, gpu_layers
from fastrank.model.linear import Linear
from fastrank.model.settings import Settings

if TYPE_CHECKING:
    from fastrank.packing import PackedBatch


class Norm(nn.Module):
    """LayerNorm(x + residual)."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.bias = nn.Parameter(torch.zeros(size))
        self.eps = eps

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        return ops.layer_norm(x, residual, self.weight, self.bias, self.eps)


class Embeddings(nn.Module):
    """Word, token type and position vectors of each token, summed and normalised."""

    def __init__(self, settings: Settings) -> None:
        super().__init__()
        size = settings.embedding_size
        # padding_idx stops the gradient of that row, as in transformers: a text can spell out "[PAD]".
        self.words = _table(settings.vocab_size, size, padding_idx=settings.pad_token_id)
        self.token_types = _table(settings.num_token_types, size)
        padding_position = settings.first_position - 1 if settings.first_position else None
        self.positions = _table(settings.num_positions, size, padding_idx=padding_position)
        self.norm = Norm(size, settings.layer_norm_eps)
        self.dropout = settings.dropout
        self.project = Linear(size, settings.hidden_size) if size != settings.hidden_size else None

    def forward(self, token_ids: Tensor, token_types: Tensor, positions: Tensor, dtype: torch.dtype | None) -> Tensor:
        """All arguments (tokens,) int64; returns (tokens, hidden) in dtype, by default that of the weights."""
        tables = self.words, self.token_types, self.positions
        x = ops.embedding_norm(
            (token_ids, token_types, positions),
            tuple(table.weight for table in tables),
            self.norm.weight,
            self.norm.bias,
            self.norm.eps,
            padding=(self.words.padding_idx, self.positions.padding_idx),
            dtype=dtype,
        )
        x = F.dropout(x, self.dropout, self.training)
        return x if self.project is None else self.project(x)


class Layer(nn.Module):
    """Self-attention and a two-layer network, each followed by LayerNorm(x + residual)."""

    def __init__(self, settings: Settings, *, is_last: bool) -> None:
        super().__init__()
        size, inner = settings.hidden_size, settings.intermediate_size
        self.is_last = is_last
        self.heads = (settings.num_heads, size // settings.num_heads)
        self.dropout = settings.dropout
        self.activation = settings.activation
        if is_last:
            self.query = Linear(size, size)
            self.key_value = Linear(size, 2 * size)
        else:
            self.qkv = Linear(size, 3 * size)
        self.attention_output = Linear(size, size)
        self.attention_norm = Norm(size, settings.layer_norm_eps)
        self.up = Linear(size, inner)
        self.down = Linear(inner, size)
        self.norm = Norm(size, settings.layer_norm_eps)

    def forward(self, x: Tensor, offsets: Tensor, span: tuple[int, int]) -> Tensor:
        """x: (tokens, hidden); offsets int32 (pairs + 1,); span as in ops.attention. Returns (tokens, hidden); the last
        layer (pairs, hidden)."""
        if self.is_last:
            attended, x = self._attend_from_first_tokens(x, offsets, span)
        else:
            qkv = self.qkv.in_groups(x, 3 * self.heads[0]).unflatten(1, (3, -1))
            attended = ops.fused_attention(qkv, offsets, span=span)
        return self.after_attention(attended.flatten(1), x)

    def products(self) -> list[Linear]:
        """Every matrix product of the layer."""
        first = [self.query, self.key_value] if self.is_last else [self.qkv]
        return [*first, self.attention_output, self.up, self.down]

    def after_attention(self, attended: Tensor, x: Tensor) -> Tensor:
        """attended: what attention gives for the rows of x, (rows, hidden) both."""
        frozen = [module.frozen is not None for module in (self.attention_output, self.up, self.down)]
        if any(frozen):
            if not all(frozen):
                raise RuntimeError("Only some products of a layer are frozen: freeze the whole model.")
            x = self._then_norm(attended, self.attention_output, x, self.attention_norm)
            return self._then_norm(x, self.up, x, self.norm, activation=self.activation, second=self.down.frozen)
        x = self.attention_norm(self._drop(self.attention_output(attended)), x)
        return self.norm(self._drop(self.down(self._activate(self.up.multiply(x), self.up.bias))), x)

    @staticmethod
    def _then_norm(x: Tensor, first: Linear, residual: Tensor, norm: Norm, **more: object) -> Tensor:
        return ops.linear(
            x, first.frozen, residual=residual, norm_weight=norm.weight, norm_bias=norm.bias, eps=norm.eps, **more
        )

    def _activate(self, x: Tensor, bias: Tensor) -> Tensor:
        if self.activation == "relu":
            return torch.relu(x + bias.to(x.dtype))
        return ops.bias_gelu(x, bias, tanh_form=self.activation == "gelu_tanh")

    def _attend_from_first_tokens(self, x: Tensor, offsets: Tensor, span: tuple[int, int]) -> tuple[Tensor, Tensor]:
        k, v = self.key_value.in_groups(x, 2 * self.heads[0]).unflatten(1, (2, -1)).unbind(1)
        first = x.index_select(0, offsets[:-1])
        q = self.query(first).unflatten(1, self.heads)
        one_query_each = torch.arange(len(offsets), dtype=offsets.dtype, device=offsets.device)
        return ops.attention(q, k, v, offsets, query_offsets=one_query_each, span=span), first

    def _drop(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout, self.training)


class Encoder(nn.Module):
    """Embeddings and layers.

    precision: of the matrix products. uses_fp8: those of all tokens are in fp8 instead, for inference on a GPU.
    hidden_dtype: of what lies between them; None for precision where kernels take it, as on a GPU and in bf16 on a CPU,
    and elsewhere for that of the weights. recomputes: a training step keeps only what goes into each layer, and
    computes the layer again in its backward pass: less memory, the same gradients.
    """

    precision: torch.dtype = torch.float32
    uses_fp8: bool = False
    recomputes: bool = False
    hidden_dtype: torch.dtype | None = None
    _halves: gpu_layers.Halves | None = None

    def __init__(self, settings: Settings) -> None:
        super().__init__()
        self.embeddings = Embeddings(settings)
        count = settings.num_layers
        self.layers = nn.ModuleList(Layer(settings, is_last=i == count - 1) for i in range(count))

    def __getstate__(self) -> dict:
        return {name: value for name, value in self.__dict__.items() if name != "_halves"}  # made again where needed

    def forward(self, batch: "PackedBatch", positions: Tensor) -> Tensor:
        """positions: (tokens,) int64, rows of the position table. Returns the first token's vector, (pairs, hidden)."""
        dtype = self.hidden_dtype
        if dtype is None and self.precision != torch.float32:
            if positions.is_cuda or cpu_layers.takes(self.precision, self.layers[0].heads[1]):
                dtype = self.precision
        x = self.embeddings(batch.token_ids, batch.token_types, positions, dtype)
        with torch.inference_mode(False):
            # A tensor of this forward alone: what a GPU's attention derives from it serves all layers, and no longer.
            offsets = batch.pair_offsets.clone() if batch.pair_offsets.is_cuda else batch.pair_offsets
        learns = torch.is_grad_enabled() and (x.requires_grad or any(one.requires_grad for one in self.parameters()))
        recomputes = learns and self.recomputes
        # Without a gradient, too, training mode drops hidden states.
        trains = learns or (self.training and self.layers[0].dropout > 0)
        if self.uses_fp8 and trains:
            raise ValueError(
                "fp8 is for inference: call eval() and score under torch.no_grad(), or to_precision('bf16') to train."
            )
        if gpu_layers.suits(self.layers, x) and (not self.uses_fp8 or gpu_layers.has_fp8(x.device)):
            if trains:
                return gpu_layers.train(self.layers, x, offsets, batch.span, recomputes=recomputes)
            kind = gpu_layers.Fp8Weights if self.uses_fp8 else gpu_layers.Halves
            if type(self._halves) is not kind or self._halves.dtype != x.dtype:
                self._halves = kind(self.layers, x.dtype)
            return gpu_layers.infer(self.layers, x, offsets, batch.span, self._halves)
        if self.uses_fp8 and len(x):
            raise ValueError(
                "fp8 runs only by fastrank's Triton kernels, on a GPU of compute capability 8.9 or more, and these "
                "cannot run here: choose another precision (python -m fastrank backends says why)."
            )
        if cpu_layers.suits(self.layers, x):
            return cpu_layers.infer(self.layers, x, offsets)
        for layer in self.layers:
            if recomputes:
                x = checkpoint(layer, x, offsets, batch.span, use_reentrant=False)
            else:
                x = layer(x, offsets, batch.span)
        return x


def _table(rows: int, size: int, padding_idx: int | None = None) -> nn.Embedding:
    """An embedding whose weights a checkpoint will fill in."""
    return nn.Embedding.from_pretrained(torch.empty(rows, size), freeze=False, padding_idx=padding_idx)


# Our module name -> the hub's names, whose rows are stacked. The same in every family.
EMBEDDING_NAMES = {
    "words": ("embeddings.word_embeddings",),
    "token_types": ("embeddings.token_type_embeddings",),
    "positions": ("embeddings.position_embeddings",),
    "norm": ("embeddings.LayerNorm",),
    "project": ("embeddings_project",),
}
LAYER_NAMES = {
    "qkv": ("attention.self.query", "attention.self.key", "attention.self.value"),
    "query": ("attention.self.query",),
    "key_value": ("attention.self.key", "attention.self.value"),
    "attention_output": ("attention.output.dense",),
    "attention_norm": ("attention.output.LayerNorm",),
    "up": ("intermediate.dense",),
    "down": ("output.dense",),
    "norm": ("output.LayerNorm",),
}
