"""The optimizer: Hugging Face's schedules, the groups of A and B, clipping and decay."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lora_jax import errors
from lora_jax.optim import adamw
from lora_jax.optim import config as optim_config


def params():
    """A lora dict as `model_state.split` makes it: nested, with A and B at the leaves."""
    rng = np.random.default_rng(0)
    normal = lambda *shape: jnp.asarray(rng.normal(size=shape).astype(np.float32))  # noqa: E731
    return {
        "layers": {
            "q_proj": {"lora_A": normal(3, 8, 2), "lora_B": normal(3, 2, 8)},
            "v_proj": {"lora_A": normal(3, 8, 2), "lora_B": normal(3, 2, 4)},
        }
    }


def make(num_steps=10, **settings):
    settings = dict(lr=0.1, schedule="constant", warmup=0, clip=0) | settings
    return adamw.make(optim_config.OptimConfig(**settings), num_steps)


def first_update(optimizer, params, gradient):
    state = optimizer.init(params)
    return jax.jit(optimizer.update)(gradient, state, params)[0]


def leaves(tree, name):
    flat, _ = jax.tree_util.tree_flatten_with_path(tree)
    return [leaf for path, leaf in flat if any(getattr(part, "key", "") == name for part in path)]


def hugging_face(name, step, warmup, num_steps):
    """The factor of transformers' get_{name}_schedule_with_warmup at `step`."""
    if step < warmup:
        return step / max(1, warmup)
    progress = (step - warmup) / max(1, num_steps - warmup)
    return {
        "constant": 1.0,
        "linear": max(0.0, (num_steps - step) / max(1, num_steps - warmup)),
        "cosine": max(0.0, 0.5 * (1 + math.cos(math.pi * 0.5 * 2 * progress))),
    }[name]


@pytest.mark.parametrize("warmup", [0, 3, 40])
@pytest.mark.parametrize("name", optim_config.SCHEDULES)
def test_schedules_are_hugging_faces(name, warmup):
    schedule = adamw.schedule(
        optim_config.OptimConfig(lr=0.02, schedule=name, warmup=warmup), num_steps=40
    )
    found = jax.jit(jax.vmap(schedule))(jnp.arange(40))
    expected = [0.02 * hugging_face(name, step, warmup, 40) for step in range(40)]
    np.testing.assert_allclose(found, expected, atol=1e-8, rtol=1e-5)


@pytest.mark.parametrize("name", ["cosine", "linear"])
def test_the_decay_ends_at_a_share_of_the_peak(name):
    config = optim_config.OptimConfig(lr=0.02, schedule=name, warmup=4, min_lr_ratio=0.1)
    found = jax.jit(jax.vmap(adamw.schedule(config, num_steps=40)))(jnp.arange(60))
    # transformers' get_cosine_with_min_lr_schedule_with_warmup
    shares = [0.1 + 0.9 * hugging_face(name, step, 4, 40) for step in range(4, 40)]
    np.testing.assert_allclose(found[4:40], 0.02 * np.array(shares), rtol=1e-5)
    np.testing.assert_allclose(found[40:], 0.002, rtol=1e-5)


def test_schedules_stay_at_zero_after_the_end():
    for name in ("linear", "cosine"):
        config = optim_config.OptimConfig(schedule=name, warmup=0)
        assert abs(float(adamw.schedule(config, 10)(25))) < 1e-9


def test_warmup_below_one_is_a_share_of_all_steps():
    share, count = (
        adamw.schedule(optim_config.OptimConfig(warmup=warmup), 200) for warmup in (0.05, 10)
    )
    np.testing.assert_allclose([share(i) for i in range(20)], [count(i) for i in range(20)])
    assert share(5) == pytest.approx(1e-4)


def test_unknown_schedule_is_an_error():
    with pytest.raises(errors.UserError, match=r"(?s)polynomial.*cosine, linear, constant"):
        optim_config.OptimConfig(schedule="polynomial")


@pytest.mark.parametrize("ratio", [1.0, 16.0])
def test_b_learns_ratio_times_as_fast_as_a(ratio):
    """Adam's first update is −lr · sign(gradient), whatever the gradient's size."""
    tree = params()
    updates = first_update(make(lora_plus_ratio=ratio), tree, tree)
    for name, rate in (("lora_A", 0.1), ("lora_B", 0.1 * ratio)):
        for update, gradient in zip(leaves(updates, name), leaves(tree, name), strict=True):
            np.testing.assert_allclose(update, -rate * np.sign(gradient), rtol=1e-4)


def test_updates_follow_the_schedule():
    optimizer = make(num_steps=4, schedule="linear", warmup=2)
    tree = params()
    state, sizes = optimizer.init(tree), []
    for _ in range(4):
        updates, state = jax.jit(optimizer.update)(tree, state, tree)
        sizes.append(float(jnp.abs(leaves(updates, "lora_B")[0]).max()))
    np.testing.assert_allclose(sizes, [0, 0.05, 0.1, 0.05], atol=1e-5)


