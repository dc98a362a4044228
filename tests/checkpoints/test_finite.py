"""Weights that are NaN or infinite: all of them are named, wherever a checkpoint is read."""

import json
import pathlib
import shutil

import cases
import cli
import ml_dtypes
import numpy as np
import pytest
import quantized_models
import safetensors.numpy

from lora_jax import errors, lora
from lora_jax.checkpoints import finite, loader, quantize, safetensors_files
from lora_jax.parallel import mesh as sharding

MODELS = pathlib.Path(__file__).parents[1] / "golden" / "models"
NORM, UP = "model.norm.weight", "model.layers.1.mlp.up_proj.weight"


def changed(tmp_path, edit, source=MODELS / "llama"):
    """A copy of a model with edited tensors."""
    folder = pathlib.Path(shutil.copytree(source, tmp_path / "model"))
    tensors = safetensors.numpy.load_file(folder / "model.safetensors")
    edit(tensors)
    safetensors.numpy.save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def break_two(tensors):
    tensors[NORM][5] = np.nan
    tensors[UP][3, 4] = tensors[UP][0, 0] = -np.inf


@pytest.mark.parametrize("dtype", ["float32", "float16", "float64", "bfloat16", "float8_e5m2"])
def test_every_kind_of_float_is_counted(dtype):
    array = np.zeros((3, 4), ml_dtypes.finfo(dtype).dtype)
    info = ml_dtypes.finfo(dtype)
    array[0, :3] = info.max, info.min, info.smallest_subnormal
    assert finite.count(array) == 0
    array[1, 1], array[2, 0], array[2, 3] = np.nan, np.inf, -np.inf
    assert finite.count(array) == finite.count(array.T) == 3


def test_integers_and_long_arrays_are_counted():
    assert finite.count(np.full(3, 255, np.uint8)) == 0
    many = np.zeros(2 * finite._CHUNK + 3, np.float32)
    many[[0, finite._CHUNK, -1]] = np.nan
    assert finite.count(many) == 3


@pytest.mark.parametrize("quantization", ["none", "int4", *cases.long("nf4-dq")])
def test_loading_names_every_tensor(tmp_path, quantization):
    folder = changed(tmp_path, break_two)
    with pytest.raises(errors.UserError, match="finite weights") as error:
        loader.load(folder, quantization=quantization)
    file = folder / "model.safetensors"
    assert [line.strip() for line in str(error.value).splitlines() if "values" in line] == [
        f"found:    {file}: 2 of 1536 values in {UP} are NaN or infinite",
        f"{file}: 1 of 32 values in {NORM} is NaN or infinite",
    ]


@pytest.mark.long
def test_loading_on_a_mesh_names_them(tmp_path):
    folder = changed(tmp_path, break_two)
    mesh = sharding.make_mesh({"data": 1, "fsdp": 2, "tensor": 2})
    for quantization in ("none", "int4"):
        with pytest.raises(errors.UserError, match=f"2 of 1536 values in {UP}"):
            loader.load(folder, quantization=quantization, mesh=mesh)


def test_weights_to_compute_pissa_from_are_named(tmp_path):
    folder = changed(tmp_path, break_two)
    principal = lora.Principal(lora.LoRAConfig(rank=2, init_lora_weights="pissa"))
    with pytest.raises(errors.UserError, match=UP):
        loader.load(folder, quantization="int4", residual=principal.take)


@pytest.mark.parametrize("method", ["gptq", *cases.long("awq")])
def test_scales_that_are_not_finite_are_named(tmp_path, method):
    folder = tmp_path / "packed"
    quantized_models.write(folder, method)
    name = "model.layers.0.mlp.down_proj.scales"
    file = folder / "model.safetensors"
    tensors = safetensors.numpy.load_file(file)
    tensors[name][0, 1] = np.inf
    safetensors.numpy.save_file(tensors, file)
    for quantization in (None, "none"):
        with pytest.raises(errors.UserError, match=f"1 of 256 values in {name} is NaN"):
            loader.load(folder, quantization=quantization)


@pytest.mark.parametrize("name", [*cases.long("absmax"), "nested_absmax"])
def test_scales_of_bitsandbytes_that_are_not_finite_are_named(tmp_path, name):
    source = MODELS.parent / "quantized" / f"stories260K-bnb-nf4{'-dq' * (name != 'absmax')}"
    name = f"model.layers.0.mlp.down_proj.weight.{name}"
    folder = changed(tmp_path, lambda tensors: tensors[name].__setitem__(0, np.nan), source)
    with pytest.raises(errors.UserError, match=f"1 of .* values in {name} is NaN"):
        loader.load(folder)


def test_a_copy_and_a_quantized_one_name_them(tmp_path):
    folder = changed(tmp_path, break_two)
    stored = safetensors_files.tensors(folder)
    for tensor in (NORM, UP):
        with pytest.raises(errors.UserError, match=tensor):
            finite.check(stored[tensor].value(), stored[tensor])
    with pytest.raises(errors.UserError, match="NaN or infinite"):
        list(quantize.write(folder, tmp_path / "copy", quantize.plan(folder, "int8")))
    assert not (tmp_path / "copy").exists()


def test_what_is_not_read_may_hold_anything(tmp_path):
    """Buffers of older versions, heads of other tasks, and a head beside a tied embedding."""

    def add(tensors):
        mask = np.full((4, 4), -np.inf, np.float32)
        tensors["model.layers.0.self_attn.attn.bias"] = mask
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = mask[0]
        tensors["score.weight"] = mask
        assert "lm_head.weight" not in tensors
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()

    folder = changed(tmp_path, add, MODELS / "llama_tied_hd16")
    loader.load(folder, quantization="int8")
    list(quantize.write(folder, tmp_path / "copy", quantize.plan(folder, "int8")))


@pytest.mark.parametrize("verb", ["generate", "train", "quantize"])
def test_commands_end_with_one_error(tmp_path, verb):
    """`serve` and `chat` open their model as `generate` does, and `merge` loads it first."""

    def spoil(tensors):
        tensors[NORM][:] = np.nan

    flags = {
        "generate": ("--prompt", "Once"),
        "train": ("--dataset", data(tmp_path), "--max-steps", 1),
        "quantize": (),
    }[verb]
    flags += ("--output-dir", tmp_path / "out") if verb != "generate" else ()
    folder = changed(tmp_path, spoil, cli.BASE)
    message = cli.refused(verb, "--model", folder, *flags)
    assert f"64 of 64 values in {NORM} are NaN or infinite" in message


def data(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps({"prompt": "Once", "completion": " upon a time"}) + "\n")
    return path
