"""Random adapter folders: each is read and put into a model as it says, or is one clear error."""

import functools
import json
import pathlib
import re
import tempfile

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st

from lora_jax import errors, lora
from lora_jax.lora import peft

CONFIG = {
    "peft_type": "LORA", "r": 2, "lora_alpha": 4, "lora_dropout": 0.0, "bias": "none",
    "target_modules": ["up", "down"], "modules_to_save": ["embed_tokens"], "rank_pattern": {},
    "alpha_pattern": {}, "use_dora": False, "use_rslora": False, "init_lora_weights": True,
    "layers_to_transform": None, "layers_pattern": None, "exclude_modules": None,
    "base_model_name_or_path": "base", "ensure_weight_tying": False, "task_type": "CAUSAL_LM",
}  # fmt: skip
TENSORS = {
    "up.lora_A.weight": (2, 4), "up.lora_B.weight": (6, 2),
    "down.lora_A.weight": (2, 6), "down.lora_B.weight": (4, 2),
    "embed_tokens.weight": (8, 4),
}  # fmt: skip
SIZES = {"up": (4, 6), "down": (6, 4)}
scalars = st.one_of(
    st.none(), st.booleans(), st.integers(-2, 9), st.floats(), st.text(max_size=6),
    st.sampled_from(["up", "down", ".*", "(", "[", "all-linear", "lora_only", "pissa", "eva"]),
)  # fmt: skip
values = st.one_of(
    scalars,
    st.lists(scalars, max_size=3),
    st.dictionaries(st.text(max_size=4), scalars, max_size=2),
)
changes = st.dictionaries(
    st.one_of(st.sampled_from(sorted(CONFIG)), st.text(max_size=8)), values, max_size=3
)


@functools.cache
def parts():
    rngs = nnx.Rngs(0)
    model = nnx.Dict(
        up=nnx.Linear(4, 6, rngs=rngs),
        down=nnx.Linear(6, 4, rngs=rngs),
        embed_tokens=nnx.Embed(8, 4, rngs=rngs),
    )
    return nnx.split(model)


def write(folder, config, tensors):
    folder = pathlib.Path(folder)
    (folder / "adapter_config.json").write_text(json.dumps(config))
    safetensors.numpy.save_file(tensors, folder / "adapter_model.safetensors")


def load(folder):
    """(the model with the adapter, its config), or None after an error that changed nothing."""
    model = nnx.merge(*parts(), copy=True)
    try:
        return model, peft.load(model, folder)
    except errors.UserError as error:
        assert str(error)
        assert nnx.graphdef(model) == parts()[0]
        return None


def tensors(names=TENSORS):
    random = np.random.default_rng(0)
    return {f"base_model.model.{name}": random.normal(size=shape).astype(np.float32)
            for name, shape in names.items()}  # fmt: skip


@given(changes, st.sets(st.sampled_from(sorted(CONFIG)), max_size=2))
def test_any_settings_are_taken_or_are_an_error(changed, dropped):
    config = {key: value for key, value in (CONFIG | changed).items() if key not in dropped}
    with tempfile.TemporaryDirectory() as folder:
        write(folder, config, tensors())
        found = load(folder)
        if found is None:
            return
        model, read = found
        for name, (k, n) in SIZES.items():  # W + s · A B, from the file alone
            layer = getattr(model, name)
            A, B, scaling, *_ = (np.asarray(part) for part in lora_arrays(layer))
            stored = tensors()
            np.testing.assert_array_equal(A, stored[f"base_model.model.{name}.lora_A.weight"].T)
            np.testing.assert_array_equal(B, stored[f"base_model.model.{name}.lora_B.weight"].T)
            assert A.shape == (k, 2) and B.shape == (2, n)
            alpha = alpha_of(name, config)
            wanted = alpha / (np.sqrt(2) if config.get("use_rslora") else 2)
            np.testing.assert_allclose(scaling, wanted, rtol=1e-6, atol=1e-30)
        assert read.rank >= 1


def lora_arrays(layer):
    return layer.lora_A[...], layer.lora_B[...], layer.lora_scaling[...]


def alpha_of(name, config):
    for pattern, value in (config.get("alpha_pattern") or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", name):
            return value
    return config.get("lora_alpha", 8)  # PEFT's default


wrappers = st.sampled_from(["", "_orig_mod.", "module.", "_fsdp_wrapped_module."])
adapters = st.sampled_from(["", ".default", ".mine", ".a-b_2"])
dtypes = st.sampled_from([np.float32, np.float16, np.float64, ml_dtypes.bfloat16])


@pytest.mark.long
@given(st.lists(wrappers, max_size=3), adapters, dtypes, st.booleans())
def test_wrapped_names_and_dtypes_are_read_alike(outer, adapter, dtype, prefixed):
    def renamed(name):
        name = name if prefixed else name.removeprefix("base_model.model.")
        if "lora_" in name:
            name = name.replace(".weight", f"{adapter}.weight")
        elif adapter:
            name = name.replace(".weight", f".modules_to_save{adapter}.weight")
        return "".join(outer) + name

    with tempfile.TemporaryDirectory() as folder:
        stored = {name: array.astype(dtype) for name, array in tensors().items()}
        write(folder, CONFIG, {renamed(name): array for name, array in stored.items()})
        model, _ = load(folder)
    for name in SIZES:
        A = stored[f"base_model.model.{name}.lora_A.weight"].astype(np.float32).T
        np.testing.assert_array_equal(lora_arrays(getattr(model, name))[0], A)
    saved = model.embed_tokens.modules_to_save.embedding[...]
    whole = stored["base_model.model.embed_tokens.weight"].astype(np.float32)
    np.testing.assert_array_equal(saved, whole)


keys = st.builds(
    "".join,
    st.lists(
        st.sampled_from(["base_model.model.", "up", "down", "embed_tokens", ".", ".lora_A",
                         "lora_B", ".weight", ".default", ".base_layer", ".modules_to_save"]),
        min_size=1, max_size=6,
    ),
)  # fmt: skip
shapes = st.lists(st.integers(0, 4), max_size=4).map(tuple)


@given(st.dictionaries(keys, shapes, max_size=3), st.sets(st.sampled_from(sorted(TENSORS))))
def test_any_tensors_fit_or_are_an_error(more, dropped):
    kept = {name: shape for name, shape in TENSORS.items() if name not in dropped}
    stored = tensors(kept) | {name: np.ones(shape, np.float32) for name, shape in more.items()}
    with tempfile.TemporaryDirectory() as folder:
        write(folder, CONFIG, stored)
        found = load(folder)
    if found is not None:
        lora.strip(found[0])
        assert nnx.graphdef(found[0]) == parts()[0]
