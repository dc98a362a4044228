"""LoRA's algebra on a weight seen as a matrix W [K, N]: A [K, R], B [R, N], y = x W + s · (x A) B.

All is in float32 unless stated otherwise; s is the scaling, alpha / R. With DoRA (Liu et al. 2024,
https://arxiv.org/abs/2402.09353, eq. 5) the magnitude m [N] sets the length of each column of
W + s · A B: y = m / ‖W + s · A B‖ · x (W + s · A B). The gradient treats the norm as a constant
(§4.3).
"""

import functools
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, PRNGKeyArray

from lora_jax.kernels import explicit, matmul
from lora_jax.layers import linear_map


def initial(
    key: PRNGKeyArray, lead: tuple[int, ...], k: int, rank: int
) -> Float[Array, "*lead K R"]:
    """A ~ U(−1/√K, 1/√K) for B = 0, as in PEFT."""
    bound = 1 / math.sqrt(k)
    return jax.random.uniform(key, (*lead, k, rank), minval=-bound, maxval=bound)


def initial_of_embedding(
    key: PRNGKeyArray, lead: tuple[int, ...], rank: int, n: int
) -> Float[Array, "*lead R N"]:
    """B ~ N(0, 1) for A = 0, as in PEFT."""
    return jax.random.normal(key, (*lead, rank, n))


def delta(
    A: Float[Array, "*lead K R"], B: Float[Array, "*lead R N"], scaling: Float[Array, "*lead 1 1"]
) -> Float[Array, "*lead K N"]:
    """ΔW = s · A B."""
    return jnp.matmul(A, B * scaling, precision="highest")


def squares(weight: Float[Array, "*lead K N"]) -> Float[Array, "*lead N"]:
    """‖W‖² of each column."""
    return jnp.square(weight.astype(jnp.float32)).sum(axis=-2)


def lengths(
    weight: Float[Array, "*lead K N"],
    A: Float[Array, "*lead K R"],
    B: Float[Array, "*lead R N"],
    scaling: Float[Array, "*lead 1 1"],
) -> Float[Array, "*lead N"]:
    """‖W + s · A B‖ of each column."""
    return jnp.sqrt(squares(weight.astype(jnp.float32) + delta(A, B, scaling)))


def norm(
    square: Float[Array, "*batch N"],
    crossed: Float[Array, "*batch R N"],
    A: Float[Array, "*batch K R"],
    B: Float[Array, "*batch R N"],
    scaling: Float[Array, "*batch 1 1"],
) -> Float[Array, "*batch N"]:
    """`lengths` from ‖W‖² and Aᵀ W, so that a packed W need not become dense.

    ‖w + s A b‖² = ‖w‖² + 2 s bᵀ (Aᵀ w) + s² bᵀ (Aᵀ A) b.
    """
    B = B * scaling
    gram = jnp.matmul(A.mT, A, precision="highest")
    both = 2 * crossed.astype(jnp.float32) + jnp.matmul(gram, B, precision="highest")
    # Rounding may leave a negative number where B cancels a column.
    return jnp.sqrt(jnp.maximum(square + (B * both).sum(axis=-2), jnp.finfo(jnp.float32).tiny))


def crossed(
    A: Float[Array, "*batch K R"], weight: Float[Array, "*batch K N"]
) -> Float[Array, "*batch R N"]:
    """Aᵀ W, in float32."""
    return jnp.matmul(A.mT.astype(weight.dtype), weight, preferred_element_type=jnp.float32)


def stretch(
    magnitude: Float[Array, "*lead N"],
    length: Float[Array, "*lead N"],
    scaling: Float[Array, "*lead 1 1"],
) -> Float[Array, "*lead N"]:
    """magnitude / length, DoRA's factor; 1 in a layer of a stack that has no adapter."""
    return jnp.where(scaling[..., 0] == 0, 1, magnitude / length)


def merged(
    weight: Float[Array, "*lead K N"],
    A: Float[Array, "*lead K R"],
    B: Float[Array, "*lead R N"],
    scaling: Float[Array, "*lead 1 1"],
    magnitude: Float[Array, "*lead N"] | None = None,
) -> Float[Array, "*lead K N"]:
    """W + s · A B in W's dtype; with DoRA its columns have the length `magnitude`."""
    whole = weight.astype(jnp.float32) + delta(A, B, scaling)
    if magnitude is not None:
        length = lax.stop_gradient(jnp.sqrt(squares(whole)))
        whole = whole * stretch(magnitude, length, scaling)[..., None, :]
    return whole.astype(weight.dtype)


