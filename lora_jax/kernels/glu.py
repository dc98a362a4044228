"""The gated activations of an MLP, computed in float32 and rounded once.

Source: Shazeer 2020, https://arxiv.org/abs/2002.05202, eq. 6.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from lora_jax.kernels import forward_mode


def swiglu(gate: Float[Array, "*B F"], up: Float[Array, "*B F"]) -> Float[Array, "*B F"]:
    """silu(gate) · up, in gate's dtype; the derivative saves gate and up in their own dtypes."""
    return _call(jax.nn.silu, gate, up)


def geglu(gate: Float[Array, "*B F"], up: Float[Array, "*B F"]) -> Float[Array, "*B F"]:
    """The same with GELU's approximation by tanh."""
    return _call(jax.nn.gelu, gate, up)


ACTIVATIONS = {"silu": swiglu, "gelu_pytorch_tanh": geglu}  # by Hugging Face's names


def _call(activation: Callable, gate: jax.Array, up: jax.Array) -> jax.Array:
    gated, plain = (functools.partial(form, activation) for form in (_gated, _plain))
    return forward_mode.call(gated, plain, gate, up)


def _plain(activation: Callable, gate: jax.Array, up: jax.Array) -> jax.Array:
    return (activation(gate.astype(jnp.float32)) * up.astype(jnp.float32)).astype(gate.dtype)


_gated = jax.custom_vjp(_plain, nondiff_argnums=(0,))


def _forward(activation, gate, up):
    return _plain(activation, gate, up), (gate, up)


def _backward(activation, saved, dy):
    # Without the barrier, XLA saves the forward pass's float32 copies instead: twice the memory.
    gate, up, dy = (a.astype(jnp.float32) for a in lax.optimization_barrier((*saved, dy)))
    activated, pull_back = jax.vjp(activation, gate)
    (d_gate,) = pull_back(dy * up)
    return d_gate.astype(saved[0].dtype), (dy * activated).astype(saved[1].dtype)


_gated.defvjp(_forward, _backward)
