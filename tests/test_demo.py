"""The demo as a user runs it, only shorter."""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

from fastrank import Reranker
from fastrank.train.report import read_log


def test_the_demo_trains_and_shows_how_to_re_rank(tmp_path):
    command = [sys.executable, "-m", "fastrank.train", "--demo", "--num_lists", "12", "--num_queries", "5"]
    result = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"}
    )
    assert result.returncode == 0, result.stderr
    lines = result.stdout.strip().splitlines()
    figures = json.loads(lines[-1])
    assert list(figures) == [
        "measure", "bm25", "bi_encoder", "untrained", "trained", "pairs_per_second", "seconds", "checkpoint",
    ]  # fmt: skip
    assert figures["measure"] == "nDCG@10" and figures["checkpoint"] == "runs/demo"
    assert all(0 <= figures[name] <= 1 for name in ("bm25", "bi_encoder", "untrained", "trained"))
    assert figures["bm25"] > figures["untrained"] and figures["pairs_per_second"] > 0
    folder = tmp_path / "runs" / "demo"
    assert (folder / "curves.png").stat().st_size > 10_000
    assert [record["step"] for record in read_log(folder) if "ndcg_at_10" in record] == [0, 2, 3]
    assert any("BM25" in line and f"{figures['bm25']:.4f}" in line for line in lines)
    # The printed command really re-ranks, and so does the name "demo" in the same folder.
    (printed,) = [line for line in lines if line.strip().startswith("python -c")]
    again = subprocess.run(
        [sys.executable, *shlex.split(printed)[1:]], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert "Read and write ZIP archives." in again.stdout
    scores = Reranker(folder).predict([("zip", "Read ZIP archives."), ("zip", "Sort a list.")])
    assert scores[0] != scores[1]


def test_another_trial_may_replace_the_first_but_not_other_files(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    command = [sys.executable, "-m", "fastrank.train", "--demo", "--num_lists", "2", "--num_queries", "1"]
    result = subprocess.run([*command, "--output_dir", str(tmp_path)], capture_output=True, text=True)
    assert result.returncode == 2 and "--overwrite would delete them" in result.stderr
    assert (Path(tmp_path) / "thesis.tex").exists()
