"""Where the real ranking data lies: $FASTRANK_DATA, else ../shared/data beside the checkout."""

import os
from pathlib import Path

import pytest


def data_folder() -> Path:
    """The folder; a test skips without it, and fails where CI=true."""
    named = os.environ.get("FASTRANK_DATA")
    folder = Path(named) if named else Path(__file__).parents[2] / "shared" / "data"
    if not folder.is_dir():
        sentence = f"the real data is not at {folder}; set FASTRANK_DATA to the folder that holds it"
        if os.environ.get("CI", "").lower() == "true":
            pytest.fail(sentence)
        pytest.skip(sentence)
    return folder
