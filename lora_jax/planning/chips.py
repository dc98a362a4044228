"""Targets to compile for, which this machine need not have, and the published peaks of their chips.

A target is named platform:chip or platform:chip-count, such as tpu:v5e-4 or gpu:h100. cpu:8 means
eight devices that XLA simulates on this machine's processor.
"""

import importlib.util
import os
import re
from typing import NamedTuple

import jax
from jax.experimental import topologies

from lora_jax import errors


class Peaks(NamedTuple):
    """Published peaks of one chip: dense bfloat16 FLOP/s, bytes/s and bytes of its HBM."""

    flops: float
    bandwidth: float
    memory: float


# Sources: https://cloud.google.com/tpu/docs/{v5e,v5p,v6e}; the data sheets on
# https://www.nvidia.com/en-us/data-center/{a10,a100,h100,h200,l4,l40s} (half of what they state for
# sparsity); for the RTX cards, NVIDIA's white papers on GA102 and Ada, tables of GeForce cards
# (bfloat16 accumulated in float32).
PEAKS = {
    "tpu:v5e": Peaks(197e12, 819e9, 16e9),
    "tpu:v5p": Peaks(459e12, 2765e9, 95e9),
    "tpu:v6e": Peaks(918e12, 1640e9, 32e9),
    "gpu:a10": Peaks(125e12, 600e9, 24e9),
    "gpu:a100": Peaks(312e12, 2039e9, 80e9),
    "gpu:a100_40gb": Peaks(312e12, 1555e9, 40e9),
    "gpu:h100": Peaks(989e12, 3350e9, 80e9),
    "gpu:h100_pcie": Peaks(756e12, 2000e9, 80e9),
    "gpu:h200": Peaks(989e12, 4800e9, 141e9),
    "gpu:l4": Peaks(121e12, 300e9, 24e9),
    "gpu:l40s": Peaks(362e12, 864e9, 48e9),
    "gpu:rtx3090": Peaks(71e12, 936e9, 24e9),
    "gpu:rtx4080": Peaks(97.5e12, 716.8e9, 16e9),
    "gpu:rtx4090": Peaks(165e12, 1008e9, 24e9),
}
# Bytes/s between one chip and the others, in both directions together. Sources: as above; cards
# without NVLink are connected by PCIe with 16 lanes, the H100 by 5.0 and the others by 4.0.
INTERCONNECT = {
    "tpu:v5e": 400e9,
    "tpu:v5p": 1200e9,
    "tpu:v6e": 800e9,
    "gpu:a10": 64e9,
    "gpu:a100": 600e9,
    "gpu:a100_40gb": 600e9,
    "gpu:h100": 900e9,
    "gpu:h100_pcie": 128e9,
    "gpu:h200": 900e9,
    "gpu:l4": 64e9,
    "gpu:l40s": 64e9,
    "gpu:rtx3090": 64e9,
    "gpu:rtx4080": 64e9,
    "gpu:rtx4090": 64e9,
}
COUNTS = {  # number of chips → their topology, as libtpu or the CUDA plugin names it
    "tpu": {1: "1x1", 2: "1x2", 4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8", 128: "8x16",
            256: "16x16"},
    "gpu": {1: "1x1x1", 2: "1x1x2", 4: "1x1x4", 8: "1x1x8", 16: "1x2x8", 32: "1x4x8", 64: "1x8x8",
            128: "1x16x8", 256: "1x32x8"},
}  # fmt: skip
_CUBES = {1: "1x1x1", 2: "1x2x1", 4: "2x2x1", 8: "2x2x2", 16: "2x2x4", 32: "2x4x4", 64: "4x4x4",
          128: "4x4x8", 256: "4x8x8"}  # of tpu:v5p, a torus in three dimensions  # fmt: skip
_MOST_CPUS = 256
GPU_SHARE = 0.75  # of its memory that JAX uses, unless XLA_PYTHON_CLIENT_MEM_FRACTION changes it

# Without these, libtpu asks the network which TPU it runs on, or admits one process at a time. It
# reads them when it is loaded: when `devices` first asks for a TPU.
LIBTPU_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}

