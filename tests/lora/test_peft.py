"""PEFT's adapter folders: its runs (tests/golden) are read, repeated and written back."""

import functools
import json
import os
import pathlib
import re
import shutil
import tempfile

import cases
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
import safetensors.numpy
from flax import nnx

from lora_jax import errors, lora
from lora_jax.checkpoints import loader
from lora_jax.lora import adapter as host
from lora_jax.lora import config as lora_config
from lora_jax.lora import peft, peft_tensors
from lora_jax.lora.nnx import bank, banked, model_state
from lora_jax.optim import adamw
from lora_jax.optim import config as optim_config
from lora_jax.optim import loss as train_loss
from lora_jax.optim import step as train_step
from lora_jax.parallel import mesh as sharding

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"
PREFIX = "base_model.model.model.layers."
RUNS = (
    "lora_qv", "lora_all_rslora", "lora_plus", "lora_bias", "lora_dora", "lora_dora_embedding",
    "lora_embedding", "lora_saved", "lora_tokens", "lora_tokens_head", "lora_gemma3",
    "lora_granite", "lora_phi3", "lora_olmo3", "lora_gemma2",
)  # fmt: skip


ONE = sharding.make_mesh({"data": 1, "fsdp": 1, "tensor": 1})


@functools.cache
def split_base(name):
    return nnx.split(loader.load(GOLDEN / "models" / name, dtype="float32", mesh=ONE))


def base_of(run):
    path = GOLDEN / run / "golden.json"
    return json.loads(path.read_text()).get("base", "llama") if path.exists() else "llama"


def llama(adapter=None):
    """A fresh model, with the adapter in that folder."""
    base = base_of(adapter.parent.name) if adapter and adapter.is_relative_to(GOLDEN) else "llama"
    model = nnx.merge(*split_base(base), copy=True)
    if adapter is not None:
        peft.load(model, adapter, untrained=True)
    return model


def arrays(path):
    with np.load(GOLDEN / path) as stored:
        return dict(stored)


def batch_at(batches, step):
    return train_loss.Batch(
        *(jnp.asarray(batches[key][step][None]) for key in train_loss.Batch._fields)
    )


@functools.cache
def logits_function(graphdef):
    return jax.jit(lambda state, ids, mask: nnx.merge(graphdef, state)(ids, mask))


def compiled(model, ids):
    graphdef, state = nnx.split(model)
    return logits_function(graphdef)(jax.tree.map(np.asarray, state), ids, None)


def check_logits(model, golden, name, tolerance):
    graphdef, state = nnx.split(model)
    ids, mask = (jnp.asarray(golden[key]) for key in ("input_ids", "attention_mask"))
    state = jax.tree.map(np.asarray, state)  # of trained and loaded models alike, to compile once
    logits = np.asarray(logits_function(graphdef)(state, ids, mask))
    real = golden["attention_mask"] == 1
    np.testing.assert_allclose(logits[real], golden[name][real], atol=tolerance, rtol=0)


def check_gradients(model, config, gradient, golden, tolerance):
    """gradient: of the adapter state of `model`. golden: {PEFT's name: gradient}."""
    model = nnx.merge(*nnx.split(model), copy=True)
    nnx.update(model, jax.tree.map(jnp.asarray, gradient))
    with tempfile.TemporaryDirectory() as folder:
        peft.save(pathlib.Path(folder), model, config, base_model="")
        found = safetensors.numpy.load_file(f"{folder}/adapter_model.safetensors")
    found = {name: array for name, array in found.items() if "base_layer" not in name}
    golden = {
        re.sub(r"(\.modules_to_save)?\.default", "", name).replace("vector.weight", "vector"): array
        for name, array in golden.items()
    }
    assert found.keys() == golden.keys()
    for name, expected in golden.items():
        error = np.linalg.norm(found[name] - expected)
        assert error <= tolerance * np.linalg.norm(expected) + 1e-12, (name, error)


def gradient_of(model, batch):
    graphdef, trained, frozen = model_state.split(model)

    @jax.jit
    @jax.value_and_grad
    def mean(trained):
        built = nnx.merge(graphdef, trained, frozen.dropout_keys, frozen.base)
        own = jax.tree.map(lambda x: x[0], batch)
        found = train_loss.objective(None)(train_loss.losses(built, own), None, own)
        return found.loss / found.count

    return mean(trained)


def recording(optimizer):
    """The optimizer, whose state also holds the gradient that it got last."""

    def update(gradient, state, params=None):
        updates, state = optimizer.update(gradient, state[1], params)
        return updates, (gradient, state)

    return optax.GradientTransformation(
        lambda params: (jax.tree.map(jnp.copy, params), optimizer.init(params)), update
    )


