"""Everything that waits for a GPU, in parts of a few minutes each: is it right, and how fast is it beside its peers.

python benchmarks/gpu.py --part PART ... [--data DIR] [--output DIR] [--commit NAME] [--large [PART ...]]: first
compiles all kernels and measures the machine's limits (copy bandwidth, bf16 matrix products), then runs some parts of
PARTS, or all of them, and merges what it finds, as it comes, into OUTPUT/<gpu>-<commit>.json; tables come last. DIR
holds TREC DL as FASTRANK_DATA/trec-dl does; without it texts are made up. --large adds XLM-R-large, to all parts or to
some, and --compile torch.compile, which take most of the time. --dry_run runs the same code with tiny shapes on the
CPU, kernels in Triton's interpreter (correctness) or in C++ (the rest), and writes nothing. Needs the package built in
place: python setup.py build_ext --inplace.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import re
import sys
import time
import traceback
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PARTS = ("correctness", "attention", "forward", "rerank", "train", "losses", "variants", "profile", "cpu")


def limits(device: str, dry_run: bool) -> dict[str, float]:
    """Bytes a second that a copy reads and writes, and floating-point operations a second of bf16 matrix products."""
    import torch
    from timing import Comparison, Contender

    size = 2**20 if dry_run else 2**31
    source, target = (torch.randint(0, 99, (size,), dtype=torch.uint8, device=device) for _ in range(2))
    found = {}
    copy = Comparison("copy", "bytes", [Contender("copy", lambda: target.copy_(source), 2 * size)], device=device)
    found["copy_bytes_per_second"] = copy.measure(5, shortest_round=0 if dry_run else 0.05)["copy"].rate
    side = 64 if dry_run else 8192
    a, b = (torch.randn(side, side, device=device).bfloat16() for _ in range(2))
    product = Comparison("product", "flop", [Contender("product", lambda: a @ b, 2 * side**3)], device=device)
    found["bf16_flop_per_second"] = product.measure(5, shortest_round=0 if dry_run else 0.05)["product"].rate
    return found


def merge(path: Path, part: str, found: dict) -> None:
    """Adds a part to the results of this GPU and commit."""
    known = json.loads(path.read_text()) if path.exists() else {}
    known[part] = found
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(known, indent=1) + "\n")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--part", choices=(*PARTS, "all"), required=True, nargs="+")
    parser.add_argument("--data", type=Path, help="folder of TREC DL's files")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument(
        "--large", nargs="*", choices=PARTS, metavar="PART", help="XLM-R-large, too; default: in all parts"
    )
    parser.add_argument("--compile", action="store_true", help="torch.compile of MiniLM-L6 in `forward`, too")
    parser.add_argument("--commit", help="of the code, where git is not there to tell")
    parser.add_argument(
        "--cases", default="", help="of correctness, or peers in attention: those whose names this expression matches"
    )
    parser.add_argument("--skip_compile", action="store_true", help="an earlier call has compiled all kernels")
    parser.add_argument("--dry_run", action="store_true", help="tiny shapes on the CPU; writes nothing")
    options = parser.parse_args()
    os.environ |= {"FASTRANK_GPU_CASES": options.cases, "FASTRANK_GPU_COMPILES": "1" * options.compile}
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # deterministic sums, while outputs are poisoned
    if options.dry_run and {"correctness", "all"} & set(options.part):
        os.environ["TRITON_INTERPRET"] = "1"
    for folder in (ROOT, ROOT / "tests", ROOT / "benchmarks"):
        sys.path.insert(0, str(folder))
    import torch
    from report import machine, markdown, record, set_commit
    from timing import COMPARISONS

    device = "cpu" if options.dry_run else "cuda"
    if device == "cuda" and not torch.cuda.is_available():
        parser.error("torch finds no GPU here; --dry_run runs on the CPU")
    if options.commit:
        set_commit(options.commit)
    facts = machine()
    gpu = re.sub(r"[^A-Za-z0-9]+", "-", facts["gpu"] or "cpu").strip("-")
    path = options.output / f"{gpu}-{facts['commit'] or 'unknown'}.json"
    if device == "cuda" and not options.skip_compile:
        from gpu_compile import all_jobs, compile_all

        started = time.perf_counter()
        for line in compile_all(all_jobs()):
            print(line, flush=True)
        print(f"kernels compiled in {time.perf_counter() - started:.0f} s", flush=True)
    top = {} if options.part == ["cpu"] else limits(device, options.dry_run)
    print(", ".join(f"{name} {value:.3g}" for name, value in top.items()), flush=True)
    failures = 0
    for part in PARTS if "all" in options.part else options.part:
        COMPARISONS.clear()
        started = time.perf_counter()
        module = importlib.import_module(f"gpu_{part}")
        found: dict = {"limits": top, "lines": []}
        large = options.large is not None and (not options.large or part in options.large)
        try:
            for line in module.run(device=device, limits=top, data=options.data, dry_run=options.dry_run, large=large):
                print(line, flush=True)
                found["lines"].append(line)
                failures += line.startswith("WRONG")
                if not options.dry_run:  # as it comes: a part that runs out of time leaves what it has
                    merge(path, part, found | record(COMPARISONS))
        except Exception as error:
            found["error"] = f"{type(error).__name__}: {error}"
            failures += 1
            traceback.print_exc()
        failures += sum(one.ours and bool(one.failure) for each in COMPARISONS for one in each.contenders)
        found |= {"seconds": time.perf_counter() - started} | record(COMPARISONS)
        if not options.dry_run:
            merge(path, part, found)
        print(markdown(COMPARISONS) if COMPARISONS else json.dumps(found, indent=1))
        print(f"{part}: {found['seconds']:.0f} s", flush=True)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
