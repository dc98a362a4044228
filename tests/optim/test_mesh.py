"""Any mesh takes the same steps and generates the same tokens; what its devices communicate."""

import functools
import math

import cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_step
import tiny_tokenizer
from flax import nnx

from lora_jax import tokenizer
from lora_jax.data import encoding
from lora_jax.generation import config as generation_config
from lora_jax.generation import engine
from lora_jax.lora.nnx import model_state
from lora_jax.optim import adamw
from lora_jax.optim import loss as train_loss
from lora_jax.optim import step as train_step
from lora_jax.parallel import mesh as sharding
from lora_jax.planning import hlo
from lora_jax.training import monitor

STEPS, ROWS, MICRO_BATCHES, LAYERS = 6, 16, 2, 3
TOKENS = 20  # not a dimension of a weight, so that it identifies activations
MESHES = {
    "1·1·1": {"data": 1, "fsdp": 1, "tensor": 1},
    "8·1·1": {"data": 8, "fsdp": 1, "tensor": 1},
    "1·8·1": {"data": 1, "fsdp": 8, "tensor": 1},
    "1·1·4": {"data": 1, "fsdp": 1, "tensor": 4},
    "2·2·2": {"data": 2, "fsdp": 2, "tensor": 2},
}
HEAD = (32, test_step.VOCAB)
TARGETS = ("q_proj", "down_proj")  # split over its outputs, split over its inputs


