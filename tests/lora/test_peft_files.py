"""adapter_config.json and the tensors of adapters as people have them: the right adapter or one
UserError, never anything else."""

import dataclasses
import json
import os
import pathlib
import stat

import hypothesis
import ml_dtypes
import numpy as np
import pytest
import safetensors
import safetensors.numpy
from hypothesis import strategies as st

from lora_jax import errors
from lora_jax.lora import adapter as host
from lora_jax.lora import peft, peft_config, peft_tensors, targets

FOLDER = pathlib.Path(__file__).parents[1] / "golden" / "lora_qv" / "final_adapter"
WEIGHTS = "adapter_model.safetensors"
RAW = json.loads((FOLDER / "adapter_config.json").read_text())
TENSORS = safetensors.numpy.load_file(FOLDER / WEIGHTS)
Q = "base_model.model.model.layers.0.self_attn.q_proj"


def folder(path, tensors=TENSORS, **changes):
    path.mkdir(exist_ok=True)
    (path / "adapter_config.json").write_text(json.dumps(RAW | changes))
    safetensors.numpy.save_file(tensors, path / WEIGHTS)
    return path


def raw_file(path, **arrays):
    """A file of arrays in dtypes that safetensors.numpy does not write."""
    names = {"float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2", "bfloat16": "BF16"}
    data = {name: {"dtype": names.get(array.dtype.name, "F32"), "shape": list(array.shape),
                   "data": array.tobytes()} for name, array in arrays.items()}  # fmt: skip
    entries, end = {}, 0
    for name, each in data.items():
        entries[name] = {"dtype": each["dtype"], "shape": each["shape"],
                         "data_offsets": [end, end + len(each["data"])]}  # fmt: skip
        end += len(each["data"])
    header = json.dumps(entries).encode()
    header += b" " * (-len(header) % 8)
    body = b"".join(each["data"] for each in data.values())
    path.write_bytes(len(header).to_bytes(8, "little") + header + body)


# ------------------------------------------------------------------------- any input

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 70) | st.floats() | st.text(max_size=6)
    | st.sampled_from(["q_proj", "lm_head", "embed_tokens", "all-linear", "((", "default", "all"]),
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(st.sampled_from(["q_proj", "((", "a"]), inner, max_size=2),
    max_leaves=4,
)  # fmt: skip


@hypothesis.given(
    st.dictionaries(st.sampled_from([*RAW, "key_of_the_future"]), VALUES, max_size=4),
    st.sets(st.sampled_from(list(RAW)), max_size=2),
)
def test_any_settings_are_read_or_refused(changes, left_out):
    raw = {key: value for key, value in (RAW | changes).items() if key not in left_out}
    raw = json.loads(json.dumps(raw))
    try:
        config = peft_config.parse(raw, "adapter_config.json")
    except errors.UserError as error:
        assert "adapter_config.json" in str(error)
        return
    assert config.rank == raw.get("r", 8) and config.alpha == raw.get("lora_alpha", 8)
    assert config.use_dora == bool(raw.get("use_dora"))
    assert config.lora_bias == bool(raw.get("lora_bias"))
    assert bool(config.trainable_token_indices) == bool(raw.get("trainable_token_indices"))
    written = json.dumps(peft_config.written(host.Adapter(config, {}), None))
    again = peft_config.parse(json.loads(written), "x")
    # Names have no order, and are written in that of the alphabet.
    assert in_order(again) == in_order(config)


def in_order(config):
    names = ("targets", "exclude", "modules_to_save")
    own = {name: getattr(config, name) for name in names}
    return dataclasses.replace(config, **{name: value if isinstance(value, str) else sorted(value)
                                          for name, value in own.items()})  # fmt: skip


PARTS = st.sampled_from(
    ["base_model", "model", "layers", "0", "self_attn", "q_proj", "lora_A", "lora_B", "weight",
     "default", "module", "_orig_mod", "modules_to_save", "lora_embedding_A", "lm_head", "bias",
     "lora_magnitude_vector", "original_module", "", "lora_"]
)  # fmt: skip
SHAPES = st.lists(st.integers(0, 3), max_size=5).map(tuple)


@hypothesis.given(
    st.lists(st.tuples(st.lists(PARTS, max_size=9).map(".".join), SHAPES), max_size=4),
    st.booleans(),
)
def test_any_tensors_are_read_or_refused(more, whole):
    arrays = {name: np.ones(shape, np.float32) for name, shape in more}
    try:
        factors, saved = peft_tensors.parse((TENSORS if whole else {}) | arrays, "file")
    except errors.UserError as error:
        assert "file" in str(error)
        return
    again = peft_tensors.tensors(host.Adapter(peft.config(FOLDER), factors, saved)) if whole and (
        all(own.A is not None and own.B is not None for own in factors.values())
    ) else {}  # fmt: skip
    for name, array in TENSORS.items() if again else ():
        np.testing.assert_array_equal(again[name], arrays.get(name, array))


