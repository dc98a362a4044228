"""Quantized checkpoints of other programs: the same weights bit for bit, also on a mesh; errors."""

import contextlib
import functools
import json
import pathlib
import shutil

import cases
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import quantized_models
import safetensors.numpy
from flax import nnx

from lora_jax import errors
from lora_jax.checkpoints import inventory, loader, safetensors_files, storage
from lora_jax.kernels import packed as packing
from lora_jax.lora import config as lora_config
from lora_jax.lora import peft
from lora_jax.lora.nnx import inject, model_state
from lora_jax.models import quantization_config
from lora_jax.optim import adamw
from lora_jax.optim import config as optim_config
from lora_jax.optim import loss as train_loss
from lora_jax.optim import step as train_step
from lora_jax.parallel import mesh as sharding
from lora_jax.quant import conversion, formats
from lora_jax.quant import linear as quant_linear

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"
MODELS = GOLDEN / "models"
NF4, NF4_DQ = (GOLDEN / "quantized" / f"stories260K-bnb-{fmt}" for fmt in ("nf4", "nf4-dq"))
STEPS = 5
STATE = "weight.quant_state.bitsandbytes__"


def mesh_of(*sizes):
    return sharding.make_mesh(dict(zip(sharding.AXES, sizes, strict=True)))


ONE = (1, 1, 1)


@functools.cache
def load(folder, quantization=None, mesh=ONE):
    how = {"dtype": "float32", "quantization": quantization, "mesh": mesh_of(*mesh)}
    return loader.load(folder, **how)


def dense(model):
    """{module on disk: its weight [K, N]} of every linear layer."""
    found = {}
    for path, node in nnx.iter_graph(model.model.layers):
        if isinstance(node, nnx.Linear | quant_linear.QuantLinear):
            linear = (
                conversion.dequantize_linear(node)
                if isinstance(node, quant_linear.QuantLinear)
                else node
            )
            for layer, kernel in enumerate(np.asarray(linear.kernel[...])):
                found[".".join(("model", "layers", str(layer), *path))] = kernel
    return found


def assert_same_weights(model, expected):
    found = dense(model)
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        np.testing.assert_array_equal(found[name], weight, err_msg=name)


@functools.partial(jax.jit, static_argnums=0)
def apply(graphdef, state, ids):
    return nnx.merge(graphdef, state)(ids)


def logits(model, ids):
    return np.asarray(apply(*nnx.split(model), jnp.asarray(ids)))


@functools.partial(jax.jit, static_argnums=(0, 2))
def unpack(how, raw, *dtype):
    return how(raw, *dtype)


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def dequantize(packed, fmt, rows, dtype):
    return formats.dequantize(packed, fmt, rows, dtype)


# bitsandbytes


def golden_matrix(case):
    with np.load(GOLDEN / "nf4.npz") as arrays:
        return {key.removeprefix(f"{case}_"): arrays[key] for key in arrays
                if key.removeprefix(f"{case}_") in
                ("packed", "absmax", "code", "blocksize", "dequant", "nested_absmax",
                 "nested_code", "nested_blocksize", "offset")}  # fmt: skip


def state_of(golden, kind, shape):
    state = {"quant_type": kind, "blocksize": int(golden["blocksize"]), "dtype": "float32"}
    state["shape"] = list(shape)
    if "offset" in golden:
        state |= {"nested_blocksize": int(golden["nested_blocksize"]), "nested_dtype": "float32",
                  "nested_offset": float(golden["offset"])}  # fmt: skip
    return state


