"""The file of a device: what was measured on it, written after every measurement.

{"date", "commit", "tiny", "device": facts of the machine, "cases": {name: outcome}}. An outcome has
"settings", "status", "date" and "commit", and what was measured or the "reason" why it was not.
"""

import json
import os
import pathlib
import re
from typing import Any

import device_cases

FOLDER = pathlib.Path(__file__).parent / "devices"
MEASURED, TOO_LARGE, FAILED, UNAVAILABLE = "measured", "does not fit", "failed", "not available"
BEGUN = "not finished"  # a search that the next call continues
FINAL = (MEASURED, TOO_LARGE)  # what is not tried again


def path(folder: pathlib.Path, kind: str) -> pathlib.Path:
    """The file of a kind of device, such as nvidia-h100-80gb-hbm3.json."""
    return folder / f"{re.sub(r'[^a-z0-9]+', '-', kind.lower()).strip('-')}.json"


def read(file: pathlib.Path) -> dict[str, Any]:
    """The record; an empty one if there is no file."""
    return json.loads(file.read_text()) if file.exists() else {"cases": {}}


def write(file: pathlib.Path, record: dict[str, Any]) -> None:
    """A kill leaves the old file or the new one, never a part."""
    file.parent.mkdir(parents=True, exist_ok=True)
    beside = file.with_suffix(".tmp")
    beside.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n")
    os.replace(beside, file)


def outcome(record: dict[str, Any], case: device_cases.Case) -> dict[str, Any] | None:
    """What is known of a case; None if nothing is, or if it had other settings then."""
    found = record["cases"].get(case.name)
    return found if found and found["settings"] == device_cases.fields(case) else None


def is_done(record: dict[str, Any], case: device_cases.Case) -> bool:
    """Whether the case need not be measured again."""
    found = outcome(record, case)
    return found is not None and found["status"] in FINAL


def is_out_of_memory(message: str) -> bool:
    """Whether an error of XLA or of torch says that the device's memory is full."""
    return "RESOURCE_EXHAUSTED" in message or "out of memory" in message.lower()


def all_of(folder: pathlib.Path) -> list[dict[str, Any]]:
    """The records of a folder, without rehearsals."""
    records = [read(file) for file in sorted(folder.glob("*.json"))]
    return [record for record in records if not record["tiny"]]
