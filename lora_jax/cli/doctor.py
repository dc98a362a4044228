"""Say what is wrong with an installation, and check and time the kernels on its device."""

import collections
import dataclasses
import json
import os
from collections.abc import Iterator
from typing import Any

from lora_jax import console, errors, extras
from lora_jax.cli import arguments
from lora_jax.diagnosis import problems, system
from lora_jax.diagnosis.problem import Problem

DESCRIPTION = """\
Say what is wrong with an installation, and check and time its kernels.

  lora-jax doctor
  lora-jax doctor --json > doctor.json             the same, for a bug report

The exit code is 1 if a device cannot be used or a kernel is wrong, else 0.
"""


def flags(**where: Any) -> arguments.Flags:
    """The flags of `doctor`. where: see arguments.Flags."""
    flags = arguments.Flags(DESCRIPTION, **where)
    flags.switch("--json", "print the answers as JSON")
    flags.switch("--no-kernels", "neither check nor time the kernels")
    return flags


def parse(argv: list[str] | None = None) -> arguments.Given:
    """The typed flags. Unlike other verbs, this one needs no extra."""
    return vars(flags().parser.parse_args(argv))


def main() -> int:
    asked = parse()
    show = _show if not asked["json"] else lambda *_: None
    found = system.read()
    wrong = [*problems.problems(found), *_missing_extra()]
    report = {
        "system": dataclasses.asdict(found),
        "problems": [dataclasses.asdict(each) for each in wrong],
    }
    for label, text in _machine(found):
        show(label, text)
    for index, problem in enumerate(wrong):
        show("" if index else "wrong", f"{problem.what}\n→ {problem.do}")
    if not wrong:
        show("wrong", "nothing found")
    failed = any(each.unusable for each in wrong)
    if not failed:
        failed = _show_kernels(found, show, report, check=not asked["no_kernels"])
    if asked["json"]:
        print(json.dumps(report, indent=2))
    return int(failed)


def _show_kernels(found: system.System, show, report: dict[str, Any], *, check: bool) -> bool:
    """Shows what this machine's device computes with. Returns whether a kernel is wrong."""
    if found.jax.platform == "cpu":  # else plugins that have nothing to open print why, once more
        os.environ.setdefault("JAX_PLATFORMS", "cpu")
    from lora_jax.cli import doctor_kernels  # imports jax

    rows = []
    if check:
        show(None, doctor_kernels.HEADER)
        for row in doctor_kernels.rows():
            rows.append(row)
            show(None, row.line())
            if row.problem:
                show("", f"wrong: {row.problem}")
    report["kernels"] = [row._asdict() for row in rows]
    report["choices"] = doctor_kernels.choices()
    for label, text in doctor_kernels.sentences(report["choices"]):
        show(label, text)
    return any(row.problem for row in rows)


def _missing_extra() -> Iterator[Problem]:
    try:
        extras.require()
    except errors.UserError as error:
        found = " ".join(str(error.found).split())
        yield Problem(f"most commands of lora-jax need the extra `train`: {found}", error.do or "")


def _machine(found: system.System) -> Iterator[tuple[str, str]]:
    """Labels and texts: versions and devices."""
    wheels = {name: v for name, v in found.packages.items() if name.startswith("nvidia-")}
    others = {name: v for name, v in found.packages.items() if name not in wheels}
    where = found.machine + (" in WSL" if found.wsl else "")
    yield "versions", f"{console.pairs(others)}, Python {found.python}, {where}"
    if wheels:
        yield "CUDA", console.pairs(wheels)
    kinds = collections.Counter(found.jax.devices)
    devices = [_device(each, count) for each, count in kinds.items()] or ["JAX finds none"]
    machine = [f"{console.size(found.memory)} of memory"] if found.memory else []
    if found.nvidia.gpus:
        gpu = found.nvidia.gpus[0]
        memory = f" with {console.size(gpu.memory)}" if gpu.memory else ""
        newest = f" for CUDA up to {found.nvidia.cuda}" if found.nvidia.cuda else ""
        machine.append(
            f"{len(found.nvidia.gpus)} × {gpu.name}{memory}, driver {gpu.driver}{newest}"
        )
    if found.tpu.chips:
        machine.append(f"{found.tpu.chips} TPU chips")
    devices += ["machine: " + "; ".join(machine)] if machine else []
    yield "devices", "\n".join(devices)
    if found.environment:
        yield "variables", console.pairs(found.environment)


def _device(device, count: int) -> str:
    memory = f", {console.size(device.memory)} each for JAX" if device.memory else ""
    capability = f", compute capability {device.capability}" if device.capability else ""
    return f"JAX: {count} × {device.kind} ({device.platform}){memory}{capability}"


def _show(label: str | None, text: str) -> None:
    """Prints the lines of `text` behind a label, wrapped to the width of the terminal; with None,
    as they are."""
    for line in text.splitlines():
        print(line if label is None else console.labelled(label, line), flush=True)
        label = label and ""