def steps_of(graphdef, parts, config, num_steps, batches):
    """Yields (state, frozen, metrics) after each step, placed as in a run."""
    with jax.set_mesh(ONE):
        trained, frozen = parts
        trained, frozen = sharding.place([jax.tree.map(np.array, trained), frozen], ONE)
        optimizer, schedule = adamw.make(config, num_steps), adamw.schedule(config, num_steps)
        optimizer = recording(optimizer)
        step = train_step.make_step(graphdef, optimizer, schedule, seed=0, remat="none")
        state = train_step.start(trained, optimizer)
        batch = functools.partial(batch_at, batches)
        for following, metrics in train_step.steps(step, state, frozen, batch, num_steps):
            yield following, frozen, metrics


# Of which other runs do more: on more layers, and on the embedding too. Adapters of other models
# are the same, and test_models.py has the models.
LONG = dict.fromkeys(
    ("lora_qv", "lora_dora", "lora_plus", "lora_bias", "lora_embedding", "lora_tokens_head",
     "lora_tokens", "lora_gemma3", "lora_granite", "lora_olmo3", "lora_phi3"),
    pytest.mark.long,
)  # fmt: skip


@pytest.fixture(
    scope="module", params=[pytest.param(name, marks=LONG.get(name, ())) for name in RUNS]
)
def run(request):
    """(name, golden.json, metrics of each step, the first gradient, the trained model) of a
    repeated run."""
    name = request.param
    golden = json.loads((GOLDEN / name / "golden.json").read_text())
    c, batches = golden["config"], arrays(f"{name}/batches.npz")
    config = optim_config.OptimConfig(
        lr=c["lr"],
        schedule=c["sched"],
        warmup=c["warmup"],
        weight_decay=c["wd"],
        clip=c["clip"] or 0,
        lora_plus_ratio=c.get("lora_plus_ratio", 1),
    )
    graphdef, *parts = model_state.split(llama(GOLDEN / name / "init_adapter"))
    metrics, gradient = [], None
    for state, frozen, measured in steps_of(graphdef, parts, config, c["steps"], batches):
        gradient = gradient or jax.tree.map(np.array, state.opt_state[0])
        metrics.append(measured)
        if measured["step"] == c["steps"]:
            model = nnx.merge(graphdef, state.lora, frozen.dropout_keys, frozen.base)
    return name, golden, metrics, gradient, model


def test_losses_equal_pefts(run):
    _, golden, metrics, *_ = run
    found = [measured["loss"] for measured in metrics]
    np.testing.assert_allclose(found, golden["loss_fp32"], atol=1e-4, rtol=0)


def test_gradient_norms_and_learning_rates_equal_pefts(run):
    _, golden, metrics, *_ = run
    norms = [measured["grad_norm"] for measured in metrics]
    np.testing.assert_allclose(norms, golden["grad_norm_fp32"], rtol=1e-4)
    np.testing.assert_allclose([m["lr"] for m in metrics], golden["lr"], rtol=1e-6)
    assert [m["step"] for m in metrics] == list(range(1, golden["config"]["steps"] + 1))


def test_trained_model_equals_pefts(run):
    name, *_, model = run
    check_logits(model, arrays(f"{name}/eval_logits.npz"), "logits", 1e-3)


def test_trained_tensors_equal_pefts(run, tmp_path):
    """After the optimizer's steps, tensor by tensor, as written to disk."""
    name, *_, model = run
    settings = peft.config(GOLDEN / name / "init_adapter")
    peft.save(tmp_path, model, settings, base_model=base_of(name))
    found, expected = (
        safetensors.numpy.load_file(folder / "adapter_model.safetensors")
        for folder in (tmp_path, GOLDEN / name / "final_adapter")
    )
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        error = np.linalg.norm(found[key] - tensor) / np.linalg.norm(tensor)
        assert error < 1e-2, (key, error)  # Adam turns rounding into steps where a gradient is ~ 0


def test_gradient_of_the_first_step_equals_pefts(run):
    name, *_, gradient, model = run
    config = peft.config(GOLDEN / name / "init_adapter")
    check_gradients(model, config, gradient, arrays(f"{name}/step0_grads.npz"), 1e-4)


@pytest.mark.parametrize(
    "name",
    ["lora_bias", "lora_tokens_head",
     *cases.long("lora_qv", "lora_dora", "lora_plus", "lora_embedding")],
)  # fmt: skip
def test_gradient_before_any_step_equals_pefts(name):
    batch = batch_at(arrays(f"{name}/batches.npz"), 0)
    model = llama(GOLDEN / name / "init_adapter")
    _, gradient = gradient_of(model, batch)
    config = peft.config(GOLDEN / name / "init_adapter")
    check_gradients(model, config, gradient, arrays(f"{name}/step0_grads.npz"), 1e-4)


def test_patterns_gradient_equals_pefts():
    """Unequal ranks and alphas, layers without an adapter: the stack's padding has no gradient."""
    golden = arrays("lora_patterns/grads.npz")
    model = llama(GOLDEN / "lora_patterns" / "adapter")
    value, gradient = gradient_of(model, batch_at(arrays("lora_patterns/batches.npz"), 0))
    assert abs(float(value) - golden.pop("loss")) < 1e-5
    config = peft.config(GOLDEN / "lora_patterns" / "adapter")
    check_gradients(model, config, gradient, golden, 1e-4)
    q_proj = gradient["model"]["layers"]["self_attn"]["q_proj"]
    assert q_proj["lora_A"].shape == (3, 32, 6)
    assert not np.asarray(q_proj["lora_A"][1]).any() and not np.asarray(q_proj["lora_B"][1]).any()
    assert not np.asarray(q_proj["lora_A"][0, :, 4:]).any()
    assert not np.asarray(q_proj["lora_B"][0, 4:]).any()


