"""Buckets of CUDA graphs: every batch fits its bucket, and what fills it up changes no score. Graphs need a GPU."""

import contextlib
import threading
import time

import numpy as np
import pytest
import torch
from hub_models import make_checkpoint, random_pairs

from fastrank import Reranker
from fastrank.checkpoint import load_model
from fastrank.model.graphs import LONGEST, MOST_TOKENS, Bucket, fill, find_bucket, plan_one_shape, record
from fastrank.packing import pack_pairs


@pytest.mark.parametrize("longest", [1, 5, 32, 33, 128, 300, 512])
def test_every_batch_fits_its_bucket(longest):
    random = np.random.default_rng(longest)
    buckets = set()
    for _ in range(300):
        lengths = random.integers(1, longest + 1, random.integers(1, 400))
        if lengths.sum() > MOST_TOKENS:
            continue
        batch = pack_pairs([(np.full(n, 7), np.zeros(n, int)) for n in lengths])
        bucket = find_bucket(batch.num_tokens, batch.num_pairs, batch.max_pair_tokens)
        assert bucket.longest in LONGEST and bucket.longest >= batch.max_pair_tokens
        filled = fill(batch, bucket, (9, 1))
        assert filled.num_tokens == bucket.num_tokens and filled.num_pairs == bucket.num_pairs
        sizes = filled.pair_offsets.diff()
        assert sizes.min() >= 1 and sizes.max() <= bucket.longest and filled.span == (1, bucket.longest)
        assert torch.equal(filled.pair_offsets[: batch.num_pairs + 1], batch.pair_offsets)
        assert torch.equal(filled.token_ids[: batch.num_tokens], batch.token_ids)
        assert (filled.token_ids[batch.num_tokens :] == 9).all() and (filled.token_types[batch.num_tokens :] == 1).all()
        starts = filled.pair_offsets[:-1].long()
        assert not filled.positions[starts].any() and filled.positions.max() < bucket.longest
        buckets.add(bucket)
    assert len(buckets) < 90


def test_what_has_no_bucket():
    assert find_bucket(MOST_TOKENS + 1, 100, 200) is None and find_bucket(600, 1, 513) is None
    assert find_bucket(0, 0, 0) is None
    assert find_bucket(5, 1, 5) == Bucket(1024, 64, 32)  # 1,019 tokens more are 32 pairs of at most 32


@pytest.mark.parametrize("longest", [20, 512, 8192])
@pytest.mark.parametrize("sizes", [[], [1], [1] * 2000, "mixed", "longest"])
def test_batches_of_one_shape(longest, sizes):
    """All pairs are there once, every batch can be filled up, and the shape is the same for any pairs."""
    random = np.random.default_rng(0)
    lengths = {"mixed": random.integers(1, longest + 1, 700), "longest": [longest] * 50}.get(str(sizes), sizes)
    plan, bucket = plan_one_shape(lengths, longest)
    assert bucket == plan_one_shape([3], longest)[1]
    assert sorted(int(i) for batch in plan for i in batch) == list(range(len(lengths)))
    for indices in plan:
        batch = pack_pairs([(np.full(lengths[i], 7), np.zeros(lengths[i], int)) for i in indices])
        filled = fill(batch, bucket, (9, 1))
        sizes = filled.pair_offsets.diff()
        assert filled.num_tokens == bucket.num_tokens and filled.num_pairs == bucket.num_pairs
        assert sizes.min() >= 1 and sizes.max() <= longest


@pytest.mark.parametrize("kind", ["bert", "xlm-roberta"])
def test_what_fills_a_bucket_changes_no_score(kind, tmp_path):
    pairs = random_pairs(make_checkpoint(tmp_path, kind), [5, 90, 3, 40, 128])
    model = load_model(tmp_path)
    batch = pack_pairs(pairs)
    bucket = find_bucket(batch.num_tokens, batch.num_pairs, batch.max_pair_tokens)
    filled = fill(batch, bucket, (model.settings.first_position, 0))
    with torch.no_grad():
        expected, found = model.score(batch), model.score(filled)
    assert found.isfinite().all()
    assert torch.allclose(found[: len(expected)], expected, atol=1e-5)


def test_a_cpu_has_no_graphs():
    with pytest.raises(ValueError, match="cuda_graphs need a GPU, but the device is cpu"):
        Reranker("a model that is not looked for", device="cpu", cuda_graphs=True)


def test_threads_record_one_after_another(monkeypatch):
    """torch has one stream to record on, and attention's side streams are shared, too."""
    running, most = [], []

    @contextlib.contextmanager
    def graph(*_, **__):
        running.append(None)
        most.append(len(running))
        yield
        running.pop()

    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: None)
    monkeypatch.setattr(torch.cuda, "graph", graph)
    threads = [threading.Thread(target=record, args=(lambda: time.sleep(0.01), None)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1] * 4


class _Stream:
    """Writes down what waits for what."""

    device_index = 0

    def __init__(self, *_):
        self.log = []

    def record_event(self):
        return self, len(self.log)

    def wait_event(self, event):
        self.log.append(event)


@pytest.mark.parametrize("count", [0, 1, 2, 4])
def test_launches_of_a_graph_begin_together_and_are_waited_for(count, monkeypatch):
    configuration = pytest.importorskip("fastrank.kernels.configuration")
    main = _Stream()
    used = [main]

    @contextlib.contextmanager
    def on(stream):
        used.append(stream)
        yield
        used.pop()

    launched = {}
    launches = [lambda i=i: (launched.update({i: used[-1]}), used[-1].log.append(i)) for i in range(count)]
    for name, value in {
        "is_initialized": lambda: True,
        "is_current_stream_capturing": lambda: True,
        "current_stream": lambda: used[-1],
        "Stream": _Stream,
        "stream": on,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(configuration, "_side_streams", configuration._side_streams.__wrapped__)
    configuration.run_together(launches)
    assert sorted(launched) == list(range(count)) and len(set(launched.values())) == count
    sides = [launched[i] for i in range(1, count)]
    # Each side waits for what came before on the main stream, where the first one runs, and the main stream for all.
    assert all(side.log == [(main, 0), i] for i, side in enumerate(sides, 1))
    assert main.log == ([0, *((side, 2) for side in sides)] if count else [])