# ------------------------------------------------------------------------- names and values


@pytest.mark.parametrize(
    "renamed",
    [
        lambda name: f"module.{name}",
        lambda name: f"module.module.{name}",
        lambda name: f"_orig_mod.{name}",
        lambda name: name.replace("base_model.model.", "base_model.model._orig_mod."),
        lambda name: name.replace("base_model.model.", "base_model.model.module."),
        lambda name: name.replace("layers.", "layers._fsdp_wrapped_module."),
        lambda name: name.replace("self_attn", "self_attn._checkpoint_wrapped_module"),
        lambda name: f"base_model.model.{name}",
        lambda name: name.removeprefix("base_model.model."),
        lambda name: name.replace(".weight", ".my_name.weight"),
        lambda name: name.replace(".weight", ".default"),
    ],
)
def test_wrapped_names_are_read(renamed):
    factors, saved = peft_tensors.parse({renamed(n): a for n, a in TENSORS.items()}, "x")
    expected, _ = peft_tensors.parse(TENSORS, "x")
    assert not saved and factors.keys() == expected.keys()
    for path, own in expected.items():
        np.testing.assert_array_equal(factors[path].A, own.A)
        np.testing.assert_array_equal(factors[path].B, own.B)


def test_fully_trained_modules_are_read_by_any_of_their_names():
    weight, other = np.ones((3, 2), np.float32), np.zeros((3, 2), np.float32)
    named = {
        "base_model.model.lm_head.modules_to_save.mine.weight": weight,
        "base_model.model.lm_head.original_module.weight": other,
        "base_model.model.lm_head.weight": weight,
    }
    factors, saved = peft_tensors.parse(named, "x")
    assert not factors and list(saved) == ["lm_head.weight"]
    np.testing.assert_array_equal(saved["lm_head.weight"], weight)


@pytest.mark.parametrize(
    "more, found",
    [
        ({f"{Q}.lora_A.a.weight": 1, f"{Q}.lora_B.b.weight": 1}, "2 adapters: a, b"),
        (
            {f"module.{Q}.lora_A.weight": 1},
            r"q_proj.lora_A.weight and module\..*q_proj.lora_A.weight differ",
        ),
        ({f"{Q}.lora_A.bias": 1}, "q_proj.lora_A.bias, of an unknown kind"),
        ({f"{Q}.lora_B.bias": 1}, r"q_proj.lora_B.bias has shape \(4, 4\)"),
        ({f"{Q}.lora_B.one.bias": 1, f"{Q}.lora_A.two.weight": 1}, "2 adapters: one, two"),
        ({f"{Q}.lora_diag.default": 1}, "lora_diag.default, of an unknown kind"),
        (
            {"lm_head.modules_to_save.a.weight": 0, "lm_head.weight": 1},
            "lm_head.modules_to_save.a.weight and lm_head.weight differ",
        ),
    ],
)
def test_what_cannot_be_right_is_named(more, found):
    arrays = {name: np.full((4, 4), value, np.float32) for name, value in more.items()}
    with pytest.raises(errors.UserError, match=found):
        peft_tensors.parse(TENSORS | arrays, "x")


@pytest.mark.parametrize("dtype", ["bfloat16", "float8_e4m3fn", "float8_e5m2", "float16"])
def test_narrow_floats_are_read_with_their_values(dtype, tmp_path):
    kind = np.dtype(getattr(ml_dtypes, dtype, dtype))
    narrow = {name: array.astype(kind) for name, array in TENSORS.items()}
    folder(tmp_path)
    if dtype == "float16":
        safetensors.numpy.save_file(narrow, tmp_path / WEIGHTS)
    else:
        raw_file(tmp_path / WEIGHTS, **narrow)
    own = peft.read(tmp_path).factors["model.layers.0.self_attn.q_proj"]
    expected = narrow[f"{Q}.lora_A.weight"].astype(np.float32).T
    np.testing.assert_array_equal(own.A, expected)
    assert own.A.any()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_tensors_that_are_not_finite_are_named(value, tmp_path):
    damaged = {name: array.copy() for name, array in TENSORS.items()}
    damaged[f"{Q}.lora_B.weight"][0, 0] = value
    with pytest.raises(errors.UserError, match=r"q_proj\.lora_B\.weight has NaN or infinity"):
        peft.read(folder(tmp_path, damaged))
    with pytest.raises(errors.UserError, match=r"lora_A\.weight has dtype I32"):
        peft.read(folder(tmp_path, {f"{Q}.lora_A.weight": np.ones((4, 4), np.int32)}))