# The device properties that XLA needs; the fields are those of cudaGetDeviceProperties.
_GPU = """
platform_name: "CUDA"
runtime_version {{ major: 12 minor: 9 patch: 0 }}
dnn_version_info {{ major: 9 minor: 10 }}
device_description_str: "{name}"
gpu_device_info {{
  cuda_compute_capability {{ major: {major} minor: {minor} }}
  core_count: {cores}
  fpus_per_core: {fpus}
  clock_rate_ghz: {clock}
  device_memory_size: {memory:.0f}
  memory_bandwidth: {bandwidth:.0f}
  l2_cache_size: {l2}
  shared_memory_per_core: {shared_core}
  shared_memory_per_block_optin: {shared_block}
  shared_memory_per_block: 49152
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  threads_per_core_limit: {threads}
  threads_per_block_limit: 1024
  threads_per_warp: 32
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
}}
"""
_KIB = 1024
_AMPERE = {"major": 8, "minor": 0, "cores": 108, "fpus": 64, "clock": 1.41, "threads": 2048,
           "l2": 40 * _KIB**2, "shared_core": 164 * _KIB, "shared_block": 163 * _KIB}  # fmt: skip
_HOPPER = {"major": 9, "minor": 0, "fpus": 128, "threads": 2048, "shared_core": 228 * _KIB,
           "shared_block": 227 * _KIB}  # fmt: skip
_SXM = {"cores": 132, "clock": 1.98, **_HOPPER}
_ADA = {"major": 8, "minor": 9, "fpus": 128, "threads": 1536, "shared_core": 100 * _KIB,
        "shared_block": 99 * _KIB}  # fmt: skip
_GA102 = {**_ADA, "minor": 6, "clock": 1.695, "l2": 6 * _KIB**2}
_GPUS = {
    "gpu:a10": {"name": "NVIDIA A10", "cores": 72, **_GA102},
    "gpu:a100": {"name": "NVIDIA A100-SXM4-80GB", **_AMPERE},
    "gpu:a100_40gb": {"name": "NVIDIA A100-SXM4-40GB", **_AMPERE},
    "gpu:h100": {"name": "NVIDIA H100 80GB HBM3", "l2": 50 * _KIB**2, **_SXM},
    "gpu:h100_pcie": {"name": "NVIDIA H100 PCIe", "cores": 114, "clock": 1.755,
                      "l2": 50 * _KIB**2, **_HOPPER},
    "gpu:h200": {"name": "NVIDIA H200", "l2": 60 * _KIB**2, **_SXM},
    "gpu:l4": {"name": "NVIDIA L4", "cores": 58, "clock": 2.04, "l2": 48 * _KIB**2, **_ADA},
    "gpu:l40s": {"name": "NVIDIA L40S", "cores": 142, "clock": 2.52, "l2": 96 * _KIB**2, **_ADA},
    "gpu:rtx3090": {"name": "NVIDIA GeForce RTX 3090", "cores": 82, **_GA102},
    "gpu:rtx4080": {"name": "NVIDIA GeForce RTX 4080", "cores": 76, "clock": 2.505,
                    "l2": 64 * _KIB**2, **_ADA},
    "gpu:rtx4090": {"name": "NVIDIA GeForce RTX 4090", "cores": 128, "clock": 2.52,
                    "l2": 72 * _KIB**2, **_ADA},
}  # fmt: skip


_COMPILERS = {"tpu": ("libtpu",), "gpu": ("jax_plugins.xla_cuda12", "jax_plugins.xla_cuda13")}


def l2_bytes(chip: str) -> int:
    """Bytes of a GPU's L2 cache; 0 for a chip that has none."""
    return _GPUS.get(chip, {"l2": 0})["l2"]


