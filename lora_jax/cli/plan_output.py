"""What the plans of training and of serving share: sizes in, lines out, and the compiler."""

import signal
import textwrap
from collections.abc import Callable, Mapping
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


def devices(name: str | None) -> tuple[Any, Any]:
    """(chips.Target, programs.Host) of that --target, or of this machine.

    From then on only shapes matter: JAX is kept from occupying an accelerator.
    """
    import jax

    from lora_jax.planning import chips, programs

    if name:
        target = chips.parse(name)
        host = programs.Host(target.platform, target.chip, target.count, target.usable_bytes)
    else:
        host = programs.host()
        target = chips.of_kind(host.platform, host.kind, host.count)
    jax.config.update("jax_platforms", "cpu")
    return target, host


def printer(asked: Mapping[str, Any]) -> Callable[[str], None]:
    """Prints a plan, wrapped to the width of the terminal; with --json, nothing."""
    return (lambda _: None) if asked.get("json") else _print_wrapped


def _print_wrapped(text: str) -> None:
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
        return programs.compiled(job, target, sizes, what)
    finally:
        signal.signal(signal.SIGINT, before)


def show_memory(
    show: Callable[[str], None], stays: Mapping[str, int], work: Mapping[str, int], total: int
) -> None:
    """The parts of a device's memory: what stays there, and what a step works with."""
    show("memory of each device, as planned")
    for name, size in stays.items():
        show(row(name, size))
    largest = max(work, key=work.__getitem__)
    for name, size in work.items():
        show(row(f"work: {name}", size, "" if name == largest else "(not at its peak)"))
    show(row("total", total))


def row(name: str, size: int | str, note: str = "") -> str:
    """A line of the plan."""
    shown = size if isinstance(size, str) else console.size(size)
    return f"  {name:<38}{shown:>10}  {note}".rstrip()
