"""The tests marked `device` on the machine's own device: LORA_JAX_TEST_DEVICE=1 pytest -m device.

The same tests run on CPUs in the whole suite, where kernels of other platforms are interpreted.
"""

import contextlib
import os
import pathlib
from collections.abc import Iterator

import jax
import pytest

ASKED = os.environ.get("LORA_JAX_TEST_DEVICE") == "1"
# Of a kernel's result, relative to the size of what it is compared with.
TOLERANCE = {"float32": 2e-5, "bfloat16": 2e-2}


def check(config: pytest.Config) -> None:
    """Raises: UsageError where `-m device` would test another device than the user thinks."""
    only = config.option.markexpr == "device"
    if only and not ASKED:
        raise pytest.UsageError(
            "expected LORA_JAX_TEST_DEVICE=1 with -m device: without it, the tests run on the CPU"
        )
    if ASKED and not (only and not getattr(config.option, "numprocesses", None)):
        raise pytest.UsageError(
            "expected -m device -n 0 with LORA_JAX_TEST_DEVICE=1: one process has the device"
        )


def leaves_out(path: pathlib.Path) -> bool:
    """Whether the tier has no test in this file: some want more devices when they are imported."""
    return ASKED and path.name.startswith("test_") and "mark.device" not in path.read_text()


def interprets(platform: str) -> bool:
    """Whether a kernel of `platform` is interpreted: on a CPU. Skips the test on other devices."""
    here = jax.devices()[0]
    if here.platform == platform:
        return False
    if here.platform != "cpu":
        pytest.skip(f"a kernel for a {platform}, on a {here.platform}")
    return True


def begin() -> None:
    """Has a device multiply float32 in float32, as a CPU does, and not in TF32 or bfloat16."""
    if ASKED:
        jax.config.update("jax_default_matmul_precision", "highest")


@contextlib.contextmanager
def precision(request: pytest.FixtureRequest) -> Iterator[None]:
    """Tests of bfloat16 keep the precision that users run with."""
    values = getattr(getattr(request.node, "callspec", None), "params", {}).values()
    is_bfloat16 = any(isinstance(value, str) and value == "bfloat16" for value in values)
    with jax.default_matmul_precision("default") if is_bfloat16 else contextlib.nullcontext():
        yield
