"""Adapters of composite models: PEFT's names for the whole model, and those of a LLaMA."""

import dataclasses
import json
import pathlib
import re

import numpy as np
import pytest
import safetensors

from lora_jax import errors
from lora_jax.lora import config as lora_config
from lora_jax.lora import outer_names, peft, peft_config, peft_tensors, targets
from lora_jax.models import config as model_config

COMPOSITES = pathlib.Path(__file__).parents[1] / "golden" / "composites"
GEMMA = model_config.load(COMPOSITES / "gemma3")
QWEN = model_config.load(COMPOSITES / "qwen2_5_vl")
PLAIN = dataclasses.replace(GEMMA, composite="")
UNSLOTH = json.loads((COMPOSITES / "gemma3/unsloth/adapter_config.json").read_text())[
    "target_modules"
]
LAYERS = [f"model.layers.{layer}.{part}_proj" for layer in (0, 1)
          for part in ("self_attn.q", "self_attn.k", "self_attn.v", "self_attn.o", "mlp.gate",
                       "mlp.up", "mlp.down")]  # fmt: skip


def modules():
    """The modules of the whole model that have a weight, as PEFT names them."""
    with safetensors.safe_open(COMPOSITES / "gemma3/model.safetensors", "numpy") as file:
        names = [name.rpartition(".")[0] for name in file.keys()]  # noqa: SIM118
    own = [re.sub("^language_model.model", "model.language_model", name) for name in names]
    return ["lm_head", *(name if name.startswith("model.") else f"model.{name}" for name in own)]


def chosen(paths, config):
    return [path for path in paths if targets.is_chosen(path, config)]


def renamed(adapter, old, new):
    """The adapter with other names in its file and its settings."""

    def own(arrays):
        return {name.replace(old, new, 1): array for name, array in arrays.items()}

    text = json.dumps(peft_config.written(adapter, None))
    for first, second in ((old, new), (re.escape(old), re.escape(new))):
        text = text.replace(json.dumps(first)[1:-1], json.dumps(second)[1:-1])
    config = peft_config.parse(json.loads(text), "")
    return dataclasses.replace(
        adapter, config=config, factors=own(adapter.factors), saved=own(adapter.saved)
    )


@pytest.mark.parametrize("name", ["names", "unsloth"])
def test_adapters_of_both_forms_are_read_the_same(name):
    adapter = peft.read(COMPOSITES / "gemma3" / name)
    found = outer_names.inner(adapter, GEMMA)
    assert chosen(LAYERS, found.config) == [each for each in LAYERS if each in found.factors]
    assert all(path.startswith("model.layers.") for path in found.factors)
    older = renamed(adapter, "model.language_model", "language_model.model")
    assert "language_model.model.layers.0.self_attn.q_proj" in older.factors
    again = outer_names.inner(older, GEMMA)
    assert again.config == found.config
    assert again.factors.keys() == found.factors.keys() and again.saved.keys() == found.saved.keys()
    assert outer_names.inner(found, GEMMA) is found  # the names of the language model alone
    assert outer_names.inner(adapter, PLAIN) is adapter  # of any other model


def test_what_an_adapter_has_beside_the_language_model_is_named():
    adapter = peft.read(COMPOSITES / "gemma3/names")
    assert outer_names.beside(adapter, GEMMA) == ["vision_tower", "multi_modal_projector"]
    assert "vision_tower, multi_modal_projector" in outer_names.note(adapter, GEMMA)
    found = outer_names.inner(adapter, GEMMA)
    assert found.config.rank_pattern == {r"model\.layers\.0\.self_attn\.q_proj": 3}
    assert found.config.modules_to_save == () and not found.saved
    assert outer_names.note(found, GEMMA) == ""
    outer_names.refuse_beside(found, GEMMA)
    with pytest.raises(errors.UserError, match="vision_tower"):
        outer_names.refuse_beside(adapter, GEMMA)