def write_matrix(folder, golden, kind, held_as=np.uint8):
    """One matrix as bitsandbytes saves it, and what storage.find returns."""
    shape = golden["dequant"].shape
    tensors = {
        "m.weight": golden["packed"].reshape(-1).view(held_as)[:, None],
        "m.weight.absmax": golden["absmax"],
        "m.weight.quant_map": golden["code"],
        f"m.{STATE}{kind}": np.frombuffer(
            json.dumps(state_of(golden, kind, shape)).encode(), np.uint8
        ),
    }
    if "offset" in golden:
        tensors["m.weight.nested_absmax"] = golden["nested_absmax"]
        tensors["m.weight.nested_quant_map"] = golden["nested_code"]
    safetensors.numpy.save_file(tensors, folder / "model.safetensors")
    declared = quantization_config.Quantization("bitsandbytes", kind)
    stored = safetensors_files.tensors(folder)
    return storage.find(declared, {"m": shape[::-1]}, (), stored), set(stored)


@pytest.mark.parametrize(
    ("case", "kind", "fmt"),
    [
        ("bf16_nf4", "nf4", "nf4"),
        ("bf16_nf4_dq", "nf4", "nf4-dq"),
        ("bf16_fp4_dq", "fp4", "fp4-dq"),
        ("zeros_block_fp4", "fp4", "fp4"),
        ("gauss_bs128_nf4_dq", "nf4", "nf4-dq"),
        ("ragged_nf4", "nf4", None),
        ("ragged_fp4_dq", "fp4", None),
    ],
)
def test_a_matrix_of_bitsandbytes_is_read_bit_for_bit(tmp_path, case, kind, fmt):
    """Also in blocks of 128, and in blocks that reach across rows, which make the weight dense."""
    golden = golden_matrix(case)
    found, names = write_matrix(tmp_path, golden, kind)
    assert not found.problems and found.claimed == names
    weight = found.weights["m"]
    raw = storage.read(weight, mesh_of(*ONE), (None, None))
    dtype = jnp.bfloat16 if case.startswith("bf16") else jnp.float32
    unpacked = unpack(storage.Dequantize(weight.recipe), raw, dtype)
    np.testing.assert_array_equal(unpacked.astype(jnp.float32).T, golden["dequant"])
    spec = weight.recipe.packed
    assert (spec.fmt if spec else None) == fmt
    if spec:
        packed = unpack(storage.Unpack(weight.recipe, 1), raw)
        np.testing.assert_array_equal(
            dequantize(packed, fmt, golden["dequant"].shape[1], dtype), unpacked
        )
        assert packed.scale.dtype == (jnp.uint8 if fmt.endswith("dq") else jnp.float32)


@pytest.mark.parametrize("held_as", [ml_dtypes.bfloat16, np.float16, np.float32, np.int8])
def test_any_dtype_may_hold_the_bytes(tmp_path, held_as):
    golden = golden_matrix("bf16_nf4")
    found, _ = write_matrix(tmp_path, golden, "nf4", held_as)
    weight = found.weights["m"]
    raw = storage.read(weight, mesh_of(*ONE), (None, None))
    unpacked = unpack(storage.Dequantize(weight.recipe), raw, jnp.bfloat16)
    np.testing.assert_array_equal(unpacked.astype(jnp.float32).T, golden["dequant"])


def test_logits_are_those_of_bitsandbytes_weights():
    with np.load(NF4_DQ.with_name(f"{NF4_DQ.name}.npz")) as arrays:
        golden = dict(arrays)
    model = load(NF4_DQ)
    found = logits(model, golden["input_ids"])[:, golden["positions"]]
    np.testing.assert_allclose(found, golden["logits"], atol=2e-4)
    # Blocks of 64 do not divide its 172 inputs.
    expected = [f"model.layers.{i}.mlp.down_proj" for i in range(5)]
    assert inventory.dense_linears(model) == (expected, 35)
    assert model.model.layers.self_attn.q_proj.fmt == "nf4-dq"
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(nnx.state(model)))
    assert size == inventory.loaded_bytes(NF4_DQ, dtype="float32", quantization=None)


