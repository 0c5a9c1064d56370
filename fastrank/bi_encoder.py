"""A bi-encoder to compare with and distil from: cosines of mean-pooled token vectors.

In: a folder of sentence-embedding weights and ranking lists. Out: one cosine per document of every list.
Every text is encoded once, in order of length, so that the padding of these small batches stays small.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from fastrank.data.ranking_list import RankingList


def bi_encoder_scores(
    model_folder: str | Path,
    lists: Sequence[RankingList],
    *,
    max_length: int = 128,
    max_batch_tokens: int = 4096,
) -> list[np.ndarray]:
    """Return the cosine of query and document for every list: float32 arrays (documents of the list,).

    model_folder: encoder weights and tokenizer as transformers saves them; a head is ignored.
    max_length: tokens kept of a text, special tokens included. max_batch_tokens: padded tokens a batch.
    """
    texts = list(dict.fromkeys(text for ranking in lists for text in (ranking.query, *ranking.documents)))
    if not texts:
        return [np.zeros(0, np.float32) for _ in lists]
    vectors = _embed(model_folder, texts, max_length, max_batch_tokens)
    row = {text: i for i, text in enumerate(texts)}
    return [
        vectors[[row[document] for document in ranking.documents]] @ vectors[row[ranking.query]] for ranking in lists
    ]


def _embed(model_folder: str | Path, texts: Sequence[str], max_length: int, max_batch_tokens: int) -> np.ndarray:
    from transformers import AutoModel, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    model = AutoModel.from_pretrained(model_folder).eval()
    encodings = tokenizer(list(texts), truncation=True, max_length=max_length)["input_ids"]
    by_length = sorted(range(len(texts)), key=lambda i: len(encodings[i]))
    vectors = np.zeros((len(texts), model.config.hidden_size), np.float32)
    start = 0
    with torch.inference_mode():
        while start < len(by_length):
            end = start + 1
            while end < len(by_length) and (len(encodings[by_length[end]]) * (end + 1 - start) <= max_batch_tokens):
                end += 1
            rows = by_length[start:end]
            batch = tokenizer.pad({"input_ids": [encodings[i] for i in rows]}, return_tensors="pt")
            hidden = model(**batch).last_hidden_state
            mask = batch["attention_mask"].unsqueeze(-1).to(hidden.dtype)
            mean = (hidden * mask).sum(1) / mask.sum(1)
            vectors[rows] = torch.nn.functional.normalize(mean, dim=1).numpy()
            start = end
    return vectors
