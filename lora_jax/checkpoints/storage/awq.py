"""4-bit weights as AWQ stores them (version "gemm"): checked, read and packed.

  P.qweight  int32 [K, N/8]       nibble i of word j is column 8j + ORDER[i]
  P.qzeros   int32 [groups, N/8]  likewise
  P.scales   [groups, N]

w = (code − zero) · scale.
Source: awq/modules/linear/gemm.py of https://github.com/casper-hansen/AutoAWQ
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh

from lora_jax.checkpoints import safetensors_files
from lora_jax.checkpoints.storage import zero_points
from lora_jax.checkpoints.storage.stored_linear import Recipe, StoredLinear
from lora_jax.kernels import packed as packing

ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
NEEDED = zero_points.NEEDED
NAMES = frozenset(NEEDED)


def check(tensors, rows, columns, declared) -> tuple[StoredLinear | None, list[str]]:
    """See stored_linear.Format."""
    problems = zero_points.check_shapes(tensors, rows, columns, declared, (rows, columns // 8))
    if problems:
        return None, problems
    return zero_points.stored_linear_of(tensors, rows, columns, declared)


def read(linear: StoredLinear, mesh: Mesh, axes) -> dict[str, jax.Array]:
    """See stored_linear.Format."""
    words = safetensors_files.read(linear.tensors["qweight"], mesh, axes)
    return zero_points.read(linear, mesh, axes) | {"words": words}


def pack(raw: dict[str, jax.Array], recipe: Recipe) -> packing.Packed:
    """See stored_linear.Format."""
    words = lax.bitcast_convert_type(raw["words"], jnp.uint32)  # [K, N/8]
    words = words.reshape(-1, 8, words.shape[1])

    def column(n: int) -> jax.Array:
        """Column n of every eight."""
        shift = 4 * ORDER.index(n)
        return zero_points.join_nibbles(lambda i: words[:, i] >> shift)

    columns = [column(n) for n in range(8)]
    words = jnp.stack(columns, axis=2).reshape(len(words), -1)
    return zero_points.pack(words, raw, recipe, ORDER)
