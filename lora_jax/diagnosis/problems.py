"""What is wrong with an installation of JAX, and what mends it."""

from collections.abc import Iterator

from lora_jax.diagnosis import amd, environment, gpus, packages, probe, tpus
from lora_jax.diagnosis.problem import Problem
from lora_jax.diagnosis.system import System


def problems(system: System) -> list[Problem]:
    """All that is known to be wrong, the worst first. A healthy machine has none."""
    found = [
        *packages.problems(system),
        *gpus.problems(system),
        *amd.problems(system),
        *tpus.problems(system),
        *environment.problems(system),
    ]
    if not any(each.unusable for each in found):
        found += _unexplained(system)
    return sorted(found, key=lambda each: not each.unusable)


def _unexplained(system: System) -> Iterator[Problem]:
    """A failure for which no rule has a reason."""
    error = system.jax.error or ""
    name = system.nvidia.gpus[0].name if system.nvidia.gpus else "TPU"
    if error.startswith(probe.TIMEOUT):
        do = "end the process that holds the devices: nvidia-smi, or sudo lsof -w /dev/accel*"
        if "," in system.environment.get("TPU_WORKER_HOSTNAMES", ""):
            do = "start this command on all hosts of the slice at the same time"
        yield Problem(f"JAX gives {error} when it is asked for its devices", do, unusable=True)
    elif error:
        what = f"JAX does not start: {error}"
        yield Problem(what, f"{packages.reinstall(system)}, in a new environment", unusable=True)
    elif system.accelerated and system.jax.platform == "cpu":
        said = [line for line in system.jax.log.splitlines() if "rror" in line or "fail" in line]
        reason = " ".join(said[-1].split())[:300] if said else "it does not say why"
        yield Problem(
            f"JAX does not open the {name}: {reason}",
            "JAX_LOGGING_LEVEL=DEBUG python -c 'import jax; jax.devices()' shows more",
            unusable=True,
        )
