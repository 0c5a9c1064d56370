"""Passes of a training step: what fills a batch up changes no gradient, and all weights have one. Graphs need a GPU:
benchmarks/gpu_correctness.py holds training by them against training without."""

import pytest
import torch
from hub_models import make_checkpoint, random_pairs

from fastrank.checkpoint import load_model
from fastrank.packing import pack_pairs
from fastrank.train.passes import Passes, Update


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


def test_gradients_are_clipped_together(tmp_path):
    make_checkpoint(tmp_path, "bert")
    model = load_model(tmp_path)
    optimizer = torch.optim.SGD([{"params": list(model.parameters()), "peak": 1.0}], lr=1.0)
    update = Update(model, optimizer, 2.0, uses_graphs=False)
    for one in model.parameters():
        one.grad = torch.ones_like(one)
    update(1.0)
    norm = torch.stack([one.grad.norm() for one in model.parameters()]).norm()
    assert float(norm) == pytest.approx(2.0, rel=1e-3)
