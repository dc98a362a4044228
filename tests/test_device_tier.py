"""The device tier: what it refuses, skips and leaves out."""

import types

import device_tier
import jax
import pytest


@pytest.mark.parametrize(
    ("asked", "markexpr", "numprocesses", "refused"),
    [
        (False, "not aot and not long", 2, None),
        (True, "device", 0, None),
        (True, "device", None, None),  # without pytest-xdist
        (False, "device", 0, "LORA_JAX_TEST_DEVICE=1"),
        (True, "device", 2, "-n 0"),
        (True, "not aot and not long", 0, "-m device"),
    ],
)
def test_one_process_with_both_the_marker_and_the_variable(
    asked, markexpr, numprocesses, refused, monkeypatch
):
    monkeypatch.setattr(device_tier, "ASKED", asked)
    option = types.SimpleNamespace(markexpr=markexpr, numprocesses=numprocesses)
    config = types.SimpleNamespace(option=option)
    if refused is None:
        device_tier.check(config)
    else:
        with pytest.raises(pytest.UsageError, match=refused):
            device_tier.check(config)


def test_kernels_are_interpreted_on_cpus_only(monkeypatch):
    assert device_tier.interprets("tpu") and device_tier.interprets("gpu")
    monkeypatch.setattr(jax, "devices", lambda: [types.SimpleNamespace(platform="gpu")])
    assert not device_tier.interprets("gpu")
    with pytest.raises(pytest.skip.Exception, match="kernel for a tpu, on a gpu"):
        device_tier.interprets("tpu")


def test_files_without_tests_of_the_tier_are_not_imported(monkeypatch, tmp_path):
    own, other = tmp_path / "test_own.py", tmp_path / "test_other.py"
    own.write_text("@pytest.mark.device\n")
    other.write_text("raise ValueError\n")
    assert not device_tier.leaves_out(other)
    monkeypatch.setattr(device_tier, "ASKED", True)
    assert device_tier.leaves_out(other) and not device_tier.leaves_out(own)


@pytest.mark.parametrize(("dtype", "expected"), [("float32", None), ("bfloat16", "default")])
def test_bfloat16_keeps_the_precision_of_users(dtype, expected, request):
    with device_tier.precision(request):
        assert jax.config.jax_default_matmul_precision == expected