@pytest.mark.parametrize("name", ["names", "unsloth"])
def test_what_is_written_is_for_peft_on_the_whole_model(name, tmp_path):
    """The tensors have PEFT's names, and its settings choose these layers and no others."""
    adapter = peft.read(COMPOSITES / "gemma3" / name)
    inner = outer_names.inner(adapter, GEMMA)
    peft.write(tmp_path, outer_names.outer(inner, GEMMA))
    again = peft.read(tmp_path)
    stored = safetensors.numpy.load_file(COMPOSITES / "gemma3" / name / "adapter_model.safetensors")
    written = peft_tensors.tensors(again)
    assert written.keys() == {key for key in stored
                              if "vision_tower" not in key and "projector" not in key}  # fmt: skip
    assert all(np.array_equal(written[key], stored[key]) for key in written)
    expected = [path for path in modules() if path in again.factors]
    assert chosen(modules(), again.config) == expected and len(expected) in (4, 14)
    for path in expected:
        assert targets.scaling(path, again.factors[path].A.shape[1], again.config) == (
            adapter.scaling(path)
        )
    assert outer_names.inner(again, GEMMA).config == inner.config


def test_older_names_of_qwen_are_those_of_a_llama():
    adapter = peft.read(COMPOSITES / "qwen2_5_vl/names")
    assert outer_names.beside(adapter, QWEN) == ["visual"]  # it has a gate_proj, too
    found = outer_names.inner(adapter, QWEN)
    assert {*found.factors} == {each for each in LAYERS if re.search("k_proj|gate", each)}

    older = renamed(renamed(adapter, "model.language_model", "model"), "model.visual", "visual")
    assert found.factors.keys() <= older.factors.keys()
    again = outer_names.inner(older, QWEN)
    assert again.config == found.config and again.factors.keys() == found.factors.keys()
    written = outer_names.outer(again, QWEN)
    assert {*written.factors} == {path for path in adapter.factors if "visual" not in path}
    assert chosen([*adapter.factors], written.config) == [*written.factors]


def inner_config(base=GEMMA, /, **settings):
    return outer_names.inner_config(lora_config.LoRAConfig(**settings), base)


Q = ["model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj"]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (dict(targets="all-linear"), LAYERS),
        (dict(targets=UNSLOTH), LAYERS),
        (dict(targets=("q_proj",)), Q),
        (dict(targets=r"model\.language_model\..*q_proj"), Q),
        (dict(targets=r"language_model\.model\..*q_proj"), Q),
        (dict(targets=r"model\.layers\..*q_proj"), Q),
        (dict(targets=r"model\.layers\..*q_proj", trainable_token_indices=(3,)), Q),
        (dict(targets=r"language_model\.model\..*q_proj", modules_to_save=("lm_head",)), Q),
        (dict(targets=r"model\.layers\..*q_proj", exclude=r"model\.layers\.0\..*"), Q[1:]),
        (dict(targets=r".*q_proj", exclude="(?!.*language_model).*"), Q),
        (dict(targets=("q_proj",), exclude=r"model\.layers\.0\..*"), Q[1:]),
        (dict(targets=("q_proj",), exclude=r"language_model\.model\.layers\.0\..*"), Q[1:]),
        (dict(targets=r"model\.language_model.*q_proj", exclude=r"model\.layers\.0\..*"), Q[1:]),
        (dict(targets=("q_proj",), exclude=("language_model.layers.0.self_attn.q_proj",)), Q[1:]),
        (dict(targets=("model.language_model.layers.1.self_attn.q_proj",)), Q[1:]),
        (dict(targets=("language_model.layers.0.self_attn.q_proj", "v_proj"), layers=(1,)),
         ["model.layers.1.self_attn.v_proj"]),
        (dict(targets=("q_proj",), layers=(1,), layers_pattern="language_model.layers"), Q[1:]),
        (dict(targets=("q_proj",), modules_to_save=("model.language_model.layers.0",)), Q[1:]),
    ],
)  # fmt: skip
def test_settings_with_outer_names_mean_the_same_layers(settings, expected):
    found = inner_config(**settings)
    assert chosen(LAYERS, found) == expected
    assert outer_names.inner_config(found, GEMMA) == found
    given = lora_config.LoRAConfig(**settings)
    assert outer_names.inner_config(given, PLAIN) == given