@pytest.mark.long
def test_training_on_bitsandbytes_weights_has_pefts_losses():
    """Up to rounding, for the first steps; the golden values cover 50."""
    golden = json.loads((GOLDEN / "qlora_nf4" / "golden.json").read_text())
    with np.load(GOLDEN / "qlora_nf4" / "batches.npz") as arrays:
        rows = arrays["input_ids"].astype(np.int32)[:STEPS]
    mesh = mesh_of(*ONE)
    with jax.set_mesh(mesh):
        model = loader.load(NF4, mesh=mesh)
        peft.load(model, GOLDEN / "qlora_nf4" / "init_adapter", untrained=True)
        graphdef, *state = model_state.split(model)
        trained, frozen = sharding.place(state, mesh)
        adam = optim_config.OptimConfig(
            lr=golden["config"]["lr"], schedule="constant", warmup=0, clip=0
        )
        optimizer = adamw.make(adam, len(rows))
        step = train_step.make_step(
            graphdef, optimizer, adamw.schedule(adam, len(rows)), seed=0, remat="full"
        )
        state, losses = train_step.start(trained, optimizer), []
        for ids in rows:
            batch = train_loss.Batch(ids[None], ids[None], np.ones_like(ids)[None])
            state, metrics = step(state, frozen, sharding.put(batch, sharding.batch(mesh)))
            losses.append(float(metrics["loss"]))
    np.testing.assert_allclose(losses, golden["losses"][:STEPS], rtol=1e-4)


# GPTQ, AWQ, compressed-tensors and mlx-lm

FOREIGN = {
    "gptq": dict(method="gptq"),
    "gptq-sym": dict(method="gptq", symmetric=True, group=64),
    "gptq-v2-whole": dict(method="gptq", version=2, group=-1),
    "gptq-act-order": dict(method="gptq", act_order=True, group=48),
    "awq": dict(method="awq"),
    "compressed-tensors": dict(method="compressed-tensors", group=16),
    "compressed-tensors-sym": dict(method="compressed-tensors", symmetric=True, group=-1),
    "compressed-tensors-act-order": dict(method="compressed-tensors", act_order=True),
    "mlx": dict(method="mlx", group=64),
}


@pytest.fixture(scope="module")
def foreign(tmp_path_factory):
    """name in FOREIGN → (folder, its dense weights)"""
    parent = tmp_path_factory.mktemp("foreign")

    @functools.cache
    def written(name):
        return parent / name, quantized_models.write(parent / name, **FOREIGN[name])

    return written


# Other tests compare the weights of the first; the others are variants of those that stay.
LONG = ("gptq-act-order", "gptq-sym", "compressed-tensors", "mlx")


@pytest.mark.parametrize(
    "name", [*(name for name in FOREIGN if name not in LONG), *cases.long(*LONG)]
)
def test_weights_are_code_less_zero_times_scale_bit_for_bit(foreign, name):
    folder, weights = foreign(name)
    model = load(folder)
    assert_same_weights(model, weights)
    packed = model.model.layers.mlp.down_proj.packed
    assert model.model.layers.mlp.down_proj.fmt == "int4"
    assert inventory.dense_linears(model) == ([], 14)
    assert (packed.group_bias is None) == ("sym" in name)
    assert (packed.order is None) == ("act-order" not in name)
    assert packed.scale.dtype == jnp.float32


def test_a_trained_head_is_no_stack_of_dense_layers(foreign):
    model = load(foreign(next(iter(FOREIGN)))[0])
    inject.inject(
        model,
        lora_config.LoRAConfig(targets=("q_proj",), modules_to_save=("lm_head",)),
        rngs=nnx.Rngs(0),
    )
    assert inventory.dense_linears(model) == ([], 14)


@pytest.mark.parametrize(
    "how",
    [*cases.long(dict(symmetric=True, group=-1), dict(group=16)), dict(act_order=True)],
    ids=str,
)
def test_words_of_four_bytes_become_dense(how, tmp_path):
    """compressed-tensors' "pack-quantized" with 8 bits; --quant rounds them as dense weights."""
    weights = quantized_models.write(tmp_path, "compressed-tensors", bits=8, **how)
    model = load(tmp_path)
    assert_same_weights(model, weights)
    assert len(inventory.dense_linears(model)[0]) == 14
    up = "model.layers.0.mlp.up_proj"
    one = formats.quantize(jnp.asarray(weights[up]), "int8")
    found = load(tmp_path, "int8", mesh=(1, 2, 2)).model.layers.mlp.up_proj.packed
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a[0], b), found, one)


