"""4-bit weights as compressed-tensors stores them ("pack-quantized"): checked, read and packed.

  P.weight_packed      int32 [N, K/8]       nibble i of word j is column 8j+i
  P.weight_scale       [N, groups]
  P.weight_zero_point  int32 [N/8, groups]  nibble i of word j is row 8j+i; not if symmetric
  P.weight_g_idx       int32 [K]            the group of each column; with "actorder": "group"
  P.weight_shape       [2]                  N, K

w = (code − zero) · scale, with 8 as the zero point of symmetric weights. These are GPTQ's arrays,
transposed.
Source: compressed_tensors/compressors/pack_quantized of
https://github.com/vllm-project/compressed-tensors
"""

import jax
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
    if rows % 8 or columns % 8:
        problems.append(f"weight_packed: a weight [{columns}, {rows}] does not fill whole words")
    for name, dtypes, shape in (
        ("weight_packed", ("I32",), (columns, rows // 8)),
        ("weight_scale", safetensors_files.FLOATS, (columns, groups)),
        ("weight_zero_point", ("I32",), (columns // 8, groups)),
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
    size = stored_linear.split_group(group)
    packed = PackedSpec("int4", size, has_zeros, act_order)
    recipe = Recipe(declared.method, rows, columns, "int4", group, packed)
    return StoredLinear(recipe, tensors, {}), []


def read(linear: StoredLinear, mesh: Mesh, axes) -> dict[str, jax.Array]:
    """See stored_linear.Format."""
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


def pack(raw: dict[str, jax.Array], recipe: Recipe) -> packing.Packed:
    """See stored_linear.Format."""
    transposed = {name: array if name == "order" else array.T for name, array in raw.items()}
    return gptq.pack(transposed, recipe)