class Target(NamedTuple):
    """`count` chips of one kind. chip: a key of PEAKS, or a platform."""

    chip: str
    count: int

    @property
    def platform(self) -> str:
        return self.chip.split(":")[0]

    @property
    def peaks(self) -> Peaks | None:
        """The peaks of one chip; None for a CPU."""
        return PEAKS.get(self.chip)

    @property
    def usable_bytes(self) -> int | None:
        """The part of one chip's HBM that JAX uses by default; None for a CPU."""
        share = GPU_SHARE if self.platform == "gpu" else 1
        return self.peaks and int(share * self.peaks.memory)


def parse(name: str) -> Target:
    """Target("tpu:v5e", 4) from "tpu:v5e-4"; without a number, one chip.

    Raises: UserError, with the known names, for any other name.
    """
    if cpus := re.fullmatch(r"cpu:([1-9]\d*)", name):
        target = Target("cpu", int(cpus[1]))
        exists = target.count <= _MOST_CPUS
    else:
        match = re.fullmatch(r"(\w+:\w+)(?:-(\d+))?", name)
        target = Target(match[1], int(match[2] or 1)) if match else None
        exists = target and target.chip in PEAKS and target.count in COUNTS[target.platform]
    if not exists:
        chips = ", ".join(PEAKS)
        raise errors.UserError(
            expected=f"one of {chips}, followed by -N for several chips; or cpu:N",
            found=repr(name),
            where=[
                f"possible numbers of chips: {platform} {', '.join(map(str, counts))}"
                for platform, counts in COUNTS.items()
            ],
        )
    return target


def of_kind(platform: str, kind: str, count: int) -> Target:
    """The Target of devices that JAX sees, by their `device_kind`; its chip is a key of PEAKS if
    the kind is known, else the platform."""
    kinds = {_GPUS[chip]["name"]: chip for chip in _GPUS}
    # JAX uses either name, depending on the version of the driver.
    kinds |= {"TPU v5 lite": "tpu:v5e", "TPU v5": "tpu:v5p", "TPU v6 lite": "tpu:v6e"}
    kinds |= {"NVIDIA A100 80GB PCIe": "gpu:a100", "NVIDIA A100-PCIE-40GB": "gpu:a100_40gb"}
    kinds |= {"TPU v5e": "tpu:v5e", "TPU v5p": "tpu:v5p", "TPU v6e": "tpu:v6e"}
    return Target(kinds.get(kind, platform), count)


def check(name: str) -> None:
    """Raises UserError if the name is unknown or the target's compiler is not installed."""
    if parse(name).platform == "cpu":
        return
    modules = _COMPILERS[parse(name).platform]
    for module in modules:
        package = module.split(".")[0]
        if importlib.util.find_spec(package) and importlib.util.find_spec(module):
            return
    raise errors.UserError(
        expected=f"the compiler for {name}",
        found=f"no module {' or '.join(modules)}",
        do='pip install "lora-jax[aot]"',
    )


def target_config(chip: str) -> str:
    """XLA's description of a GPU: a GpuTargetConfigProto, as text."""
    peaks = PEAKS[chip]
    return _GPU.format(bandwidth=peaks.bandwidth, memory=peaks.memory, **_GPUS[chip])


def devices(name: str) -> list[jax.Device]:
    """The target's devices: programs can be compiled for them, but cannot run on them.

    Set JAX_PLATFORMS=cpu, so that JAX does not look for the devices in the machine. The devices of
    a CPU also need --xla_force_host_platform_device_count in XLA_FLAGS. Raises: UserError as
    `check` does.
    """
    check(name)
    target = parse(name)
    if target.platform == "cpu":
        return jax.devices("cpu")[: target.count]
    shape = _CUBES if target.chip == "tpu:v5p" else COUNTS[target.platform]
    shape = shape[target.count]
    if target.platform == "gpu":
        how = {"platform": "cuda", "topology": shape, "target_config": target_config(target.chip)}
    else:
        for variable, value in LIBTPU_ENVIRONMENT.items():
            os.environ.setdefault(variable, value)
        how = {"platform": "tpu", "topology_name": f"{target.chip.removeprefix('tpu:')}:{shape}"}
        if target.count < 4:  # fewer than the four chips of a host
            how["chips_per_host_bounds"] = [1, target.count, 1]
    return list(topologies.get_topology_desc(**how).devices)
