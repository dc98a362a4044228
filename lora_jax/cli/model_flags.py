"""The flags of the base model that most commands have: which one, its format, its chat template."""

import pathlib
import sys

from lora_jax import errors
from lora_jax.cli import arguments
from lora_jax.training.output import run_folder
from lora_jax.training.settings import groups


def add(flags: arguments.Flags) -> None:
    """--model, --revision, --quant, --use-4bit, --dtype, --mesh and others."""
    flags.group("model")
    flags.add("--model", "folder or Hugging Face id (default: the demo model)",
              metavar="PATH|HUB_ID")  # fmt: skip
    flags.add("--revision", "branch, tag or commit of a hub model", metavar="REV")
    formats = ", ".join(groups.CHOICES["quant"])
    flags.add("--quant", f"format of the frozen linear layers: {formats} (default: the "
              "checkpoint's)", metavar="FORMAT")  # fmt: skip
    flags.switch("--quant-fast", "int4 without the search for scales: loads faster, with 3 %% "
                 "more error")  # fmt: skip
    flags.switch("--use-4bit", "same as --quant int4")
    flags.switch("--no-4bit", "same as --quant none")
    flags.add("--dtype", "compute dtype (default: that of config.json; float16 becomes bfloat16)")
    flags.add("--mesh", "devices by axis, e.g. data=-1,fsdp=8,tensor=1 (default: fsdp if the base "
              "does not fit on one device, else data)")  # fmt: skip
    flags.add("--kernels", "auto: those for this device, if they are right on it; xla: none")


def add_chat_template(flags: arguments.Flags) -> None:
    """--chat-template."""
    flags.add(
        "--chat-template",
        "a Jinja file, the folder or hub id of a model whose chat template is used, or a template "
        "(default: the tokenizer's)",
        metavar="FILE|PATH|HUB_ID",
    )


def quantization(typed: arguments.Given) -> arguments.Given:
    """`typed` with --use-4bit and --no-4bit replaced by --quant."""
    meant = {
        value
        for flag, value in (("use_4bit", "int4"), ("no_4bit", "none"))
        if typed.pop(flag, False)
    } | ({typed["quant"]} if "quant" in typed else set())
    if len(meant) > 1:
        raise errors.UserError(
            expected="one kind of quantization", found=", ".join(sorted(meant)),
            where="--quant, --use-4bit (int4), --no-4bit (none)", do="give one of them",
        )  # fmt: skip
    return {**typed, "quant": meant.pop()} if meant else typed


def note_other_base(adapter: pathlib.Path, quant: str) -> None:
    """Prints how to use the base that a run's adapter was trained on, if `quant` is another."""
    trained_on = run_folder.quantization_of(adapter)
    if trained_on not in (None, quant):
        print(f"note: the adapter was trained with --quant {trained_on}, and this is --quant "
              f"{quant}; use --quant {trained_on} for the same base", file=sys.stderr)  # fmt: skip