# ------------------------------------------------------------------------- settings


def test_null_target_modules_are_those_in_the_file(tmp_path):
    found = peft.read(folder(tmp_path, target_modules=None, task_type=None))
    assert set(found.config.targets) == set(found.factors) and len(found.factors) == 6


@pytest.mark.parametrize(
    "path, named",
    [
        ("model.layers.{}.self_attn.q_proj", ["k_proj", "q_proj"]),
        ("model.language_model.layers.{}.self_attn.q_proj", ["k_proj", "q_proj"]),
        ("encoder.{}.q_proj", ["encoder.0.q_proj", "encoder.1.k_proj"]),
    ],
)
def test_all_linear_is_written_as_the_names_that_it_took(path, named, tmp_path):
    """As PEFT does: servers read "all-linear" as a regex, which matches nothing."""
    adapter = peft.read(FOLDER)
    own = next(iter(adapter.factors.values()))
    factors = {path.format(0): own, path.format(1).replace("q_proj", "k_proj"): own}
    config = dataclasses.replace(adapter.config, targets="all-linear", exclude=("v_proj",))
    peft.write(tmp_path, dataclasses.replace(adapter, config=config, factors=factors))
    assert peft.settings(tmp_path)["target_modules"] == named
    again = peft.read(tmp_path).config
    assert all(targets.is_chosen(each, again) for each in factors)
    assert not targets.is_chosen("model.layers.0.self_attn.v_proj", again)


def test_what_pefts_settings_mean(tmp_path):
    """How an adapter was initialized or trained does not change what it computes."""
    inert = {
        "init_lora_weights": "mica", "eva_config": {"rho": 2}, "corda_config": {"x": 1},
        "lora_ga_config": {"x": 1}, "velora_config": {"x": 1}, "bias": "lora_only",
        "loftq_config": {"loftq_bits": 4}, "revision": None, "layers_pattern": None,
    }  # fmt: skip
    assert peft.read(folder(tmp_path, **inert)).config == peft.config(FOLDER)
    assert peft.read(folder(tmp_path, ensure_weight_tying=True)).config.ensure_weight_tying


@pytest.mark.parametrize(
    "change",
    [{"use_bdlora": {"x": 1}}, {"arrow_config": {"x": 1}}, {"kasa_config": {"x": 1}},
     {"monteclora_config": {"x": 1}}, {"alora_invocation_tokens": [1]},
     {"target_parameters": ["a.b"]}, {"init_lora_weights": "pissa_niter_16"},
     {"init_lora_weights": "corda"}, {"lora_alpha": float("nan")}, {"r": True},
     {"use_dora": "yes"}, {"layers_pattern": "(("}, {"modules_to_save": [""]}],
    ids=str,
)  # fmt: skip
def test_settings_that_are_not_right_or_not_implemented_are_named(change, tmp_path):
    ((key, _),) = change.items()
    name = {"lora_alpha": "alpha nan", "layers_pattern": r"\(\("}.get(key, key)
    with pytest.raises(errors.UserError, match=name):
        peft.read(folder(tmp_path, **change))


def test_trained_biases_are_named(tmp_path):
    more = TENSORS | {f"{Q}.base_layer.bias": np.ones(4, np.float32)}
    with pytest.raises(errors.UserError, match=r"q_proj\.base_layer\.bias, with bias = 'all'"):
        peft.read(folder(tmp_path, more, bias="all"))


def test_a_base_that_was_changed_already_is_not_changed_again(tmp_path):
    more = TENSORS | {f"{Q}.base_layer.weight": np.ones((4, 4), np.float32)}
    with pytest.raises(errors.UserError, match=r"base_layer\.weight, with .* = 'pissa'"):
        peft.read(folder(tmp_path, more, init_lora_weights="pissa"))


def test_the_folder_of_a_run_names_its_adapters(tmp_path):
    for number in (5, 10):
        folder(tmp_path / f"checkpoint-{number}")
    with pytest.raises(errors.UserError, match=r"such as .*/checkpoint-10"):
        peft.settings(tmp_path)


def test_files_can_be_read_by_whom_the_umask_lets(tmp_path):
    before = os.umask(0o027)
    try:
        peft.write(tmp_path / "new", peft.read(FOLDER))
    finally:
        os.umask(before)
    modes = {stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "new").iterdir()}
    assert modes == {0o640}
