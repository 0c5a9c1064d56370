"""fastrank: train and run cross-encoder re-rankers without padding, from tokenizer to score."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fastrank.reranker import DEFAULT_MODEL, Ranking, Reranker, rerank

__all__ = ["DEFAULT_MODEL", "Ranking", "Reranker", "losses", "ops", "rerank"]
__version__ = "0.1.0"


def __getattr__(name: str):
    # Loaded when first asked for: `python -m fastrank evaluate` needs neither torch nor transformers.
    if name in ("DEFAULT_MODEL", "Ranking", "Reranker", "rerank"):
        return getattr(importlib.import_module("fastrank.reranker"), name)
    if name in ("losses", "ops"):
        return importlib.import_module(f"fastrank.{name}")
    raise AttributeError(f"module 'fastrank' has no attribute {name!r}")
