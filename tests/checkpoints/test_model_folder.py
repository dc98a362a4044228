"""Model folders as people have them: names, heads, dtypes and files that transformers takes."""

import json
import pathlib
import shutil

import ml_dtypes
import numpy as np
import pytest
import quantized_models
import safetensors.numpy
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st

from lora_jax import errors, hub
from lora_jax.checkpoints import inventory, loader, merge, model_folder, quantize, writer
from lora_jax.lora import adapter as host
from lora_jax.lora import config as lora_config
from lora_jax.parallel import mesh as sharding

MODELS = pathlib.Path(__file__).parents[1] / "golden" / "models"
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
BIAS = "model.layers.0.self_attn.q_proj.bias"


def written(folder, tensors, name="llama", **changes):
    """A folder with these tensors and the changed config.json of a golden model; None deletes."""
    folder.mkdir(exist_ok=True)
    raw = json.loads((MODELS / name / "config.json").read_text()) | changes
    raw = {key: value for key, value in raw.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(raw))
    safetensors.numpy.save_file(tensors, folder / "model.safetensors")
    return folder


def tensors_of(name="llama"):
    return safetensors.numpy.load_file(MODELS / name / "model.safetensors")


def arrays(folder, **how):
    mesh = sharding.make_mesh(dict.fromkeys(sharding.AXES, 1))
    model = loader.load(folder, mesh=mesh, **how)
    return {".".join(map(str, path)): np.asarray(value[...])
            for path, value in nnx.to_flat_state(nnx.state(model))}  # fmt: skip


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, array in found.items():
        assert array.dtype == expected[name].dtype, name
        np.testing.assert_array_equal(array, expected[name], err_msg=name)


# Names


@pytest.mark.parametrize(
    "rename",
    [
        lambda name: f"_orig_mod.{name}",
        lambda name: f"module.{name}",
        lambda name: f"module._orig_mod.module.{name}",
        lambda name: f"base_model.model.{name}",
        lambda name: f"model.{name}",
        lambda name: name.removeprefix("model."),
        lambda name: name.replace("layers.0.", "layers.0._fsdp_wrapped_module."),
        lambda name: name.replace(".mlp.", "._checkpoint_wrapped_module.mlp._orig_mod."),
        lambda name: name.replace("lm_head.", "lm_head._fsdp_wrapped_module."),
    ],
)
def test_names_of_wrappers_are_left_out(tmp_path, rename):
    tensors = {rename(name): tensor for name, tensor in tensors_of().items()}
    found = model_folder.tensors(written(tmp_path, tensors), model_folder.config(tmp_path))
    assert found.keys() == tensors_of().keys()
    for name, tensor in tensors_of().items():
        assert found[name].name == name
        np.testing.assert_array_equal(found[name].value(), tensor)
    assert model_folder.notes(tmp_path) == []


def test_a_wrapped_model_is_loaded_and_written_under_its_own_names(tmp_path):
    tensors = {f"_orig_mod.{name}": tensor for name, tensor in tensors_of().items()}
    folder = written(tmp_path / "base", tensors)
    assert_same(arrays(folder), arrays(MODELS / "llama"))
    list(quantize.write(folder, tmp_path / "q", quantize.plan(folder, "int8")))
    names = safetensors.numpy.load_file(tmp_path / "q" / "model.safetensors").keys()
    assert HEAD in names and not any("_orig_mod" in name for name in names)


def test_two_tensors_of_one_name_are_an_error(tmp_path):
    tensors = tensors_of() | {f"module.{HEAD}": tensors_of()[HEAD]}
    with pytest.raises(errors.UserError, match=f"{HEAD} and module.{HEAD}"):
        model_folder.config(written(tmp_path, tensors))


# The head


@pytest.fixture(scope="module")
def own_head(tmp_path_factory):
    """A folder that says tied, and stores a head of its own."""
    tensors = tensors_of("llama_tied_hd16")
    tensors[HEAD] = tensors[EMBEDDING][::-1].copy()
    return written(tmp_path_factory.mktemp("own") / "base", tensors, "llama_tied_hd16")


def test_a_head_that_differs_from_a_tied_embedding_is_kept(own_head):
    config = model_folder.config(own_head)
    assert not config.tie_word_embeddings
    found = arrays(own_head)
    np.testing.assert_array_equal(
        found["lm_head.kernel"].T, found["model.embed_tokens.embedding"][::-1]
    )
    (note,) = model_folder.notes(own_head)
    assert "lm_head.weight differs from the embedding" in note


