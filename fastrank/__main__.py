"""python -m fastrank VERB: one line a verb; each verb's module is imported only when it is asked for."""

from __future__ import annotations

import importlib
import sys

VERBS = {
    "train": ("fastrank.train.__main__", "main", "train a cross-encoder on ranking lists"),
    "rerank": ("fastrank.rerank_command", "rerank_command", "re-rank a TREC run or JSON lines"),
    "evaluate": ("fastrank.evaluate", "evaluate_command", "measure a run against judgments"),
    "compare": ("fastrank.compare", "compare_command", "compare runs: means, paired tests, means over corpora"),
    "convert": ("fastrank.convert", "convert_command", "rewrite ranking lists in another tool's shape"),
    "quantize": ("fastrank.quantized", "quantize_command", "store a checkpoint's int8 weights beside the others"),
    "backends": ("fastrank.backend", "backends_command", "print which backend runs which operation here, and why not"),
}


def main(argv: list[str] | None = None) -> int:
    """Runs the verb; returns its exit status, 2 for an unknown one."""
    argv = sys.argv[1:] if argv is None else argv
    usage = "usage: python -m fastrank VERB [--flag value ...]\n" + "".join(
        f"  {verb:<10} {text}\n" for verb, (_, _, text) in VERBS.items()
    )
    if not argv or argv[0] in ("-h", "--help"):
        print(usage, end="")
        return 0 if argv else 2
    if argv[0] not in VERBS:
        print(f"fastrank: {argv[0]!r} is not a verb.\n{usage}", end="", file=sys.stderr)
        return 2
    module, function, _ = VERBS[argv[0]]
    return getattr(importlib.import_module(module), function)(argv[1:])


if __name__ == "__main__":
    sys.exit(main())
