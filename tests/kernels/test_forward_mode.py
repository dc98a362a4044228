"""Derivatives in forward mode, and forward mode over reverse mode, of kernels with their own."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lora_jax.kernels import attention, cross_entropy, forward_mode, glu

HEAD = jnp.asarray(np.random.default_rng(1).normal(size=(4, 7)), jnp.float32)
TARGETS = jnp.array([[1, -1, 6], [0, 2, -1]])


def drawn(*shapes):
    rng = np.random.default_rng(0)
    return tuple(jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes)


CAP = 0.7


def attended(q, k, v, soft_cap=None):
    logits = jnp.einsum("btnh,bsnh->bnts", q, k) / 2
    logits = logits if soft_cap is None else soft_cap * jnp.tanh(logits / soft_cap)
    visible = jnp.tril(jnp.ones((q.shape[1], q.shape[1]), bool))
    p = jax.nn.softmax(jnp.where(visible, logits, -1e30))
    return jnp.einsum("bnts,bsnh->btnh", p, v)


def entropy(hidden, soft_cap=None):
    logits = hidden @ HEAD
    logits = logits if soft_cap is None else soft_cap * jnp.tanh(logits / soft_cap)
    each = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.maximum(TARGETS, 0))
    return jnp.where(TARGETS >= 0, each, 0)


CASES = {
    "swiglu": (glu.swiglu, lambda gate, up: jax.nn.silu(gate) * up, drawn((3, 5), (3, 5))),
    "attention": (attention.self_attention, attended, drawn(*[(1, 5, 1, 4)] * 3)),
    "cross-entropy": (
        lambda hidden: cross_entropy.cross_entropy(hidden, HEAD, TARGETS), entropy, drawn((2, 3, 4))
    ),
    "attention, soft cap": (
        functools.partial(attention.self_attention, soft_cap=CAP),
        functools.partial(attended, soft_cap=CAP),
        drawn(*[(1, 5, 1, 4)] * 3),
    ),
    "cross-entropy, soft cap": (
        lambda hidden: cross_entropy.cross_entropy(hidden, HEAD, TARGETS, soft_cap=CAP),
        functools.partial(entropy, soft_cap=CAP),
        drawn((2, 3, 4)),
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_every_mode_has_the_derivatives_of_the_plain_function(case):
    ours, plain, args = CASES[case]
    direction = jax.tree.map(jnp.cos, args)

    @functools.partial(jax.jit, static_argnums=0)
    def derivatives(function, args):
        def loss(*args):
            return jnp.sin(function(*args)).sum()

        def gradient(*args):
            return jax.grad(loss, range(len(args)))(*args)

        both = jax.tree.map(lambda x: jnp.stack([x, -x]), args)
        return [jax.jvp(f, args, direction) for f in (function, gradient)], jax.vmap(loss)(*both)

    found, expected = (derivatives(f, args) for f in (ours, plain))
    for one, other in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5 * np.abs(other).max())


def test_reverse_mode_has_the_functions_own_derivative():
    """Also in reverse mode of a vmap, and where only one argument moves."""

    @jax.custom_vjp
    def doubles(x, y):
        return x * y

    doubles.defvjp(lambda x, y: (x * y, (x, y)), lambda saved, d: (2 * d * saved[1], 7 * d))
    call = functools.partial(forward_mode.call, doubles, jnp.multiply)
    x, y = drawn((3,), (3,))
    np.testing.assert_array_equal(jax.grad(lambda x: call(x, y).sum())(x), 2 * y)
    np.testing.assert_array_equal(jax.vmap(jax.grad(call, 1))(x, y), 7 * jnp.ones(3))
    np.testing.assert_array_equal(jax.jvp(lambda x: call(x, y), (x,), (x,))[1], x * y)
    np.testing.assert_array_equal(jax.linearize(call, x, y)[1](x, y), 2 * x * y)
