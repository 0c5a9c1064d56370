"""Weights by the hub's names -> a CrossEncoder, and back: renaming, fusing and splitting, no files.

A fused projection's rows are those of the hub's query, key and value weights, one below the other.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fastrank.model import CrossEncoder, find_family
from fastrank.model.electra import PlainHead, from_dense_head, to_dense_head
from fastrank.model.encoder import EMBEDDING_NAMES, LAYER_NAMES
from fastrank.model.linear import linears

# Never weights of a re-ranker: tables that old versions of transformers saved, and a pooler that no head reads.
ALWAYS_IGNORED = ("embeddings.position_ids", "embeddings.token_type_ids", "pooler.")
# What other tasks leave in a checkpoint; harmless when the head is new anyway.
OTHER_HEADS = (
    "cls.",
    "lm_head.",
    "discriminator_predictions.",
    "generator_predictions.",
    "generator_lm_head.",
    "qa_outputs.",
)


def hub_names(model: CrossEncoder) -> dict[str, tuple[str, ...]]:
    """For each parameter of the model the hub's weights that it consists of, in order of rows."""
    names = {}
    for name, _ in model.named_parameters():
        path, _, kind = name.rpartition(".")
        match path.split("."):
            case ["encoder", "layers", index, module]:
                parts = [f"{model.family.prefix}.encoder.layer.{index}.{part}" for part in LAYER_NAMES[module]]
            case ["encoder", "embeddings", module]:
                parts = [f"{model.family.prefix}.{part}" for part in EMBEDDING_NAMES[module]]
            case ["head", module]:
                parts = [model.head.hub_names[module]]
        names[name] = tuple(f"{part}.{kind}" for part in parts)
    return names


def to_hub(model: CrossEncoder) -> dict[str, Tensor]:
    """The model's weights by the names that transformers expects, each a contiguous float32 tensor on the CPU."""
    weights = {}
    for _, module in linears(model):
        module.require_weights()
    for name, parts in hub_names(model).items():
        parameter = model.get_parameter(name).detach().to("cpu", torch.float32)
        pieces = parameter.chunk(len(parts)) if len(parts) > 1 else [parameter]
        weights.update((part, piece.clone()) for part, piece in zip(parts, pieces, strict=True))
    if isinstance(model.head, PlainHead):
        del weights["linear.weight"]
        weights.update(to_dense_head(model.head.output.weight.detach().to("cpu", torch.float32)))
    return weights


def from_hub(
    config: Mapping[str, Any],
    weights: Mapping[str, Tensor],
    *,
    may_initialise: bool,
    seed: int,
    dropout: float | None,
) -> CrossEncoder:
    """A model with these weights.

    config: the parsed config.json. weights: by the hub's names, with or without the family's prefix. may_initialise:
    a head that is missing is drawn from the seed (as transformers draws it), with one label where no classifier says
    otherwise; `initialised` of the model then names its weights. Raises ValueError that names the weights that are
    missing, unexpected or of a wrong shape.
    """
    family = find_family(config)
    weights = _without_prefix(weights, family.prefix)
    if family.plain_head is not None:
        weights = _with_plain_head_named(weights)
    has_plain_head = "linear.weight" in weights and family.plain_head is not None
    output = "linear.weight" if has_plain_head else f"{family.head.hub_names['output']}.weight"
    if output not in weights:
        if not may_initialise:
            raise ValueError(
                f"The checkpoint has no classification head ({output} is missing): it is a base model and cannot score "
                "pairs. Train it first, or name a re-ranker."
            )
        config = {**config, **FRESH_HEAD}
        weights = {name: tensor for name, tensor in weights.items() if not name.startswith(OTHER_HEADS)}

    model = CrossEncoder(config, has_plain_head=has_plain_head, dropout=dropout)
    parts = {
        name: [part.removeprefix(f"{family.prefix}.") for part in names] for name, names in hub_names(model).items()
    }
    needed = {part for names in parts.values() for part in names}
    missing = {part for part in needed if part not in weights}
    head = {part for name, names in parts.items() if name.startswith("head.") for part in names}
    unexpected = {name for name in weights if name not in needed and not name.startswith(ALWAYS_IGNORED)}
    _refuse("lacks the weights", missing - head if may_initialise else missing)
    _refuse("has unexpected weights", unexpected)

    generator = torch.Generator().manual_seed(seed)
    state, initialised = {}, []
    for name, parameter in model.named_parameters():
        if missing.isdisjoint(parts[name]):
            state[name] = _stack(parts[name], weights, parameter)
        else:
            state[name] = torch.zeros(parameter.shape)
            if parameter.dim() > 1:
                state[name].normal_(std=model.settings.initializer_range, generator=generator)
            initialised.append(name)
    model.load_state_dict(state, assign=True)
    model.initialised = tuple(initialised)
    return model


# A new head gives one raw score, whatever task the base model's config was written for.
FRESH_HEAD = {
    "id2label": {"0": "LABEL_0"},
    "label2id": {"LABEL_0": 0},
    "num_labels": 1,
    "sentence_transformers": {"activation_fn": "torch.nn.modules.linear.Identity"},
}


def _without_prefix(weights: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Base models are saved without the prefix, old ones with TensorFlow's names of the LayerNorm weights."""
    old = {"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"}
    renamed = {}
    for name, tensor in weights.items():
        name = name.removeprefix(f"{prefix}.")
        for ending, replacement in old.items():
            if name.endswith(ending):
                name = name.removesuffix(ending) + replacement
        renamed[name] = tensor
    return renamed


def _with_plain_head_named(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    plain = from_dense_head(weights)
    if plain is None:
        return weights
    rest = {name: tensor for name, tensor in weights.items() if not name.startswith("classifier.")}
    return {**rest, "linear.weight": plain}


def _stack(parts: list[str], weights: Mapping[str, Tensor], parameter: nn.Parameter) -> Tensor:
    """A copy of the weights, one below the other: the tensors of a file may be views of it."""
    rows = len(parameter) // len(parts)
    for part in parts:
        expected = (rows, *parameter.shape[1:])
        if weights[part].shape != expected:
            raise ValueError(
                f"The weight {part} has the shape {tuple(weights[part].shape)}, but the config asks for {expected}."
            )
    return torch.cat([weights[part].to(torch.float32) for part in parts])


def _refuse(what: str, names: set[str]) -> None:
    if names:
        shown = sorted(names)
        more = f" and {len(shown) - 12} more" if len(shown) > 12 else ""
        raise ValueError(f"The checkpoint {what}: {', '.join(shown[:12])}{more}.")