def effect(
    weight: Float[Array, "K N"],
    A: Float[Array, "K R"],
    B: Float[Array, "R N"],
    scaling: Float[Array, "1 1"],
    magnitude: Float[Array, " N"] | None = None,
) -> Float[Array, ""]:
    """‖ΔW‖ / ‖W‖, Frobenius norms."""
    weight = weight.astype(jnp.float32)
    if magnitude is None:
        change = delta(A, B, scaling)
    else:
        change = merged(weight, A, B, scaling, magnitude) - weight
    return jnp.linalg.norm(change) / jnp.maximum(jnp.linalg.norm(weight), 1e-30)


def output(
    how: linear_map.LinearMap,
    shape: Sequence[int],
    x: jax.Array,
    y: jax.Array,
    factors: Sequence[jax.Array],
    *,
    dropped: jax.Array,
    weight: jax.Array | Callable[[jax.Array], jax.Array],
    square: jax.Array | None,
    bias: jax.Array | None,
) -> jax.Array:
    """The output of an adapted layer: y + s · x' A B.

    With a magnitude m: y + (r − 1) · x' W + r · s · x' A B, r = m / ‖W + s A B‖.

    Args:
      how, shape: how the layer multiplies, and the shape of its weight.
      x, y: the layer's input and its output without the adapter.
      factors: A, B, the scaling s, and with DoRA the magnitude, of a single layer.
      dropped: x' = dropout(x), or x itself. As in PEFT, DoRA uses it for the base's change, too.
      weight, square: W and None; or a function that multiplies by a packed W, and ‖W‖². The
        function is a tree of its arrays (jax.tree_util.Partial).
      bias: the layer's.
    """
    if dropped is x:
        dropped = None
    compute = functools.partial(_output, how, tuple(shape))
    return explicit.like(y, compute, x, y, tuple(factors), dropped, weight, square, bias)


def _output(how, shape, x, y, factors, dropped, weight, square, bias):
    A, B, scaling, *magnitude = factors
    masked = x if dropped is None else dropped
    extra = how.multiply(masked, A, B * scaling, shape=shape).astype(y.dtype)
    if not magnitude:
        return y + extra
    if square is None:
        weight = how.matrix(weight)
        square, product = squares(weight), crossed(A, weight)
    else:
        product = weight(A.T.astype(y.dtype))
    length = lax.stop_gradient(norm(square, product, A, B, scaling))
    ratio = how.spread(stretch(*magnitude, length, scaling), y.ndim, shape)
    if bias is not None:
        bias = how.spread(bias.reshape(-1), y.ndim, shape).astype(y.dtype)
    if dropped is not None:
        plain = how.multiply(dropped, weight, shape=shape).astype(y.dtype)
        return (y + (ratio - 1) * plain + ratio * extra).astype(y.dtype)
    whole = y + extra if bias is None else y - bias + extra
    whole = (ratio * whole).astype(y.dtype)
    return whole if bias is None else whole + bias


def with_bias(
    how: linear_map.LinearMap,
    shape: Sequence[int],
    y: jax.Array,
    bias: Float[Array, "*batch N"],
    scaling: Float[Array, "*batch 1 1"],
) -> jax.Array:
    """y + s · bias, for the bias of B. how, shape: as of `output`."""

    def compute(y, bias, scaling):
        return y + how.spread(bias * scaling[..., 0], y.ndim, shape).astype(y.dtype)

    return explicit.like(y, compute, y, bias, scaling)


def attended(
    attend: Callable[[jax.Array], jax.Array],
    weight: Float[Array, "K N"],
    query: Float[Array, "*B N"],
    factors: Sequence[jax.Array],
) -> Float[Array, "*B K"]:
    """query · (W + s · A B)ᵀ, for an adapted embedding that is also the output of the model.

    attend: query → query · Wᵀ. factors: A, B, the scaling s, and with DoRA the magnitude m, which
    scales the columns of W + s · A B, that is, the query.
    """
    A, B, scaling, *magnitude = factors

    def stretched(query, weight, A, B, scaling, magnitude):
        square, product = squares(weight), crossed(A, weight)
        length = lax.stop_gradient(norm(square, product, A, B, scaling))
        ratio = stretch(magnitude, length, scaling)
        return (query * jnp.expand_dims(ratio, range(query.ndim - 1))).astype(query.dtype)

    if magnitude:
        query = explicit.like(query, stretched, query, weight, *factors)
    y = attend(query)

    def change(query, A, B, scaling):
        return matmul.matmul(matmul.matmul(query, (B * scaling).T), A.T, y.dtype)

    return y + explicit.like(y, change, query, A, B, scaling)