def test_a_head_of_its_own_is_kept_by_quantize_and_merge(own_head, tmp_path):
    list(quantize.write(own_head, tmp_path / "q", quantize.plan(own_head, "int8")))
    plan = merge.plan(own_head, host.Adapter(lora_config.LoRAConfig(), {}, {}))
    with writer.new_folder(tmp_path / "m", 0) as into:
        list(merge.write(own_head, into, plan))
    expected = tensors_of("llama_tied_hd16")[EMBEDDING][::-1]
    for folder in (tmp_path / "q", tmp_path / "m"):
        raw = json.loads((folder / "config.json").read_text())
        assert raw["tie_word_embeddings"] is False
        head = safetensors.numpy.load_file(folder / "model.safetensors")[HEAD]
        np.testing.assert_array_equal(head, expected)
        assert model_folder.notes(folder) == []


@pytest.mark.parametrize("stored", [(EMBEDDING,), (HEAD,), (EMBEDDING, HEAD)])
def test_an_equal_head_is_tied_and_may_stand_for_the_embedding(tmp_path, stored):
    tensors = tensors_of("llama_tied_hd16")
    weight = tensors.pop(EMBEDDING)
    folder = written(
        tmp_path, tensors | {name: weight.copy() for name in stored}, "llama_tied_hd16"
    )
    assert model_folder.config(folder).tie_word_embeddings
    _, others = inventory.contents(folder, model_folder.config(folder))
    assert HEAD not in others
    np.testing.assert_array_equal(others[EMBEDDING].value(), weight)
    assert model_folder.notes(folder) == []


def test_a_head_of_another_shape_is_an_error(tmp_path):
    tensors = tensors_of("llama_tied_hd16")
    tensors[HEAD] = tensors[EMBEDDING][:5].copy()
    folder = written(tmp_path, tensors, "llama_tied_hd16")
    with pytest.raises(errors.UserError, match=r"lm_head.weight has shape \[5, 32\]"):
        inventory.contents(folder, model_folder.config(folder))


# Other tensors


def problems(folder):
    """What is wrong with the tensors of a folder; None for nothing."""
    try:
        inventory.contents(folder, model_folder.config(folder))
    except errors.UserError as error:
        return str(error)
    return None


@pytest.mark.parametrize(
    "name, value, listed",
    [
        ("score.weight", 1, True),
        ("vision_tower.layers.0.weight", 1, True),
        ("model.layers.3.mlp.up_proj.weight", 1, True),  # of three layers
        ("model.layers.0.self_attn.rotary_emb.inv_freq", 1, False),
        ("model.rotary_emb.inv_freq", 1, False),
        ("model.layers.0.attn.masked_bias", 1, False),
        (BIAS, 0, False),
    ],
)
def test_tensors_outside_the_model_are_left_out(tmp_path, name, value, listed):
    folder = written(tmp_path, tensors_of() | {name: np.full(2, value, np.float32)})
    assert problems(folder) is None
    notes = model_folder.notes(folder)
    assert notes == ([f"tensors that are not part of the model are not loaded: {name}"]
                     if listed else [])  # fmt: skip


@pytest.mark.parametrize(
    "name, say",
    [
        (BIAS, "belong together"),
        ("model.layers.2.self_attn.q_norm.weight", "belong together"),
        ("model.layers.0.mlp.up_proj.weight_scale", "belong together"),
        ("model.layers.0.self_attn.q_proj.lora_A.weight", "merge_and_unload"),
        ("lm_head.bias", "belong together"),
    ],
)
def test_tensors_that_would_change_a_layer_are_an_error(tmp_path, name, say):
    found = problems(written(tmp_path, tensors_of() | {name: np.ones(2, np.float32)}))
    assert f"{name} is unexpected" in found and say in found


# Dtypes


@pytest.mark.parametrize(
    "stored, changes, expected",
    [
        (ml_dtypes.bfloat16, {"dtype": None}, "bfloat16"),
        (np.float16, {"dtype": "auto"}, "bfloat16"),  # float16 is trained in bfloat16
        (np.float32, {"dtype": None}, "float32"),
        (np.float64, {"dtype": "double"}, "float32"),
        (np.float64, {"dtype": "half"}, "bfloat16"),
    ],
)
def test_the_dtype_of_the_tensors_is_taken_where_config_json_has_none(
    tmp_path, stored, changes, expected
):
    tensors = {name: tensor.astype(stored) for name, tensor in tensors_of().items()}
    config = model_folder.config(written(tmp_path, tensors, **changes))
    assert config.dtype == expected
    found = model_folder.tensors(tmp_path, config)[EMBEDDING].value()
    np.testing.assert_array_equal(found.astype(np.float32), tensors[EMBEDDING].astype(np.float32))


@pytest.mark.parametrize(
    "dtype, name", [(ml_dtypes.float8_e4m3fn, "F8_E4M3"), (ml_dtypes.float8_e5m2, "F8_E5M2")]
)
def test_float8_is_read_as_what_its_values_are(tmp_path, dtype, name):
    tensors = {key: tensor.astype(dtype) for key, tensor in tensors_of().items()}
    folder = written(tmp_path / "f8", {})
    (folder / "model.safetensors").write_bytes(quantized_models.bytes_of(tensors, name))
    as_float = {key: tensor.astype(np.float32) for key, tensor in tensors.items()}
    assert_same(arrays(folder), arrays(written(tmp_path / "f32", as_float)))


