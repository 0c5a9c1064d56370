"""Which lists a step sees, and what the weights are measured on; both follow from the data and the seed alone."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

import numpy as np

from fastrank.data import LoadedData, RankingList, load_data
from fastrank.evaluate import evaluate, qrels_from_labels, run_from_scores

__all__ = ["Ahead", "EvaluationSet", "Feed"]

Made = TypeVar("Made")


class Feed:
    """Draws the lists of every step: all queries in an order of their own each epoch, the last step of an epoch short.

    Args:
        source: The training data, in the forms that fastrank.data.load_data reads; every list needs labels.
        lists_per_step: Lists of a step.
        seed: Decides order and sampling.

    Raises:
        ValueError: Unreadable data, or a list without labels.
    """

    def __init__(self, source, *, lists_per_step: int, seed: int):
        self._data: LoadedData = load_data(source, seed=seed)
        self._lists_per_step = lists_per_step
        self._seed = seed
        self._epoch, self._order = -1, np.zeros(0, np.int64)
        self._chosen: list[int] | None = None
        if self._data.unlabelled is not None:
            raise ValueError(f"List {self._data.unlabelled!r} of the training data has no labels to learn from.")

    @property
    def num_lists(self) -> int:
        return len(self._data)

    @property
    def steps_per_epoch(self) -> int:
        count = self.num_lists if self._chosen is None else len(self._chosen)
        return math.ceil(count / self._lists_per_step)

    def draw(self, index: int) -> RankingList:
        """A list as the first epoch draws it."""
        return self._data.draw(index, epoch=0)

    def choose(self, indices: list[int]) -> None:
        """From now on only these lists are shown."""
        self._chosen, self._epoch = indices, -1

    @property
    def summary(self) -> str:
        """What was read, left out and added, in one line."""
        return str(self._data.report)

    def step(self, number: int) -> list[RankingList]:
        """The lists of step `number`, counted from 0 over all epochs."""
        epoch, place = divmod(number, self.steps_per_epoch)
        if epoch != self._epoch:
            # random() is the one method whose sequence Python keeps for a seed across versions.
            draw = random.Random(f"{self._seed} order {epoch}").random
            lists = np.arange(self.num_lists) if self._chosen is None else np.array(self._chosen)
            draws = np.fromiter((draw() for _ in lists), np.float64, len(lists))
            self._epoch, self._order = epoch, lists[np.argsort(draws, kind="stable")]
        start = place * self._lists_per_step
        shown = self._order[start : start + self._lists_per_step].tolist()
        return [self._data.draw(index, epoch=epoch) for index in shown]

    @property
    def fingerprint(self) -> str:
        """Changes with any text, label or name of the data."""
        return self._data.fingerprint


class Ahead(Generic[Made]):
    """Yields make(number) for each of the numbers, made in a thread while the one before is worked on.

    To be used in a `with` statement, at whose end nothing runs any more. What make() raises, the iteration raises.
    """

    def __init__(self, make: Callable[[int], Made], numbers: range):
        self._make, self._numbers = make, iter(numbers)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="fastrank ahead")
        self._next: Future[Made] | None = None

    def __enter__(self) -> Ahead[Made]:
        self._begin()
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.shutdown(cancel_futures=True)

    def _begin(self) -> None:
        number = next(self._numbers, None)
        self._next = None if number is None else self._thread.submit(self._make, number)

    def __iter__(self) -> Ahead[Made]:
        return self

    def __next__(self) -> Made:
        if self._next is None:
            raise StopIteration
        made = self._next.result()
        self._begin()
        return made

    def settle(self) -> None:
        """Waits until nothing is being made, for a caller that needs what make() uses for itself."""
        if self._next is not None:
            self._next.exception()


class EvaluationSet:
    """Lists and judgments to measure nDCG@10 on; judged documents that are no candidates count as missed.

    Args:
        source: In the forms that fastrank.data.load_data reads; every list needs labels or judgments.
        seed: For a source that draws a sample of each list.
    """

    def __init__(self, source, *, seed: int):
        data = load_data(source, seed=seed)
        self.lists = data.draw_all()
        self._keys = data.keys
        unjudged = [i for i, key in enumerate(data.keys) if key not in data.qrels]
        self._qrels = data.qrels | qrels_from_labels(
            [self.lists[i] for i in unjudged], [data.keys[i] for i in unjudged]
        )

    def ndcg_at_10(self, scores: Sequence[np.ndarray]) -> float:
        """scores: one array (documents,) a list. Returns the mean over the judged queries."""
        return evaluate(run_from_scores(self.lists, scores, self._keys), self._qrels)["nDCG@10"]
