"""Passes of a training step: what fills a batch up changes no gradient, and all weights have one. Graphs need a GPU:
benchmarks/gpu_correctness.py holds training by them against training without."""

import warnings
import weakref

import pytest
import torch
from hub_models import make_checkpoint, random_pairs

from fastrank.checkpoint import load_model
from fastrank.packing import PackedBatch, pack_pairs
from fastrank.train.passes import Passes, Update, _Recorded


@pytest.mark.parametrize("kind", ["bert", "electra", "roberta", "xlm-roberta"])
def test_what_fills_a_batch_up_changes_no_gradient(kind, tmp_path):
    """Graphs add to the gradients of all weights, which must all be there."""
    pairs = random_pairs(make_checkpoint(tmp_path, kind), [5, 90, 3, 40, 100])
    gradients = []
    for fills in (False, True):
        model = load_model(tmp_path).train()
        passes = Passes(model, torch.device("cpu"), filler=(model.settings.first_position, 0))
        assert not passes.uses_graphs and not passes._fills
        passes._fills = fills
        passes.clear_gradients()
        for part in (pairs[:3], pairs[3:]):
            scores, go_back = passes.forward(pack_pairs(part), 3)
            assert scores.shape == (len(part),) and not scores.requires_grad
            go_back(torch.linspace(-1, 1, len(part)))
        gradients.append({name: one.grad for name, one in model.named_parameters()})
    for name, exact in gradients[0].items():
        assert exact is not None, f"{name} has no gradient"
        assert torch.allclose(gradients[1][name], exact, atol=1e-5 * float(exact.abs().max())), name


class Graph:
    """Stands in for a graph: a GPU runs what was recorded, this what it is given."""

    def __init__(self, replay):
        self.replay = replay


def graphs_of(model, inputs, slopes, *, off_by=0.0) -> _Recorded:
    """A bucket's graphs as recording makes them, or wrong ones."""
    made = []
    scores = torch.zeros(inputs.num_pairs)

    def forward():
        made[:] = [model.score(inputs)]
        scores.copy_(made[0].detach())

    def backward():
        made[0].backward(slopes * (1 + off_by))

    return _Recorded(Graph(forward), Graph(backward), inputs, scores, slopes)


@pytest.mark.parametrize("off_by", [0.0, 0.2, float("nan"), "no memory"])
def test_graphs_are_compared_with_what_they_record(off_by, tmp_path, monkeypatch):
    """The steps of a bucket go on right whether its graphs are right, wrong, or cannot be recorded; and what a step had
    added to the gradients before stays there."""
    pairs = random_pairs(make_checkpoint(tmp_path, "bert"), [5, 90, 3, 40, 100])
    model = load_model(tmp_path, dropout=0.1).train()
    passes = Passes(model, torch.device("cpu"), filler=(0, 0), unrecorded=1)
    passes._fills = passes.uses_graphs = passes._keeps_gradients = True
    recorded = []

    def record(inputs, slopes):
        recorded.append(None)
        if off_by == "no memory":
            raise torch.cuda.OutOfMemoryError
        return graphs_of(model, inputs, slopes, off_by=off_by)

    monkeypatch.setattr(passes, "_record", record)
    monkeypatch.setattr(PackedBatch, "copy_to", lambda self, other: None)  # always the same batch here
    batch, steps = pack_pairs(pairs), []
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for _ in range(4):
            passes.clear_gradients()
            for seed in (1, 2):
                scores, go_back = passes.forward(batch, seed)
                go_back(torch.linspace(-1, 1, len(pairs)))
            steps.append([scores, *(one.grad.clone() for one in model.parameters())])
    sentence = (
        "There is no memory for a CUDA graph" if off_by == "no memory" else "Training goes on without CUDA graphs: g"
    )
    assert len(recorded) == 1 and passes.uses_graphs == (off_by in (0, "no memory"))
    assert [str(one.message)[: len(sentence)] for one in told] == [sentence] * (off_by != 0)
    for step in steps[1:]:
        assert all(torch.allclose(one, first, rtol=1e-4, atol=1e-6) for one, first in zip(step, steps[0], strict=True))
    go_back = passes.forward(batch, 1)[1]
    passes.forward(batch, 2)
    with pytest.raises(RuntimeError, match="Another batch has been scored since"):
        go_back(torch.ones(len(pairs)))


def test_nothing_of_a_pass_lives_on_into_the_next(tmp_path):
    """What ties the weights to a stream must be gone when a graph is recorded on another one."""
    pairs = random_pairs(make_checkpoint(tmp_path, "bert"), [5, 90])
    model = load_model(tmp_path).train()
    passes = Passes(model, torch.device("cpu"), filler=(0, 0))
    alive = []
    scored = model.score

    def score(batch):
        assert all(one() is None for one in alive)
        scores = scored(batch)
        alive.append(weakref.ref(scores))
        return scores

    model.score = score
    for goes_back in (True, False, True):
        scores, go_back = passes.forward(pack_pairs(pairs), 0)
        if goes_back:
            go_back(torch.ones_like(scores))
    assert len(alive) == 3


def test_each_group_learns_at_its_own_rate(tmp_path):
    make_checkpoint(tmp_path, "bert")
    model = load_model(tmp_path)
    first, *others = model.parameters()
    groups = [{"params": [first], "peak": 0.5}, {"params": others, "peak": 0.25}]
    optimizer = torch.optim.SGD(groups, lr=1.0)
    update = Update(model, optimizer, 0.0, uses_graphs=False)
    before = [one.detach().clone() for one in (first, others[0])]
    for one in model.parameters():
        one.grad = torch.ones_like(one)
    update(0.5)
    moved = [float((old - new.detach()).mean()) for old, new in zip(before, (first, others[0]), strict=True)]
    assert moved == pytest.approx([0.25, 0.125], rel=1e-3)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("size", [0.0, 1e-4, 1.0, float("nan")])
def test_gradients_are_clipped_together(fused, size, tmp_path):
    """And steps are those of torch's clip_grad_norm_, whatever clips."""
    make_checkpoint(tmp_path, "bert")
    models = [load_model(tmp_path) for _ in range(2)]
    given = [{"params": list(model.parameters()), "peak": 1e-2, "lr": 1e-2} for model in models]
    optimizer, plain = (
        torch.optim.AdamW([one], eps=1e-3, fused=is_fused) for one, is_fused in zip(given, (fused, False), strict=True)
    )
    update = Update(models[0], optimizer, 2.0, uses_graphs=False)
    for _ in range(3):
        for model in models:
            for one in model.parameters():
                one.grad = torch.linspace(-size, 2 * size, one.numel()).view_as(one)
        torch.nn.utils.clip_grad_norm_(models[1].parameters(), 2.0)
        plain.step()
        update(1.0)
        assert getattr(optimizer, "grad_scale", None) is None, "a step of the user's own would be scaled"
    for one, other in zip(*(model.parameters() for model in models), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-5, atol=0.0, equal_nan=True)
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6, equal_nan=True)
