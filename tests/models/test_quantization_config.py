"""quantization_config: what --quant means for a quantized checkpoint, and what is refused."""

import pytest

from lora_jax import errors
from lora_jax.models import quantization_config


def of_weights(**changed):
    """A quantization_config of compressed-tensors."""
    weights = {
        "num_bits": 4,
        "type": "int",
        "strategy": "group",
        "group_size": 128,
        "symmetric": True,
        "actorder": None,
        "block_structure": None,
        "dynamic": False,
    }
    scheme = {"targets": ["Linear"], "weights": weights | changed, "input_activations": None}
    return {"quant_method": "compressed-tensors", "format": "pack-quantized",
            "config_groups": {"group_0": scheme}, "ignore": ["lm_head", "re:.*mlp.gate$"],
            "kv_cache_scheme": None, "quantization_status": "compressed"}  # fmt: skip


PACKED = of_weights()


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


def test_layouts_of_compressed_tensors():
    found = quantization_config.parse(PACKED, "config.json")
    assert (found.fmt, found.group, found.zero_points, found.act_order) == (
        "int4",
        128,
        False,
        False,
    )
    assert found.skips("lm_head") and found.skips("model.layers.0.mlp.gate")
    assert not found.skips("model.layers.0.mlp.gate_proj")
    by_column = of_weights(strategy="channel", group_size=None, actorder="group", symmetric=False)
    found = quantization_config.parse(by_column, "config.json")
    assert (found.group, found.zero_points, found.act_order) == (-1, True, True)
    assert not quantization_config.parse(of_weights(num_bits=8), "config.json").stays_packed


@pytest.mark.parametrize(
    "raw",
    [
        {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic"},
        {"quant_method": "bitsandbytes", "load_in_8bit": True},
        {"load_in_8bit": True},
        {"quant_method": "fbgemm_fp8", "modules_to_not_convert": ["lm_head"]},
        of_weights(num_bits=8, type="float", strategy="channel") | {"format": "float-quantized"},
        of_weights(num_bits=8)
        | {"format": "int-quantized", "sparsity_config": {"format": "dense"}},
    ],
)
def test_weights_of_8_bits_with_scales_are_dense_ones(raw):
    assert quantization_config.parse(raw, "config.json") is None


def test_a_model_of_mlx_lm_has_4_bits_or_becomes_dense():
    four = quantization_config.parse({"bits": 4, "group_size": 64}, "config.json")
    assert quantization_config.choose(None, four, "folder") == "int4"
    own = {"model.layers.0.mlp.up_proj": {"bits": 6, "group_size": 64}, "lm_head": False,
           "model.layers.1.mlp.up_proj": {"bits": 4, "group_size": 64}}  # fmt: skip
    mixed = quantization_config.parse({"bits": 4, "group_size": 64} | own, "config.json")
    assert [mixed.skips(name) for name in own] == [True, True, False]
    eight = quantization_config.parse({"bits": 8, "group_size": 64}, "config.json")
    assert quantization_config.choose(None, eight, "folder") == "none"
    assert quantization_config.choose("nf4", eight, "folder") == "nf4"


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
          ("aqlm", "hqq", "mxfp4", "torchao", "auto-round")),
        ({"bits": 4, "group_size": 64, "mode": "mxfp4"}, "mode 'mxfp4'"),
        ({"quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized"}, "nvfp4"),
        (PACKED | {"ignore": ["re:("]}, "no regular expression"),
        (PACKED | {"transform_config": {"config_groups": {"u": {}}}}, "transform_config"),
        (of_weights(num_bits=3), "3 bits"),
        (of_weights(strategy="tensor"), "strategy 'tensor'"),
        (PACKED | {"config_groups": {str(n): {"weights": {"group_size": n}} for n in (32, 64)}},
         "different settings"),
        ({"quant_method": "bitsandbytes"}, "neither load_in_4bit nor load_in_8bit"),
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
