"""The command `lora-jax`."""

import importlib

from lora_jax.cli import arguments


def run(verb: str) -> None:
    """Runs one verb with the command line's flags, and exits with its code."""
    arguments.run(importlib.import_module(f"lora_jax.cli.{verb}").main)
