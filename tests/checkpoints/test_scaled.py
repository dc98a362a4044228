"""Weights of 8 bits with scales: read as their products, and as such used by all commands."""

import json

import cases
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import quantized_models
import safetensors.numpy
import test_storage
from test_storage import load, logits

from lora_jax import errors, lora
from lora_jax.checkpoints import loader, merge, model_folder, quantize
from lora_jax.lora import adapter as host
from lora_jax.quant import formats

UP = "model.layers.0.mlp.up_proj"
BLOCK = {"weight_block_size": [32, 64], "activation_scheme": "dynamic", "quant_method": "fp8"}
SCHEME = {"targets": ["Linear"], "weights": {"num_bits": 8}}
STATIC = {"weight_block_size": None, "activation_scheme": "static", "quant_method": "fp8"}
ROWS = {"quant_method": "compressed-tensors", "format": "float-quantized",
        "config_groups": {"group_0": SCHEME}}  # fmt: skip
# {name: (dtype of the codes, that of the scales, their shape for a weight, quantization_config)}
KINDS = {
    "blocks": (ml_dtypes.float8_e4m3fn, np.float32, lambda n, k: (-(-n // 32), -(-k // 64)), BLOCK),
    "powers of two": (ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e8m0fnu,
                      lambda n, k: (n // 32, k // 32), BLOCK),
    "rows": (ml_dtypes.float8_e4m3fn, ml_dtypes.bfloat16, lambda n, k: (n, 1), ROWS),
    "one": (ml_dtypes.float8_e5m2, np.float32, lambda n, k: (1,), ROWS),
    "a scalar": (ml_dtypes.float8_e4m3fn, np.float32, lambda n, k: (), ROWS),
    "a scalar, static": (ml_dtypes.float8_e4m3fn, ml_dtypes.bfloat16, lambda n, k: (), STATIC),
    "LLM.int8()": (np.int8, np.float32, lambda n, k: (n,),
                   {"quant_method": "bitsandbytes", "load_in_8bit": True}),
    "int8": (np.int8, ml_dtypes.bfloat16, lambda n, k: (n, 1), ROWS | {"format": "int-quantized"}),
}  # fmt: skip


def write(folder, kind, dtype="float32", change=lambda tensors: None):
    """A checkpoint of that kind; {module: its weight [K, N]}."""
    codes, of_scale, shape, declared = KINDS[kind]
    quantized_models.write(folder, "gptq")  # for what is not quantized
    rng = np.random.default_rng(0)
    tensors = {name: array for name, array in
               safetensors.numpy.load_file(folder / "model.safetensors").items()
               if name.rpartition(".")[2] == "weight"}  # fmt: skip
    name = {"fp8": "weight_scale_inv", "bitsandbytes": "SCB"}
    scale_name = name.get(declared["quant_method"], "weight_scale")
    factor = np.float32(1 / 127 if scale_name == "SCB" else 1)
    weights = {}
    for layer in range(quantized_models.CONFIG["num_hidden_layers"]):
        for name, (k, n) in quantized_models.LINEARS.items():
            module = f"model.layers.{layer}.{name}"
            weight = (rng.normal(0, 40, (n, k))).astype(codes)
            scale = np.asarray(2.0 ** rng.integers(-10, -6, shape(n, k))).astype(of_scale)
            tensors |= {f"{module}.weight": weight, f"{module}.{scale_name}": scale}
            blocks = scale.reshape((*scale.shape, 1, 1)[:2]).astype(np.float32)
            sizes = [-(-size // number) for size, number in zip((n, k), blocks.shape, strict=True)]
            expanded = np.kron(blocks, np.ones(sizes, np.float32))[:n, :k]
            weights[module] = (weight.astype(np.float32) * expanded * factor).T
    tensors[f"{UP}.input_scale"] = np.ones(1, np.float32)
    tensors[f"{UP}.activation_scale"] = np.ones((), ml_dtypes.bfloat16)
    tensors["model.layers.1.self_attn.k_scale"] = np.ones(1, np.float32)
    change(tensors)
    (folder / "model.safetensors").write_bytes(quantized_models.bytes_of(tensors))
    config = quantized_models.CONFIG | {"dtype": dtype, "quantization_config": declared}
    (folder / "config.json").write_text(json.dumps(config))
    return weights


@pytest.mark.parametrize("kind", KINDS)
def test_a_weight_is_the_product_of_its_codes_and_scales(kind, tmp_path):
    weights = write(tmp_path, kind)
    test_storage.assert_same_weights(load(tmp_path), weights)
    assert "14 weights are stored in" in " ".join(model_folder.notes(tmp_path))


def test_a_mesh_reads_its_parts(tmp_path):
    weights = write(tmp_path, "blocks")
    test_storage.assert_same_weights(load(tmp_path, "none", mesh=(1, 2, 2)), weights)


def test_quant_rounds_the_products(tmp_path):
    """As of the same weights in a dense checkpoint; and so does a copy that `quantize` writes."""
    write(tmp_path / "narrow", "rows", "bfloat16")
    model = load(tmp_path / "narrow", "none")
    tensors = {f"{name}.weight": weight.T.astype(ml_dtypes.bfloat16)
               for name, weight in test_storage.dense(model).items()}  # fmt: skip
    found = load(tmp_path / "narrow", "int4").model.layers.mlp.up_proj.packed
    copy = quantize.plan(tmp_path / "narrow", "int4")
    list(quantize.write(tmp_path / "narrow", tmp_path / "copy", copy))
    again = load(tmp_path / "copy").model.layers.mlp.up_proj.packed
    one = formats.quantize(jnp.asarray(tensors[f"{UP}.weight"].T), "int4")
    for whole in (found, again):
        jax.tree.map(lambda a, b: np.testing.assert_array_equal(a[0], b), whole, one)


def test_a_merge_writes_a_dense_model_in_the_dtype_of_the_config(tmp_path):
    weights = write(tmp_path / "narrow", "blocks", "bfloat16")
    adapter = host.Adapter(lora.LoRAConfig(), {})
    plan = merge.plan(tmp_path / "narrow", adapter)
    (tmp_path / "merged").mkdir()
    list(merge.write(tmp_path / "narrow", tmp_path / "merged", plan))
    assert "quantization_config" not in json.loads((tmp_path / "merged/config.json").read_text())
    tensors = safetensors.numpy.load_file(tmp_path / "merged/model.safetensors")
    assert tensors.keys() == {name for name in tensors if name.endswith(".weight")}
    for name, weight in weights.items():
        found = tensors[f"{name}.weight"]
        assert found.dtype == ml_dtypes.bfloat16
        np.testing.assert_array_equal(found, weight.T.astype(ml_dtypes.bfloat16))


@pytest.mark.parametrize(
    "change, found",
    [
        ({"weight_scale": np.ones((3, 1), np.float32)}, r"shape \[3, 1\]"),
        ({"weight_scale": np.ones((128, 1), np.int32)}, "dtype I32"),
        ({"weight_zero_point": np.ones((128, 1), np.int8)}, "is not 0"),
        ({"weight_format": np.full((), 2, np.uint8)}, "is not 0"),
        ({"weight_scale": np.full(1, np.nan, np.float32)}, "NaN"),
        ({"weight_scale_inv": np.ones((128, 1), np.float32)}, "scales of one weight"),
        ({"weight_scale": None}, "has dtype I8"),
    ],
)
def test_what_does_not_belong_together_is_named(change, found, tmp_path):
    def changed(tensors):
        for name, array in change.items():
            tensors[f"{UP}.{name}"] = array
            if array is None:
                del tensors[f"{UP}.{name}"]

    write(tmp_path, "int8", change=changed)
    with pytest.raises(errors.UserError, match=f"(?s){UP}.*{found}|{found}.*{UP}"):
        loader.load(tmp_path)


def test_zero_points_of_0_are_nothing(tmp_path):
    zero = np.zeros((128, 1), np.int8)
    write(tmp_path, "int8", change=lambda t: t.update({f"{UP}.weight_zero_point": zero}))
    loader.load(tmp_path)


@pytest.mark.parametrize("bits", [3, *cases.long(8)])
def test_codes_of_mlx_lm_of_other_than_4_bits_are_rounded_like_dense_weights(bits, tmp_path):
    quantized_models.write(tmp_path / "four", "mlx")
    folder, rng, weights = tmp_path / "other", np.random.default_rng(0), {}
    tensors = safetensors.numpy.load_file(tmp_path / "four/model.safetensors")
    for name in [name for name in tensors if name.endswith(".scales")]:
        module, scale, bias = (name.removesuffix(".scales"), tensors[name],
                               tensors[name.replace("scales", "biases")])  # fmt: skip
        codes = rng.integers(0, 2**bits, (len(scale), 32 * scale.shape[1]))
        stream = (codes[..., None] >> np.arange(bits)) & 1  # the bits of a row, the lowest first
        words = np.packbits(stream.reshape(len(codes), -1), axis=1, bitorder="little")
        tensors[f"{module}.weight"] = words.view(np.uint32)
        scale, bias = (np.repeat(each.astype(np.float32), 32, axis=1) for each in (scale, bias))
        weights[module] = (codes * scale + bias).astype(np.float32).T
    folder.mkdir()
    safetensors.numpy.save_file(tensors, folder / "model.safetensors")
    config = json.loads((tmp_path / "four/config.json").read_text())
    config["quantization_config"]["bits"] = bits
    (folder / "config.json").write_text(json.dumps(config))

    test_storage.assert_same_weights(load(folder), weights)
    one = formats.quantize(jnp.asarray(weights[UP]), "int8")
    for mesh in ((1, 1, 1), (1, 2, 2)):
        found = load(folder, "int8", mesh=mesh).model.layers.mlp.up_proj.packed
        jax.tree.map(lambda a, b: np.testing.assert_array_equal(a[0], b), found, one)
    merged = tmp_path / "merged"
    merged.mkdir()
    plan = merge.plan(folder, host.Adapter(lora.LoRAConfig(), {}), quantization="int8")
    list(merge.write(folder, merged, plan))
    expected = np.asarray(formats.dequantize(one, "int8", 64).T, np.float16)
    whole = safetensors.numpy.load_file(merged / "model.safetensors")
    np.testing.assert_array_equal(whole[f"{UP}.weight"], expected)


@pytest.mark.parametrize("name", ["ct-w4a16", *cases.long("mlx-4bit", "ct-fp8", "ct-w8a16")])
def test_logits_are_those_of_the_programs_that_wrote_the_files(name):
    folder = test_storage.GOLDEN / "quantized" / name
    with np.load(folder.with_suffix(".npz")) as golden:
        ids, expected = golden["input_ids"], golden["logits"]
    for how in (None, "none"):
        found = logits(load(folder, how), ids)
        np.testing.assert_allclose(found, expected, atol=1e-5 * abs(expected).max())
    if name == "mlx-4bit":  # with an embedding of 4 bits
        assert load(folder).model.layers.mlp.up_proj.fmt == "int4"
