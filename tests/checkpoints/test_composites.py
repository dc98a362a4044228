"""Folders of models with a vision tower: logits of text, merged and quantized copies."""

import json
import pathlib

import cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx

from lora_jax import errors
from lora_jax.checkpoints import (
    inventory,
    loader,
    merge,
    model_folder,
    quantize,
    safetensors_files,
    writer,
)
from lora_jax.lora import outer_names, peft
from lora_jax.lora.nnx import bank, banked
from lora_jax.models import config as model_config
from lora_jax.parallel import mesh as sharding

COMPOSITES = pathlib.Path(__file__).parents[1] / "golden" / "composites"
TOLERANCE = 1e-4


def tensors_of(folder):
    return safetensors.numpy.load_file(folder / "model.safetensors")


def load(name):
    return loader.load(COMPOSITES / name, dtype="float32", mesh=sharding.make_mesh(sharding.ONE))


def check_logits(model, name, expected):
    with np.load(COMPOSITES / name / "logits.npz") as arrays:
        ids, logits = arrays["input_ids"], arrays[expected]
    graphdef, state = nnx.split(model)
    forward = jax.jit(lambda state, ids: nnx.merge(graphdef, state)(ids, jnp.ones_like(ids)))
    np.testing.assert_allclose(forward(state, jnp.asarray(ids)), logits, atol=TOLERANCE, rtol=0)


def newer(key):
    """The name in transformers 4.52 and newer of a tensor that has an older one."""
    own = key.replace("language_model.model.", "model.language_model.")
    if key.startswith("model."):  # of Qwen2.5-VL
        own = key.replace("model.", "model.language_model.", 1)
    own = own.removeprefix("language_model.") if "lm_head" in key else own
    return own if own.startswith(("model.", "lm_head.")) else f"model.{own}"


def test_logits_of_text_equal_hugging_face_and_nothing_else_is_read(monkeypatch):
    read = []
    opened, value = safetensors_files.opened, safetensors_files.StoredTensor.value
    monkeypatch.setattr(safetensors_files, "opened", lambda each: read.append(each) or opened(each))
    monkeypatch.setattr(
        safetensors_files.StoredTensor, "value", lambda each: read.append(each) or value(each)
    )
    model = load("gemma3")
    assert read and all((each.key or each.name).startswith("language_model") for each in read)
    assert model.config.composite == "gemma3"
    check_logits(model, "gemma3", "logits")


@pytest.mark.parametrize(
    ("name", "adapter"),
    [("gemma3", "names"), ("gemma3", "unsloth"), ("llava", "saved"), ("qwen2_5_vl", "names"),
     *cases.long(("qwen3_vl", "unsloth"))],
)  # fmt: skip
def test_logits_under_an_adapter_equal_pefts_on_the_whole_model(name, adapter):
    """One has its own rank by an outer name, and parts for the vision tower; see make_golden.py."""
    model = load(name)
    peft.load(model, COMPOSITES / name / adapter)
    check_logits(model, name, adapter)


def test_an_adapter_of_the_whole_model_goes_into_a_bank():
    """Without its part for the vision tower."""
    model, adapter = load("gemma3"), peft.read(COMPOSITES / "gemma3/names")
    bank.add(model, slots=1, rank=4)
    contents = banked.Bank(model).contents(adapter, "names")
    same = outer_names.inner(adapter, model.config)
    assert contents.digest == banked.Bank(model).contents(same, "same").digest
    assert len(contents.slots[0]) == 2  # q_proj and v_proj


@pytest.mark.parametrize(
    ("name", "beside", "number"),
    [("gemma3", "multi_modal_projector, vision_tower", 23), ("qwen2_5_vl", "visual", 18)],
)
def test_names_of_both_forms_are_the_same_tensors(name, beside, number, tmp_path):
    (tmp_path / "config.json").write_text((COMPOSITES / name / "config.json").read_text())
    renamed = {newer(key): array for key, array in tensors_of(COMPOSITES / name).items()}
    assert "model.language_model.layers.0.mlp.up_proj.weight" in renamed
    safetensors.numpy.save_file(renamed, tmp_path / "model.safetensors")
    config = model_folder.config(tmp_path)
    old, new = (model_folder.tensors(each, config) for each in (COMPOSITES / name, tmp_path))
    assert old.keys() == new.keys() and "model.layers.0.mlp.up_proj.weight" in old
    for folder in (COMPOSITES / name, tmp_path):
        assert model_folder.notes(folder) == [
            f"of this {name}, only the language model is loaded, not {beside}"
        ]
        assert len(model_folder.beside(folder, config)) == number


def merged(name, adapter, into):
    base = COMPOSITES / name
    plan = merge.plan(base, adapter)
    with writer.new_folder(into, 0) as folder:
        list(merge.write(base, folder, plan))
    return tensors_of(base), tensors_of(into)


