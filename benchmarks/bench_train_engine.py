"""Training steps on the CPU: fastrank against a padded, length-sorted loop over the same checkpoint in transformers."""

from __future__ import annotations

import functools
import itertools

import pytest
from baselines import DTYPES, PaddedTrainer, padded_contenders, refusal
from timing import CLOCK, Comparison, Contender
from workloads import checkpoint, ranking_lists

from fastrank.train import TrainConfig
from fastrank.train.trainer import Trainer

MAX_LENGTH = 256
# A step in bf16 rounds; float32 must agree far closer.
TOLERANCE = {"float32": 1e-4, "bf16": 0.1}
NAMES = ["fastrank float32", "fastrank bf16", "transformers float32", "transformers bf16"]


@pytest.fixture(scope="module")
def comparison(full, tmp_path_factory) -> Comparison:
    folder = checkpoint()
    source, lists = ranking_lists(8, 50) if full else ranking_lists(4, 30)
    num_pairs = sum(len(one.documents) for one in lists)
    expected = PaddedTrainer(folder, "float32", MAX_LENGTH).step(lists, 8, update=False)

    def check(dtype):
        def compare(loss):
            return None if abs(loss - expected) <= TOLERANCE[dtype] else f"loss {loss:.5f} instead of {expected:.5f}"

        return compare

    def contender(dtype):
        name = f"fastrank {dtype}"
        if reason := refusal(dtype):
            return Contender(name, lambda: None, num_pairs, ours=True, failure=reason)
        config = TrainConfig(
            model=str(folder),
            train_data=lists,
            output_dir=str(tmp_path_factory.mktemp("train")),
            loss="ranknet",
            per_device_train_batch_size=len(lists),
            max_length=MAX_LENGTH,
            dropout=0.0,
            precision=dtype,
        )
        trainer, steps = Trainer(config), itertools.count()
        return Contender(name, lambda: trainer.step(lists, next(steps)), num_pairs, ours=True, check=check(dtype))

    contenders = [contender(dtype) for dtype in DTYPES]
    notes = [
        f"one step of {len(lists)} lists, {num_pairs} pairs of {source}, MiniLM-L6, RankNet, from strings, no dropout"
    ]
    padded, padded_notes = padded_contenders(
        lambda dtype: PaddedTrainer(folder, dtype, MAX_LENGTH),
        PaddedTrainer.step,
        lists,
        check,
        functools.partial(PaddedTrainer.step, update=False),
    )
    contenders += padded
    notes += padded_notes
    return Comparison("Training on the CPU", "pairs", contenders, notes).measure(5 if full else 3)


@pytest.mark.benchmark(group="train_engine", timer=CLOCK)
@pytest.mark.parametrize("name", NAMES)
def bench_train_engine(name, comparison, benchmark):
    comparison.hand_over(name, benchmark)
