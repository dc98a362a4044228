"""4-bit weights as GPTQ (AutoGPTQ, GPTQModel) stores them: checked, read and packed.

  P.qweight  int32 [K/8, N]       nibble i of word j is row 8j+i
  P.qzeros   int32 [groups, N/8]  nibble i of word j is column 8j+i; "gptq" stores zero − 1,
                                  "gptq_v2" stores zero
  P.scales   [groups, N]
  P.g_idx    int32 [K]            the group of each row; optional

w = (code − zero) · scale.
Source: qlinear_cuda.py of https://github.com/AutoGPTQ/AutoGPTQ
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh

from lora_jax.checkpoints import safetensors_files
from lora_jax.checkpoints.storage import stored_linear, zero_points
from lora_jax.checkpoints.storage.stored_linear import Recipe, StoredLinear
from lora_jax.kernels import packed as packing

NEEDED = zero_points.NEEDED
NAMES = frozenset((*NEEDED, "g_idx"))


def check(tensors, rows, columns, declared) -> tuple[StoredLinear | None, list[str]]:
    """See stored_linear.Format."""
    problems = zero_points.check_shapes(tensors, rows, columns, declared, (rows // 8, columns))
    if "g_idx" in tensors:
        problems += stored_linear.mismatches(tensors["g_idx"], "g_idx", ("I32",), (rows,))
    if problems:
        return None, problems
    act_order = False
    if "g_idx" in tensors:
        group = zero_points.group_of(declared, rows)
        act_order, problem = order_of(tensors["g_idx"].value(), group)
        if problem:
            return None, [f"g_idx {problem}"]
    return zero_points.stored_linear_of(tensors, rows, columns, declared, act_order=act_order)


def order_of(index: np.ndarray, group: int) -> tuple[bool, str]:
    """(whether the rows of a group are not side by side, what is wrong with the groups)."""
    rows = len(index)
    natural = np.arange(rows) // group
    sizes = np.bincount(index[(index >= 0) & (index < -(-rows // group))])
    if sizes.sum() != rows or not np.array_equal(sizes, np.bincount(natural)):
        return False, f"does not divide {rows} rows into groups of {group}"
    return not np.array_equal(index, natural), ""


def read(linear: StoredLinear, mesh: Mesh, axes) -> dict[str, jax.Array]:
    """See stored_linear.Format."""
    axis_in, axis_out = axes
    act_order = linear.recipe.packed.order
    raw = zero_points.read(linear, mesh, axes)
    # With act-order a device needs rows from anywhere, so it reads all.
    words = (None if act_order else axis_in, axis_out)
    raw["words"] = safetensors_files.read(linear.tensors["qweight"], mesh, words)
    if act_order:
        raw["order"] = read_order(linear, "g_idx", mesh)
    return raw


def read_order(linear: StoredLinear, name: str, mesh: Mesh) -> jax.Array:
    """int32 [K]: the rows in the order of their groups, on every device."""
    order = np.arange(linear.recipe.rows)
    if name in linear.tensors:  # another layer of the stack may have an order
        order = np.argsort(linear.tensors[name].value(), kind="stable")
    return stored_linear.replicated(order.astype(np.int32), mesh)


def pack(raw: dict[str, jax.Array], recipe: Recipe) -> packing.Packed:
    """See stored_linear.Format."""
    words = lax.bitcast_convert_type(raw["words"], jnp.uint32)
    order = raw.get("order")
    if order is not None:
        rows = order.reshape(-1, 8)
        words = zero_points.join_nibbles(
            lambda i: words[rows[:, i] // 8] >> (rows[:, i, None] % 8 * 4).astype(jnp.uint32)
        )
    return zero_points.pack(words, raw, recipe, range(8))._replace(order=order)
