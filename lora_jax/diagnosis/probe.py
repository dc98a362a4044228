"""The devices that JAX finds, asked in a process of its own: JAX may abort, or wait for minutes."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
from typing import Any

SECONDS = 120  # to wait for the answer; a TPU slice or eight GPUs take up to half a minute
TIMEOUT = "no answer within"
# Settings of JAX that cost time or memory where they are on.
SETTINGS = ("jax_enable_x64", "jax_disable_jit", "jax_debug_nans", "jax_debug_infs")


@dataclasses.dataclass(frozen=True)
class Device:
    """memory: the bytes that JAX may use, None if it does not say. capability: of a GPU."""

    platform: str
    kind: str
    memory: int | None = None
    capability: str | None = None


@dataclasses.dataclass(frozen=True)
class Answer:
    """devices: those of jax.devices(). error: why there are none. log: what JAX has logged.
    on: those of SETTINGS that are on.
    """

    devices: tuple[Device, ...] = ()
    error: str | None = None
    log: str = ""
    on: tuple[str, ...] = ()

    @property
    def platform(self) -> str | None:
        """cpu, gpu or tpu; None if JAX does not start."""
        return self.devices[0].platform if self.devices else None


def ask(limit: float = SECONDS) -> Answer:
    """What JAX answers in another process with this one's environment."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-m", "lora_jax.diagnosis.probe"]
    try:
        child = subprocess.run(
            command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True,
            errors="replace", timeout=limit,
        )  # fmt: skip
    except subprocess.TimeoutExpired as late:
        log = (late.stderr or b"").decode(errors="replace")
        return Answer(error=f"{TIMEOUT} {limit:g} s", log=log)
    if child.returncode:  # only an abort: exceptions are part of the answer
        said = child.stderr.strip().splitlines()
        return Answer(error=said[-1] if said else _ended(child.returncode), log=child.stderr)
    found: dict[str, Any] = json.loads(child.stdout.splitlines()[-1])
    devices = tuple(Device(**each) for each in found.pop("devices", ()))
    return Answer(devices, found.get("error"), child.stderr, tuple(found.get("on", ())))


def _ended(code: int) -> str:
    return f"it ended with {signal.Signals(-code).name if code < 0 else code}"


def here() -> dict[str, Any]:
    """The fields of Answer that this process can tell, for JSON."""
    try:
        import jax

        devices = [dataclasses.asdict(_device(each)) for each in jax.devices()]
        return {"devices": devices, "on": [name for name in SETTINGS if getattr(jax.config, name)]}
    except Exception as error:
        return {"error": " ".join(f"{type(error).__name__}: {error}".split())[:500]}


def _device(device: Any) -> Device:
    try:
        memory = (device.memory_stats() or {}).get("bytes_limit")
    except Exception:  # not all platforms have it
        memory = None
    capability = getattr(device, "compute_capability", None)
    return Device(device.platform, device.device_kind, memory, capability and str(capability))


if __name__ == "__main__":
    print(json.dumps(here()))