CHANGING = ("lora_pissa", "lora_olora")  # they change the base
FINISHED = (*(f"{name}/final_adapter" for name in (*RUNS, *CHANGING)), "lora_patterns/adapter")


# The runs above have their trained models, and others their kinds of adapters.
REPEATED = tuple(f"{name}/final_adapter" for name in (
    "lora_qv", "lora_all_rslora", "lora_plus", "lora_dora_embedding", "lora_embedding",
    "lora_saved", "lora_granite", "lora_gemma2", "lora_dora", "lora_tokens"))  # fmt: skip


@pytest.mark.parametrize(
    "folder", [*(each for each in FINISHED if each not in REPEATED), *cases.long(*REPEATED)]
)
def test_loaded_and_merged_logits_equal_pefts(folder):
    golden = arrays(pathlib.Path(folder).parent / "eval_logits.npz")
    model = llama(GOLDEN / folder)
    check_logits(model, golden, "logits", 1e-4)
    lora.merge(model)
    # PEFT merges an embedding's adapter into the head that is tied to it as well.
    tied = folder.startswith("lora_dora_embedding")
    check_logits(model, golden, "logits" if tied else "merged_logits", 1e-4)


@pytest.mark.parametrize("folder", FINISHED)
def test_round_trip_is_byte_identical(folder, tmp_path):
    model, base = llama(GOLDEN / folder), base_of(pathlib.Path(folder).parent)
    peft.save(tmp_path, model, peft.config(GOLDEN / folder), base_model=base)
    name = "adapter_model.safetensors"
    assert (tmp_path / name).read_bytes() == (GOLDEN / folder / name).read_bytes()
    written, original = (
        json.loads((f / "adapter_config.json").read_text()) for f in (tmp_path, GOLDEN / folder)
    )
    assert written == {key: original[key] for key in written}
    text = (tmp_path / "adapter_config.json").read_text()
    assert text == json.dumps(written, indent=2, sort_keys=True)
    assert peft.config(tmp_path) == peft.config(GOLDEN / folder)


def test_config_round_trip_keeps_every_setting(tmp_path):
    config = lora_config.LoRAConfig(
        rank=3,
        alpha=5,
        dropout=0.25,
        targets=("q_proj", "up_proj"),
        exclude=("k_proj",),
        layers=(0, 1),
        rank_pattern={r"0\.self_attn\.q_proj": 2},
        alpha_pattern={"up_proj": 7},
        use_rslora=True,
    )
    model = llama()
    lora.inject(model, config, rngs=nnx.Rngs(0))
    peft.save(tmp_path / "new" / "adapter", model, config, base_model="b", revision="main")
    assert peft.config(tmp_path / "new" / "adapter") == config
    raw = peft.settings(tmp_path / "new" / "adapter")
    assert raw["base_model_name_or_path"] == "b" and raw["revision"] == "main"
    shapes = {
        name.removeprefix(PREFIX): tensor.shape
        for name, tensor in safetensors.numpy.load_file(
            tmp_path / "new" / "adapter" / "adapter_model.safetensors"
        ).items()
    }
    assert shapes == {
        f"{layer}.{module}.{part}.weight": shape
        for layer, rank in ((0, 2), (1, 3))
        for module, own, d_out in (("self_attn.q_proj", rank, 32), ("mlp.up_proj", 3, 48))
        for part, shape in (("lora_A", (own, 32)), ("lora_B", (d_out, own)))
    }


def test_modules_to_save_may_name_each_layer(tmp_path):
    each = [f"layers.{n}.input_layernorm" for n in range(3)]
    for ends in (["input_layernorm"], each, ["0.input_layernorm", *each[1:]],
                 ["input_layernorm", each[0]]):  # fmt: skip
        model, config = llama(), lora.LoRAConfig(targets=("q_proj",), modules_to_save=ends)
        lora.inject(model, config, rngs=nnx.Rngs(0))
        peft.save(tmp_path, model, config)
        adapter = peft.read(tmp_path)
        assert adapter.saved.keys() == {f"model.{path}.weight" for path in each}
        lora.attach(llama(), adapter, untrained=True)


