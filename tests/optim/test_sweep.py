"""Several settings in one program: each adapter ends as that of a run of its own."""

import functools

import jax
import numpy as np
import pytest
import test_mesh
import test_step
from flax import nnx

from lora_jax import lora
from lora_jax.checkpoints import loader
from lora_jax.lora import config as lora_config
from lora_jax.lora.nnx import model_state
from lora_jax.optim import adamw, sweep
from lora_jax.optim import config as optim_config
from lora_jax.optim import step as train_step
from lora_jax.parallel import mesh as sharding

STEPS, MESH = 3, "2·2·2"
pytestmark = pytest.mark.long  # test_run.py has a sweep whose members are those of separate runs


def member(name, rank, lr):
    """A member that trains A, B and its bias in the stack of layers, norms inside and outside of
    it, and tokens."""
    tokens = {"embed_tokens": (9, 90), "lm_head": (7,)}
    how = {"dropout": 0.2, "targets": ("q_proj",), "modules_to_save": ("norm",),
           "trainable_token_indices": tokens, "lora_bias": True}  # fmt: skip
    adapters = lora_config.LoRAConfig(rank=rank, use_rslora=True, **how)
    return sweep.Member(name, adapters, optim_config.OptimConfig(lr=lr, weight_decay=0.1, warmup=1))


# The second's rank is padded; the third diverges.
MEMBERS = [member("wide", 4, 0.01), member("narrow", 2, 0.003), member("wild", 4, 1e30)]


def parts_of(members, mesh):
    """[(graphdef, lora, frozen)] of the members, each injected into the same base."""
    how = {"dtype": "float32", "quantization": "int4", "search": False, "mesh": mesh}
    model = loader.load(test_step.LLAMA, **how)
    found = []
    for each in members:
        lora.inject(model, each.lora, rngs=nnx.Rngs(0))
        graphdef, *parts = model_state.split(model)
        found.append((graphdef, *sharding.place(parts, mesh)))
        lora.strip(model)
    return found


@functools.cache
def swept():
    """(graphdef, [(state, metrics)] after each step, the first state, frozen) on a mesh."""
    mesh = sharding.make_mesh(test_mesh.MESHES[MESH])
    with jax.set_mesh(mesh):
        (graphdef, *_), *_ = found = parts_of(MEMBERS, mesh)
        trained, frozen = sweep.join([tuple(parts) for _, *parts in found])
        state = sweep.start(MEMBERS, trained, STEPS)
        state, frozen = sharding.place((state, frozen), mesh)
        first = test_step.saved(state)

        def batch_at(index):
            return jax.device_put(test_mesh.make_batch(index, 2), sharding.batch(mesh))

        step = sweep.make_step(graphdef, MEMBERS, STEPS, seed=0, remat="full")
        run = train_step.steps(step, state, frozen, batch_at, STEPS)
        return graphdef, [(test_step.saved(state), told) for state, told in run], first, frozen


def of(state, index):
    return jax.tree.map(lambda array: array[index], (state.lora, state.opt_state.moments))


def test_a_member_ends_as_the_adapter_of_a_run_alone():
    """On a mesh, with a padded rank and a diverging neighbor, as alone on one device."""
    _, run, _, _ = swept()
    own = MEMBERS[1]
    ((graphdef, trained, frozen),) = parts_of([own], sharding.make_mesh(test_mesh.MESHES["1·1·1"]))
    optimizer, schedule = (make(own.optim, STEPS) for make in (adamw.make, adamw.schedule))
    step = train_step.make_step(graphdef, optimizer, schedule, seed=0, remat="full")
    state = train_step.start(trained, optimizer)
    *_, (state, told) = train_step.steps(
        step, state, frozen, lambda index: test_mesh.make_batch(index, 2), STEPS
    )
    found, metrics = run[-1]
    assert test_step.distance(sweep.cut(of(found, 1)[0], state.lora), state.lora) < 1e-5
    for name in ("loss", "grad_norm", "lr"):
        np.testing.assert_allclose(metrics[f"{name}/narrow"], told[name], rtol=1e-5)
    assert metrics["num_tokens"] == told["num_tokens"]


def test_what_pads_a_rank_stays_zero():
    _, run, first, _ = swept()
    q_proj = run[-1][0].lora["model"]["layers"]["self_attn"]["q_proj"]
    A, B = q_proj["lora_A"][1], q_proj["lora_B"][1]
    assert A.shape[-1] == B.shape[-2] == 4
    assert A[..., :2].all() and B[..., :2, :].any() and not A[..., 2:].any()
    assert not B[..., 2:, :].any()
    assert test_step.distance(*(of(state, 1)[0] for state in (run[-1][0], first))) > 1e-3


def test_a_member_that_is_not_finite_is_left_as_it_was():
    """The first step has learning rate 0, the second makes B huge, the third is not finite."""
    _, run, _, _ = swept()
    states, told = zip(*run, strict=True)
    assert [state.opt_state.lost.tolist() for state in states] == [[0, 0, 0]] * 2 + [[0, 0, 3]]
    assert not np.isfinite(told[2]["loss/wild"] + told[2]["grad_norm/wild"])
    test_step.assert_equal_trees(of(states[2], 2), of(states[1], 2))
    assert all(np.isfinite(told[2][f"loss/{name}"]) for name in ("wide", "narrow"))
    assert int(states[2].step) == 3
