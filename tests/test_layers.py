"""Who may import whom, as pyproject.toml says; and what the package looks like from outside."""

import subprocess
import sys
from pathlib import Path

import pytest

import fastrank

ROOT = Path(__file__).parents[1]


def test_imports_follow_the_layers():
    result = subprocess.run(
        [str(Path(sys.executable).with_name("lint-imports"))],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout + result.stderr


def test_ruff_is_clean():
    result = subprocess.run([sys.executable, "-m", "ruff", "check", "."], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout


def test_public_names():
    for name in fastrank.__all__:
        assert getattr(fastrank, name) is not None
    with pytest.raises(AttributeError, match="has no attribute 'rerankk'"):
        _ = fastrank.rerankk


def test_import_is_light():
    """Importing the package loads neither torch nor transformers, so that a command that needs neither starts at
    once."""
    code = "import sys, fastrank, fastrank.__main__; print([m for m in ('torch', 'transformers') if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_the_readme_tree_is_true():
    """Every file that the README's tree names exists, and every source file is in it."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    block = readme.split("<!-- tree -->")[1].split("```")[1]
    folders: list[tuple[int, str]] = []
    named = set()
    for line in block.splitlines():
        entry = line.split("#")[0].rstrip()
        if not entry.strip():
            continue
        indent = len(entry) - len(entry.lstrip())
        while folders and folders[-1][0] >= indent:
            folders.pop()
        path = "".join(folder for _, folder in folders) + entry.strip()
        assert (ROOT / path).exists(), f"the README names {path}, which does not exist"
        if path.endswith("/"):
            folders.append((indent, entry.strip()))
        named.add(path)
    sources = subprocess.run(
        ["git", "ls-files", "fastrank", "csrc", "benchmarks", "tests"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    covered = tuple(
        path for path in named if path.endswith("/") and not any(o != path and o.startswith(path) for o in named)
    )
    missing = [
        p
        for p in sources
        if p not in named and not p.startswith(covered) and not p.endswith(("__init__.py", "py.typed"))
    ]
    assert not missing, f"the README's tree lacks {missing}"
