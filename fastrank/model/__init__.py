"""PackedBatch -> scores: the encoder families, and CrossEncoder, which runs any of them.

The hub's checkpoints decide everything: `model_type` in their config.json picks the family from FAMILIES.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fastrank.model.bert import BERT
from fastrank.model.electra import ELECTRA
from fastrank.model.encoder import Encoder
from fastrank.model.family import Family
from fastrank.model.gpu_layers import fp8_refusals
from fastrank.model.linear import find_precision, freeze, linears, set_precision
from fastrank.model.roberta import ROBERTA, XLM_ROBERTA
from fastrank.model.settings import read_settings

if TYPE_CHECKING:
    from fastrank.packing import PackedBatch

FP8 = ("fp8", torch.float8_e4m3fn)
FAMILIES: dict[str, Family] = {
    "bert": BERT,
    "electra": ELECTRA,
    "roberta": ROBERTA,
    "xlm-roberta": XLM_ROBERTA,
}


def find_family(config: Mapping[str, Any]) -> Family:
    """The family of a config.json; raises ValueError with the supported ones for any other."""
    model_type = config.get("model_type")
    if model_type not in FAMILIES:
        raise ValueError(
            f"The checkpoint's model_type {model_type!r} is not supported; supported are {', '.join(FAMILIES)}."
        )
    return FAMILIES[model_type]


class CrossEncoder(nn.Module):
    """A re-ranker: an encoder and a head that turns each pair's first token into logits.

    Made by fastrank.checkpoint.load_model, which fills in the weights: before that they are uninitialised memory.
    config: the parsed config.json, kept as `config`. has_plain_head: the head is a single linear layer (ELECTRA only).
    dropout: replaces the config's dropout in training. `initialised` names the weights that no checkpoint gave.
    """

    def __init__(
        self, config: Mapping[str, Any], *, has_plain_head: bool = False, dropout: float | None = None
    ) -> None:
        super().__init__()
        self.config = dict(config)
        self.family = find_family(config)
        self.settings = read_settings(
            config,
            self.family.defaults,
            positions_after_padding=self.family.positions_after_padding is not None,
            dropout=dropout,
        )
        self.encoder = Encoder(self.settings)
        self.head = (self.family.plain_head if has_plain_head else self.family.head)(self.settings)
        self.initialised: tuple[str, ...] = ()

    @property
    def max_pair_tokens(self) -> int:
        """How many tokens a pair may have: the rows of the position table that can be used."""
        return self.settings.num_positions - self.settings.first_position

    def to_precision(
        self, precision: str | torch.dtype, *, hidden_states: str | torch.dtype | None = None
    ) -> "CrossEncoder":
        """Run the encoder's matrix products in "float32", "bf16", "fp16" or "fp8"; weights and head stay in float32.

        hidden_states: what lies between the products, and what kernels read and write; by default `precision`, but on
        a CPU float32 where its kernels do not take that (they take float32 and bf16). With "fp8", which is for
        inference on a GPU, that is "bf16", and so are products of the last layer's first tokens. Raises ValueError for
        unknown precisions and for a model that cannot run in fp8.
        """
        uses_fp8 = precision in FP8
        if uses_fp8:
            if refusals := fp8_refusals(self.encoder.layers):
                raise ValueError(f"This model cannot run in fp8. {' '.join(refusals)}")
            precision = "bf16" if hidden_states is None else hidden_states
        dtype = find_precision(precision)
        if uses_fp8 and dtype == torch.float32:
            raise ValueError("With fp8 hidden_states must be in half precision.")
        hidden = None if hidden_states is None else find_precision(hidden_states)
        if hidden not in (None, torch.float32, dtype):
            raise ValueError(f"hidden_states must be float32 or the products' own {dtype}, not {hidden}.")
        set_precision(self.encoder, dtype)
        self.encoder.precision, self.encoder.hidden_dtype, self.encoder.uses_fp8 = dtype, hidden, uses_fp8
        return self

    def freeze(self, precision: str, *, keep_weights: bool = True) -> "CrossEncoder":
        """Fuse the encoder's matrix products with what follows them and run them in "float32", "bf16" or "int8", with
        the weights as they are now: for inference on a CPU. Later edits of these weights and biases change nothing
        (norms, embeddings and the head stay as they are); to_precision() and load_state_dict() undo it, unless
        keep_weights is False: then the memory of the float32 weights is given back, and the model can neither be
        trained nor saved. A frozen model refuses training mode and gradients. Weights that cannot be frozen leave the
        model as it was."""
        freeze(self.encoder, precision, keep_weights=keep_weights)
        self.encoder.precision, self.encoder.hidden_dtype, self.encoder.uses_fp8 = torch.float32, None, False
        return self

    @property
    def is_frozen(self) -> bool:
        """Whether freeze() was called last, not to_precision()."""
        return all(module.frozen is not None for _, module in linears(self.encoder))

    def forward(self, batch: "PackedBatch") -> Tensor:
        """Logits of each pair, (pairs, num_labels) float32; raises ValueError if a pair is too long or has no token."""
        if (self.training or torch.is_grad_enabled()) and self.is_frozen:
            if self.training:
                raise ValueError("A frozen model is for inference: call eval(), or to_precision() to train it.")
            if any(parameter.requires_grad for parameter in self.parameters()):
                raise ValueError("A frozen model has no gradient: call it under torch.no_grad().")
        if batch.max_pair_tokens > self.max_pair_tokens:
            raise ValueError(
                f"A pair has {batch.max_pair_tokens} tokens, but the model has positions for {self.max_pair_tokens}: "
                "truncate when tokenizing (max_length)."
            )
        if batch.num_pairs and not batch.min_pair_tokens:
            raise ValueError("A pair has no tokens, but its first one is what is scored.")
        positions = batch.positions
        if self.family.positions_after_padding is not None:
            padding_idx = self.settings.pad_token_id
            positions = self.family.positions_after_padding(batch.token_ids, positions, padding_idx)
        return self.head(self.encoder(batch, positions).to(self.encoder.embeddings.words.weight.dtype))

    def score(self, batch: "PackedBatch") -> Tensor:
        """One score a pair, (pairs,) float32: the logit, or with two labels the log-probability of the second."""
        logits = self(batch)
        return logits[:, 0] if logits.shape[1] == 1 else logits.log_softmax(1)[:, 1]
