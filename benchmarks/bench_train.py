"""Training steps on the CPU: fastrank against a padded, length-sorted loop over the same checkpoint in transformers."""

from __future__ import annotations

import itertools

import pytest
from baselines import PaddedTrainer, refusal
from timing import CLOCK, Comparison, Contender, best_setting
from workloads import checkpoint, ranking_lists

from fastrank.train import TrainConfig
from fastrank.train.trainer import Trainer

MAX_LENGTH = 256
BATCH_SIZES = [4, 8, 16, 32]
NAMES = ["fastrank float32", "transformers float32", "transformers bf16"]


@pytest.fixture(scope="module")
def comparison(full, tmp_path_factory) -> Comparison:
    folder = checkpoint("MiniLM-L6")
    source, lists = ranking_lists(8, 50) if full else ranking_lists(4, 30)
    num_pairs = sum(len(one.documents) for one in lists)
    expected = PaddedTrainer(folder, "float32", MAX_LENGTH).step(lists, 8, update=False)

    def check(tolerance):
        return lambda loss: None if abs(loss - expected) <= tolerance else f"loss {loss:.5f} instead of {expected:.5f}"

    config = TrainConfig(
        model=str(folder),
        train_data=lists,
        output_dir=str(tmp_path_factory.mktemp("train")),
        loss="ranknet",
        per_device_train_batch_size=len(lists),
        max_length=MAX_LENGTH,
        dropout=0.0,
    )
    trainer = Trainer(config)
    steps = itertools.count()
    contenders = [
        Contender("fastrank float32", lambda: trainer.step(lists, next(steps)), num_pairs, ours=True, check=check(1e-4))
    ]
    notes = [
        f"one step of {len(lists)} lists, {num_pairs} pairs of {source}, MiniLM-L6, RankNet, from strings, no dropout"
    ]
    for dtype in ("float32", "bf16"):
        if reason := refusal(dtype):
            contenders.append(Contender(f"transformers {dtype}", lambda: None, num_pairs, failure=reason))
            continue
        padded = PaddedTrainer(folder, dtype, MAX_LENGTH)
        size = best_setting(lambda size, padded=padded: lambda: padded.step(lists[:1], size, update=False), BATCH_SIZES)
        contenders.append(
            Contender(
                f"transformers {dtype}",
                lambda padded=padded, size=size: padded.step(lists, size),
                num_pairs,
                check=check(1e-4 if dtype == "float32" else 0.1),
            )
        )
        notes.append(f"transformers {dtype}: best batch size {size} of {BATCH_SIZES}")
    return Comparison("Training on the CPU", "pairs", contenders, notes).measure(5 if full else 3)


@pytest.mark.benchmark(group="train", timer=CLOCK)
@pytest.mark.parametrize("name", NAMES)
def bench_train(name, comparison, benchmark):
    comparison.hand_over(name, benchmark)