@pytest.mark.parametrize(
    "name, tensor, found",
    [
        ("mlx", ("scales", np.ones((128, 65), np.float16)), "no codes of 2 to 8 bits"),
        ("mlx", ("scales", np.ones((128, 0), np.float16)), "no codes of 2 to 8 bits"),
        ("mlx", ("weight", np.ones((), np.uint32)), r"weight has shape \[\]"),
        ("mlx", ("weight", np.ones((128, 7), np.uint32)), "7 words"),
        ("compressed-tensors", ("weight_shape", np.array([128, 63])), "weight_shape is not"),
        ("compressed-tensors", ("weight_scale", None), "weight_scale is missing"),
        ("compressed-tensors", ("weight_zero_point", None), "weight_zero_point is missing"),
        (
            "compressed-tensors-act-order",
            ("weight_g_idx", np.zeros(64, np.int32)),
            "does not divide",
        ),
    ],
)
def test_shapes_that_are_none_of_a_format_are_named(foreign, name, tensor, found, tmp_path):
    folder = shutil.copytree(foreign(name)[0], tmp_path / "changed")
    tensors = safetensors.numpy.load_file(folder / "model.safetensors")
    changed, array = f"model.layers.0.mlp.up_proj.{tensor[0]}", tensor[1]
    del tensors[changed]
    safetensors.numpy.save_file(
        tensors | ({} if array is None else {changed: array}), folder / "model.safetensors"
    )
    with pytest.raises(errors.UserError, match=f"model.layers.0.mlp.up_proj.*{found}"):
        load(folder)


def test_zero_points_of_weights_that_are_declared_symmetric_count(tmp_path):
    weights = quantized_models.write(tmp_path, "compressed-tensors")
    path = tmp_path / "config.json"
    path.write_text(path.read_text().replace('"symmetric": false', '"symmetric": true'))
    assert_same_weights(load(tmp_path), weights)


def test_quantization_none_makes_them_dense_with_the_same_products(foreign):
    folder, weights = foreign("gptq-act-order")
    model = load(folder, "none")
    assert_same_weights(model, weights)
    assert len(inventory.dense_linears(model)[0]) == 14
    ids = np.arange(24).reshape(2, 12)
    expected = logits(model, ids)
    np.testing.assert_allclose(logits(load(folder), ids), expected, atol=1e-5 * abs(expected).max())


def test_the_derivative_with_rows_in_act_order(foreign):
    """dx = dy · Wᵀ, in the order of x's features."""
    folder, weights = foreign("gptq-act-order")
    layer = quant_linear.QuantLinear(
        packing.layer(load(folder).model.layers.mlp.down_proj.packed, 1),
        nnx.Linear(128, 64, use_bias=False, rngs=nnx.Rngs(0)),
        fmt="int4",
    )
    x = jnp.asarray(np.random.default_rng(0).normal(size=(3, 128)), jnp.float32)
    y, dx = jax.jit(lambda x: (layer(x), jax.vjp(layer, x)[1](layer(x))[0]))(x)
    weight = weights["model.layers.1.mlp.down_proj"]
    np.testing.assert_allclose(y, x @ weight, atol=1e-4)
    np.testing.assert_allclose(dx, y @ weight.T, atol=1e-3)


# On a mesh


