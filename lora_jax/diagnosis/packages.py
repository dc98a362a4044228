"""Which packages JAX needs for a machine, and which of those that are installed do not fit."""

import re
from collections.abc import Iterator

from lora_jax.diagnosis import versions
from lora_jax.diagnosis.problem import Problem
from lora_jax.diagnosis.system import System

# The major version of CUDA: (the oldest driver, the lowest compute capability).
CUDA = {13: (580, 7.5), 12: (525, 5.2)}


def reinstall(system: System) -> str:
    """The pip line for the machine's devices that keeps the versions of jax and, if it can be
    used, of CUDA."""
    newest = cuda(system) or max(CUDA)
    usable = [major for major in plugins(system) if major <= newest]
    extra = f"cuda{(usable or [newest])[0]}" if system.nvidia.gpus else ""
    return install(system, "tpu" if system.tpu.chips else extra)


def install(system: System, extra: str = "") -> str:
    """The pip line for jax with the extra, in the version that is installed."""
    installed = system.packages.get("jax", "")
    version = f"=={installed}" if re.fullmatch(r"[\d.]+", installed) else ""
    return f'pip install "jax[{extra}]{version}"' if extra else f'pip install "jax{version}"'


def cuda(system: System) -> int | None:
    """The newest major version of CUDA that the driver and all GPUs take; None: no version."""
    gpus = system.nvidia.gpus
    for major, (driver, capability) in CUDA.items():
        if all(
            versions.numbers(gpu.driver) >= (driver,)
            and (gpu.capability is None or float(gpu.capability) >= capability)
            for gpu in gpus
        ):
            return major
    return None


def plugins(system: System) -> list[int]:
    """The major versions of CUDA for which JAX's plugin is installed, the newest first."""
    return [major for major in CUDA if f"jax-cuda{major}-plugin" in system.packages]


def problems(system: System) -> Iterator[Problem]:
    """Packages that are missing, twice there, or of versions that do not fit."""
    have, mend = system.packages, reinstall(system)
    for name in ("jax", "jaxlib"):
        if name not in have:
            yield Problem(f"{name} is not installed", mend, unusable=True)
    jaxlib = have.get("jaxlib", "")
    wanted = system.wanted.get("jaxlib", "")
    if jaxlib and not versions.meets(jaxlib, wanted):
        what = f"jax {have.get('jax')} needs jaxlib {wanted}, but {jaxlib} is installed"
        yield Problem(what, mend, unusable=True)
    both = plugins(system)
    if len(both) > 1:
        other = next(major for major in both if major != (cuda(system) or max(both)))
        what = "the plugins for CUDA 13 and CUDA 12 are both installed, and JAX takes only one"
        do = f"pip uninstall jax-cuda{other}-plugin jax-cuda{other}-pjrt"
        yield Problem(what, do)
    for major in both[:1]:
        for name in (f"jax-cuda{major}-plugin", f"jax-cuda{major}-pjrt"):
            found = have.get(name)
            if found is None:
                yield Problem(f"{name} is not installed, but the other half of it is", mend)
            # jaxlib/plugin_support.py: they must be equal.
            elif jaxlib and versions.numbers(found) != versions.numbers(jaxlib):
                yield Problem(f"{name} {found} does not fit jaxlib {jaxlib}", mend)
    wanted = system.wanted.get("libtpu", "")
    if system.tpu.chips and "libtpu" in have and not versions.meets(have["libtpu"], wanted):
        what = f"jax {have.get('jax')} needs libtpu {wanted}, but {have['libtpu']} is installed"
        yield Problem(what, mend)
    if "jax-metal" in have:
        what = "jax-metal, a plugin for old versions of JAX, is installed and breaks this one"
        yield Problem(what, "pip uninstall jax-metal")
