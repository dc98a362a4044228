"""Eight fake CPU devices, strict arithmetic and one compilation cache for every test.

With LORA_JAX_TEST_DEVICE=1, the machine's own devices; see device_tier.py.
"""

import atexit
import os
import pathlib
import shutil
import tempfile

import jaxlib.version

# Before jax is imported anywhere.
if os.environ.get("LORA_JAX_TEST_DEVICE") != "1":
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["XLA_FLAGS"] = (
        os.environ.get("XLA_FLAGS", "")
        + " --xla_force_host_platform_device_count=8"
        # The suite compiles much and computes little: in half the time with these.
        + " --xla_backend_optimization_level=0"
        # jaxlib 0.11.1 has no such flag, and XLA ends the process for one that it does not know.
        + " --xla_cpu_use_fusion_emitters=false" * (jaxlib.version.__version_info__ < (0, 11, 1))
        + " --xla_cpu_parallel_codegen_split_count=1"
        # jaxlib 0.10.2: two fake devices may run independent collectives in different orders and
        # wait for each other for ever.
        + " --xla_cpu_enable_concurrency_optimized_scheduler=false"
    )
os.environ["HF_HUB_OFFLINE"] = "1"
# XLA copies from pass to pass where each operation was called: a tenth of a step's compiling.
os.environ["JAX_TRACEBACK_IN_LOCATIONS_LIMIT"] = "0"
# Pytest's workers and what tests start inherit it. One that is given is kept for the next run.
if not {"PYTEST_XDIST_WORKER", "JAX_COMPILATION_CACHE_DIR"} & set(os.environ):
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp()
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)

os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"

import device_tier
import eager
import hypothesis
import jax
import pytest
import thrift
import typecheck

hypothesis.settings.register_profile(
    "suite", max_examples=200, deadline=None, derandomize=True, database=None
)
hypothesis.settings.register_profile("long", max_examples=500, deadline=None, database=None)
hypothesis.settings.load_profile("suite")

jax.config.update("jax_numpy_rank_promotion", "raise")
device_tier.begin()
if not device_tier.ASKED:
    eager.begin()
thrift.begin()
typecheck.begin()

# A module stays on one worker, for what its tests share. The longest are begun first, so that the
# workers end together.
LONGEST = (
    "run",
    "mesh",
    "engine",
    "resume",
    "docs",
    "processes",
    "linen_models",
    "models_of_others",
    "proof",
    "plan",
    "step",
    "peft",
    "linen",
    "ahead",
    "sites",
    "adapter_jobs",
    "loader",
    "explicit_mesh",
    "int4_matmul",
    "kernels",
    "merge",
    "structure",
    "storage",
    "bank",
    "models",
    "cached_attention",
    "sampling",
    "hub",
    "text",
    "formats",
    "dpo",
    "lora",
)


def pytest_configure(config):
    device_tier.check(config)
    thrift.do_not_collect(config)


def pytest_ignore_collect(collection_path):
    return True if device_tier.leaves_out(collection_path) else None


def pytest_collection_modifyitems(items):
    order = {f"test_{name}.py": rank for rank, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(pathlib.Path(item.path).name, len(order)))


@pytest.fixture(autouse=device_tier.ASKED)
def device_precision(request):
    with device_tier.precision(request):
        yield


@pytest.fixture(scope="session")
def parent(tmp_path_factory):
    """A process whose forks run the scripts."""
    import forks

    with forks.parent(tmp_path_factory.mktemp("parent")) as started:
        yield started
