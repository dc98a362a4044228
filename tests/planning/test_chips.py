import importlib.util

import pytest

from lora_jax import errors
from lora_jax.planning import chips


def test_a_name_is_a_chip_and_a_count():
    assert chips.parse("tpu:v5e-4") == ("tpu:v5e", 4)
    assert chips.parse("gpu:h100") == chips.parse("gpu:h100-1") == ("gpu:h100", 1)
    assert chips.parse("gpu:h100-8").platform == "gpu"


@pytest.mark.parametrize(
    "name", ["h100", "gpu:h101", "tpu:v5e-3", "tpu:v5e-0", "gpu:h100-", "gpu:v5e", "tpu:v5e:4", ""]
)
def test_an_unknown_name_lists_the_known_ones(name):
    with pytest.raises(errors.UserError) as caught:
        chips.parse(name)
    message = str(caught.value)
    assert repr(name) in message
    assert all(chip in message for chip in chips.PEAKS)
    assert "1, 2, 4, 8, 16" in message


@pytest.mark.parametrize("chip", chips.PEAKS)
def test_every_chip_has_peaks_of_the_right_order(chip):
    flops, bandwidth, memory = chips.parse(chip).peaks
    assert 7e13 < flops < 1e15
    assert 2e11 < bandwidth < 5e12
    assert 1e10 < memory < 2e11
    # A chip can do about a hundred or a few hundred operations for each byte that it reads.
    assert 70 < flops / bandwidth < 1000


@pytest.mark.parametrize("platform", chips.COUNTS)
def test_a_topology_has_the_right_number_of_chips(platform):
    for count, topology in chips.COUNTS[platform].items():
        product = 1
        for extent in topology.split("x"):
            product *= int(extent)
        assert product == count


@pytest.mark.parametrize("name", ["tpu:v5e-4", "gpu:h100"])
def test_a_missing_compiler_is_reported_with_what_to_install(name, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda module: None)
    with pytest.raises(errors.UserError, match=r'pip install "lora-jax\[aot\]"') as caught:
        chips.devices(name)
    assert name in str(caught.value)


def test_every_gpu_has_a_description_for_the_compiler():
    for chip in chips.PEAKS:
        if chip.startswith("gpu"):
            text = chips.target_config(chip)
            assert text.count("{") == text.count("}")
            assert f"device_memory_size: {chips.PEAKS[chip].memory:.0f}\n" in text


def test_cpu_devices_are_named_by_their_number():
    assert chips.parse("cpu:8") == ("cpu", 8) and chips.parse("cpu:8").peaks is None
    assert len(chips.devices("cpu:8")) == 8
    with pytest.raises(errors.UserError, match="cpu:N"):
        chips.parse("cpu:0")


def test_a_chip_is_recognized_by_the_kind_that_jax_reports():
    assert chips.of_kind("gpu", "NVIDIA H100 80GB HBM3", 8) == ("gpu:h100", 8)
    for kinds, chip in (
        (("TPU v5 lite", "TPU v5e"), "tpu:v5e"),
        (("TPU v5", "TPU v5p"), "tpu:v5p"),
        (("TPU v6 lite", "TPU v6e"), "tpu:v6e"),
    ):
        assert [chips.of_kind("tpu", kind, 4) for kind in kinds] == 2 * [(chip, 4)]
    assert chips.of_kind("gpu", "NVIDIA A100-PCIE-40GB", 1) == ("gpu:a100_40gb", 1)
    assert chips.of_kind("gpu", "NVIDIA T4", 1).peaks is None


def test_jax_uses_three_quarters_of_a_gpu_and_all_of_a_tpu():
    names = ("gpu:rtx4080", "tpu:v5e", "cpu:2")
    assert [chips.parse(name).usable_bytes for name in names] == [12e9, 16e9, None]


def test_every_chip_has_an_interconnect():
    assert chips.INTERCONNECT.keys() == chips.PEAKS.keys()