def test_modules_to_save_may_name_some_layers_of_a_stack(tmp_path):
    ends = ["layers.0.mlp.up_proj", "layers.2.input_layernorm"]
    config = lora.LoRAConfig(targets=("q_proj",), modules_to_save=ends)
    model, ids = llama(), jnp.arange(5)[None]
    before = model(ids)
    taken = lora.inject(model, config, rngs=nnx.Rngs(0))
    assert [name for name in taken.left if "up_proj" in name] == [
        f"model.layers.{n}.mlp.up_proj" for n in (1, 2)
    ]
    summary = lora.summary(model)
    assert "model.layers.N.mlp.up_proj: fully trained" in summary
    np.testing.assert_array_equal(model(ids), before)
    for _, variable in nnx.iter_graph(model):
        if isinstance(variable, lora.LoRAParam):  # also of the layers that are not trained
            variable.set_value(variable[...] + 0.1)
    peft.save(tmp_path, model, config)
    adapter, changed = peft.read(tmp_path), model(ids)
    assert adapter.saved.keys() == {f"model.{end}.weight" for end in ends}
    again = llama()
    lora.attach(again, adapter)
    np.testing.assert_allclose(again(ids), changed, rtol=1e-6)
    own = llama().model.layers.mlp.up_proj.kernel[...]
    for merged in (model, again):
        lora.merge(merged)
        np.testing.assert_allclose(merged(ids), changed, rtol=1e-4, atol=1e-5)
        kernel = merged.model.layers.mlp.up_proj.kernel[...]
        np.testing.assert_array_equal(kernel[1:], own[1:])
        np.testing.assert_allclose(kernel[0], own[0] + 0.1, rtol=1e-5)
    for targets in (("up_proj",), ("down_proj",)):
        config = lora.LoRAConfig(targets=targets, modules_to_save=["layers.0.mlp"])
        with pytest.raises(errors.UserError, match=r"layers\.mlp has an adapter on other"):
            lora.inject(llama(), config, rngs=nnx.Rngs(0))


def test_adapters_on_a_quantized_base_are_written_the_same(tmp_path):
    """Only A and B are saved, so QLoRA and LoRA write the same files."""
    model = loader.load(GOLDEN / "models" / "llama", dtype="float32", quantization="int8", mesh=ONE)
    config = peft.load(model, GOLDEN / FINISHED[0])
    peft.save(tmp_path, model, config, base_model="llama")
    name = "adapter_model.safetensors"
    assert (tmp_path / name).read_bytes() == (GOLDEN / FINISHED[0] / name).read_bytes()


def test_names_of_other_writers_are_read(tmp_path):
    """Without PEFT's prefix, and with the adapter's name in it."""
    shutil.copy(GOLDEN / FINISHED[0] / "adapter_config.json", tmp_path)
    tensors = safetensors.numpy.load_file(GOLDEN / FINISHED[0] / "adapter_model.safetensors")
    renamed = {
        name.removeprefix("base_model.model.").replace(".weight", ".default.weight"): tensor
        for name, tensor in tensors.items()
    }
    safetensors.numpy.save_file(renamed, tmp_path / "adapter_model.safetensors")
    check_logits(llama(tmp_path), arrays("lora_qv/eval_logits.npz"), "logits", 1e-4)


def test_weights_of_the_base_in_an_adapter_replace_them(adapter):
    """PEFT loads them into the base, also those of some layers of what is a stack here."""
    model, tokens = llama(), jnp.arange(1, 9)[None]
    kernel = model.model.layers.self_attn.q_proj.kernel
    kernel.set_value(kernel[...].at[1].multiply(2))
    more = {
        f"base_model.model.model.layers.{layer}.self_attn.q_proj.base_layer.weight":
        np.asarray(kernel[layer].T)
        for layer in range(len(kernel[...]))
    }  # fmt: skip
    peft.load(model, adapter)
    expected = np.asarray(compiled(model, tokens))
    file = adapter / "adapter_model.safetensors"
    own = safetensors.numpy.load_file(file)
    assert not np.allclose(compiled(llama(adapter), tokens), expected, atol=1e-3)
    for layers in ([1], range(len(more))):
        given = {name: array for n, (name, array) in enumerate(more.items()) if n in layers}
        safetensors.numpy.save_file(own | given, file)
        np.testing.assert_array_equal(compiled(llama(adapter), tokens), expected)
    packed = loader.load(GOLDEN / "models/llama", quantization="int8", mesh=ONE)
    with pytest.raises(errors.UserError, match=r"not quantized(.|\n)*layers\.1.*base_layer"):
        peft.load(packed, adapter)


def rewrite(folder, change):
    """Replaces the tensors in an adapter's file by change(name, array), (another name, array)."""
    file = folder / "adapter_model.safetensors"
    tensors = safetensors.numpy.load_file(file)
    changed = dict(change(name, array) for name, array in tensors.items())
    safetensors.numpy.save_file(changed, file)


@pytest.mark.parametrize(
    "rename",
    [
        lambda name: f"_orig_mod.{name}",
        lambda name: f"module.{name}",
        lambda name: name.replace("base_model.model.", "base_model.model.module."),
        lambda name: name.replace("base_model.model.", "base_model.model._orig_mod."),
        lambda name: f"_fsdp_wrapped_module.{name}".replace(".self", "._fsdp_wrapped_module.self"),
        lambda name: name.replace("_proj.", "_proj._checkpoint_wrapped_module."),
        lambda name: name.replace(".weight", ".my-own_name2.weight"),
        lambda name: "module._orig_mod." + name.replace(".weight", ".default"),
    ],
)
def test_names_with_wrappers_or_an_adapters_name_are_read(rename, adapter):
    expected = peft.read(adapter).factors
    rewrite(adapter, lambda name, array: (rename(name), array))
    found = peft.read(adapter).factors
    assert found.keys() == expected.keys()
    for path, own in expected.items():
        np.testing.assert_array_equal(found[path].A, own.A)
        np.testing.assert_array_equal(found[path].B, own.B)