def test_other_dtypes_are_named(tmp_path):
    folder = written(tmp_path, {})
    tensors = {name: tensor.astype(np.uint8) for name, tensor in tensors_of().items()}
    (folder / "model.safetensors").write_bytes(quantized_models.bytes_of(tensors, "F8_E8M0"))
    assert f"{HEAD} has dtype F8_E8M0" in problems(folder)


# Files


def test_model_safetensors_precedes_an_index(tmp_path):
    folder = written(tmp_path, tensors_of())
    index = {"weight_map": {HEAD: "model-00001-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert problems(folder) is None


def test_an_index_may_name_the_wrong_one_of_its_files(tmp_path):
    folder = written(tmp_path, tensors_of())
    (folder / "model.safetensors").unlink()
    files = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
    names = sorted(tensors_of())
    for file, part in zip(files, (names[::2], names[1::2]), strict=True):
        safetensors.numpy.save_file({n: tensors_of()[n] for n in part}, folder / file)
    weight_map = {name: files[(i // 2) % 2] for i, name in enumerate(names)}
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    assert problems(folder) is None


@pytest.mark.parametrize(
    "file, settings, method",
    [
        ("quantize_config.json", {"bits": 4, "group_size": 32, "sym": False}, "gptq"),
        ("quant_config.json",
         {"w_bit": 4, "q_group_size": 32, "zero_point": True, "version": "GEMM"}, "awq"),
    ],
)  # fmt: skip
def test_settings_of_autogptq_and_autoawq_beside_config_json(tmp_path, file, settings, method):
    quantized_models.write(tmp_path / "new", method=method)
    shutil.copytree(tmp_path / "new", tmp_path / "old")
    raw = json.loads((tmp_path / "new" / "config.json").read_text())
    assert raw.pop("quantization_config")["quant_method"] == method
    (tmp_path / "old" / "config.json").write_text(json.dumps(raw))
    assert "has no quantization_config" in problems(tmp_path / "old")
    (tmp_path / "old" / file).write_text(json.dumps(settings))
    config = model_folder.config(tmp_path / "old")
    assert config == model_folder.config(tmp_path / "new")
    assert config.quantization.method == method and problems(tmp_path / "old") is None


def test_settings_beside_a_dense_model_are_not_its_own(tmp_path):
    folder = written(tmp_path, tensors_of())
    (folder / "quantize_config.json").write_text('{"bits": 4, "group_size": 128}')
    assert model_folder.config(folder).quantization is None


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_file_in_place_of_its_folder_is_explained(tmp_path, name):
    folder = written(tmp_path, tensors_of())
    with pytest.raises(errors.UserError, match=f"pass its folder, {folder}"):
        hub.model_folder(str(folder / name))


# Random headers


@pytest.fixture(scope="module")
def damaged(tmp_path_factory):
    return written(tmp_path_factory.mktemp("damaged"), tensors_of())


_FILE = (MODELS / "llama" / "model.safetensors").read_bytes()
_HEADER = 8 + int.from_bytes(_FILE[:8], "little")
_ENTRY = st.sampled_from(sorted(tensors_of()))
_VALUE = (
    st.none()
    | st.integers(-2, 2**65)
    | st.sampled_from(["F32", "F4", "BF16", "F8_E4M3", "X", [], [0], [32], [0, 0], [-1, 4], {}])
    | st.lists(st.integers(0, 2**40), max_size=3)
)


@given(
    flips=st.dictionaries(st.integers(0, _HEADER - 1), st.integers(0, 255), max_size=3),
    edits=st.lists(
        st.tuples(_ENTRY, st.sampled_from(["dtype", "shape", "data_offsets"]), _VALUE), max_size=2
    ),
    cut=st.none() | st.integers(0, len(_FILE)),
)
def test_a_random_header_is_taken_or_one_error(damaged, flips, edits, cut):
    entries = json.loads(_FILE[8:_HEADER])
    for name, key, value in edits:
        entries[name][key] = value
    header = json.dumps(entries).encode() if edits else _FILE[8:_HEADER]
    data = bytearray(len(header).to_bytes(8, "little") + header + _FILE[_HEADER:])
    for place, byte in flips.items():
        data[place] = byte
    (damaged / "model.safetensors").write_bytes(bytes(data[:cut]))
    try:
        config = model_folder.config(damaged)
        linears, others = inventory.contents(damaged, config)
        model_folder.notes(damaged)
    except errors.UserError as error:
        assert error.found
        return
    expected = tensors_of()
    for name, stored in (linears | others).items():
        assert stored.value().shape == expected[name].shape
