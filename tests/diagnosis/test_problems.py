"""Broken installations, faked: each gives its problem and what mends it; healthy ones give none."""

import dataclasses

import pytest

from lora_jax.diagnosis import nvidia_smi, probe, problems, system, tpu_vm

CPU = probe.Answer((probe.Device("cpu", "cpu"),))
H100 = nvidia_smi.Gpu("NVIDIA H100 80GB HBM3", "580.65.06", 85 * 10**9, 10**8, "9.0")
BASE = {"jax": "0.10.2", "jaxlib": "0.10.2"}
CUDA13 = {**BASE, "jax-cuda13-plugin": "0.10.2", "jax-cuda13-pjrt": "0.10.2"}
CUDA12 = {**BASE, "jax-cuda12-plugin": "0.10.2", "jax-cuda12-pjrt": "0.10.2"}
TPU = {**BASE, "libtpu": "0.0.42.1"}
WANTED = {"jaxlib": "<=0.10.2,>=0.10.1", "libtpu": "==0.0.42.*"}
CUSPARSE = "RuntimeError: Unable to load cuSPARSE. Is it installed?"
HELD = (
    "RuntimeError: Unable to initialize backend 'tpu': ABORTED: The TPU is already in use by "
    "process with pid 4711. Not attempting to load libtpu.so in this process."
)


def sees(platform, **more):
    return probe.Answer((probe.Device(platform, platform),), **more)


def fails(error, **more):
    return probe.Answer(error=error, **more)


def cpu(packages=BASE, **more):
    return system.System(**{"packages": packages, "wanted": WANTED, "jax": CPU} | more)


def gpu(packages=CUDA13, *, count=1, users=(), seen=True, jax=None, **more):
    """A machine with H100s; more: the fields of a Gpu that differ, or of System."""
    names = {field.name for field in dataclasses.fields(nvidia_smi.Gpu)}
    one = dataclasses.replace(H100, **{k: v for k, v in more.items() if k in names})
    found = nvidia_smi.Found((one,) * count, count, None, "13.0", users)
    rest = {k: v for k, v in more.items() if k not in names}
    return cpu(packages, nvidia=found, jax=jax or (sees("gpu") if seen else CPU), **rest)


def tpu(packages=TPU, *, users=(), lock=False, huge_pages=True, jax=None, **more):
    found = tpu_vm.Found(4, users, lock, huge_pages)
    return cpu(packages, tpu=found, jax=jax or sees("tpu"), **more)


def no_driver(failure, **more):
    return cpu(nvidia=nvidia_smi.Found(on_bus=1, failure=failure), **more)


