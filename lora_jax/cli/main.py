# PYTHON_ARGCOMPLETE_OK
"""The command `lora-jax`."""

import importlib
import os
import pathlib
import sys

import lora_jax
from lora_jax import errors
from lora_jax.cli import arguments, runner

VERBS = {
    "train": "fine-tune a model with LoRA",
    "generate": "continue prompts with a model and its adapter",
    "chat": "chat with a model and its adapters in the terminal",
    "serve": "serve a model and its adapters over HTTP",
    "merge": "fold an adapter into its base",
    "quantize": "write a quantized copy of a model, or report its error",
    "plan": "plan the memory and time of a training job",
    "inspect": "show examples as the model sees them",
    "report": "write the report.html of a run",
    "doctor": "say what is wrong with an installation, and check its kernels",
}


def run(verb: str) -> None:
    """Runs a verb with the flags of the command line, and exits with its code."""
    _complete(verb)
    runner.run(importlib.import_module(f"lora_jax.cli.{verb}").main)


def main() -> None:
    """Runs the verb in the first argument; without one, lists the verbs."""
    _complete(None)
    name, words = pathlib.Path(sys.argv[0]).name, sys.argv[1:]
    if words[:1] == ["help"]:  # `help train` is `train --help`
        words = [*words[1:2], "--help"]
    verb = words[0] if words else ""
    if verb in VERBS:
        program = "python -m lora_jax" if name == "__main__.py" else name
        sys.argv = [f"{program} {verb}", *words[1:]]
        run(verb)
    elif verb in ("", "-h", "--help"):
        runner.run(lambda: print(usage()))
    elif verb in ("-V", "--version"):
        runner.run(lambda: print(lora_jax.__version__))
    else:
        runner.run(lambda: _unknown(verb))


def usage() -> str:
    """The list of verbs, one line each."""
    each = "\n".join(f"  {verb:<10}{text}" for verb, text in VERBS.items())
    return (
        f"usage: lora-jax VERB [flags]\n\n{each}\n\n"
        "lora-jax VERB --help shows its flags; lora-jax --version shows the version."
    )


def _unknown(verb: str) -> None:
    raise errors.UserError(
        expected=f"one of {', '.join(VERBS)}",
        found=verb,
        do="the verb first, such as lora-jax train --rank 8"
        if verb.startswith("-")
        else errors.did_you_mean(verb, VERBS),
    )


def _complete(verb: str | None) -> None:
    """Completes the command line if argcomplete has started this program for it."""
    if "_ARGCOMPLETE" not in os.environ:
        return
    try:
        import argcomplete
    except ImportError:
        return
    if verb:
        parser = importlib.import_module(f"lora_jax.cli.{verb}").flags().parser
    else:
        parser = arguments.Parser(prog="lora-jax")
        subparsers = parser.add_subparsers()
        for each in VERBS:
            module = importlib.import_module(f"lora_jax.cli.{each}")
            module.flags(subparsers=subparsers, verb=each)
    argcomplete.autocomplete(parser)
