"""LoRA's algebra on a weight seen as a matrix W [K, N]: A [K, R], B [R, N], y = x W + s · (x A) B.

All in float32 unless it says otherwise; s is the scaling, alpha / R. With DoRA (Liu et al. 2024,
https://arxiv.org/abs/2402.09353, eq. 5) each column of W + s · A B has the length that the
magnitude m [N] says: y = m / ‖W + s · A B‖ · x (W + s · A B), and the norm is a constant to the
gradient (§4.3).
"""

import functools
import math
import re

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, PRNGKeyArray

PISSA = re.compile(r"pissa(?:_niter_(\d+))?")


def initial(
    key: PRNGKeyArray, lead: tuple[int, ...], k: int, rank: int
) -> Float[Array, "*lead K R"]:
    """A ~ U(−1/√K, 1/√K), to go with B = 0, as in PEFT."""
    bound = 1 / math.sqrt(k)
    return jax.random.uniform(key, (*lead, k, rank), minval=-bound, maxval=bound)


def initial_of_embedding(
    key: PRNGKeyArray, lead: tuple[int, ...], rank: int, n: int
) -> Float[Array, "*lead R N"]:
    """B ~ N(0, 1), to go with A = 0, as in PEFT."""
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
    """`lengths` from ‖W‖² and Aᵀ W, so that of a packed W nothing dense is needed.

    ‖w + s A b‖² = ‖w‖² + 2 s bᵀ (Aᵀ w) + s² bᵀ (Aᵀ A) b.
    """
    B = B * scaling
    gram = jnp.matmul(A.mT, A, precision="highest")
    both = 2 * crossed.astype(jnp.float32) + jnp.matmul(gram, B, precision="highest")
    # Rounding may leave less than nothing of a column that B takes away.
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
    """magnitude / length, by which DoRA multiplies; 1 in a layer of a stack without an adapter."""
    return jnp.where(scaling[..., 0] == 0, 1, magnitude / length)


def merged(
    weight: Float[Array, "*lead K N"],
    A: Float[Array, "*lead K R"],
    B: Float[Array, "*lead R N"],
    scaling: Float[Array, "*lead 1 1"],
    magnitude: Float[Array, "*lead N"] | None = None,
) -> Float[Array, "*lead K N"]:
    """W + s · A B, its columns stretched to `magnitude` if there is one; in W's dtype."""
    whole = weight.astype(jnp.float32) + delta(A, B, scaling)
    if magnitude is not None:
        length = jnp.sqrt(squares(whole))
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


@functools.partial(jax.jit, static_argnames=("rank", "scaling", "init"))
def pissa(
    weight: Float[Array, "K N"], rank: int, scaling: float, init: str
) -> tuple[Float[Array, "K R"], Float[Array, "R N"]]:
    """(A, B) with s · A B = the part of W with the largest `rank` singular values.

    W = U S Vᵀ: A = U √(S / s), B = √(S / s) Vᵀ. The base keeps W − s · A B.
    init: "pissa", or "pissa_niter_N": by N steps of subspace iteration, much sooner done.
    Source: Meng et al. 2024, https://arxiv.org/abs/2404.02948, eq. 2-4.
    """
    weight = weight.astype(jnp.float32)
    if steps := PISSA.fullmatch(init)[1]:
        U, S, Vt = _few_singular(weight, rank, int(steps))
    else:
        U, S, Vt = jnp.linalg.svd(weight, full_matrices=False)
    root = jnp.sqrt(S[:rank] / scaling)
    return U[:, :rank] * root[None], root[:, None] * Vt[:rank]


def _few_singular(weight: jax.Array, rank: int, steps: int):
    """The largest singular values: Halko et al. 2011, https://arxiv.org/abs/0909.4061, alg. 4.4."""
    dot = lambda a, b: jnp.matmul(a, b, precision="highest")  # noqa: E731
    seen = min(rank + max(8, rank // 2), *weight.shape)
    start = jax.random.normal(jax.random.key(0), (weight.shape[1], seen))
    Q = jnp.linalg.qr(dot(weight, start))[0]

    def iterate(_, Q):
        Q = jnp.linalg.qr(dot(weight.T, Q))[0]
        return jnp.linalg.qr(dot(weight, Q))[0]

    Q = lax.fori_loop(0, steps, iterate, Q)
    U, S, Vt = jnp.linalg.svd(dot(Q.T, weight), full_matrices=False)
    return dot(Q, U), S, Vt
