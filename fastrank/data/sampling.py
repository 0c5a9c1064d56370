"""Which documents of a candidate list one training step sees, and which queries belong to which part of the data.

Both are pure functions of names and seeds: the draw for (seed, epoch, list) is the same in whatever order, process or
Python version it is made, so that a resumed run sees exactly what the uninterrupted one would have seen.
"""

from __future__ import annotations

import math
import random
from hashlib import blake2b

from fastrank.data.ranking_list import RankingList

SAMPLINGS = ("all", "top", "random", "log_random", "top_and_random", "single_relevant")


def draw_sample(
    ranking: RankingList, sampling: str, sample_size: int | None, *, seed: int, epoch: int, key: str
) -> RankingList:
    """Draw from a candidate list the documents of one training example, in the order they have in the list.

    sampling: `all`; `top`: the first ones; `random`: uniform without replacement; `log_random`: without replacement,
    the weight of place i (from 1) is 1 / ln(1 + i), as in Lightning-IR; `top_and_random`: the first half of the draw is
    the first documents, the rest random ones of the others; `single_relevant`: one random document with a label above 0
    and sample_size - 1 random ones without, as in Rank-DistiLLM's first stage.
    sample_size: documents to draw; a list that has fewer (of a kind) gives those it has. Not read for `all`.
    seed, epoch, key: what the draw depends on; `key` names the list.
    Raises ValueError for an unknown sampling, and under single_relevant for a list without a relevant document.
    """
    if sampling == "all":
        return ranking
    if sampling not in SAMPLINGS or sample_size is None:
        raise ValueError(f"sampling is {sampling!r}, sample_size {sample_size}; choose one of {', '.join(SAMPLINGS)}")
    if sampling == "top":
        positions = list(range(min(sample_size, len(ranking))))
    else:
        # random() is the one method whose sequence Python promises to keep for a seed, so everything stands on it.
        draw = random.Random(_hash(f"{seed}\0{epoch}\0{key}")).random
        draws = [draw() for _ in range(len(ranking))]
        if sampling == "log_random":
            # Of exponential times with these rates the first ones are such a draw (Efraimidis and Spirakis 2006).
            draws = [-math.log1p(-value) * math.log(2 + place) for place, value in enumerate(draws)]
        shuffled = sorted(range(len(ranking)), key=draws.__getitem__)
        if sampling in ("random", "log_random"):
            positions = shuffled[:sample_size]
        elif sampling == "top_and_random":
            num_top = min(-(-sample_size // 2), len(ranking))
            others = [i for i in shuffled if i >= num_top]
            positions = [*range(num_top), *others[: sample_size - num_top]]
        else:
            if not has_relevant(ranking):
                raise ValueError(f"list {key!r} has no relevant document to draw")
            relevant = next(i for i in shuffled if ranking.labels[i] > 0)
            others = [i for i in shuffled if not ranking.labels[i] > 0]
            positions = [relevant, *others[: sample_size - 1]]
    return ranking if len(positions) == len(ranking) else ranking.take(sorted(positions))


def has_relevant(ranking: RankingList) -> bool:
    """Whether some document of the list has a label above 0."""
    return ranking.labels is not None and max(ranking.labels, default=0) > 0


def query_share(name: str, split_seed: int) -> float:
    """A number in [0, 1) that depends on the query's name and the seed alone; `queries_part` cuts this axis."""
    # 53 bits fill a float exactly, so the largest value stays below 1.
    return (_hash(f"{split_seed}\0{name}") >> 11) / 2**53


def _hash(text: str) -> int:
    return int.from_bytes(blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "big")