@pytest.mark.parametrize("name", ["default", "other"])
def test_saved_modules_with_an_adapters_name_are_read(name, tmp_path):
    folder = shutil.copytree(GOLDEN / "lora_saved/final_adapter", tmp_path / "adapter")
    expected = peft.read(folder).saved
    rewrite(folder, lambda key, array: (
        key if "lora_" in key else key.replace(".weight", f".modules_to_save.{name}.weight"), array
    ))  # fmt: skip
    found = peft.read(folder).saved
    assert found.keys() == expected.keys() and len(found) > 1
    assert all(np.array_equal(found[key], expected[key]) for key in found)


def test_a_model_may_have_an_attribute_named_module(tmp_path):
    model = nnx.Dict(module=nnx.Dict(up=nnx.Linear(2, 3, rngs=nnx.Rngs(0))))
    config = lora.LoRAConfig(rank=1, targets=("up",))
    lora.inject(model, config, rngs=nnx.Rngs(0))
    peft.save(tmp_path, model, config)
    assert peft.read(tmp_path).factors.keys() == {"module.up"}


def test_two_adapters_in_one_file_are_an_error(adapter):
    rewrite(adapter, lambda name, array: (
        name.replace(".weight", ".one.weight" if ".0." in name else ".two.weight"), array
    ))  # fmt: skip
    with pytest.raises(errors.UserError, match="2 adapters: one, two"):
        peft.read(adapter)
    file = adapter / "adapter_model.safetensors"
    tensors = safetensors.numpy.load_file(file)
    again = {f"_orig_mod.{name}": array + 1 for name, array in tensors.items()}
    safetensors.numpy.save_file(tensors | again, file)
    with pytest.raises(errors.UserError, match=r"_orig_mod\..* and base_model"):
        peft.read(adapter)


def test_half_precision_is_read_as_it_is(adapter):
    plain = safetensors.numpy.load_file(adapter / "adapter_model.safetensors")
    for dtype in (ml_dtypes.bfloat16, np.float16, np.float64):
        halves = {name: array.astype(dtype) for name, array in plain.items()}
        safetensors.numpy.save_file(halves, adapter / "adapter_model.safetensors")
        found = peft.read(adapter)
        for path, own in found.factors.items():
            exact = halves[f"base_model.model.{path}.lora_A.weight"].astype(np.float32).T
            assert own.A.dtype == np.float32
            np.testing.assert_array_equal(own.A, exact)


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "float8_e5m2"])
def test_float8_is_read_as_it_is(dtype):
    values = np.array([[0.5, -1.75, 2.0], [1.5, 0.25, -3.0]], np.float32)
    data = values.astype(getattr(ml_dtypes, dtype)).tobytes()
    name = {"float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2"}[dtype]
    header = json.dumps({"a": {"dtype": name, "shape": [2, 3], "data_offsets": [0, 6]}}).encode()
    stored = safetensors.deserialize(len(header).to_bytes(8, "little") + header + data)
    array = peft_tensors.decode(stored, "file")["a"]
    assert array.dtype == np.float32
    np.testing.assert_array_equal(array, values)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_tensors_that_are_not_finite_are_named(value, adapter):
    def damaged(name, array):
        if "layers.1.self_attn.q_proj.lora_B" in name:
            array = array.astype(ml_dtypes.bfloat16)
            array[0, 0] = value
        return name, array

    rewrite(adapter, damaged)
    found = r"found: +base_model\S+layers.1.self_attn.q_proj.lora_B.weight has NaN or infinity\n +w"
    with pytest.raises(errors.UserError, match=found):
        peft.read(adapter)


def test_integers_are_refused_by_name(adapter):
    rewrite(adapter, lambda name, array: (name, array.astype(np.int8)))
    with pytest.raises(errors.UserError, match=r"q_proj.lora_A.weight has dtype I8"):
        peft.read(adapter)


def test_both_files_follow_the_umask(tmp_path):
    adapter = peft.read(GOLDEN / FINISHED[0])
    before = os.umask(0o027)
    try:
        for _ in range(2):  # the second time over the first
            peft.write(tmp_path, adapter)
            modes = {path.name: path.stat().st_mode & 0o777 for path in tmp_path.iterdir()}
            assert modes == {"adapter_model.safetensors": 0o640, "adapter_config.json": 0o640}
    finally:
        os.umask(before)


@pytest.fixture
def adapter(tmp_path):
    """A copy of a valid adapter, for tests to damage."""
    return pathlib.Path(shutil.copytree(GOLDEN / FINISHED[0], tmp_path / "adapter"))


