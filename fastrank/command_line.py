"""What the verbs' command lines share: flags with hyphens or underscores, and one sentence for what is wrong."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

MAX_THREADS = 1024  # thousands of them end the process


def with_underscores(argv: Sequence[str]) -> list[str]:
    """--learning-rate becomes --learning_rate; values are left alone."""
    words = []
    for word in argv:
        name, equals, value = word.partition("=")
        words.append(name.replace("-", "_").replace("__", "--", 1) + equals + value if word.startswith("--") else word)
    return words


class OneSentenceParser(argparse.ArgumentParser):
    """argparse without the usage text in front of an error, and without guesses at cut-off names."""

    def __init__(self, *, prog: str, description: str) -> None:
        super().__init__(prog=prog, description=description, allow_abbrev=False)

    def error(self, message: str) -> None:  # type: ignore[override]
        self.exit(2, f"{self.prog}: {message}; see {self.prog} --help\n")
