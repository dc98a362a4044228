"""Rules for environment variables: flags of XLA and settings of JAX that cost time or memory."""

import contextlib
import re
from collections.abc import Iterator

from lora_jax.diagnosis import gpus, packages
from lora_jax.diagnosis.problem import Problem
from lora_jax.diagnosis.system import System

_SETTINGS = {  # those of probe.SETTINGS
    "jax_enable_x64": "arrays take 64 bits where 32 are meant, which costs time and memory",
    "jax_disable_jit": "nothing is compiled, so that everything is slow",
    "jax_debug_nans": "each result is checked for NaN",
    "jax_debug_infs": "each result is checked for infinity",
}
_OFF = ("0", "false")
_FLAGS = {  # {flag of XLA: (the values that hurt; (): all, why)}
    "xla_gpu_autotune_level": (("0",), "products are not timed to choose the fastest form"),
    "xla_backend_optimization_level": (("0", "1"), "programs are hardly optimized"),
    "xla_gpu_enable_triton_gemm": (_OFF, "products are not fused with what makes their operands"),
    "xla_disable_all_hlo_passes": (("1", "true", ""), "programs are not optimized"),
    "xla_dump_to": ((), "each program that is compiled is also written there"),
}
_FEW = 0.5  # of a GPU's memory
_UNKNOWN = r"Unknown flags? in XLA_FLAGS: *(.+)"  # then XLA ends the process


def problems(system: System) -> Iterator[Problem]:
    """What a healthy installation is better without."""
    for name in system.jax.on:
        yield Problem(f"{name.upper()} is on: {_SETTINGS[name]}", f"unset {name.upper()}")
    if unknown := re.search(_UNKNOWN, f"{system.jax.error}\n{system.jax.log}"):
        what = f"XLA_FLAGS has a flag that ends this version of XLA: {unknown[1]}"
        yield Problem(what, "leave the flag out of XLA_FLAGS", unusable=True)
    yield from _flags(system)
    value, error = system.environment.get("JAX_PLATFORMS", "cpu"), system.jax.error or ""
    no_backend = "backend" in error or error.startswith("AssertionError")  # jax 0.10 asserts
    if value != "cpu" and no_backend and not system.accelerated:
        what = f"JAX_PLATFORMS={value} names a platform that JAX does not find here"
        yield Problem(what, "unset JAX_PLATFORMS", unusable=True)
    if system.nvidia.gpus:
        yield from _gpu_memory(system)
        if system.shadowing and packages.plugins(system) and system.jax.platform == "gpu":
            yield gpus.shadowed(system)


def _flags(system: System) -> Iterator[Problem]:
    for word in system.environment.get("XLA_FLAGS", "").split():
        name, _, value = word.lstrip("-").partition("=")
        if name in _FLAGS:
            values, why = _FLAGS[name]
            if not values or value.lower() in values:
                yield Problem(f"XLA_FLAGS has {word}: {why}", "leave the flag out of XLA_FLAGS")
        elif name == "xla_force_host_platform_device_count" and system.accelerated:
            what = f"XLA_FLAGS has {word}, which is for machines without an accelerator"
            yield Problem(what, "leave the flag out of XLA_FLAGS")


def _gpu_memory(system: System) -> Iterator[Problem]:
    for prefix in ("XLA_PYTHON_CLIENT", "XLA_CLIENT"):
        name = f"{prefix}_MEM_FRACTION"
        with contextlib.suppress(ValueError):
            if 0 < (share := float(system.environment.get(name, "1"))) < _FEW:
                what = f"{name}={share:g}: JAX takes only {share:.0%} of the GPU's memory"
                yield Problem(what, f"unset {name}")
    name = "XLA_PYTHON_CLIENT_PREALLOCATE"
    if system.environment.get(name, "").lower() in _OFF:
        what = f"{name} is off: the GPU's memory fragments, so a job that fits may run out of it"
        yield Problem(what, f"unset {name}")
    name = "XLA_PYTHON_CLIENT_ALLOCATOR"
    if (value := system.environment.get(name, "").lower()) == "platform":
        yield Problem(f"{name}={value}: each array is allocated by the driver, which is slow",
                      f"unset {name}")  # fmt: skip
