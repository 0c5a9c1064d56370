"""Which lists a run trains on, chosen by the model that it starts from: the share from which it can learn most.

Every list is scored once, as the first epoch draws it, and gets a value; the lists with the highest values stay. In a
chain of stages each stage chooses anew, with what the one before has learned: a closed loop.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch

from fastrank.data import RankingList
from fastrank.data.files import write_aside
from fastrank.losses import LOSSES

from .config import TrainConfig
from .feed import Feed
from .trainer import Trainer

__all__ = ["num_selected", "select_lists"]

FILE = "selection.json"
LISTS_AT_ONCE = 256
DEPTH = 10


def gap(lists: Sequence[RankingList], score: Callable[[Sequence[RankingList]], list[np.ndarray]]) -> list[float]:
    """How far the student is from the teacher: 1 - nDCG@10 of its order, gains 0, 1, 2 ... for the list's labels from
    the lowest on. (The idea of MLLM-DataEngine, arXiv 2308.13566: more of what the student does badly.)"""
    values = []
    for one, scores in zip(lists, score(lists), strict=True):
        gains = np.unique(one.labels, return_inverse=True)[1]
        discounts = 1 / np.log2(np.arange(2, min(DEPTH, len(gains)) + 2))
        found, best = (gains[order][:DEPTH] @ discounts for order in (np.argsort(-scores), np.argsort(-gains)))
        values.append(float(1 - found / best) if best > 0 else 0.0)
    return values


def difficulty(lists: Sequence[RankingList], score: Callable[[Sequence[RankingList]], list[np.ndarray]]) -> list[float]:
    """How little the query's text helps: the list's RankNet loss over the loss with an empty query. Above 1, where the
    text does harm, the list counts as noise and comes last. (Instruction-following difficulty, arXiv 2308.12032.)"""
    without = [RankingList("", one.documents, one.labels) for one in lists]
    values = []
    for with_text, blank in zip(_losses(lists, score(lists)), _losses(lists, score(without)), strict=True):
        ratio = with_text / blank if blank > 0 else 0.0
        values.append(ratio if ratio < 1 else -ratio)
    return values


def energy(lists: Sequence[RankingList], score: Callable[[Sequence[RankingList]], list[np.ndarray]]) -> list[float]:
    """How unlike what it has learned a list is: -logsumexp of its raw scores (Liu et al. 2020, arXiv 2010.03759)."""
    return [-float(np.logaddexp.reduce(scores.astype(np.float64))) for scores in score(lists)]


_VALUES = {"gap": gap, "difficulty": difficulty, "energy": energy}


def select_lists(trainer: Trainer, feed: Feed, folder: Path) -> list[int]:
    """Indices of the lists to train on, in order; stored in the folder, where a resumed run finds them.

    Returns at least one list: select_share of all of them, those of the highest values, earlier ones first in a tie.
    """
    config, path = trainer.config, folder / FILE
    if config.resume and path.exists():
        return json.loads(path.read_text(encoding="utf-8"))["lists"]
    values: list[float] = []
    for start in range(0, feed.num_lists, LISTS_AT_ONCE):
        lists = [feed.draw(index) for index in range(start, min(start + LISTS_AT_ONCE, feed.num_lists))]
        values += _VALUES[config.select_by](lists, trainer.scores)
    kept = sorted(sorted(range(feed.num_lists), key=lambda index: -values[index])[: num_selected(config, feed)])
    if trainer.processes.is_first:
        folder.mkdir(parents=True, exist_ok=True)
        with write_aside(path) as file:
            json.dump({"by": config.select_by, "lists": kept, "values": values}, file)
    return kept


def num_selected(config: TrainConfig, feed: Feed) -> int:
    return max(1, math.ceil(config.select_share * feed.num_lists))


def _losses(lists: Sequence[RankingList], scores: Sequence[np.ndarray]) -> list[float]:
    offsets = torch.tensor([0, *np.cumsum([len(one) for one in lists])], dtype=torch.int32)
    labels = torch.tensor([label for one in lists for label in one.labels], dtype=torch.float64)
    return LOSSES["ranknet"](torch.from_numpy(np.concatenate(scores)), labels, offsets, reduction="none").tolist()
