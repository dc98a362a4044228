"""Everything that is read from a machine before it is judged."""

import contextlib
import dataclasses
import importlib.metadata
import os
import pathlib
import platform
import re
from collections.abc import Callable, Mapping

from lora_jax.diagnosis import nvidia_smi, pci, probe, tpu_vm

_PACKAGES = re.compile(r"lora-jax|jax|jaxlib|flax|optax|jax-.*|libtpu.*|nvidia-.*")
_VARIABLES = re.compile(r"(JAX|XLA|CUDA|TPU|LIBTPU|NVIDIA|NCCL)_.*|LD_LIBRARY_PATH")
# Libraries of CUDA that come as wheels with JAX.
_LIBRARIES = re.compile(r"lib(cudart|cudnn|cublas|cusparse|cusolver|cufft|nvJitLink|nvrtc)\b.*\.so")


@dataclasses.dataclass(frozen=True)
class System:
    """packages: {name: version}. wanted: {package: the versions that the installed jax asks for}.
    environment: the variables that matter to JAX. shadowing: the folders of LD_LIBRARY_PATH with
    libraries that the wheels have too. memory, shared_memory: the bytes of the host, and of
    /dev/shm. amd_gpus: their number, without those that are part of a processor.
    """

    python: str = ""
    machine: str = ""  # such as "Linux x86_64"
    wsl: bool = False
    container: bool = False
    packages: Mapping[str, str] = dataclasses.field(default_factory=dict)
    wanted: Mapping[str, str] = dataclasses.field(default_factory=dict)
    environment: Mapping[str, str] = dataclasses.field(default_factory=dict)
    shadowing: tuple[str, ...] = ()
    memory: int | None = None
    shared_memory: int | None = None
    nvidia: nvidia_smi.Found = dataclasses.field(default_factory=nvidia_smi.Found)
    amd_gpus: int = 0
    tpu: tpu_vm.Found = dataclasses.field(default_factory=tpu_vm.Found)
    jax: probe.Answer = dataclasses.field(default_factory=probe.Answer)

    @property
    def accelerated(self) -> bool:
        """Whether there is a GPU or TPU, seen by JAX or not."""
        return bool(self.nvidia.gpus or self.nvidia.on_bus or self.tpu.chips)


def read(ask: Callable[[], probe.Answer] = probe.ask) -> System:
    """This machine. ask: how JAX is asked for its devices."""
    # Before JAX is asked, which then holds the devices itself.
    nvidia, tpu = nvidia_smi.read(), tpu_vm.read()
    packages = _packages()
    return System(
        python=platform.python_version(),
        machine=f"{platform.system()} {platform.machine()}",
        wsl=pathlib.Path("/dev/dxg").exists(),
        container=any(pathlib.Path(f).exists() for f in ("/.dockerenv", "/run/.containerenv")),
        packages=packages,
        wanted=_wanted(packages),
        environment={k: v for k, v in sorted(os.environ.items()) if _VARIABLES.fullmatch(k)},
        shadowing=tuple(filter(_shadows, os.environ.get("LD_LIBRARY_PATH", "").split(":"))),
        memory=host_memory(),
        shared_memory=_shared_memory(),
        nvidia=nvidia,
        amd_gpus=pci.count(pci.AMD, pci.OTHER_DISPLAY, pci.ACCELERATOR),
        tpu=tpu,
        jax=ask(),
    )


def host_memory() -> int | None:
    """The bytes of the machine's memory; None: unknown."""
    with contextlib.suppress(OSError, ValueError):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return None


def _packages() -> dict[str, str]:
    found = {}
    for each in importlib.metadata.distributions():
        # Of a package that is found twice, Python imports the first. A broken one has no name.
        name = re.sub(r"[-_.]+", "-", each.metadata["Name"] or "").lower()
        if _PACKAGES.fullmatch(name) and name not in found:
            found[name] = each.version
    return dict(sorted(found.items()))


def _wanted(packages: Mapping[str, str]) -> dict[str, str]:
    """What jax's own metadata asks for, with any of its extras: {package: versions}."""
    found = {}
    for line in importlib.metadata.requires("jax") or () if "jax" in packages else ():
        name, versions, extra = re.match(
            r"([\w.-]+)(?:\[.*?\])?\s*([^;]*)(?:;\s*extra == \"(.*)\")?", line
        ).groups()
        if (name, extra) in (("jaxlib", None), ("libtpu", "tpu")):
            found[name] = versions.strip(" ()")
    return found


def _shadows(folder: str) -> bool:
    if not folder or "site-packages" in folder:  # the wheels themselves
        return False
    with contextlib.suppress(OSError):
        return any(map(_LIBRARIES.match, os.listdir(folder)))
    return False


def _shared_memory() -> int | None:
    with contextlib.suppress(OSError):
        found = os.statvfs("/dev/shm")
        return found.f_blocks * found.f_frsize
    return None
