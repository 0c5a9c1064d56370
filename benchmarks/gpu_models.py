"""Models of the real shapes with random weights, and batches, texts and checkpoints to run them on."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from workloads import read_lists

from fastrank.data import RankingList
from fastrank.model import CrossEncoder
from fastrank.packing import PackedBatch, Pair, pack_pairs

BERT = {"model_type": "bert", "vocab_size": 30522, "num_labels": 1, "max_position_embeddings": 512}
SHAPES = {
    "MiniLM-L6": BERT
    | {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536},
    "MiniLM-L12": BERT
    | {"hidden_size": 384, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 1536},
    "ELECTRA-base": BERT
    | {
        "model_type": "electra",
        "embedding_size": 768,
        "hidden_size": 768,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "intermediate_size": 3072,
    },
    "XLM-R-large": {
        "model_type": "xlm-roberta",
        "vocab_size": 250002,
        "num_labels": 1,
        "max_position_embeddings": 514,
        "type_vocab_size": 1,
        "pad_token_id": 1,
        "hidden_size": 1024,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "intermediate_size": 4096,
        "layer_norm_eps": 1e-5,
    },
}
TINY = BERT | {
    "vocab_size": 200,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 128,
    "max_position_embeddings": 256,
}


def config_of(shape: str) -> dict:
    return TINY if shape == "tiny" else SHAPES[shape]


def make_model(shape: str, *, dropout: float | None = 0.0) -> CrossEncoder:
    """Random weights as wide as trained ones are, so that scores spread."""
    generator = torch.Generator().manual_seed(0)
    model = CrossEncoder(config_of(shape), dropout=dropout)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.fill_(1.0 if name.endswith("weight") else 0.0)
            else:
                parameter.normal_(std=0.04, generator=generator)
    return model.eval()


def batch_of(lengths: Sequence[int], vocab_size: int, device: str, *, seed: int = 0) -> PackedBatch:
    """Random ids of pairs of these lengths."""
    return pack_pairs(pairs_of(lengths, vocab_size, seed=seed)).to(device)


def pairs_of(lengths: Sequence[int], vocab_size: int, *, seed: int = 0) -> list[Pair]:
    rng = np.random.default_rng(seed)
    return [(rng.integers(5, vocab_size, length), np.zeros(length, np.int64)) for length in lengths]


def agrees(scores: np.ndarray, exact: np.ndarray) -> str | None:
    """A sentence where scores in half precision are not those of float32; rounding alone, through many layers of random
    weights, leaves a correlation of .99 and more."""
    correlation = float(np.corrcoef(np.asarray(scores, np.float64), np.asarray(exact, np.float64))[0, 1])
    return None if correlation > 0.98 else f"scores correlate with float32's by {correlation:.3f}"


def useful_flop(shape: str, lengths: np.ndarray) -> float:
    """Floating-point operations of the forward of these pairs: matrix products and attention of real tokens, the last
    layer's queries, output and feed-forward network for the first tokens alone."""
    config = config_of(shape)
    hidden, inner, layers = config["hidden_size"], config["intermediate_size"], config["num_hidden_layers"]
    tokens, pairs, squares = lengths.sum(), len(lengths), (lengths.astype(float) ** 2).sum()
    whole = 2 * tokens * (4 * hidden * hidden + 2 * hidden * inner) + 4 * squares * hidden
    last = (
        2 * tokens * 2 * hidden * hidden + 2 * pairs * (2 * hidden * hidden + 2 * hidden * inner) + 4 * tokens * hidden
    )
    return float((layers - 1) * whole + last)


@functools.cache
def texts(data: Path | None, dry_run: bool) -> tuple[str, list[RankingList]]:
    """A name, and BM25's lists of dl19 (made-up ones of the same lengths without `data`), labels falling with rank."""
    if data is None:
        rng = np.random.default_rng(0)
        words = ["".join(rng.choice(list("abcdefghijklmnoprstuvw"), rng.integers(2, 9))) for _ in range(20000)]
        sizes = np.clip(rng.lognormal(3.9, 0.4, (43, 100)), 8, 220).astype(int)
        made = [
            RankingList(
                " ".join(rng.choice(words, 6)),
                [" ".join(rng.choice(words, size)) for size in row],
                [float(-i) for i in range(len(row))],
                str(number),
            )
            for number, row in enumerate(sizes[:2, :8] if dry_run else sizes)
        ]
        return "made-up texts", made
    return "dl19, BM25", read_lists(data, *((2, 8) if dry_run else (43, 100)))


@functools.cache
def checkpoint(shape: str, data: Path | None, dry_run: bool) -> Path:
    """A folder as the hub has them: random weights, a vocabulary trained on the texts (WordPiece; Unigram for
    XLM-R's shape)."""
    from tokenizers import BertWordPieceTokenizer, SentencePieceUnigramTokenizer
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    from fastrank.checkpoint import save_model

    _, lists = texts(data, dry_run)
    corpus = [text for one in lists for text in (one.query, *one.documents)]
    config = config_of(shape)
    size = min(config["vocab_size"], 30522)
    folder = Path(tempfile.mkdtemp(prefix="fastrank-gpu-")) / shape
    folder.mkdir()
    if config["model_type"] == "xlm-roberta":
        trained = SentencePieceUnigramTokenizer()
        special = ["<s>", "<pad>", "</s>", "<unk>"]
        trained.train_from_iterator(
            corpus, vocab_size=size, special_tokens=special, unk_token="<unk>", show_progress=False
        )
        first, last, pad, unknown = "<s>", "</s>", "<pad>", "<unk>"
        between, kind = f"{last} {last}", 0
    else:
        trained = BertWordPieceTokenizer(lowercase=True)
        trained.train_from_iterator(corpus, vocab_size=size, show_progress=False)
        first, last, pad, unknown = "[CLS]", "[SEP]", "[PAD]", "[UNK]"
        between, kind = last, 1
    trained._tokenizer.post_processor = TemplateProcessing(
        single=f"{first} $A {last}",
        pair=f"{first} $A {between} $B:{kind} {last}:{kind}",
        special_tokens=[(name, trained.token_to_id(name)) for name in (first, last)],
    )
    PreTrainedTokenizerFast(
        tokenizer_object=trained._tokenizer,
        cls_token=first,
        sep_token=last,
        pad_token=pad,
        unk_token=unknown,
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
        model_max_length=config["max_position_embeddings"] - (2 if config["model_type"] == "xlm-roberta" else 0),
    ).save_pretrained(folder)
    from transformers import AutoTokenizer

    from fastrank.tokens import PairTokenizer

    save_model(folder, make_model(shape), PairTokenizer(AutoTokenizer.from_pretrained(folder)))
    return folder
