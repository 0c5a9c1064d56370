"""How others do it: the same checkpoint in transformers, padded, length-sorted; nothing of fastrank inside."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import numpy as np
import torch
from timing import Contender, best_setting
from transformers import AutoModelForSequenceClassification, AutoTokenizer

DTYPES = {"float32": torch.float32, "bf16": torch.bfloat16}
BATCH_SIZES = [4, 8, 16, 32]


def refusal(dtype: str) -> str:
    """Why a dtype is not worth measuring here; empty where it is."""
    if dtype == "bf16" and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return "this processor has no bf16 instructions"
    return ""


class _Padded:
    """Pairs sorted by tokens, a fixed count a batch, padded to the longest of the batch."""

    def __init__(self, folder, max_length: int):
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.max_length = max_length

    def batches(self, lists, batch_size: int):
        """Yields each batch's places among all pairs, and its padded tensors."""
        queries = [one.query for one in lists for _ in one.documents]
        documents = [text for one in lists for text in one.documents]
        encoded = self.tokenizer(queries, documents, truncation="longest_first", max_length=self.max_length)
        order = np.argsort([-len(ids) for ids in encoded["input_ids"]], kind="stable")
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            yield (
                rows,
                self.tokenizer.pad({key: [encoded[key][i] for i in rows] for key in encoded}, return_tensors="pt"),
            )


class PaddedReranker(_Padded):
    """Strings in, scores out."""

    def __init__(self, folder, dtype: str, max_length: int):
        super().__init__(folder, max_length)
        self.model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=DTYPES[dtype]).eval()

    @torch.inference_mode()
    def scores(self, lists, batch_size: int) -> np.ndarray:
        scores = np.empty(sum(len(one.documents) for one in lists), np.float32)
        for rows, batch in self.batches(lists, batch_size):
            scores[rows] = self.model(**batch).logits[:, 0].float().numpy()
        return scores


class PaddedTrainer(_Padded):
    """One optimizer step at a time: the graphs of a step's batches are kept, RankNet over each list, AdamW."""

    def __init__(self, folder, dtype: str, max_length: int):
        super().__init__(folder, max_length)
        self.model = AutoModelForSequenceClassification.from_pretrained(folder).train()
        for module in self.model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        self.model.config.attention_probs_dropout_prob = 0.0
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-5, fused=True)
        self.dtype = dtype

    def step(self, lists, batch_size: int, *, update: bool = True) -> float:
        places, logits = [], []
        with torch.autocast("cpu", torch.bfloat16, enabled=self.dtype == "bf16"):
            for rows, batch in self.batches(lists, batch_size):
                places.append(rows)
                logits.append(self.model(**batch).logits[:, 0].float())
        scores = torch.cat(logits)[torch.from_numpy(np.argsort(np.concatenate(places)))]
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


def best_batch_size(engine: _Padded, lists: Sequence) -> int:
    """The batch size at which the engine scores the first lists fastest."""
    return best_setting(lambda size: lambda: engine.scores(lists[:2], size), BATCH_SIZES)


def padded_contenders(
    make: Callable[[str], _Padded],
    run: Callable[..., object],
    lists: Sequence,
    check: Callable[[str], Callable[[object], str | None]],
    trial: Callable[..., object] | None = None,
) -> tuple[list[Contender], list[str]]:
    """transformers in every dtype at its own best batch size, and a note on each.

    make: a padded engine by dtype. run: (engine, lists, batch size) does the work once. check: by dtype, as
    Contender.check. trial: what the batch size is chosen by, where `run` would change the engine; default: run.
    """
    contenders, notes = [], []
    trial = trial or run
    work = sum(len(one.documents) for one in lists)
    for dtype in DTYPES:
        name = f"transformers {dtype}"
        if reason := refusal(dtype):
            contenders.append(Contender(name, lambda: None, work, failure=reason))
            continue
        engine = make(dtype)
        size = best_setting(lambda size, engine=engine: lambda: trial(engine, lists[:1], size), BATCH_SIZES)
        work_once = functools.partial(run, engine, lists, size)
        contenders.append(Contender(name, work_once, work, check=check(dtype)))
        notes.append(f"{name}: best batch size {size} of {BATCH_SIZES}")
    return contenders, notes
