"""The advice about accelerators that are unused, too small or in use by another process."""

import collections
import dataclasses
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from lora_jax import errors
from lora_jax.diagnosis import nvidia_smi, system, tpu_vm
from lora_jax.parallel import devices

GPU_FULL = (
    "RESOURCE_EXHAUSTED: Out of memory while trying to allocate 12.50GiB.\n"
    "[tf-allocator-allocation-error='']"
)
TPU_HELD = (
    "Unable to initialize backend 'tpu': ABORTED: The TPU is already in use by process with pid "
    "4711. Not attempting to load libtpu.so in this process."
)


def test_describe_counts_and_names_the_devices():
    assert devices.describe() == "8 × cpu (cpu)"


def machine(monkeypatch, **found):
    """Sets what is found beside what JAX sees."""
    read = system.System(packages={"jax": "0.10.2", "jaxlib": "0.10.2"}, **found)
    monkeypatch.setattr(devices.system, "read", lambda ask: dataclasses.replace(read, jax=ask()))


L4 = nvidia_smi.Found((nvidia_smi.Gpu("NVIDIA L4", "580.65.06"),), 1)


@pytest.mark.parametrize(
    ("found", "parts"),
    [
        ({"nvidia": L4}, ("NVIDIA L4", 'pip install "jax[cuda13]==0.10.2"')),
        ({"tpu": tpu_vm.Found(4)}, ("a TPU", 'pip install "jax[tpu]==0.10.2"')),
    ],
)
def test_an_accelerator_that_jax_does_not_see_is_reported(monkeypatch, found, parts):
    machine(monkeypatch, **found)
    assert devices.unused_accelerator() is None  # because JAX_PLATFORMS=cpu is set
    monkeypatch.delenv("JAX_PLATFORMS")
    warning = devices.unused_accelerator()
    assert all(part in warning for part in ("only the CPU", "lora-jax doctor", *parts))


def test_programs_compiled_for_an_accelerator_are_cached(tmp_path):
    code = (
        "import jax, lora_jax.parallel.devices as devices\n"
        "devices.keep_compiled()\n"
        "assert jax.config.jax_compilation_cache_dir is None  # a CPU\n"
        "jax.default_backend = lambda: 'gpu'\n"
        "devices.keep_compiled()\n"
        "hits = []\n"
        "jax.monitoring.register_event_listener(lambda name, **_: hits.append('hits' in name))\n"
        "jax.jit(lambda x: x * 2)(1.0)\n"
        "print(any(hits))"
    )
    environment = {name: value for name, value in os.environ.items()
                   if name != "JAX_COMPILATION_CACHE_DIR"}  # fmt: skip
    environment |= {
        "XDG_CACHE_HOME": str(tmp_path),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    for found in ("False", "True"):
        done = subprocess.run(
            [sys.executable, "-c", code], env=environment, capture_output=True, text=True
        )
        assert done.stdout.strip() == found, done
    assert any((tmp_path / "lora_jax/xla").iterdir())


def test_no_warning_without_an_accelerator_or_if_jax_uses_it(monkeypatch):
    monkeypatch.delenv("JAX_PLATFORMS")
    machine(monkeypatch)
    assert devices.unused_accelerator() is None
    machine(monkeypatch, nvidia=L4)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert devices.unused_accelerator() is None


def test_peak_memory_is_that_of_the_process_if_the_device_reports_none(monkeypatch):
    assert 2**24 < devices.peak_bytes() < 2**42

    class Device(collections.namedtuple("Device", "stats")):
        def memory_stats(self):
            return self.stats

    monkeypatch.setattr(jax, "local_devices", lambda: [Device({"peak_bytes_in_use": 123})])
    assert devices.peak_bytes() == 123


def test_a_job_too_large_for_the_device_is_explained():
    with pytest.raises(RuntimeError) as real:
        jnp.zeros(2**50).block_until_ready()  # 4 PiB
    explained = devices.explain(real.value)
    assert isinstance(explained, errors.UserError)
    message = str(explained)
    assert "4503599627370496 bytes wanted" in message and "8 × cpu" in message
    for way_out in ("--quant int4", "--batch-size", "--grad-accum", "--seq-len", "fsdp=N"):
        assert way_out in message


def test_the_wanted_and_the_free_memory_are_reported(monkeypatch):
    class Device:
        device_kind, platform = "NVIDIA L4", "gpu"

        def memory_stats(self):
            return {"bytes_limit": 22 * 2**30, "bytes_in_use": 20 * 2**30}

    for name in ("devices", "local_devices"):
        monkeypatch.setattr(jax, name, lambda: [Device()])
    message = str(devices.explain(RuntimeError(GPU_FULL)))
    assert "12.50GiB wanted, 2.00 GiB free of 22.00 GiB" in message
    assert "1 × NVIDIA L4 (gpu)" in message


def test_no_size_is_invented():
    assert "more wanted" in str(devices.explain(RuntimeError("Out of memory. Buy more. B")))


def test_a_device_in_use_is_explained():
    message = str(devices.explain(RuntimeError(TPU_HELD)))
    for part in ("expected:", "found:", "pid 4711", "to do:", "JAX_PLATFORMS=cpu"):
        assert part in message


def test_other_errors_are_not_explained():
    assert devices.explain(ValueError("shapes (3,) and (4,) do not match")) is None