def edit_config(folder, **changes):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_pickles_are_refused(adapter):
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    with pytest.raises(errors.UserError, match=r"(?s)pickle.*weights_only=True"):
        llama(adapter)


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_config.json"])
def test_lfs_pointers_are_refused(adapter, name):
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 99\n"
    (adapter / name).write_text(pointer)
    with pytest.raises(errors.UserError, match=f"(?s)git-lfs pointer.*{name}"):
        llama(adapter)


def test_truncated_file_is_refused(adapter):
    path = adapter / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(errors.UserError, match=r"adapter_model\.safetensors"):
        llama(adapter)


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_config.json"])
def test_missing_files_are_named(adapter, name):
    (adapter / name).unlink()
    with pytest.raises(errors.UserError, match=name):
        llama(adapter)


def test_tensors_that_do_not_fit_are_all_listed(adapter):
    path = adapter / "adapter_model.safetensors"
    tensors = safetensors.numpy.load_file(path)
    del tensors[PREFIX + "1.self_attn.q_proj.lora_A.weight"]
    del tensors[PREFIX + "2.self_attn.v_proj.lora_B.weight"]
    tensors[PREFIX + "0.mlp.up_proj.lora_A.weight"] = np.zeros((4, 32), np.float32)
    tensors[PREFIX + "7.self_attn.q_proj.lora_B.weight"] = np.zeros((32, 4), np.float32)
    tensors[PREFIX + "0.self_attn.q_proj.lora_B.weight"] = np.zeros((4, 32), np.float32)
    safetensors.numpy.save_file(tensors, path)
    with pytest.raises(errors.UserError) as raised:
        llama(adapter)
    message = str(raised.value)
    for problem in (
        "layers.1.self_attn.q_proj.lora_A is missing",
        "layers.2.self_attn.v_proj.lora_B is missing",
        "layers.0.mlp.up_proj.lora_A has no target in its config",
        "layers.7.self_attn.q_proj.lora_B has no layer",
        "layers.0.self_attn.q_proj.lora_B has shape (4, 32), expected (32, 4)",
        "the model that it was trained on: llama",
    ):
        assert problem in message
    assert message.count("\n            ") == 4


@pytest.mark.parametrize(
    "change",
    [
        {"use_qalora": True},
        {"alora_invocation_tokens": [1]},
        {"bias": "some"},
        {"layer_replication": [[0, 2]]},
        {"trainable_token_indices": ["<s>"]},
        {"trainable_token_indices": {"embed_tokens": 1}},
        {"init_lora_weights": "pissa_niter_4"},
        {"megatron_config": {"a": 1}},
        {"key_of_the_future": 0.5},
    ],
)
def test_settings_that_change_the_mathematics_are_named(adapter, change):
    edit_config(adapter, **change)
    (key,) = change
    with pytest.raises(errors.UserError, match=f"(?s){key} = .*adapter_config.json"):
        llama(adapter)


def test_all_settings_at_fault_are_named_at_once(adapter):
    edit_config(adapter, use_qalora=True, key_of_the_future=1)
    with pytest.raises(errors.UserError, match=r"(?s)use_qalora = True.*key_of_the_future = 1"):
        peft.config(adapter)


def test_settings_that_do_not_matter_are_ignored(adapter):
    before = peft.config(adapter)
    edit_config(
        adapter,
        use_new_thing=False,
        new_list=[],
        new_table={},
        new_name=None,
        qalora_group_size=64,
        megatron_core="other",
        peft_version="9",
        inference_mode=False,
    )
    assert peft.config(adapter) == before


@pytest.mark.parametrize(
    "change",
    [
        {"r": "8"}, {"r": 4.0}, {"lora_alpha": "16"}, {"target_modules": 5}, {"exclude_modules": 5},
        {"target_modules": ["q_proj", 5]}, {"rank_pattern": ["q_proj"]}, {"modules_to_save": "x"},
        {"rank_pattern": {"q_proj": "4"}}, {"layers_to_transform": "1"},
        {"base_model_name_or_path": 5},
    ],
    ids=str,
)  # fmt: skip
def test_settings_of_another_type_are_named(adapter, change):
    edit_config(adapter, **change)
    ((key, value),) = change.items()
    with pytest.raises(errors.UserError) as raised:
        peft.read(adapter)
    assert raised.value.found == f"{key} = {value!r}"
    assert str(adapter / "adapter_config.json") in str(raised.value)


@pytest.mark.parametrize(
    "change",
    [{"lora_dropout": 2}, {"r": -1}, {"target_modules": "((("}, {"alpha_pattern": {"(((": 3}}],
    ids=str,
)
def test_settings_out_of_their_range_are_reported_with_their_file(adapter, change):
    edit_config(adapter, **change)
    with pytest.raises(errors.UserError, match=r"(?s)(dropout 2|rank -1|'\(\(\(').*adapter_config"):
        peft.read(adapter)


@pytest.mark.parametrize(
    "text, found",
    [("{", "JSON"), ("[1]", "a list"), ('{"peft_type": "LORA"}', "no target_modules\n")],
)
def test_a_broken_config_is_named(adapter, text, found):
    (adapter / "adapter_config.json").write_text(text)
    with pytest.raises(errors.UserError, match=found):
        peft.config(adapter)


