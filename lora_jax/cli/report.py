"""Write the report.html of a run, also of one that was killed or still runs."""

import pathlib
from typing import Any

from lora_jax import console
from lora_jax.cli import arguments
from lora_jax.training.report import page

DESCRIPTION = """\
Write the report.html of a run, also of one that was killed or still runs.

  lora-jax report runs/…
"""


def flags(**where: Any) -> arguments.Flags:
    """The flags of `report`. where: see arguments.Flags."""
    flags = arguments.Flags(DESCRIPTION, **where)
    flags.add("run_folder", "what train.py was given as --output-dir", metavar="RUN_FOLDER")
    return flags


def parse(argv: list[str] | None = None) -> arguments.Given:
    """Every setting: what was typed, else the defaults."""
    return flags().typed(argv)


def main() -> int:
    console.say("report", str(page.write(pathlib.Path(parse()["run_folder"]))))
    return 0
