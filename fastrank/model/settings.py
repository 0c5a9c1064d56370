"""A checkpoint's config.json comes in, checked numbers go out: what an encoder and its head are built from.

Keys and default values are those of the transformers library, so that a key that is left out means the same here.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

# A config's hidden_act -> the activation of fastrank.ops. erf and tanh GELU differ by up to 5e-4, which moves scores:
# the form is the checkpoint's, never ours to choose.
ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "relu": "relu",
}

DEFAULTS = {
    "vocab_size": 30522,
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.1,
    "classifier_dropout": None,
    "max_position_embeddings": 512,
    "type_vocab_size": 2,
    "initializer_range": 0.02,
    "layer_norm_eps": 1e-12,
    "pad_token_id": 0,
    "position_embedding_type": "absolute",
    "is_decoder": False,
}


@dataclass(frozen=True, slots=True)
class Settings:
    """The numbers of one encoder; the field names that config.json has too mean the same as there."""

    vocab_size: int
    embedding_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    intermediate_size: int
    activation: str
    layer_norm_eps: float
    num_positions: int
    first_position: int
    num_token_types: int
    pad_token_id: int | None
    dropout: float
    head_dropout: float
    initializer_range: float
    num_labels: int


def count_labels(config: Mapping[str, Any]) -> int:
    """The number of labels that a config.json stands for (2 where it does not say, as in transformers)."""
    return len(config["id2label"]) if config.get("id2label") else config.get("num_labels", 2)


def read_settings(
    config: Mapping[str, Any],
    family_defaults: Mapping[str, Any],
    *,
    positions_after_padding: bool,
    dropout: float | None,
) -> Settings:
    """Settings of a config.json.

    config: the parsed file. family_defaults: what the family sets differently from DEFAULTS. positions_after_padding:
    positions count from pad_token_id + 1 instead of 0. dropout: replaces both dropout shares of the config. Raises
    ValueError for what the encoder cannot run.
    """
    values = {**DEFAULTS, **family_defaults, **config}
    if values["position_embedding_type"] not in ("absolute", None):
        raise ValueError(
            f"The config asks for {values['position_embedding_type']!r} position embeddings; only 'absolute' ones "
            "are supported."
        )
    if values["is_decoder"]:
        raise ValueError("The config describes a decoder (is_decoder is true); only encoders can re-rank here.")
    if values["hidden_act"] not in ACTIVATIONS:
        raise ValueError(
            f"The config's hidden_act {values['hidden_act']!r} is not supported; supported are "
            f"{', '.join(ACTIVATIONS)}."
        )
    if values["hidden_size"] % values["num_attention_heads"]:
        raise ValueError(
            f"hidden_size {values['hidden_size']} cannot be divided among {values['num_attention_heads']} heads."
        )
    num_labels = count_labels(config)
    if num_labels not in (1, 2):
        raise ValueError(f"The checkpoint has {num_labels} labels; a re-ranker has 1 or 2.")
    if dropout is None:
        dropout, head_dropout = values["hidden_dropout_prob"], values["classifier_dropout"]
        head_dropout = dropout if head_dropout is None else head_dropout
    else:
        head_dropout = dropout
    return Settings(
        vocab_size=values["vocab_size"],
        embedding_size=values.get("embedding_size", values["hidden_size"]),
        hidden_size=values["hidden_size"],
        num_layers=values["num_hidden_layers"],
        num_heads=values["num_attention_heads"],
        intermediate_size=values["intermediate_size"],
        activation=ACTIVATIONS[values["hidden_act"]],
        layer_norm_eps=values["layer_norm_eps"],
        num_positions=values["max_position_embeddings"],
        first_position=values["pad_token_id"] + 1 if positions_after_padding else 0,
        num_token_types=values["type_vocab_size"],
        pad_token_id=values["pad_token_id"],
        dropout=dropout,
        head_dropout=head_dropout,
        initializer_range=values["initializer_range"],
        num_labels=num_labels,
    )