# ------------------------------------------------------------------------- what others write


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_mlx_lms_adapters_are_read(kind, tmp_path):
    """lora_a [in, r] and lora_b [r, out] instead of A and B, a scale instead of alpha, m."""
    folder = GOLDEN / ("lora_dora" if kind == "dora" else "lora_qv") / "final_adapter"
    adapter = peft.read(folder)
    tensors = {}
    for path, own in adapter.factors.items():
        tensors |= {f"{path}.lora_a": own.A, f"{path}.lora_b": own.B}
        if own.magnitude is not None:
            tensors[f"{path}.m"] = own.magnitude
    safetensors.numpy.save_file(
        {name: np.ascontiguousarray(array) for name, array in tensors.items()},
        tmp_path / "adapters.safetensors",
    )
    own = {"rank": 4, "scale": 2.0, "dropout": 0.1, "keys": ["self_attn.q_proj"]}
    raw = {"fine_tune_type": kind, "lora_parameters": own, "num_layers": 16, "model": "m/x"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(raw))
    read = peft.read(tmp_path)
    assert read.config.alpha == 8 and read.config.dropout == 0.1 and read.base_model == "m/x"
    assert peft.base_of(tmp_path) == ("m/x", None)
    model = nnx.merge(*split_base(base_of(folder.parent.name)), copy=True)
    peft.load(model, tmp_path)
    check_logits(model, arrays(folder.parent / "eval_logits.npz"), "logits", 1e-4)


@pytest.mark.parametrize(
    "raw, tensor, found",
    [
        ({"fine_tune_type": "full"}, "a.lora_a", "fine_tune_type = 'full'"),
        ({"lora_parameters": {"rank": 4}}, "a.lora_a", "no scale"),
        ({"lora_parameters": [4]}, "a.lora_a", "no rank"),
        ({"lora_parameters": {"rank": "4", "scale": 1}}, "a.lora_a", "rank = '4'"),
        ({"lora_parameters": {"rank": 4, "scale": 1}}, "a.weight", "a.weight"),
    ],
)
def test_what_mlx_lm_trains_otherwise_is_refused(raw, tensor, found, tmp_path):
    (tmp_path / "adapter_config.json").write_text(json.dumps(raw))
    array = {tensor: np.ones((4, 4), np.float32)}
    safetensors.numpy.save_file(array, tmp_path / "adapters.safetensors")
    with pytest.raises(errors.UserError, match=f"(?s){found}.*mlx_lm.fuse"):
        peft.read(tmp_path)


OLD = {  # as PEFT 0.3 wrote it
    "base_model_name_or_path": "llama", "bias": "none", "enable_lora": None,
    "fan_in_fan_out": False, "inference_mode": True, "lora_alpha": 8, "lora_dropout": 0.0,
    "merge_weights": False, "modules_to_save": None, "peft_type": "LORA", "r": 4,
    "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM", "init_lora_weights": True,
}  # fmt: skip


def test_configs_of_old_and_new_versions_are_read(adapter):
    (adapter / "adapter_config.json").write_text(json.dumps(OLD))
    check_logits(llama(adapter), arrays("lora_qv/eval_logits.npz"), "logits", 1e-4)
    assert len(peft.settings(GOLDEN / FINISHED[0])) > 2 * len(OLD)  # all of 0.21's keys


def test_targets_of_other_models_beside_the_right_ones_are_ignored(adapter):
    """PEFT ignores names without a match, and many adapters list the names of several models."""
    edit_config(adapter, target_modules=["q_proj", "v_proj", "c_attn"], exclude_modules=["lm_head"],
                rank_pattern={"c_proj": 2})  # fmt: skip
    check_logits(llama(adapter), arrays("lora_qv/eval_logits.npz"), "logits", 1e-4)


def test_an_adapter_of_another_model_is_refused_by_its_layers(adapter):
    path = adapter / "adapter_model.safetensors"
    tensors = {
        name.replace("model.layers", "transformer.h").replace("self_attn.q_proj", "attn.c_attn"): a
        for name, a in safetensors.numpy.load_file(path).items()
    }
    safetensors.numpy.save_file(tensors, path)
    edit_config(adapter, target_modules=["c_attn"], base_model_name_or_path="gpt2")
    with pytest.raises(errors.UserError) as raised:
        llama(adapter)
    message = str(raised.value)
    assert "model.layers.N.self_attn.q_proj" in message and "trained on: gpt2" in message
    assert "transformer.h.0.attn.c_attn.lora_A has no layer in this model" in message


@pytest.mark.parametrize("kind", ["PROMPT_TUNING", "IA3", "ADALORA", "LOHA", "VERA"])
def test_adapters_of_other_kinds_are_refused_by_name(adapter, kind):
    edit_config(adapter, peft_type=kind, r=None, num_virtual_tokens=8)
    with pytest.raises(errors.UserError, match=f"(?s)peft_type LORA.*peft_type = '{kind}'"):
        llama(adapter)


