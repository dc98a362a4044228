"""What the plans of training and of serving share: sizes in, lines out, and the compiler."""

import signal
import textwrap
from typing import Any

from lora_jax import console, errors

Report = dict[str, Any]  # what --json prints, or a part of it
_UNITS = {"": 1, "k": 1e3, "m": 1e6, "g": 1e9, "t": 1e12,
          "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}  # fmt: skip


def num_bytes(text: str) -> int:
    """17179869184 from "16GiB", 16000000000 from "16GB". Raises: UserError if it is no size."""
    number = text.strip().lower().removesuffix("b")
    unit = number.lstrip("0123456789.")
    try:
        size = int(float(number.removesuffix(unit)) * _UNITS[unit.strip()])
    except (ValueError, KeyError):
        size = 0
    if size <= 0:
        raise errors.UserError(
            expected="a memory size such as 16GiB or 16GB", found=repr(text), where="--hbm"
        )
    return size


def print_wrapped(text: str) -> None:
    """Prints the lines of `text`, wrapped to the width of the terminal."""
    for line in text.split("\n"):
        indent = " " * (len(line) - len(line.lstrip()) + 2)
        print(*textwrap.wrap(line, console.width(), subsequent_indent=indent,
                             break_long_words=False, break_on_hyphens=False) or [""],
              sep="\n", flush=True)  # fmt: skip


def compile_(job, target: str | None, sizes: dict[str, int], what: str = "train"):
    """One of programs.PROGRAMS, compiled; or the reason why it is not."""
    from lora_jax.planning import chips, programs

    if target is not None:
        try:
            chips.check(target)
        except errors.UserError as error:
            parts = [line.split(":", 1)[1].strip() for line in str(error).strip().splitlines()]
            return "wanted " + "; ".join(parts)
    # So that subprocess.run ends the compiler's process on Ctrl-C.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        return programs.compiled(job, target, sizes, *([what] if what != "train" else []))
    finally:
        signal.signal(signal.SIGINT, before)


def row(name: str, size: int | str, note: str = "") -> str:
    """A line of the plan."""
    shown = size if isinstance(size, str) else console.size(size)
    return f"  {name:<38}{shown:>10}  {note}".rstrip()
