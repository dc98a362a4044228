"""The platform that a program is traced for, by which kernels choose their implementation.

It is the platform of the ambient mesh (jax.set_mesh), which may differ from that of this process:
programs are also compiled ahead of time for other devices.
"""

import jax


def platform_here() -> str | None:
    """cpu, gpu or tpu: the platform of the ambient mesh's devices; None without a mesh."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    if device is None:
        return None
    kind = device.device_kind.lower()  # jax 0.10.0 and older have no device.platform
    return "cpu" if kind == "cpu" else "tpu" if kind.startswith("tpu") else "gpu"


def on_cpu() -> bool:
    """Whether the ambient mesh consists of CPU devices."""
    return platform_here() == "cpu"


def compute_capability() -> float | None:
    """That of this process's NVIDIA GPU, such as 9.0; None where it has none."""
    if jax.default_backend() != "gpu":
        return None
    found = str(jax.local_devices()[0].compute_capability)
    return float(found) if found.replace(".", "").isdigit() else None


def is_ampere_to_hopper() -> bool:
    """Whether this process's GPU is one of NVIDIA's of compute capability 8.0 to 9.0.

    True where there is no GPU, for programs that are compiled ahead of time.
    """
    return jax.default_backend() != "gpu" or 8 <= (compute_capability() or 0) < 10


def num_processors() -> int:
    """The streaming multiprocessors of the ambient mesh's GPU; those of an A100 where unknown."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return (device and device.num_cores) or 108


def compiler_options() -> dict[str, bool] | None:
    """jax.jit's compiler_options for a large function on the ambient mesh.

    On a CPU, they make XLA order operations for low memory, not for concurrency. On two cores that
    takes a tenth less time, and 250 MB less.
    """
    return {"xla_cpu_enable_concurrency_optimized_scheduler": False} if on_cpu() else None
