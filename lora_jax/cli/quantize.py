"""Write a quantized copy of a checkpoint, or report its error and size."""

import contextlib
import pathlib
import signal
import time
from typing import Any

from lora_jax import console, errors, quant
from lora_jax.cli import arguments, quantize_report

DEFAULTS = {"quant": ("int4",)}
DESCRIPTION = """\
Write a quantized copy of a checkpoint, which then loads in seconds, or report
the error and size of quantizing it. Both read one tensor at a time.

  lora-jax quantize --model owner/name --quant int4 --output-dir name-int4
  lora-jax quantize --model owner/name --quant int4 --quant nf4-dq --report
"""


def flags(**where: Any) -> arguments.Flags:
    """The flags of `quantize`. where: see arguments.Flags."""
    flags = arguments.Flags(DESCRIPTION, DEFAULTS, **where)
    flags.group("model")
    flags.add("--model", "folder or Hugging Face id (default: the demo model)",
              metavar="PATH|HUB_ID")  # fmt: skip
    flags.add("--revision", "branch, tag or commit of a hub model", metavar="REV")
    flags.group("quantization")
    flags.add("--quant", f"{', '.join(quant.QUANTS[1:])}; may be repeated, to compare formats",
              choices=quant.QUANTS[1:], action="append", metavar="FORMAT")  # fmt: skip
    flags.switch("--fast", "int4 without the search for scales")
    flags.group("what to do")
    flags.add("--output-dir", "write the model there, with quantized linear layers: int8 and int4 "
              "in lora_jax's own layout, nf4 and fp4 in that of bitsandbytes",
              metavar="DIR")  # fmt: skip
    flags.switch("--report", "print error and bits per weight of each kind of module")
    flags.add("--json", "also write the report of each module to FILE", metavar="FILE")
    return flags


def parse(argv: list[str] | None = None) -> arguments.Given:
    """The typed flags, and the defaults of the others."""
    return DEFAULTS | flags().typed(argv)


def main() -> int:
    settings = parse()
    chosen = tuple(dict.fromkeys(settings["quant"]))
    into = pathlib.Path(settings["output_dir"]) if "output_dir" in settings else None
    if not settings.get("report") and into is None:
        raise errors.UserError(
            expected="--report, --output-dir DIR or both",
            found="neither",
            do="add one; train and generate can also quantize while they load, with --quant",
        )
    if into is not None and len(chosen) > 1:
        raise errors.UserError(
            expected="one format to write", found=", ".join(chosen), where="--output-dir",
            do="give one --quant",
        )  # fmt: skip
    if "json" in settings and not settings.get("report"):
        raise errors.UserError(
            expected="flags that have an effect", found="--json without --report",
            do="add --report",
        )  # fmt: skip
    if settings.get("fast") and not any(fmt.startswith("int4") for fmt in chosen):
        raise errors.UserError(
            expected="flags that have an effect",
            found=f"--fast with {', '.join(chosen)}",
            do="--quant int4: only its scales are searched",
        )
    if "revision" in settings and "model" not in settings:
        raise errors.UserError(
            expected="flags that have an effect", found="--revision without --model",
            do="add --model",
        )  # fmt: skip
    path = pathlib.Path(settings["json"]) if "json" in settings else None
    if path and not path.parent.is_dir():
        raise errors.UserError(
            expected="a folder to write to", found="none", where=str(path.parent), do="create it"
        )
    from lora_jax import assets, hub

    if into is not None:  # before a model is downloaded
        from lora_jax.checkpoints import writer

        writer.refuse_occupied(into)
    folder = hub.model_folder(settings.get("model") or str(assets.FOLDER), settings.get("revision"))
    if into is not None:
        write(folder, into, chosen[0], search=not settings.get("fast"))
    if settings.get("report"):
        quantize_report.show(folder, settings, chosen, path)
    return 0


def write(folder: pathlib.Path, into: pathlib.Path, fmt: str, *, search: bool) -> None:
    """Writes the model in `folder`, quantized, to the new folder `into`."""
    from lora_jax.checkpoints import model_folder, quantize

    copy = quantize.plan(folder, fmt, search=search)
    for note in model_folder.notes(folder):
        console.say("note", note)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # to remove incomplete files
    start = time.time()
    with contextlib.closing(quantize.write(folder, into, copy)) as names:
        for _ in console.tracked(names, len(copy.parts), "tensor"):
            pass
    after = sum(file.stat().st_size for file in into.glob("*.safetensors"))
    sizes = f"{console.size(after)} of {console.size(copy.num_bytes)}"
    console.say("wrote", f"{into}: {fmt}, {sizes}, in {time.time() - start:.1f} s")
    if copy.num_crossing:
        console.say("note", f"{copy.num_crossing} linear layers will be dense when loaded: their "
                    "input size is no multiple of 64, so blocks span several rows")  # fmt: skip
    named = console.quoted(str(into))
    print(f"\nto use it:\n  {console.command('train')} --model {named} …")
