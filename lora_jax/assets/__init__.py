"""The demo: a small base model, data and settings that ship with the package. Imports no jax."""

import json
import pathlib

FOLDER = pathlib.Path(__file__).parent / "demo"
TRAIN = FOLDER / "train.jsonl"
EVAL = FOLDER / "eval.jsonl"


def settings() -> dict[str, int | float | str]:
    """The defaults of `train` when neither a model nor data are given."""
    return json.loads((FOLDER / "settings.json").read_text())
