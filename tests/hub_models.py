"""Small checkpoints as transformers writes them, with random weights that spread the scores, and their true scores."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    ElectraConfig,
    ElectraForSequenceClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
    XLMRobertaConfig,
    XLMRobertaForSequenceClassification,
)

Pair = tuple[np.ndarray, np.ndarray]

SIZES = {
    "vocab_size": 503,
    "hidden_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "layer_norm_eps": 1e-5,
}
CLASSES = {
    "bert": (BertForSequenceClassification, BertConfig, {}),
    "electra": (ElectraForSequenceClassification, ElectraConfig, {"embedding_size": 48}),
    "electra-narrow": (ElectraForSequenceClassification, ElectraConfig, {"embedding_size": 20}),
    "roberta": (RobertaForSequenceClassification, RobertaConfig, {"max_position_embeddings": 514}),
    "xlm-roberta": (XLMRobertaForSequenceClassification, XLMRobertaConfig, {"max_position_embeddings": 514}),
}


def randomise(model: torch.nn.Module, seed: int = 0) -> None:
    """Draw every weight anew, none at its default, so that scores spread and each weight matters."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if "embeddings.weight" in name:
            noise *= 0.03  # as small as in real checkpoints, where eps is felt
        elif "LayerNorm.weight" in name:
            noise = 1 + 0.2 * noise
        elif parameter.dim() == 1:
            noise *= 0.2
        else:
            noise *= 1.5 * parameter.shape[1] ** -0.5
        parameter.data.copy_(noise)
    model.classifier.get_submodule("out_proj" if hasattr(model.classifier, "out_proj") else "").weight.data.mul_(8)


def make_checkpoint(folder: Path, kind: str, *, num_labels: int = 1, seed: int = 0, **config) -> torch.nn.Module:
    """Save a random checkpoint of one of CLASSES to a folder; returns the transformers model, in eval mode."""
    model_class, config_class, own = CLASSES[kind]
    options = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "num_labels": num_labels}
    model = model_class(config_class(**{**SIZES, **own, **options, **config})).eval()
    randomise(model, seed)
    model.save_pretrained(folder)
    return model


def random_pairs(model: torch.nn.Module, lengths: Sequence[int], seed: int = 0) -> list[Pair]:
    """Pairs of such lengths, of random ids; the second half of each pair is of the last token type."""
    rng = np.random.default_rng(seed)
    pairs = []
    for length in lengths:
        ids = rng.integers(5, model.config.vocab_size, length, dtype=np.int32)
        types = (np.arange(length) >= length / 2).astype(np.int32) * (model.config.type_vocab_size - 1)
        pairs.append((ids, types))
    return pairs


def padded_logits(model: torch.nn.Module, pairs: Sequence[Pair]) -> torch.Tensor:
    """What transformers makes of the same pairs, padded to the longest."""
    shape = len(pairs), max(len(ids) for ids, _ in pairs)
    ids = torch.full(shape, model.config.pad_token_id)
    types, mask = torch.zeros(shape, dtype=torch.long), torch.zeros(shape, dtype=torch.long)
    for i, (pair_ids, pair_types) in enumerate(pairs):
        ids[i, : len(pair_ids)] = torch.from_numpy(pair_ids)
        types[i, : len(pair_ids)] = torch.from_numpy(pair_types)
        mask[i, : len(pair_ids)] = 1
    return model(input_ids=ids, token_type_ids=types, attention_mask=mask).logits
