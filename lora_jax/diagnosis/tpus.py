"""Rules for TPU VMs."""

import re
from collections.abc import Iterator

from lora_jax.diagnosis import packages
from lora_jax.diagnosis.problem import Problem
from lora_jax.diagnosis.system import System

# jax/_src/cloud_tpu_init.py asks for huge pages on all others.
_OLD = ("TPU v2", "TPU v3", "TPU v4")


def problems(system: System) -> Iterator[Problem]:
    """Why JAX does not use the TPU that is there, and what makes it slow."""
    found = system.tpu
    if not found.chips:
        return
    if system.jax.platform != "tpu":
        yield from _unused(system)
    newer = any(not each.kind.startswith(_OLD) for each in system.jax.devices)
    if system.jax.platform == "tpu" and newer and not found.huge_pages:
        yield Problem(
            "transparent huge pages are off, so the TPU takes longer to start and stop",
            'sudo sh -c "echo always > /sys/kernel/mm/transparent_hugepage/enabled"',
        )


def _unused(system: System) -> Iterator[Problem]:
    value = system.environment.get("JAX_PLATFORMS")
    log = f"{system.jax.error or ''} {system.jax.log}"
    if value and "tpu" not in value.split(","):
        what = f"JAX_PLATFORMS={value} hides the TPU"
        yield Problem(what, "unset JAX_PLATFORMS", unusable=True)
    elif "libtpu" not in system.packages and "TPU_LIBRARY_PATH" not in system.environment:
        what = "there is a TPU, but libtpu is not installed"
        yield Problem(what, packages.reinstall(system), unusable=True)
    elif pid := re.search(r"already in use by process with pid (\d+)", log):
        yield _held(pid[1])
    elif system.tpu.users:
        yield _held(system.tpu.users[0])
    elif system.tpu.lock_of_another:
        what = "another user holds the TPU, or has left libtpu's lock file behind"
        do = "sudo lsof -w /dev/accel* /dev/vfio/* names the process; without one, sudo rm "
        yield Problem(what, f"{do}/tmp/libtpu_lockfile", unusable=True)
    elif failure := re.search(r"\w+: TPU initialization failed[^(\n]*", log):
        do = "restart the TPU VM"
        if system.container:
            do = "start the container with --privileged --net=host"
        yield Problem(f"libtpu cannot start the TPU: {failure[0].strip()}", do, unusable=True)


def _held(process: str) -> Problem:
    return Problem(
        f"process {process} holds the TPU, and only one may",
        f"end it: kill {process.split()[0]}", unusable=True,
    )  # fmt: skip
