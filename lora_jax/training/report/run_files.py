"""Reads what the page shows: run.json and metrics.jsonl."""

import json
import pathlib
from collections.abc import Sequence

from lora_jax.training.output import run_folder
from lora_jax.training.report import formatting
from lora_jax.training.settings import convert

Metrics = Sequence[run_folder.MetricsLine]


def read(folder: pathlib.Path) -> tuple[run_folder.RunJson, Metrics]:
    """(the content of run.json, the lines of metrics.jsonl if that file exists).

    Raises: UserError if the folder has no run in it.
    """
    record = run_folder.read_run(folder)
    path, rows = folder / "metrics.jsonl", []
    for line in path.read_text(errors="replace").splitlines() if path.exists() else []:
        try:
            rows.append(json.loads(line))
        except (ValueError, RecursionError):
            break  # a killed run left an incomplete line
    return record, [row for row in rows if isinstance(row, dict)]


def sweep_members(record: run_folder.RunJson) -> list[str]:
    """The names of the members of a sweep; empty if the run trains one adapter."""
    asked = record.get("settings", {}).get("sweep")
    return list(convert.sweep(asked)[1]) if asked else []


def seconds(record: run_folder.RunJson) -> dict[str, float]:
    """{phase: seconds}"""
    found = {name: formatting.finite(value) for name, value in record.get("seconds", {}).items()}
    return {name: value for name, value in found.items() if value is not None}