@pytest.mark.parametrize(
    ("exclude", "expected"),
    [
        (r".*vision_tower.*", ()),
        (r"(model\.)?(vision_tower|multi_modal_projector)\..*", ()),  # as `outer` writes it
        (("vision_tower", "o_proj"), ("o_proj",)),
        (r"^(?!.*language_model).*", ()),  # the head is tied
        (r".*no_such_layer.*", r".*no_such_layer.*"),  # to be an error
    ],
)
def test_an_exclude_of_what_is_never_adapted_is_left_out(exclude, expected):
    assert inner_config(targets="all-linear", exclude=exclude).exclude == expected


@pytest.mark.parametrize(
    ("exclude", "expected"),
    [
        (("visual",), ()),
        (r".*visual.*", ()),
        (r"visual\.blocks\.\d+\.attn\.(qkv|proj)", ()),
        (r".*visual\.merger.*", ()),
        (r"model\.layers\.0\..*", r"model\.layers\.0\..*"),
        (r"model\.language_model\.layers\.0\..*", tuple(LAYERS[:7])),
    ],
)
def test_an_exclude_of_qwen_in_both_forms(exclude, expected):
    found = inner_config(QWEN, targets="all-linear", exclude=exclude)
    assert found.exclude == expected
    assert chosen(LAYERS, found) == LAYERS[7 if expected else 0 :]
    assert chosen(LAYERS, inner_config(QWEN, targets=UNSLOTH, exclude=exclude)) == (
        chosen(LAYERS, found)
    )


def test_names_of_fused_layers():
    text = dict(model_type="phi3", num_hidden_layers=2)
    phi = model_config.from_dict(dict(model_type="llava", text_config=text))
    targets = r"model\.language_model\.layers\.1\..*(qkv|gate_up|down)_proj"
    found = inner_config(phi, targets=targets, rank_pattern={r".*language_model.*qkv_proj": 3})
    parts = ("self_attn.qkv_proj", "mlp.gate_up_proj", "mlp.down_proj")
    assert found.targets == tuple(f"model.layers.1.{part}" for part in parts)
    assert {*found.rank_pattern} == {
        re.escape(f"model.layers.{layer}.self_attn.qkv_proj") for layer in (0, 1)
    }


def test_settings_that_match_nothing_stay_to_be_an_error():
    """With the name that was given, not none at all."""
    found = inner_config(targets=("q_proj", "vision_tower.q_proj", "model.layers.7.mlp.up_proj"))
    assert found.targets == ("q_proj", "vision_tower.q_proj", "model.layers.7.mlp.up_proj")


def test_other_settings_keep_their_meaning():
    found = inner_config(
        rank_pattern={r"^model\.language_model\.layers\.1\..*": 3, "v_proj": 5},
        alpha_pattern={"q_proj": 2},
        modules_to_save=("model.language_model.norm", "lm_head"),
        trainable_token_indices={"language_model.embed_tokens": (4, 2)},
    )
    assert found.alpha_pattern == {"q_proj": 2}
    assert found.modules_to_save == ("model.norm", "lm_head")
    assert found.trainable_token_indices == {"model.embed_tokens": (4, 2)}
    ranks = {path: targets.layer_config(path, 1, found).rank for path in LAYERS}
    assert {path for path, rank in ranks.items() if rank == 3} == {*LAYERS[7:]}
    assert ranks["model.layers.0.self_attn.v_proj"] == 5
    assert ranks["model.layers.0.self_attn.q_proj"] == found.rank


def test_settings_for_a_whole_layer_name_nothing_that_has_no_adapter():
    """Such as its norms, which would be an error in training."""
    layer = r"^model\.language_model\.layers\.0\..*"
    found = inner_config(
        targets="all-linear", exclude=layer, rank_pattern={r".*language_model.*": 3}
    )
    assert {*found.exclude} == {*LAYERS[:7]}
    assert {*found.rank_pattern} == {re.escape(path) for path in LAYERS}
