"""The small base model, task and settings that ship with the package. Imports no jax."""

import json
import pathlib
from typing import Any

FOLDER = pathlib.Path(__file__).parent / "demo"
TRAIN = FOLDER / "train.jsonl"
EVAL = FOLDER / "eval.jsonl"


def settings() -> dict[str, Any]:
    """What replaces the defaults of scripts/train.py when neither model nor data are given."""
    return json.loads((FOLDER / "settings.json").read_text())
