"""Write the report.html of a run, even if it was killed or is still running."""

import pathlib
from typing import Any

from lora_jax import console
from lora_jax.cli import arguments
from lora_jax.training.report import page

DESCRIPTION = """\
Write the report.html of a run, even if it was killed or is still running.

  lora-jax report runs/…
"""


def flags(**where: Any) -> arguments.Flags:
    """The flags of `report`. where: see arguments.Flags."""
    flags = arguments.Flags(DESCRIPTION, **where)
    flags.add("run_folder", "the --output-dir of the run", metavar="RUN_FOLDER")
    return flags


def parse(argv: list[str] | None = None) -> arguments.Given:
    """The typed flags."""
    return flags().typed(argv)


def main() -> int:
    console.say("report", str(page.write(pathlib.Path(parse()["run_folder"]))))
    return 0