def test_an_adapter_without_effect_is_an_error():
    with pytest.raises(errors.UserError, match="A or B is zero in each of its 6 layers"):
        peft.load(nnx.merge(*split_base("llama"), copy=True), GOLDEN / "lora_qv" / "init_adapter")


def test_the_effect_of_each_layer_is_reported():
    model = llama(GOLDEN / FINISHED[0])
    effects = lora.effects(model)
    assert set(effects) == set(peft.read(GOLDEN / FINISHED[0]).factors)
    own = peft.read(GOLDEN / FINISHED[0]).factors["model.layers.1.self_attn.q_proj"]
    weight = np.asarray(model.model.layers.self_attn.q_proj.kernel[1])
    expected = np.linalg.norm(2 * own.A @ own.B) / np.linalg.norm(weight)
    assert effects["model.layers.1.self_attn.q_proj"] == pytest.approx(expected, rel=1e-5)


# ------------------------------------------------------------------------- PiSSA and OLoRA


@pytest.mark.parametrize("name", ["lora_pissa", *cases.long("lora_olora")])
def test_what_changes_the_base_trains_as_in_peft(name, tmp_path):
    """The same initial values lead to the same losses and the same change of the original base."""
    golden = json.loads((GOLDEN / name / "golden.json").read_text())
    steps, lr = golden["config"]["steps"], golden["config"]["lr"]
    model, own = llama(), golden["config"]["lora"]
    config = lora_config.LoRAConfig(
        rank=4,
        alpha=own["lora_alpha"],
        targets=("q_proj", "down_proj"),
        init_lora_weights=own["init_lora_weights"],
    )
    lora.inject(model, config, rngs=nnx.Rngs(0))
    graphdef, *parts = model_state.split(model)
    how = optim_config.OptimConfig(lr=lr, schedule="constant", warmup=0, clip=0)
    batches = arrays(f"{name}/batches.npz")
    found = [*steps_of(graphdef, parts, how, steps, batches)]
    losses, (state, frozen, _) = [measured["loss"] for *_, measured in found], found[-1]
    np.testing.assert_allclose(losses, golden["loss_fp32"], atol=1e-4, rtol=0)

    model = nnx.merge(graphdef, state.lora, frozen.dropout_keys, frozen.base)
    peft.save(tmp_path, model, config, base_model="llama")
    found, expected = (peft.read(f) for f in (tmp_path, GOLDEN / name / "final_adapter"))
    assert found.config == expected.config and found.factors.keys() == expected.factors.keys()
    for path, theirs in expected.factors.items():
        ours = found.factors[path]
        change = theirs.A @ theirs.B
        error = np.linalg.norm(ours.A @ ours.B - change) / np.linalg.norm(change)
        assert error < 1e-2, (path, error)


@pytest.mark.parametrize("name", [CHANGING[0], *cases.long(*CHANGING[1:])])
def test_an_unconverted_adapter_changes_the_base_as_in_peft(name, tmp_path):
    """PEFT takes the initial A B from the base again when it loads the adapter."""
    folder, golden = GOLDEN / name / "unconverted_adapter", arrays(f"{name}/eval_logits.npz")
    model, base = llama(folder), llama()
    check_logits(model, golden, "logits", 1e-4)
    written = peft.read(folder)
    peft.write(tmp_path / "same", written)
    assert peft.read(tmp_path / "same").config == written.config
    peft.save(tmp_path / "plain", model, written.config, base_model="llama")
    converted = peft.read(tmp_path / "plain")
    assert converted.config == peft.config(GOLDEN / name / "final_adapter")
    check_logits(llama(tmp_path / "plain"), golden, "logits", 1e-4)
    stripped = nnx.merge(*nnx.split(model), copy=True)
    lora.strip(stripped)
    kernel, original = (m.model.layers.self_attn.q_proj.kernel[...] for m in (stripped, base))
    np.testing.assert_allclose(kernel, original, atol=1e-6)
    lora.merge(model)
    check_logits(model, golden, "logits", 1e-4)
    packed = loader.load(GOLDEN / "models/llama", quantization="int8", mesh=ONE)
    with pytest.raises(errors.UserError, match=r"q_proj is in int8(.|\n)*--quant none"):
        peft.load(packed, folder)
    bank.add(base, slots=1, rank=4, targets=("q_proj", "down_proj"))
    for attempt in (lambda: host.aligned({"x": written}), lambda: host.combined([(written, 1)]),
                    lambda: banked.Bank(base).contents(written, "x")):  # fmt: skip
        with pytest.raises(errors.UserError, match="which changes the base"):
            attempt()


@pytest.mark.parametrize("text", ["[" * 10**5, "{", "\udcff", "[]"])
def test_an_adapter_config_that_cannot_be_read_is_named(tmp_path, text):
    path = tmp_path / "adapter_config.json"
    path.write_text(text, errors="surrogateescape")
    with pytest.raises(errors.UserError, match="a JSON object") as error:
        peft.settings(tmp_path)
    assert error.value.where == str(path)