def make_batch(index, micro_batches):
    """Sequences of different lengths, with half of each trained."""
    rng = np.random.default_rng(index)
    ids = rng.integers(3, test_step.VOCAB, (ROWS, TOKENS)).astype(np.int32)
    lengths = rng.integers(4, TOKENS + 1, (ROWS, 1))
    mask = (np.arange(TOKENS) < lengths).astype(np.int32)
    labels = np.where((np.arange(TOKENS) >= lengths // 2) & (mask == 1), ids, encoding.IGNORED)
    return train_loss.Batch(*(a.reshape(micro_batches, -1, TOKENS) for a in (ids, labels, mask)))


@functools.cache
def load(name, **settings):
    mesh = sharding.make_mesh(MESHES[name])
    with jax.set_mesh(mesh):
        model = test_step.make_model(
            mesh, "int4", **{"dropout": 0.1, "targets": TARGETS, **settings}
        )
        graphdef, *parts = model_state.split(model)
        return mesh, graphdef, *sharding.place(parts, mesh)


def start(trained, mesh):
    """A state whose memory a step may reuse."""
    state = train_step.start(jax.tree.map(jnp.copy, trained), adamw.make(test_step.ADAM, STEPS))
    return sharding.place(state, mesh)


@functools.cache
def trained_on(name):
    """(losses of all steps, the step's program, the shapes of its packed words) on a mesh.

    One device takes all 16 sequences at once, the other meshes 8 at a time.
    """
    mesh, graphdef, trained, frozen = load(name)
    micro_batches = 1 if name == "1·1·1" else MICRO_BATCHES
    with jax.set_mesh(mesh):
        state = start(trained, mesh)

        def batch_at(index):
            batch = make_batch(index % (STEPS // 2), micro_batches)  # each batch twice
            return jax.device_put(batch, sharding.batch(mesh))

        step = test_step.make_step(graphdef, remat="full")
        step = step.lower(state, frozen, batch_at(0)).compile()
        run = train_step.steps(step, state, frozen, batch_at, STEPS)
        losses = np.array([metrics["loss"] for _, metrics in run])
    words = {leaf.shape[1:] for leaf in jax.tree.leaves(frozen.base) if leaf.dtype == np.uint32}
    return losses, hlo.parse(step.as_text()), words


def collectives(name):
    """[(kind, dtype, dimensions other than 1, count)] of the step's communication."""
    return [
        (kind, dtype, tuple(n for n in dims if n != 1), times)
        for instruction, times, _ in trained_on(name)[1]
        if (kind := instruction.opcode.removesuffix("-start")) in hlo.COLLECTIVES
        for dtype, dims, _ in hlo.arrays(instruction.shape)
    ]


@pytest.mark.parametrize("name", [*cases.long("8·1·1", "1·8·1", "1·1·4"), "2·2·2"])
def test_every_mesh_takes_the_same_steps(name):
    """With dropout: a mask belongs to its sequence, on whichever device that is computed."""
    expected = trained_on("1·1·1")[0]
    assert abs(trained_on(name)[0] - expected).max() < 2e-5
    assert expected[STEPS // 2 :].mean() < expected[: STEPS // 2].mean()


@pytest.mark.long
@pytest.mark.parametrize(
    "settings",
    [
        # The head's logits are sharded over tensor, and computed all at once.
        {"targets": ("lm_head", "embed_tokens", "o_proj"), "use_dora": True},
        {"modules_to_save": ("lm_head",), "trainable_token_indices": (9, 90, 5)},
        # Columns of a head that is sharded over tensor.
        {
            "targets": ("q_proj",),
            "modules_to_save": ("embed_tokens", "input_layernorm"),
            "trainable_token_indices": {"lm_head": (91, 7)},
        },
        # Slices of an output that is sharded over tensor, at other places.
        {"base": test_step.LLAMA.parent / "phi3_longrope", "targets": "all-linear"},
        # A norm over all heads, which are sharded over tensor.
        {"base": test_step.LLAMA.parent / "olmo3", "targets": "all-linear"},
        # Soft caps of logits whose heads, and whose vocabulary, are sharded over tensor.
        {"base": test_step.LLAMA.parent / "gemma2"},
    ],
    ids=[
        "head",
        "saved head",
        "tokens of the head",
        "fused layers",
        "norm of all heads",
        "soft caps",
    ],
)
def test_adapters_of_every_kind_take_the_same_step(settings):
    found = []
    for name in ("1·1·1", "2·2·2"):
        mesh, graphdef, trained, frozen = load.__wrapped__(name, **settings)  # each once
        with jax.set_mesh(mesh), monitor.Compilations() as compilations:
            state, step, norms = start(trained, mesh), test_step.make_step(graphdef), []
            for index in range(2):  # after the first step, all trained arrays have a gradient
                batch = jax.device_put(make_batch(index, 1), sharding.batch(mesh))
                state, metrics = step(state, frozen, batch)
                norms += [float(metrics["loss"]), float(metrics["grad_norm"])]
                assert not compilations.done(index + 1, step, batch.input_ids.shape)
            found.append(norms)
    np.testing.assert_allclose(*found, rtol=2e-5)


def test_one_device_does_not_communicate():
    assert collectives("1·1·1") == []


@pytest.mark.long
def test_data_parallel_devices_sum_once_a_step():
    """Not for every micro-batch and layer: in total, the gradient and three numbers."""
    _, _, trained, _ = load("8·1·1")
    adapters = sum(leaf.size for leaf in jax.tree.leaves(trained))
    assert {(kind, times) for kind, _, _, times in collectives("8·1·1")} == {("all-reduce", 1)}
    floats = [math.prod(dims) for _, dtype, dims, _ in collectives("8·1·1") if dtype == "f32"]
    assert sum(floats) == adapters + 1  # the loss
    counts = [dims for _, dtype, dims, _ in collectives("8·1·1") if dtype != "f32"]
    assert counts == [(), ()]  # the numbers of trained tokens and of all tokens


@pytest.mark.long
def test_fsdp_gathers_weights_packed():
    """Layer by layer: in the forward pass, in its recomputation, and in the backward pass."""
    gathered = [part for part in collectives("1·8·1") if part[0] == "all-gather"]
    words = [(dims, times) for _, dtype, dims, times in gathered if dtype == "u32"]
    assert {dims for dims, _ in words} == trained_on("1·8·1")[2]
    assert sum(times for _, times in words) <= 7 * LAYERS * MICRO_BATCHES * 3
    floats = [(dims, times) for _, dtype, dims, times in gathered if dtype == "f32"]
    matrices = [(dims, times) for dims, times in floats if len(dims) > 1]
    assert matrices == [(HEAD, 1)]  # the head is not quantized; the rest are column scales


@pytest.mark.parametrize("name", [*cases.long("1·1·4"), "2·2·2"])
def test_no_weight_is_gathered_over_tensor(name):
    gathered = {(dtype, dims) for kind, dtype, dims, _ in collectives(name) if kind == "all-gather"}
    packed = {math.prod(dims) for dtype, dims in gathered if dtype in ("u32", "s8")}
    of_floats = {dims for dtype, dims in gathered if dtype == "f32" and TOKENS not in dims}
    if name == "1·1·4":
        assert not packed and not of_floats
    else:  # over fsdp, half of each
        words = {math.prod(shape) // 2 for shape in trained_on(name)[2]}
        assert {math.prod(dims) for dtype, dims in gathered if dtype == "u32"} == words
        assert {dims for dims in of_floats if len(dims) > 1} == {(32, test_step.VOCAB // 2)}


def generated_on(name, temperature, folder):
    """8 requests in 4 slots."""
    mesh, graphdef, trained, frozen = load(name)
    sampling = generation_config.Sampling(
        max_new_tokens=8, temperature=temperature, top_k=20, top_p=0.95, seed=1
    )
    rng = np.random.default_rng(0)
    prompts = [rng.integers(3, test_step.VOCAB, length).tolist() for length in range(2, 10)]
    model = nnx.merge(graphdef, trained, frozen.dropout_keys, frozen.base)
    reader = tokenizer.load(tiny_tokenizer.save(folder))
    serving = engine.Engine(model, reader, eos_ids=(2,), slots=4, context=64, mesh=mesh)
    return [result.tokens for result in serving.generate(prompts, sampling)]


@pytest.mark.long
@pytest.mark.parametrize("temperature", [0.0, 1.0], ids=["greedy", "sampled"])
def test_a_mesh_generates_the_same_tokens(temperature, tmp_path):
    expected = generated_on("1·1·1", temperature, tmp_path)
    assert len({token for tokens in expected for token in tokens}) > 8
    assert generated_on("2·2·2", temperature, tmp_path) == expected
