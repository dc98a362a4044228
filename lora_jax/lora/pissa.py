"""PiSSA and OLoRA: A and B begin as a part of the weight, which the base then lacks.

Sources: Meng et al. 2024, https://arxiv.org/abs/2404.02948, eq. 2-4; Büyükakyüz 2024,
https://arxiv.org/abs/2406.01775, algorithm 1.
"""

import functools
import re
from collections.abc import Callable, Iterable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from lora_jax import errors
from lora_jax.lora import site as lora_site
from lora_jax.lora import targets
from lora_jax.lora.site import LayerConfigs, Site

_INIT = re.compile(r"pissa(?:_niter_(\d+))?")


def check(sites: Iterable[tuple[Site, LayerConfigs]]) -> None:
    """Raises: UserError if a rank is larger than the rank of its weight can be."""
    problems = []
    for site, configs in sites:
        for name, own in zip(site.names, configs, strict=True):
            for rows, columns in lora_site.parts(site.out_features, own) if own else ():
                most = min(site.in_features, len(range(site.out_features)[columns]))
                if rows.stop - rows.start > most:
                    problems.append(f"{name} with rank {rows.stop - rows.start} of {most} at most")
    if problems:
        raise errors.UserError(
            expected="ranks no larger than the smaller side of each weight, for PiSSA and OLoRA",
            found=problems,
            do="choose a smaller rank, for these in rank_pattern, or init_lora_weights default",
        )


def initial(
    site: Site,
    configs: LayerConfigs,
    init: str,
    weight: Callable[[int], Float[Array, "K N"]],
) -> tuple[Float[Array, "*lead K R"], Float[Array, "*lead R N"]]:
    """A and B of a new adapter, computed for each adapted part of an output by itself.

    weight: returns the weight of one layer, by its index among the site's names.
    """
    each = []
    for index, own in enumerate(configs):
        A, B = lora_site.zeros(site, configs)
        if own:
            A[:, : own.rank], B[: own.rank] = initial_of_layer(weight(index), own, init)
        each.append((A, B))
    A, B = (site.stacked(arrays) for arrays in zip(*each, strict=True))
    return A, B


def initial_of_layer(
    weight: Float[Array, "K N"], own: targets.LayerConfig, init: str
) -> tuple[Float[np.ndarray, "K R"], Float[np.ndarray, "R N"]]:
    """A and B of one layer."""
    k, n = weight.shape
    A, B = np.zeros((k, own.rank), np.float32), np.zeros((own.rank, n), np.float32)
    for rows, columns in lora_site.parts(n, own):
        how = rows.stop - rows.start, own.scaling, init
        A[:, rows], B[rows, columns] = principal(weight[:, columns], *how)
    return A, B


@functools.partial(jax.jit, static_argnames=("rank", "scaling", "init"))
def principal(
    weight: Float[Array, "K N"], rank: int, scaling: float, init: str
) -> tuple[Float[Array, "K R"], Float[Array, "R N"]]:
    """(A, B): with PiSSA, s · A B is the part of W with the largest `rank` singular values.

    W = U S Vᵀ: A = U √(S / s), B = √(S / s) Vᵀ. With OLoRA, Wᵀ = Q R: A = Rᵀ and B = Qᵀ, the first
    `rank` columns of Rᵀ and rows of Qᵀ. The base keeps W − s · A B.
    init: "pissa", or "pissa_niter_N" for N steps of subspace iteration, which is much faster;
    "olora".
    """
    weight = weight.astype(jnp.float32)
    if init == "olora":
        Q, R = jnp.linalg.qr(weight.T)
        return R[:rank].T, Q[:, :rank].T
    if steps := _INIT.fullmatch(init)[1]:
        U, S, Vt = _largest_singular(weight, rank, int(steps))
    else:
        U, S, Vt = jnp.linalg.svd(weight, full_matrices=False)
    root = jnp.sqrt(S[:rank] / scaling)
    return U[:, :rank] * root[None], root[:, None] * Vt[:rank]


def _largest_singular(weight: jax.Array, rank: int, steps: int):
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