HEALTHY = {
    "cpu": cpu(),
    "gpu with cuda 13": gpu(),
    # Drivers run what was made for an older CUDA.
    "gpu with cuda 12 and a driver for 13": gpu(CUDA12),
    "gpu with cuda 12 and its driver": gpu(CUDA12, driver="535.104.05"),
    "gpu with forward compatibility": gpu(driver="535.104.05"),
    "gpu of a system whose cuda is not pip's": gpu(BASE),
    "gpu whose memory the driver does not know": gpu(memory=None, used=None),
    "tpu": tpu(),
    "an old tpu": tpu(jax=probe.Answer((probe.Device("tpu", "TPU v4"),)), huge_pages=False),
    "an AMD GPU that JAX uses": cpu(amd_gpus=1, jax=sees("gpu")),
    "an AMD GPU beside an NVIDIA GPU": gpu(amd_gpus=1),
    "an older jaxlib that jax takes": cpu({**BASE, "jaxlib": "0.10.1"}),
    "harmless settings": gpu(
        environment={
            "XLA_FLAGS": "--xla_gpu_autotune_level=4 --xla_gpu_enable_triton_gemm=true",
            "XLA_PYTHON_CLIENT_MEM_FRACTION": ".95",
            "JAX_PLATFORMS": "cuda,cpu",
            "CUDA_VISIBLE_DEVICES": "0",
        }
    ),
    "fake devices of a cpu": cpu(
        environment={"XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
    ),
}


@pytest.mark.parametrize("name", HEALTHY)
def test_a_healthy_machine_has_no_problem(name):
    assert problems.problems(HEALTHY[name]) == []


def uses(variable, value):
    return {"environment": {variable: value}}


UNUSABLE = {
    "no plugin": (gpu(BASE, seen=False), "without its plugin", 'pip install "jax[cuda13]==0.10.2"'),
    "no plugin, old driver": (
        gpu(BASE, seen=False, driver="550.54.14"),
        "without its plugin",
        'pip install "jax[cuda12]==0.10.2"',
    ),
    "cuda 13 on a driver for 12": (
        gpu(seen=False, driver="550.54.14"),
        "CUDA 13 needs a driver 580",
        "pip uninstall -y jax-cuda13-plugin jax-cuda13-pjrt && "
        'pip install "jax[cuda12]==0.10.2"',
    ),
    "cuda 13 on Volta": (
        gpu(seen=False, capability="7.0"),
        "compute capability 7.5",
        'pip install "jax[cuda12]==0.10.2"',
    ),
    "driver for cuda 11": (gpu(seen=False, driver="470.82.01"), "too old for JAX", "update"),
    "Kepler": (gpu(seen=False, capability="3.7"), "JAX needs 5.2", "another GPU"),
    "no driver": (no_driver("nvidia-smi is not installed"), "not installed", "580 or newer"),
    "driver updated": (
        no_driver("Failed to initialize NVML: Driver/library version mismatch"),
        "version mismatch",
        "sudo reboot",
    ),
    "container without the GPU": (
        no_driver("nvidia-smi is not installed", container=True), "does not list", "--gpus all",
    ),
    "WSL": (no_driver("nvidia-smi is not installed", wsl=True), "driver", "in Windows"),
    "hidden by JAX_PLATFORMS": (
        gpu(seen=False, **uses("JAX_PLATFORMS", "cpu")), "=cpu hides", "unset JAX_PLATFORMS",
    ),
    "hidden by CUDA_VISIBLE_DEVICES": (
        gpu(seen=False, **uses("CUDA_VISIBLE_DEVICES", "")), "hides", "unset CUDA_VISIBLE_DEVICES",
    ),
    "another CUDA is loaded": (
        gpu(jax=sees("cpu", log=CUSPARSE), shadowing=("/usr/local/cuda/lib64",)),
        "/usr/local/cuda/lib64",
        "unset LD_LIBRARY_PATH",
    ),
    "libraries of CUDA are missing": (
        gpu(CUDA12, jax=sees("cpu", log=CUSPARSE)),
        "no libraries",
        'pip install "jax[cuda12]==0.10.2"',
    ),
    "libraries of CUDA do not load": (
        gpu({**CUDA13, "nvidia-cudnn-cu13": "9.1"}, jax=sees("cpu", log="Outdated cuDNN inst")),
        "no libraries",
        'pip install --force-reinstall "jax[cuda13]==0.10.2"',
    ),
    "the GPU's memory is held": (
        gpu(jax=sees("cpu", log="INTERNAL: no supported devices found for platform CUDA")),
        "too little of its memory",
        "nvidia-smi",
    ),
    "an unknown reason": (
        gpu(jax=sees("cpu", log="CUDA backend failed to initialize: a riddle.")),
        "failed to initialize: a riddle.",
        "JAX_LOGGING_LEVEL=DEBUG",
    ),
    "libtpu is missing": (
        tpu(BASE, jax=CPU), "libtpu is not installed", 'pip install "jax[tpu]==0.10.2"',
    ),
    "the TPU is held": (tpu(jax=fails(HELD)), "process 4711 holds the TPU", "kill 4711"),
    "the TPU is held, and JAX waits": (
        tpu(users=("815 python3",), jax=fails("no answer within 120 s")), "815 python3", "kill 815",
    ),
    "a lock file of another user": (
        tpu(lock=True, jax=fails("RuntimeError: x")), "lock file", "/tmp/libtpu_lockfile",
    ),
    "a TPU that does not start": (
        tpu(jax=fails("RuntimeError: NOT_FOUND: TPU initialization failed: No device. (set x)")),
        "NOT_FOUND: TPU initialization failed: No device.",
        "restart the TPU VM",
    ),
    "a TPU in a container": (
        tpu(jax=fails("NOT_FOUND: TPU initialization failed: No device."), container=True),
        "cannot start the TPU",
        "--privileged",
    ),
    "hosts of a slice that wait": (
        tpu(jax=fails("no answer within 120 s"), **uses("TPU_WORKER_HOSTNAMES", "a,b")),
        "no answer within 120 s",
        "on all hosts",
    ),
    "the TPU is hidden": (
        tpu(jax=CPU, **uses("JAX_PLATFORMS", "cpu")), "hides the TPU", "unset JAX_PLATFORMS",
    ),
    "jaxlib is newer than jax": (
        cpu({**BASE, "jaxlib": "0.11.0"}, jax=fails("RuntimeError: it is newer")),
        "jax 0.10.2 needs jaxlib <=0.10.2,>=0.10.1, but 0.11.0",
        'pip install "jax==0.10.2"',
    ),
    "no jaxlib": (
        cpu({"jax": "0.10.2"}, jax=fails("ModuleNotFoundError: No module named 'jaxlib'")),
        "jaxlib is not installed",
        'pip install "jax==0.10.2"',
    ),
    "an unknown flag": (
        cpu(jax=fails("F1129 x] Unknown flag in XLA_FLAGS: --xla_nonsense=1")),
        "version of XLA: --xla_nonsense=1",
        "leave the flag out",
    ),
    "a platform that is not there": (
        cpu(jax=fails("AssertionError:"), **uses("JAX_PLATFORMS", "cuda")),
        "JAX_PLATFORMS=cuda",
        "unset JAX_PLATFORMS",
    ),
    "JAX does not start": (
        cpu(**uses("JAX_PLATFORMS", "cpu"), jax=fails("ImportError: libstdc++.so.6")),
        "libstdc++",
        'pip install "jax==0.10.2"',
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", UNUSABLE)
def test_what_keeps_jax_from_a_device_is_named(name):
    machine, what, do = UNUSABLE[name]
    worst, *others = problems.problems(machine)
    assert what in worst.what and do in worst.do and worst.unusable
    assert all("bfloat16" in each.what for each in others)  # old GPUs


OTHERS = {
    "both plugins": (gpu(CUDA12 | CUDA13), "both installed", "pip uninstall jax-cuda12-plugin"),
    "both plugins, old driver": (
        gpu(CUDA12 | CUDA13, driver="550.54.14"), "both", "pip uninstall jax-cuda13-plugin",
    ),
    "a plugin of another version": (
        gpu({**CUDA13, "jax-cuda13-plugin": "0.10.1"}),
        "jax-cuda13-plugin 0.10.1 does not fit jaxlib 0.10.2",
        'pip install "jax[cuda13]==0.10.2"',
    ),
    "half of a plugin": (
        gpu({**BASE, "jax-cuda13-plugin": "0.10.2"}), "jax-cuda13-pjrt is not", "jax[cuda13]",
    ),
    "libtpu of another version": (
        tpu({**TPU, "libtpu": "0.0.17"}), "libtpu ==0.0.42.*, but 0.0.17", "jax[tpu]==0.10.2",
    ),
    "an AMD GPU without a plugin": (
        cpu(amd_gpus=1), "there is an AMD GPU", 'pip install "jax[rocm7-local]==0.10.2", on a',
    ),
    "jax-metal": (cpu({**BASE, "jax-metal": "0.1.1"}), "jax-metal", "pip uninstall jax-metal"),
    "an old GPU": (
        gpu(capability="7.5", name="Tesla T4"), "no tensor cores for bfloat16", "--dtype float32",
    ),
    "a GPU that others use": (
        gpu(used=40 * 10**9, users=("4711 python3",)),
        "40 of 85 GB of the GPU's memory are held by other processes by 4711 python3",
        "CUDA_VISIBLE_DEVICES",
    ),
    "little shared memory": (gpu(count=8, shared_memory=2**26), "64 MiB", "--shm-size=1g"),
    "cuBLAS with wrong values": (
        gpu({**CUDA13, "nvidia-cublas": "13.1.0.3"}, capability="10.0"), "wrong", ">=13.2",
    ),
    "small pages": (tpu(huge_pages=False), "huge pages", "echo always"),
    "x64": (cpu(jax=sees("cpu", on=("jax_enable_x64",))), "64 bits", "unset JAX_ENABLE_X64"),
    "no jit": (cpu(jax=sees("cpu", on=("jax_disable_jit",))), "nothing", "unset JAX_DISABLE_JIT"),
    "no autotuning": (
        gpu(**uses("XLA_FLAGS", "--xla_gpu_autotune_level=0")), "not timed", "XLA_FLAGS",
    ),
    "no Triton": (
        gpu(**uses("XLA_FLAGS", "--xla_gpu_enable_triton_gemm=false")), "fused", "XLA_FLAGS",
    ),
    "no optimization": (
        cpu(**uses("XLA_FLAGS", "--xla_backend_optimization_level=0")), "hardly", "XLA_FLAGS",
    ),
    "dumps": (cpu(**uses("XLA_FLAGS", "--xla_dump_to=/tmp/x")), "written there", "XLA_FLAGS"),
    "fake devices beside a TPU": (
        tpu(**uses("XLA_FLAGS", "--xla_force_host_platform_device_count=8")),
        "without",
        "XLA_FLAGS",
    ),
    "little GPU memory": (
        gpu(**uses("XLA_PYTHON_CLIENT_MEM_FRACTION", ".3")), "only 30%", "unset XLA_PYTHON",
    ),
    "no preallocation": (
        gpu(**uses("XLA_PYTHON_CLIENT_PREALLOCATE", "false")), "fragments", "unset XLA_PYTHON",
    ),
    "the driver's allocator": (
        gpu(**uses("XLA_PYTHON_CLIENT_ALLOCATOR", "platform")), "slow", "unset XLA_PYTHON",
    ),
    "another CUDA first": (
        gpu(shadowing=("/opt/cuda/lib64",)), "/opt/cuda/lib64", "unset LD_LIBRARY_PATH",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", OTHERS)
def test_what_costs_time_or_memory_is_named(name):
    machine, what, do = OTHERS[name]
    (found,) = problems.problems(machine)
    assert what in found.what and do in found.do and not found.unusable


def test_several_problems_are_all_named_the_worst_first():
    found = problems.problems(
        gpu(BASE, seen=False, used=40 * 10**9, **uses("XLA_FLAGS", "--xla_dump_to=x"))
    )
    assert [each.unusable for each in found] == [True, False, False]
