"""The rule for AMD GPUs."""

from collections.abc import Iterator

from lora_jax.diagnosis import packages
from lora_jax.diagnosis.problem import Problem
from lora_jax.diagnosis.system import System


def problems(system: System) -> Iterator[Problem]:
    """That JAX computes on the CPU beside one, because it has no plugin for it."""
    others = system.accelerated or system.jax.platform != "cpu"
    installed = any(name.startswith("jax-rocm") for name in system.packages)
    if system.amd_gpus and not others and not installed:
        yield Problem(
            "there is an AMD GPU, for which JAX is installed without its plugin. lora_jax has no "
            "kernels of its own for it, and has not been tested on one",
            f"{packages.install(system, 'rocm7-local')}, on a machine with ROCm 7",
        )
