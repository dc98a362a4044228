"""NVIDIA GPUs as the driver lists them. The driver is asked by its command nvidia-smi."""

import csv
import dataclasses
import pathlib
import re
import shutil
import subprocess

from lora_jax.diagnosis import pci

_WSL_FOLDER = "/usr/lib/wsl/lib"  # has nvidia-smi, but is not always in PATH
_MIB = 2**20


@dataclasses.dataclass(frozen=True)
class Gpu:
    """One GPU. memory and used are in bytes; capability is such as "9.0"; None: not known."""

    name: str
    driver: str
    memory: int | None = None
    used: int | None = None
    capability: str | None = None


@dataclasses.dataclass(frozen=True)
class Found:
    """gpus: those that the driver lists. on_bus: how many there are in the machine, driver or not.
    failure: what nvidia-smi says if it lists none. cuda: the newest CUDA that the driver runs.
    users: the processes that compute on them, such as "4711 python3".
    """

    gpus: tuple[Gpu, ...] = ()
    on_bus: int = 0
    failure: str | None = None
    cuda: str | None = None
    users: tuple[str, ...] = ()


def read() -> Found:
    """Takes a second where there is a driver, and next to nothing where there is none."""
    program = shutil.which("nvidia-smi") or shutil.which("nvidia-smi", path=_WSL_FOLDER)
    if program is None:
        return Found(on_bus=_on_bus(), failure="nvidia-smi is not installed")
    fields = ["name", "driver_version", "memory.total", "memory.used", "compute_cap"]
    rows, failure = _query(program, "gpu", fields)
    if failure:  # old drivers do not know compute_cap
        rows, failure = _query(program, "gpu", fields[:-1])
    if not rows:
        return Found(on_bus=_on_bus(), failure=failure or "nvidia-smi lists no GPU")
    gpus = tuple(
        Gpu(name, driver, _bytes(memory), _bytes(used), *filter(_is_number, capability))
        for name, driver, memory, used, *capability in rows
    )
    users, _ = _query(program, "compute-apps", ["pid", "process_name"])
    text, _ = _run(program)
    # Newer drivers name the version of their user-mode part.
    cuda = re.search(r"CUDA (?:UMD )?Version: *([\d.]+)", text)
    return Found(
        gpus, len(gpus), None, cuda and cuda[1],
        tuple(f"{pid} {pathlib.PurePath(name).name}" for pid, name in users),
    )  # fmt: skip


def _query(program: str, what: str, fields: list[str]) -> tuple[list[list[str]], str | None]:
    """(the rows of the answer, why there are none)."""
    text, failure = _run(
        program, f"--query-{what}={','.join(fields)}", "--format=csv,noheader,nounits"
    )
    if failure:
        return [], failure
    rows = csv.reader(text.splitlines(), skipinitialspace=True)
    return [row for row in rows if len(row) == len(fields)], None


def _run(*command: str) -> tuple[str, str | None]:
    """(its output, why it failed)."""
    try:
        asked = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except subprocess.TimeoutExpired:
        return "", "nvidia-smi does not answer"
    except OSError as error:
        return "", str(error)
    text = asked.stdout.strip()
    return text, " ".join((text or asked.stderr).split())[:200] if asked.returncode else None


def _is_number(text: str) -> bool:  # else "[N/A]"
    return re.fullmatch(r"\d+\.\d+", text) is not None


def _bytes(mebibytes: str) -> int | None:
    return int(mebibytes) * _MIB if mebibytes.isdigit() else None


def _on_bus() -> int:
    return pci.count(pci.NVIDIA, pci.VGA, pci.CONTROLLER_3D)