@pytest.mark.parametrize(
    "name",
    [*cases.long("stories260K-bnb-nf4-dq", "compressed-tensors", "mlx"), "gptq-act-order"],
)
def test_a_mesh_holds_the_same_model(foreign, name):
    """The input axis is cut in two and padded to whole groups; each device reads its part."""
    folder = NF4_DQ if name == NF4_DQ.name else foreign(name)[0]
    alone, dealt = load(folder), load(folder, mesh=(2, 2, 2))
    q = dealt.model.layers.self_attn.q_proj.q[...]
    assert q.sharding.spec == jax.P(None, "fsdp", "tensor")
    assert_same_weights(dealt, dense(alone))
    if folder != NF4_DQ:
        return
    ids = np.arange(32).reshape(4, 8) % 90
    with jax.set_mesh(mesh_of(2, 2, 2)):
        found = logits(dealt, ids)
    expected = logits(alone, ids)
    np.testing.assert_allclose(found, expected, atol=2e-5 * abs(expected).max())


def test_only_the_bytes_of_a_devices_rows_are_read(tmp_path, monkeypatch):
    golden = golden_matrix("bf16_nf4")
    found, _ = write_matrix(tmp_path, golden, "nf4")
    asked, opened = [], safetensors_files.opened

    class Part:
        def __init__(self, part):
            self.part = part

        def __getitem__(self, index):
            asked.append((index.start, index.stop))
            return self.part[index]

    @functools.wraps(opened)
    def counting(stored):
        with opened(stored) as part:
            yield Part(part) if stored.name == "m.weight" else part

    monkeypatch.setattr(safetensors_files, "opened", contextlib.contextmanager(counting))
    weight = found.weights["m"]
    raw = storage.read(weight, mesh_of(2, 2, 2), ("fsdp", "tensor"))
    columns, rows = golden["dequant"].shape
    half = columns * rows // 4
    assert {*asked} == {(0, half), (half, 2 * half)}
    unpacked = unpack(storage.Dequantize(weight.recipe), raw, jnp.bfloat16)
    np.testing.assert_array_equal(unpacked.astype(jnp.float32).T, golden["dequant"])


# What is refused


def spoilt(folder, change):
    """A copy of the NF4 model with `change(tensors)` applied."""
    shutil.copytree(NF4, folder)
    tensors = safetensors.numpy.load_file(folder / "model.safetensors")
    change(tensors)
    safetensors.numpy.save_file(tensors, folder / "model.safetensors")
    return folder


def test_all_problems_are_reported_at_once(tmp_path):
    prefix = "model.layers.0.self_attn."

    def text(**state):
        return np.frombuffer(json.dumps(state).encode(), np.uint8)

    good = {"quant_type": "nf4", "blocksize": 64, "dtype": "float32", "shape": [64, 64]}

    def change(tensors):
        tensors[f"{prefix}q_proj.{STATE}nf4"] = tensors[f"{prefix}q_proj.{STATE}nf4"][:20]
        tensors[f"{prefix}o_proj.{STATE}nf4"] = text(**good | {"shape": [64, 32], "blocksize": 0})
        del tensors[f"{prefix}k_proj.weight.absmax"]
        tensors[f"{prefix}v_proj.weight"] = tensors[f"{prefix}v_proj.weight"][:-1]
        tensors[f"{prefix}v_proj.weight.extra"] = np.zeros(1, np.float32)
        up = "model.layers.1.mlp.up_proj."
        tensors[f"{up}weight.nested_absmax"] = np.zeros(1, np.float32)
        gate = "model.layers.1.mlp.gate_proj."
        tensors[f"{gate}{STATE}fp4"] = tensors.pop(f"{gate}{STATE}nf4")
        tensors["model.layers.1.mlp.down_proj.weight.quant_map"] = np.zeros(16, np.float32)
        tensors["model.norm.weight"] = np.zeros(3, np.float32)

    with pytest.raises(errors.UserError) as raised:
        loader.load(spoilt(tmp_path / "model", change))
    message = str(raised.value)
    for problem in (
        f"{prefix}q_proj.{STATE}nf4 is not JSON",
        f"{prefix}o_proj.{STATE}nf4: shape is [64, 32], expected [64, 64]",
        f"{prefix}o_proj.{STATE}nf4: blocksize is 0",
        f"{prefix}k_proj.weight.absmax is missing",
        f"{prefix}v_proj.weight has shape [1023, 1], expected [1024, 1]",
        f"{prefix}v_proj.weight.extra is unexpected",
        "model.layers.1.mlp.up_proj.weight.nested_absmax is present, but",
        f"model.layers.1.mlp.gate_proj.{STATE}fp4: quant_type is 'nf4', expected 'fp4'",
        "model.layers.1.mlp.down_proj.weight.quant_map is not nf4's",
        "model.norm.weight has shape [3]",
    ):
        assert problem in message


