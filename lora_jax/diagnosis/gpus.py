"""Rules for NVIDIA GPUs."""

from collections.abc import Iterator

from lora_jax.diagnosis import nvidia_smi, packages, versions
from lora_jax.diagnosis.problem import Problem
from lora_jax.diagnosis.system import System

_BFLOAT16 = 8.0  # the first compute capability with tensor cores for it
_HELD = 0.1  # the part of a GPU's memory that others may hold without being mentioned
_SHARED = 2**30  # bytes of /dev/shm; NCCL's documentation: docker run --shm-size=1g
_SIGNS = (  # how JAX's plugin says that it could not load a library of CUDA, or an old one
    "Unable to load cu",
    "Unable to load CU",
    "Outdated cu",
    "Outdated CU",
)


def problems(system: System) -> Iterator[Problem]:
    """Why JAX does not use the GPUs that are there, and what makes it slow on those it uses."""
    found = system.nvidia
    if not found.gpus:
        if found.on_bus:
            yield _no_driver(system)
        return
    if system.jax.platform != "gpu" and (reason := _unused(system)):
        yield reason
    gpu = found.gpus[0]
    if gpu.capability and float(gpu.capability) < _BFLOAT16:
        yield Problem(
            f"{gpu.name} has compute capability {gpu.capability}: no tensor cores for bfloat16 "
            "(8.0 has them), and no cuDNN attention",
            "try --dtype float32, or use another GPU",
        )
    held = [each for each in found.gpus if (each.used or 0) > _HELD * (each.memory or 0)]
    if held:
        used, memory = (round(n / 1e9) for n in (held[0].used, held[0].memory))
        by = f" by {', '.join(found.users[:3])}" if found.users else ""
        yield Problem(
            f"{used} of {memory} GB of the GPU's memory are held by other processes{by}",
            "end them (nvidia-smi lists them), or name another GPU in CUDA_VISIBLE_DEVICES",
        )
    if len(found.gpus) > 1 and (system.shared_memory or _SHARED) < _SHARED:
        yield Problem(
            f"/dev/shm has {system.shared_memory / 2**20:.0f} MiB: NCCL may need more for "
            f"{len(found.gpus)} GPUs",
            "start the container with --shm-size=1g",
        )
    yield from _unsafe_cublas(system)


def _no_driver(system: System) -> Problem:
    failure = system.nvidia.failure or ""
    what = f"there is an NVIDIA GPU, but its driver does not list it: {failure}"
    if "version mismatch" in failure:
        do = "sudo reboot (the driver was updated, and the old one is still loaded)"
    elif system.container:
        do = "start the container with --gpus all"
    elif system.wsl:
        do = "install NVIDIA's driver in Windows, not in WSL; then wsl --shutdown"
    else:
        do = f"install NVIDIA's driver, {packages.CUDA[max(packages.CUDA)][0]} or newer, and reboot"
    return Problem(what, do, unusable=True)


def _unused(system: System) -> Problem | None:
    """Why JAX does not compute on them, if there is a sign of it."""
    gpu, variables = system.nvidia.gpus[0], system.environment
    log = f"{system.jax.error or ''} {system.jax.log}"
    fits, installed = packages.cuda(system), packages.plugins(system)
    for name in ("JAX_PLATFORMS", "JAX_PLATFORM_NAME"):
        value = variables.get(name)
        if value and not {"cuda", "gpu"} & set(value.split(",")):
            return Problem(f"{name}={value} hides the {gpu.name}", f"unset {name}", unusable=True)
    visible = variables.get("CUDA_VISIBLE_DEVICES")
    if visible is not None and visible.strip() in ("", "-1", "none", "NoDevFiles"):
        return Problem(
            f"CUDA_VISIBLE_DEVICES={visible} hides the {gpu.name}",
            "unset CUDA_VISIBLE_DEVICES", unusable=True,
        )  # fmt: skip
    if fits is None:
        return _too_old(gpu)
    install = packages.reinstall(system)
    if not installed:
        return Problem(
            f"JAX is installed without its plugin for CUDA, which the {gpu.name} needs",
            install, unusable=True,
        )  # fmt: skip
    if installed[0] > fits:
        driver, capability = packages.CUDA[installed[0]]
        needs = f"a driver {driver} or newer and compute capability {capability:g}"
        has = f"driver {gpu.driver}, compute capability {gpu.capability or 'unknown'}"
        old = f"jax-cuda{installed[0]}-plugin jax-cuda{installed[0]}-pjrt"
        return Problem(
            f"CUDA {installed[0]} needs {needs}; this machine has {has}",
            f"pip uninstall -y {old} && {install}", unusable=True,
        )  # fmt: skip
    if any(sign in log for sign in _SIGNS):
        if system.shadowing:
            return shadowed(system, unusable=True)
        if any(name.startswith("nvidia-cudnn") for name in system.packages):
            install = install.replace("pip install", "pip install --force-reinstall")
        what = "JAX's plugin finds no libraries of CUDA that fit it"
        return Problem(what, install, unusable=True)
    if "OUT_OF_MEMORY" in log or "no supported devices found" in log:
        return Problem(
            f"JAX could not open the {gpu.name}: too little of its memory is free",
            "end the processes that hold it; nvidia-smi lists them", unusable=True,
        )  # fmt: skip
    return None


def _too_old(gpu: nvidia_smi.Gpu) -> Problem:
    driver, capability = packages.CUDA[min(packages.CUDA)]
    newest, _ = packages.CUDA[max(packages.CUDA)]
    if versions.numbers(gpu.driver) < (driver,):
        what = f"the driver {gpu.driver} is too old for JAX, which needs {driver} or newer"
        return Problem(what, f"update NVIDIA's driver, best to {newest} or newer", unusable=True)
    what = f"{gpu.name} has compute capability {gpu.capability}, and JAX needs {capability:g}"
    return Problem(what, "use another GPU, or JAX_PLATFORMS=cpu", unusable=True)


def shadowed(system: System, *, unusable: bool = False) -> Problem:
    """LD_LIBRARY_PATH has libraries that the wheels have too."""
    return Problem(
        f"LD_LIBRARY_PATH has another CUDA, which JAX's own libraries may load instead of theirs: "
        f"{', '.join(system.shadowing)}",
        "unset LD_LIBRARY_PATH", unusable,
    )  # fmt: skip


def _unsafe_cublas(system: System) -> Iterator[Problem]:
    """jax_plugins/xla_cuda13/__init__.py warns of it: wrong values, silently."""
    wheel = {13: "nvidia-cublas", 12: "nvidia-cublas-cu12"}
    for major in packages.plugins(system)[:1]:
        version = system.packages.get(wheel[major], "")
        wrong = version and (12, 8) <= versions.numbers(version) < (13, 2)
        if wrong and any(100 <= 10 * float(g.capability or 0) < 120 for g in system.nvidia.gpus):
            yield Problem(
                f"cuBLAS {version} may compute wrong values on {system.nvidia.gpus[0].name} when "
                "several kernels run at a time",
                'pip install --upgrade "jax[cuda13]" "nvidia-cublas>=13.2"',
            )
