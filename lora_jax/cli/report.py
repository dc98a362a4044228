"""Write the report.html of a run, also of one that was killed or still runs."""

import pathlib
from typing import Any

from lora_jax import console
from lora_jax.cli import arguments
from lora_jax.training.report import page

DESCRIPTION = """\
Write the report.html of a run, also of one that was killed or still runs.

  report.py runs/…
"""


def parse(argv: list[str] | None = None) -> dict[str, Any]:
    flags = arguments.Flags(DESCRIPTION, {})
    flags.add("run_folder", "what train.py was given as --output-dir", metavar="RUN_FOLDER")
    return flags.typed(argv)


def main() -> int:
    console.say("report", str(page.write(pathlib.Path(parse()["run_folder"]))))
    return 0
