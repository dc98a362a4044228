"""Weights as compressed-tensors packs them ("pack-quantized"): checked, read, packed, dequantized.

  P.weight_packed      int32 [N, K/8]       nibble i of word j is column 8j+i
  P.weight_scale       [N, groups]
  P.weight_zero_point  int32 [N/8, groups]  nibble i of word j is row 8j+i; not if symmetric
  P.weight_g_idx       int32 [K]            the group of each column; with "actorder": "group"
  P.weight_shape       [2]                  N, K

w = (code − zero) · scale, with 8 as the zero point of symmetric weights. These are GPTQ's arrays,
transposed. With 8 bits, a word has four bytes instead of eight nibbles, and the zero point of
symmetric weights is 128. Such weights can only become dense.
Source: compressed_tensors/compressors/pack_quantized of
https://github.com/vllm-project/compressed-tensors
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh

from lora_jax.checkpoints import safetensors_files
from lora_jax.checkpoints.storage import gptq, stored_linear, zero_points
from lora_jax.checkpoints.storage.stored_linear import PackedSpec, Recipe, StoredLinear
from lora_jax.kernels import packed as packing

NEEDED = ("weight_packed", "weight_scale", "weight_shape")
NAMES = frozenset((*NEEDED, "weight_zero_point", "weight_g_idx"))


def check(tensors, rows, columns, declared) -> tuple[StoredLinear | None, list[str]]:
    """See stored_linear.Format."""
    group = zero_points.group_of(declared, rows)
    groups, problems = -(-rows // group), []
    per_word = 8 if declared.stays_packed else 4
    if rows % per_word or columns % per_word:
        problems.append(f"weight_packed: a weight [{columns}, {rows}] does not fill whole words")
    for name, dtypes, shape in (
        ("weight_packed", ("I32",), (columns, rows // per_word)),
        ("weight_scale", safetensors_files.FLOATS, (columns, groups)),
        ("weight_zero_point", ("I32",), (columns // per_word, groups)),
        ("weight_g_idx", ("I32",), (rows,)),
    ):
        if name in tensors:
            problems += stored_linear.mismatches(tensors[name], name, dtypes, shape)
    if [*tensors["weight_shape"].value().reshape(-1)] != [columns, rows]:
        problems.append(f"weight_shape is not {[columns, rows]}")
    has_zeros = "weight_zero_point" in tensors  # also where config.json says symmetric
    if declared.zero_points and not has_zeros:
        problems.append("weight_zero_point is missing, but config.json does not say symmetric")
    if problems:
        return None, problems
    act_order = False
    if "weight_g_idx" in tensors:
        act_order, problem = gptq.order_of(tensors["weight_g_idx"].value(), group)
        if problem:
            return None, [f"weight_g_idx {problem}"]
    if not declared.stays_packed:
        recipe = Recipe(declared.method, rows, columns, "int8", group, None)
        return StoredLinear(recipe, tensors, {}), []
    size = stored_linear.split_group(group)
    packed = PackedSpec("int4", size, has_zeros, act_order)
    recipe = Recipe(declared.method, rows, columns, "int4", group, packed)
    return StoredLinear(recipe, tensors, {}), []


def read(linear: StoredLinear, mesh: Mesh, axes) -> dict[str, jax.Array]:
    """See stored_linear.Format."""
    if linear.recipe.packed is None:
        return _read_bytes(linear, mesh, axes[1])
    axis_in, axis_out = axes
    spec, tensors = linear.recipe.packed, linear.tensors
    # With act-order a device needs columns from anywhere, so it reads all.
    words = (axis_out, None if spec.order else axis_in)
    raw = {
        "words": safetensors_files.read(tensors["weight_packed"], mesh, words),
        "scale": safetensors_files.read(tensors["weight_scale"], mesh, (axis_out, axis_in)),
    }
    if spec.group_bias:
        zeros = tensors["weight_zero_point"]
        raw["zeros"] = safetensors_files.read(zeros, mesh, (axis_out, axis_in))
    if spec.order:
        raw["order"] = gptq.read_order(linear, "weight_g_idx", mesh)
    return raw


def _read_bytes(linear: StoredLinear, mesh: Mesh, axis_out) -> dict[str, jax.Array]:
    """The arrays of 8 bits, by their names, and the group of each column."""
    tensors = dict(linear.tensors)
    index = np.arange(linear.recipe.rows) // linear.recipe.block
    if "weight_g_idx" in tensors:
        index = tensors["weight_g_idx"].value()
    raw = {name: safetensors_files.read(tensors[name], mesh, (axis_out, None))
           for name in ("weight_packed", "weight_scale", "weight_zero_point")
           if name in tensors}  # fmt: skip
    return raw | {"group": stored_linear.replicated(index.astype(np.int32), mesh)}


def pack(raw: dict[str, jax.Array], recipe: Recipe) -> packing.Packed:
    """See stored_linear.Format."""
    transposed = {name: array if name == "order" else array.T for name, array in raw.items()}
    return gptq.pack(transposed, recipe)


def dense(raw: dict[str, jax.Array], recipe: Recipe) -> jax.Array:
    """The weight [N, K] in float32, of 8 bits."""
    scale, zero = raw["weight_scale"].astype(jnp.float32), 128.0
    codes = _bytes(raw["weight_packed"], 2, (recipe.columns, recipe.rows))
    if "weight_zero_point" in raw:
        zero = _bytes(raw["weight_zero_point"], 1, scale.shape)[:, raw["group"]]
    return (codes - zero) * scale[:, raw["group"]]


def _bytes(words: jax.Array, axis: int, shape: tuple[int, ...]) -> jax.Array:
    """The four bytes of each word along a new axis, the lowest first, in that shape."""
    words = lax.bitcast_convert_type(words, jnp.uint32)
    each = [(words >> shift) & 255 for shift in (0, 8, 16, 24)]
    return jnp.stack(each, axis).reshape(shape).astype(jnp.float32)
