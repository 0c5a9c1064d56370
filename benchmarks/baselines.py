"""How others do it: the same checkpoint in transformers, padded, length-sorted; nothing of fastrank inside."""

from __future__ import annotations

import numpy as np
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

DTYPES = {"float32": torch.float32, "bf16": torch.bfloat16}


def refusal(dtype: str) -> str:
    """Why a dtype is not worth measuring here; empty where it is."""
    if dtype == "bf16" and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return "this processor has no bf16 instructions"
    return ""


class PaddedReranker:
    """Strings in, scores out: pairs sorted by tokens, fixed count a batch, padded to the longest of the batch."""

    def __init__(self, folder, dtype: str, max_length: int):
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=DTYPES[dtype]).eval()
        self.max_length = max_length

    @torch.inference_mode()
    def scores(self, lists, batch_size: int) -> np.ndarray:
        queries = [one.query for one in lists for _ in one.documents]
        documents = [text for one in lists for text in one.documents]
        encoded = self.tokenizer(queries, documents, truncation="longest_first", max_length=self.max_length)
        order = np.argsort([-len(ids) for ids in encoded["input_ids"]], kind="stable")
        scores = np.empty(len(order), np.float32)
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            batch = self.tokenizer.pad({key: [encoded[key][i] for i in rows] for key in encoded}, return_tensors="pt")
            scores[rows] = self.model(**batch).logits[:, 0].float().numpy()
        return scores


class PaddedTrainer:
    """One optimizer step at a time: a step's pairs sorted by length into padded batches whose graphs are kept,
    RankNet over each list, AdamW."""

    def __init__(self, folder, dtype: str, max_length: int):
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.model = AutoModelForSequenceClassification.from_pretrained(folder).train()
        for module in self.model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        self.model.config.attention_probs_dropout_prob = 0.0
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-5, fused=True)
        self.dtype = dtype
        self.max_length = max_length

    def step(self, lists, batch_size: int, *, update: bool = True) -> float:
        queries = [one.query for one in lists for _ in one.documents]
        documents = [text for one in lists for text in one.documents]
        encoded = self.tokenizer(queries, documents, truncation="longest_first", max_length=self.max_length)
        order = np.argsort([-len(ids) for ids in encoded["input_ids"]], kind="stable")
        logits = []
        with torch.autocast("cpu", torch.bfloat16, enabled=self.dtype == "bf16"):
            for start in range(0, len(order), batch_size):
                rows = order[start : start + batch_size]
                batch = self.tokenizer.pad(
                    {key: [encoded[key][i] for i in rows] for key in encoded}, return_tensors="pt"
                )
                logits.append(self.model(**batch).logits[:, 0].float())
        scores = torch.cat(logits)[torch.from_numpy(np.argsort(order))]
        terms = []
        start = 0
        for one in lists:
            mine, labels = scores[start : start + len(one.documents)], torch.tensor(one.labels)
            start += len(one.documents)
            better = labels[:, None] > labels[None, :]
            terms.append(torch.nn.functional.softplus(-(mine[:, None] - mine[None, :])[better]))
        loss = torch.cat(terms).mean()
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        if update:
            self.optimizer.step()
        return float(loss)