def test_a_merged_folder_is_the_whole_model(tmp_path):
    adapter = peft.read(COMPOSITES / "llava/saved")
    before, after = merged("llava", adapter, tmp_path / "merged")
    assert (tmp_path / "merged/preprocessor_config.json").read_text() == "{}\n"
    assert before.keys() == after.keys()
    assert (json.loads((tmp_path / "merged/config.json").read_text())
            == json.loads((COMPOSITES / "llava/config.json").read_text()))  # fmt: skip
    trained = {f"{path}.weight" for path in adapter.factors} | adapter.saved.keys()
    assert trained <= before.keys()
    for name, array in before.items():
        assert (array.tobytes() == after[name].tobytes()) == (name not in trained), name
    for path, own in adapter.factors.items():
        change = adapter.scaling(path) * (own.A @ own.B).T
        new = before[f"{path}.weight"] + change
        np.testing.assert_allclose(after[f"{path}.weight"], new, atol=1e-6)
    np.testing.assert_array_equal(after["lm_head.weight"], adapter.saved["lm_head.weight"])


def test_a_flat_config_and_older_names_stay_in_merged_and_quantized_copies(tmp_path):
    base = COMPOSITES / "qwen2_5_vl"
    adapter = outer_names.inner(peft.read(base / "names"), model_config.load(base))
    before, after = merged("qwen2_5_vl", adapter, tmp_path / "merged")
    raw = json.loads((base / "config.json").read_text())
    assert json.loads((tmp_path / "merged/config.json").read_text()) == raw
    trained = {f"{path}.weight" for path in adapter.factors}
    assert before.keys() == after.keys() and trained <= before.keys()
    assert {name for name in before if before[name].tobytes() != after[name].tobytes()} == trained
    list(quantize.write(base, tmp_path / "int8", quantize.plan(base, "int8")))
    packed = tensors_of(tmp_path / "int8")
    assert "model.layers.1.mlp.up_proj.q" in packed
    assert all(name.startswith(("model.layers.", "model.norm", "model.embed_tokens", "visual."))
               for name in packed)  # fmt: skip
    found = json.loads((tmp_path / "int8/config.json").read_text())
    assert found.pop("quantization_config")["format"] == "int8" and found == raw


def test_a_head_that_is_untied_gets_the_name_that_it_has_in_the_folder(tmp_path):
    adapter = peft.read(COMPOSITES / "llava/saved")
    before, after = merged("gemma3", adapter, tmp_path / "merged")
    assert after.keys() - before.keys() == {"language_model.lm_head.weight"}
    raw = json.loads((tmp_path / "merged/config.json").read_text())
    assert raw["tie_word_embeddings"] is raw["text_config"]["tie_word_embeddings"] is False


def test_an_adapter_of_the_vision_tower_is_not_merged():
    with pytest.raises(errors.UserError, match="vision_tower") as raised:
        merge.plan(COMPOSITES / "gemma3", peft.read(COMPOSITES / "gemma3/names"))
    assert "merge_and_unload" in str(raised.value)


def test_a_quantized_copy_keeps_the_rest_and_its_names(tmp_path):
    base = COMPOSITES / "llava"
    list(quantize.write(base, tmp_path / "int8", quantize.plan(base, "int8")))
    before, after = tensors_of(base), tensors_of(tmp_path / "int8")
    packed = "model.language_model.layers.1.mlp.up_proj"
    assert f"{packed}.weight" not in after and f"{packed}.q" in after
    kept = before.keys() & after.keys()
    assert all(before[name].tobytes() == after[name].tobytes() for name in kept)
    assert {name for name in before if "vision" in name or "multi_modal" in name} <= kept
    raw = json.loads((tmp_path / "int8/config.json").read_text())
    assert raw.pop("quantization_config")["format"] == "int8"
    assert raw == json.loads((base / "config.json").read_text())
    config = model_folder.config(tmp_path / "int8")
    linears, _ = inventory.contents(tmp_path / "int8", config)
    assert len(linears) == 14 and config.composite == "llava"
    # PEFT's names, so that an adapter trained on it also fits the original.
    adapter = peft.read(base / "saved")
    own = outer_names.outer(outer_names.inner(adapter, config), config)
    assert own.factors.keys() == adapter.factors.keys()


def test_a_quantized_vision_tower_is_one_error(tmp_path):
    """Its config.json would no longer say that it is."""
    (tmp_path / "config.json").write_text((COMPOSITES / "gemma3/config.json").read_text())
    arrays = tensors_of(COMPOSITES / "gemma3")
    name = next(name for name in arrays if name.endswith("fc1.weight"))
    arrays[name] = np.zeros((3, 1), np.uint8)
    safetensors.numpy.save_file(arrays, tmp_path / "model.safetensors")
    with pytest.raises(errors.UserError, match=name) as raised:
        quantize.plan(tmp_path, "int4")
    assert "only the language model is quantized" in str(raised.value)


@pytest.mark.parametrize("form", ["model.language_model", "language_model.model"])
def test_a_plan_knows_layers_that_are_dense_by_their_outer_names(form):
    raw = json.loads((COMPOSITES / "gemma3/config.json").read_text())
    settings = dict(quant_method="awq", bits=4, group_size=8,
                    modules_to_not_convert=["vision_tower", f"{form}.layers.0.mlp"])  # fmt: skip
    config = model_config.from_dict(raw | {"quantization_config": settings})
    one = sharding.mesh_of(sharding.ONE)
    model = nnx.eval_shape(lambda: inventory.skeleton(
        config, dtype=jnp.float32, quantization="int4", mesh=one))  # fmt: skip
    dense, _ = inventory.dense_linears(model)
    assert {path.split(".")[-2] for path in dense} == {"mlp"}
