"""What GPTQ and AWQ have in common: 4-bit codes in groups along K, w = (code − zero) · scale."""

from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh

from lora_jax.checkpoints import safetensors_files
from lora_jax.checkpoints.safetensors_files import StoredTensor
from lora_jax.checkpoints.storage import stored_linear
from lora_jax.checkpoints.storage.stored_linear import PackedSpec, Recipe, StoredLinear
from lora_jax.kernels import packed as packing
from lora_jax.models import quantization_config

NEEDED = ("qweight", "qzeros", "scales")
_SYMMETRIC = 8  # the zero point of codes that stand for −8 … 7


def group_of(declared: quantization_config.Quantization, rows: int) -> int:
    """How many rows share a scale on disk."""
    return rows if declared.group == -1 else declared.group


def check_shapes(
    tensors: Mapping[str, StoredTensor],
    rows: int,
    columns: int,
    declared: quantization_config.Quantization,
    words: tuple[int, int],
) -> list[str]:
    """What is wrong with the tensors' dtypes and shapes. words: the shape of qweight."""
    groups = -(-rows // group_of(declared, rows))
    problems = []
    if rows % 8 or columns % 8:
        problems.append(f"qweight: a weight [{columns}, {rows}] does not fill whole words")
    for name, dtypes, shape in (
        ("qweight", ("I32",), words),
        ("qzeros", ("I32",), (groups, columns // 8)),
        ("scales", ("F16", "BF16"), (groups, columns)),
    ):
        problems += stored_linear.mismatches(tensors[name], name, dtypes, shape)
    return problems


def stored_linear_of(
    tensors: Mapping[str, StoredTensor],
    rows: int,
    columns: int,
    declared: quantization_config.Quantization,
    *,
    act_order: bool = False,
) -> tuple[StoredLinear | None, list[str]]:
    """(the weight in tensors of the right shapes, what is wrong with its zero points)."""
    zeros = tensors["qzeros"].value().view(np.uint32)
    symmetric = zeros == 0x11111111 * (_SYMMETRIC - declared.zero_offset)
    if not declared.zero_points and not symmetric.all():
        hint = ""
        if declared.zero_offset and (zeros == 0x11111111 * _SYMMETRIC).all():
            hint = '; they are those of "checkpoint_format": "gptq_v2"'
        return None, [f"qzeros are not {_SYMMETRIC}, but config.json says sym{hint}"]
    group = group_of(declared, rows)
    packed = PackedSpec("int4", stored_linear.split_group(group), not symmetric.all(), act_order)
    recipe = Recipe(declared.method, rows, columns, "int4", group, packed, declared.zero_offset)
    return StoredLinear(recipe, tensors, {}), []


def read(linear: StoredLinear, mesh: Mesh, axes) -> dict[str, jax.Array]:
    """The scales as they are stored, and the zero points where they are needed."""
    raw = {"scale": safetensors_files.read(linear.tensors["scales"], mesh, axes)}
    if linear.recipe.packed.group_bias:
        raw["zeros"] = safetensors_files.read(linear.tensors["qzeros"], mesh, axes)
    return raw


def join_nibbles(nibble: Callable[[int], jax.Array]) -> jax.Array:
    """Words whose nibble i is the lowest nibble of nibble(i)."""
    return sum((nibble(i) & 15) << (4 * i) for i in range(8))


def pack(words: jax.Array, raw, recipe: Recipe, order: Sequence[int]) -> packing.Packed:
    """The packed weight of codes 0 … 15 [K/8, N], which become codes −8 … 7 and a group bias.

    order: nibble i of a word of zero points belongs to column order[i] of its eight.
    """
    spec, groups = recipe.packed, len(raw["scale"])
    words = words ^ np.uint32(0x11111111 * _SYMMETRIC)
    words = jnp.pad(words, ((0, groups * recipe.block // 8 - len(words)), (0, 0)))
    parts = recipe.block // spec.group_size
    scale = raw["scale"].astype(jnp.float32)
    bias = None
    if spec.group_bias:
        stored = lax.bitcast_convert_type(raw["zeros"], jnp.uint32)
        each = [(stored >> (4 * order.index(n))) & 15 for n in range(8)]
        zeros = jnp.stack(each, axis=2).reshape(scale.shape).astype(jnp.float32)
        zeros = zeros + recipe.zero_offset
        bias = jnp.repeat((_SYMMETRIC - zeros) * scale, parts, axis=0)
    return packing.Packed(words, jnp.repeat(scale, parts, axis=0), group_bias=bias)
