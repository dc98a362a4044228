"""The devices that JAX uses: their names, their memory, and advice if JAX misses an accelerator."""

import contextlib
import ctypes
import os
import pathlib
import platform
import re
import resource
import sys
from collections.abc import Iterator

import jax

from lora_jax import errors
from lora_jax.diagnosis import probe, problems, system

_COMPILED_BYTES = 4 << 30  # of cached compiled programs; the least recently used are deleted


def describe() -> str:
    """Such as "8 × NVIDIA H100 80GB HBM3 (gpu)", plus "in 2 processes" if there are several."""
    found, processes = jax.devices(), jax.process_count()
    several = f" in {processes} processes" if processes > 1 else ""
    return f"{len(found)} × {found[0].device_kind} ({found[0].platform}){several}"


def unused_accelerator() -> str | None:
    """A warning if the machine has a GPU or TPU that JAX does not see, else None."""
    if jax.default_backend() != "cpu" or os.environ.get("JAX_PLATFORMS") == "cpu":
        return None
    found = system.read(lambda: probe.Answer((probe.Device("cpu", "cpu"),)))
    why = [each for each in problems.problems(found) if each.unusable and found.accelerated]
    if not why:
        return None
    return f"JAX sees only the CPU: {why[0].what}: {why[0].do} (`lora-jax doctor` says more)"


def device_peak_bytes() -> int | None:
    """Peak memory of the first device so far; None if it does not report that."""
    return (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use")


def peak_bytes() -> int:
    """Peak memory so far: of the first device if it reports that, else of this process."""
    reported = device_peak_bytes()
    if reported is not None:
        return reported
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def held_bytes() -> int:
    """The part of `peak_bytes` that is not arrays: on a CPU, what this process holds now."""
    with contextlib.suppress(OSError, ValueError):
        if jax.default_backend() == "cpu":
            resident = int(pathlib.Path("/proc/self/statm").read_text().split()[1])
            return resident * os.sysconf("SC_PAGE_SIZE")
    return 0


def memory_bytes(device: jax.Device) -> int | None:
    """Memory of a device that JAX may use; of a CPU, its share of the host's; None: unknown."""
    if device.platform == "cpu":
        memory = system.host_memory()
        return memory and memory // _num_local(device)
    return _stats(device).get("bytes_limit")


def free_bytes(device: jax.Device) -> int | None:
    """The free part of `memory_bytes`; None: unknown, as for a compile-only device."""
    if device.platform == "cpu":
        free = min(_free_host_bytes(), default=None)
        return None if free is None else free // _num_local(device)
    stats = _stats(device)
    return stats["bytes_limit"] - stats["bytes_in_use"] if "bytes_limit" in stats else None


def _stats(device: jax.Device) -> dict[str, int]:
    with contextlib.suppress(jax.errors.JaxRuntimeError, NotImplementedError):
        return device.memory_stats() or {}
    return {}


def _num_local(device: jax.Device) -> int:
    return len(jax.local_devices(backend=device.platform))


def _free_host_bytes() -> Iterator[int]:
    """The free memory that Linux reports, and what is left of a container's limit."""
    with contextlib.suppress(OSError, ValueError):
        if found := re.search(r"MemAvailable:\s+(\d+)", pathlib.Path("/proc/meminfo").read_text()):
            yield int(found[1]) * 1024
    with contextlib.suppress(OSError, ValueError):  # without a limit the file has "max"
        limit, used = (
            int(pathlib.Path(f"/sys/fs/cgroup/memory.{name}").read_text())
            for name in ("max", "current")
        )
        yield limit - used


def keep_compiled() -> None:
    """Turns on JAX's cache of compiled programs for an accelerator, in ~/.cache/lora_jax/xla.

    Not for a CPU: its programs may not run on another CPU that shares the folder. JAX's own
    settings have precedence: JAX_COMPILATION_CACHE_DIR, JAX_ENABLE_COMPILATION_CACHE=0.
    """
    if jax.default_backend() == "cpu" or jax.config.jax_compilation_cache_dir:
        return
    folder = cache_folder() / "xla"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:  # the home folder is not writable
        return
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_compilation_cache_max_size", _COMPILED_BYTES)


def cache_folder() -> pathlib.Path:
    """~/.cache/lora_jax, or where XDG_CACHE_HOME says."""
    return pathlib.Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "lora_jax"


def keep_freed_memory() -> None:
    """On a CPU, makes glibc keep large freed blocks for the next step.

    XLA allocates a step's temporaries anew each time. If glibc returned the blocks to the system in
    between, the kernel would clear their pages again, which took a tenth to half of a step's time.
    """
    if jax.default_backend() == "cpu" and platform.libc_ver()[0] == "glibc":
        libc, max_mmaps, trim_threshold = ctypes.CDLL(None), -4, -1  # as in malloc.h
        libc.mallopt(max_mmaps, 0)
        libc.mallopt(trim_threshold, 2**31 - 1)


def explain(error: BaseException) -> errors.UserError | None:
    """The UserError for a runtime failure that the user can fix; None for any other error."""
    text = str(error)
    if "RESOURCE_EXHAUSTED" in text or "Out of memory" in text:
        stats = jax.local_devices()[0].memory_stats() or {}
        wanted = re.search(r"\d[\d.]*\s?[KMGT]?i?(?:B|[Bb]ytes)\b", text)
        limit = stats.get("bytes_limit", 0)
        free = (limit - stats.get("bytes_in_use", 0)) / 2**30
        return errors.UserError(
            expected="a job that fits into the device's memory",
            found=f"{wanted[0] if wanted else 'more'} wanted"
            + (f", {free:.2f} GiB free of {limit / 2**30:.2f} GiB" if limit else ""),
            where=describe(),
            do="--quant int4, --remat full, a smaller --batch-size with more --grad-accum, "
            "a smaller --seq-len, or more devices with --mesh fsdp=N",
        )
    busy = ("already in use", "Unable to initialize backend", "No visible GPU", "DEADLINE_EXCEEDED")
    if any(sign in text for sign in busy):
        return errors.UserError(
            expected="a device that this process can open",
            found=text.splitlines()[0],
            do="`lora-jax doctor` says why; stop the process that uses it, if there is one, or set "
            "JAX_PLATFORMS=cpu to run without it",
        )
    return None
