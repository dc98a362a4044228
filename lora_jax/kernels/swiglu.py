"""The gated activation of a LLaMA's MLP, computed in float32 and rounded once."""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float


@jax.custom_vjp
def swiglu(gate: Float[Array, "*B F"], up: Float[Array, "*B F"]) -> Float[Array, "*B F"]:
    """silu(gate) · up, in gate's dtype; the derivative saves gate and up in their own dtypes.

    Source: Shazeer 2020, https://arxiv.org/abs/2002.05202, eq. 6.
    """
    return (jax.nn.silu(gate.astype(jnp.float32)) * up.astype(jnp.float32)).astype(gate.dtype)


def _forward(gate, up):
    return swiglu(gate, up), (gate, up)


def _backward(saved, dy):
    # Without the barrier, XLA saves the forward pass's float32 copies instead: twice the memory.
    gate, up, dy = (a.astype(jnp.float32) for a in lax.optimization_barrier((*saved, dy)))
    sigmoid = jax.nn.sigmoid(gate)
    d_gate = dy * up * sigmoid * (1 + gate * (1 - sigmoid))
    return d_gate.astype(saved[0].dtype), (dy * gate * sigmoid).astype(saved[1].dtype)


swiglu.defvjp(_forward, _backward)