def test_three_steps_are_adamws():
    """Against Adam with decoupled decay written out in float64."""
    settings = dict(lr=0.03, beta1=0.8, beta2=0.95, eps=1e-6, weight_decay=0.2)
    optimizer, tree = make(**settings), params()
    state = optimizer.init(tree)
    update = jax.jit(optimizer.update)
    w = np.asarray(leaves(tree, "lora_A")[0], np.float64)
    m = v = np.zeros_like(w)
    for step in range(1, 4):
        gradient = jax.tree.map(lambda p, step=step: jnp.sin(step * p) * 0.01, tree)
        g = np.sin(step * w) * 0.01
        m, v = 0.8 * m + 0.2 * g, 0.95 * v + 0.05 * g**2
        adam = m / (1 - 0.8**step) / (np.sqrt(v / (1 - 0.95**step)) + 1e-6)
        w = w - 0.03 * (adam + 0.2 * w)
        updates, state = update(gradient, state, tree)
        tree = optax.apply_updates(tree, updates)
        np.testing.assert_allclose(leaves(tree, "lora_A")[0], w, atol=2e-6)


def test_weight_decay_acts_on_a_and_b_without_a_gradient():
    tree = params()
    zero = jax.tree.map(jnp.zeros_like, tree)
    updates = first_update(make(weight_decay=0.5, lora_plus_ratio=2.0), tree, zero)
    for name, rate in (("lora_A", 0.1), ("lora_B", 0.2)):
        for update, weight in zip(leaves(updates, name), leaves(tree, name), strict=True):
            np.testing.assert_allclose(update, -rate * 0.5 * weight, rtol=1e-5)
    without = first_update(make(), tree, zero)
    assert not any(np.asarray(leaf).any() for leaf in jax.tree.leaves(without))


def test_clipping_is_by_the_norm_of_all_gradients_together():
    """A's gradient is large and B's small: clipping by group would not change B's."""
    tree = params()
    gradient = jax.tree_util.tree_map_with_path(
        lambda path, p: jnp.full_like(p, 10.0 if path[-1].key == "lora_A" else 0.1), tree
    )
    norm = float(optax.tree.norm(gradient))
    # With a large eps Adam's first update is proportional to the gradient: it shows the clipping.
    settings = dict(eps=1e6, lr=1e6)
    plain = first_update(make(**settings), tree, gradient)
    clipped = first_update(make(clip=1.0, **settings), tree, gradient)
    generous = first_update(make(clip=2 * norm, **settings), tree, gradient)
    for a, b, c in zip(*map(jax.tree.leaves, (plain, clipped, generous)), strict=True):
        np.testing.assert_allclose(b, a / norm, rtol=1e-3)
        np.testing.assert_allclose(c, a, rtol=1e-5)


def test_what_is_neither_a_nor_b_is_frozen_and_has_no_moments():
    tree = params()
    mixed = {**tree, "embed": jnp.ones((100, 8)), "norm": {"weight": jnp.ones(8)}}
    assert adamw.labels(mixed) == {
        "layers": {name: {"lora_A": "A", "lora_B": "B"} for name in ("q_proj", "v_proj")},
        "embed": "frozen",
        "norm": {"weight": "frozen"},
    }
    optimizer = make(weight_decay=0.1)

    def num_bytes(tree):
        return sum(leaf.nbytes for leaf in jax.tree.leaves(tree) if jnp.ndim(leaf))

    assert num_bytes(optimizer.init(mixed)) == 2 * num_bytes(tree)
    updates = first_update(optimizer, mixed, jax.tree.map(jnp.ones_like, mixed))
    assert (
        not np.asarray(updates["embed"]).any() and not np.asarray(updates["norm"]["weight"]).any()
    )
    assert np.asarray(leaves(updates, "lora_A")[0]).all()


def test_frozen_gradients_do_not_count_in_the_norm_and_integers_are_frozen_too():
    """As with all variables of a model on a quantized base, and jax.grad's allow_int."""
    tree = params()
    mixed = {**tree, "embed": jnp.ones((100, 8)), "packed": jnp.arange(6, dtype=jnp.uint32)}
    integers = np.zeros(6, jax.dtypes.float0)
    gradient = {**tree, "embed": jnp.full((100, 8), 1e3), "packed": integers}
    optimizer = make(clip=1.0, eps=1e6, lr=1e6)  # a large eps shows the clipping, as above
    updates, _ = optimizer.update(gradient, optimizer.init(mixed), mixed)
    alone = first_update(optimizer, tree, tree)
    for update, expected in zip(jax.tree.leaves(updates["layers"]), jax.tree.leaves(alone),
                                strict=True):  # fmt: skip
        np.testing.assert_allclose(update, expected, rtol=1e-5)
    after = optax.apply_updates(mixed, updates)
    for name in ("embed", "packed"):
        np.testing.assert_array_equal(after[name], mixed[name])
        assert after[name].dtype == mixed[name].dtype
