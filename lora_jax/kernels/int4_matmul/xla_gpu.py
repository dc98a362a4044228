"""A few rows of x times a 4-bit weight on a GPU: sums that XLA compiles to one pass over the words.

XLA:GPU fuses arithmetic into a sum but not into a dot, for which it would write out the dense
weight. So the product is written as two sums: within each group of rows, then over the groups.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from lora_jax.kernels import packed as packing

# Of x. With more rows, the sums of int4 no longer fit into a GPU thread's registers, and for the
# other codes XLA writes the values from the table out to memory.
MOST_ROWS = {"int4": 4, "nf4": 1, "fp4": 1}


def matvec(x: Float[Array, "M K"], packed: packing.Packed, codes: str) -> Float[Array, "M N"]:
    """y = Σ_g (s_g Σ_{k in g} code(q_k) · x_k + b_g Σ_{k in g} x_k), sums in float32, y as x.

    M is at most MOST_ROWS[codes]; `packed` is one layer's weight [K, N] in any 4-bit format. Each
    word is read and decoded once for all rows.

    Raises: ValueError if x has more rows.
    """
    if len(x) > MOST_ROWS[codes]:
        raise ValueError(f"expected at most {MOST_ROWS[codes]} rows for {codes}, found {len(x)}")
    words, columns = packed.q.shape
    groups = packed.scale.shape[0]
    q = packed.q.reshape(groups, -1, columns)
    weights = [_code(q, nibble, codes) for nibble in range(8)]
    scales = packing.scales(packed)
    rows = []
    for row in x.astype(jnp.float32).reshape(-1, groups, words // groups, 8):
        products = sum(w * row[:, :, nibble, None] for nibble, w in enumerate(weights))
        sums = products.sum(axis=1) * scales
        if packed.group_bias is not None:
            sums += packed.group_bias.astype(jnp.float32) * row.sum(axis=(1, 2))[:, None]
        rows.append(sums.sum(axis=0))
    return jnp.stack(rows).astype(x.dtype)


def _code(q: jax.Array, nibble: int, codes: str) -> jax.Array:
    if codes == "int4":
        # Shift the nibble to the top, then arithmetically down, which extends its sign.
        top = lax.bitcast_convert_type(q << (28 - 4 * nibble), jnp.int32)
        return (top >> 28).astype(jnp.float32)
    return jnp.asarray(packing.TABLES[codes])[((q >> (4 * nibble)) & 15).astype(jnp.int32)]