def test_contradictory_tensors_of_gptq_are_reported(tmp_path):
    quantized_models.write(tmp_path, "gptq")
    tensors = safetensors.numpy.load_file(tmp_path / "model.safetensors")
    prefix = "model.layers.0.self_attn."
    tensors[f"{prefix}q_proj.g_idx"] = np.zeros(64, np.int32)
    tensors[f"{prefix}k_proj.scales"] = tensors[f"{prefix}k_proj.scales"].astype(np.float32)
    tensors[f"{prefix}v_proj.qweight"] = tensors[f"{prefix}v_proj.qweight"][:4]
    del tensors[f"{prefix}o_proj.qzeros"]
    tensors[f"{prefix}o_proj.weight"] = np.zeros((64, 64), np.float16)
    tensors["model.layers.1.mlp.up_proj.bias"] = np.zeros(128, np.float16)  # as some programs write
    tensors["model.layers.1.mlp.down_proj.bias"] = np.ones(64, np.float16)
    safetensors.numpy.save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(errors.UserError) as raised:
        loader.load(tmp_path)
    message = str(raised.value)
    for problem in (
        f"{prefix}q_proj.g_idx does not divide 64 rows into groups of 32",
        f"{prefix}k_proj.scales has dtype F32, expected BF16 or F16",
        f"{prefix}v_proj.qweight has shape [4, 64], expected [8, 64]",
        f"{prefix}o_proj.qzeros is missing",
        f"{prefix}o_proj.weight is present too, dense",
        "model.layers.1.mlp.down_proj.bias is unexpected",
    ):
        assert problem in message
    assert "up_proj.bias" not in message


@pytest.mark.parametrize("version", [1, 2])
def test_zero_points_declared_symmetric_must_be_8(tmp_path, version):
    """Some programs write the zero points of gptq_v2 without declaring it."""
    quantized_models.write(tmp_path, "gptq", symmetric=True, version=2)
    path = tmp_path / "config.json"
    path.write_text(path.read_text().replace("gptq_v2", {1: "gptq", 2: "gptq_v2"}[version]))
    if version == 2:
        loader.load(tmp_path)
        return
    with pytest.raises(errors.UserError, match='says sym; they are those of "checkpoint_format"'):
        loader.load(tmp_path)


def test_one_dense_layer_makes_its_stack_dense(tmp_path):
    """As llm_int8_skip_modules leaves them: the layers of a stack are one array."""
    name = "model.layers.2.self_attn.q_proj"
    original = safetensors.numpy.load_file(MODELS / "stories260K" / "model.safetensors")

    def change(tensors):
        for key in [key for key in tensors if key.startswith(f"{name}.")]:
            del tensors[key]
        tensors[f"{name}.weight"] = original[f"{name}.weight"]

    model = loader.load(spoilt(tmp_path / "model", change))
    assert {path.split(".")[-1] for path in inventory.dense_linears(model)[0]} == {
        "q_proj", "down_proj",
    }  # fmt: skip
    expected = dense(load(NF4)) | {name: original[f"{name}.weight"].T}
    assert_same_weights(model, expected)


def test_a_declaration_without_quantized_weights_is_an_error(tmp_path):
    shutil.copytree(MODELS / "stories260K", tmp_path / "model")
    shutil.copy(NF4 / "config.json", tmp_path / "model")
    with pytest.raises(errors.UserError, match="says bitsandbytes, but every linear layer"):
        loader.load(tmp_path / "model")
