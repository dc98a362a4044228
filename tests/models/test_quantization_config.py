"""quantization_config: what --quant means for a quantized checkpoint, and what is refused."""

import pytest

from lora_jax import errors
from lora_jax.models import quantization_config


@pytest.mark.parametrize(
    ("stored", "asked", "expected"),
    [
        (None, None, "none"),
        (None, "int4", "int4"),
        ("nf4", None, "nf4"),
        ("nf4", "none", "none"),
        ("nf4", "nf4", "nf4"),
        ("nf4-dq", "nf4", "nf4-dq"),
        ("nf4-dq", "nf4-dq", "nf4-dq"),
        ("int4-g64", "int4-g64", "int4-g64"),
        ("nf4", "nf4-dq", None),
        ("nf4", "fp4", None),
        ("nf4", "int4", None),
        ("int4-g64", "int4", None),
        ("int4", "int8", None),
    ],
)
def test_quant_of_a_quantized_checkpoint(stored, asked, expected):
    stored = stored and quantization_config.Quantization("gptq", stored)
    if expected:
        assert quantization_config.choose(asked, stored, "folder") == expected
        return
    with pytest.raises(errors.UserError, match=rf"found:\s+--quant {asked}\s.*gptq"):
        quantization_config.choose(asked, stored, "folder")


def test_older_models_of_mlx_lm_are_known_as_quantized():
    of_mlx = {"quantization": {"bits": 4, "group_size": 64}}
    assert quantization_config.declared(of_mlx) == of_mlx["quantization"]
    assert quantization_config.declared({"quantization": "none"}) is None
    other = {"quant_method": "gptq"}
    assert quantization_config.declared(of_mlx | {"quantization_config": other}) == other


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        *(({"quant_method": name}, name) for name in
          ("fp8", "compressed-tensors", "aqlm", "hqq", "mxfp4", "torchao", "auto-round")),
        ({"bits": 4, "group_size": 64}, "mlx-lm"),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "load_in_8bit"),
        ({"load_in_8bit": True}, "load_in_8bit"),
        ({"quant_method": "gptq", "bits": 8, "group_size": 128}, "8 bits"),
        ({"quant_method": "gptq", "bits": 4, "group_size": 128, "checkpoint_format": "marlin"},
         "marlin"),
        ({"quant_method": "gptq", "bits": 4, "group_size": 7}, "group_size 7"),
        ({"quant_method": "awq", "bits": 3, "group_size": 128}, "3 bits"),
        ({"quant_method": "awq", "bits": 4, "group_size": 128, "version": "GEMV"}, "gemv"),
        ({"quant_method": "lora_jax", "format": "int4", "version": 2}, "version 2"),
        ({"quant_method": "lora_jax", "format": "nf4", "version": 1}, "format 'nf4'"),
        ({}, "None"),
    ],
)  # fmt: skip
def test_what_cannot_be_read_is_refused_by_name(raw, message):
    with pytest.raises(errors.UserError, match=r"config\.json") as raised:
        quantization_config.parse(raw, "config.json")
    assert message in raised.value.found
