"""Weights as mlx-lm stores them (mode "affine"): checked, read, packed and dequantized.

  P.weight  uint32 [N, K · bits/32]  code i of a row begins at bit i · bits of the row
  P.scales  [N, groups]
  P.biases  [N, groups]

w = code · scale + bias, for linear layers, embeddings and heads. The shapes say how many bits a
layer has. Weights of 4 bits are packed; others can only become dense.
Source: mlx/backend/cpu/quantized.cpp of https://github.com/ml-explore/mlx
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from lora_jax.checkpoints import safetensors_files
from lora_jax.checkpoints.storage import stored_linear
from lora_jax.checkpoints.storage.stored_linear import PackedSpec, Recipe, StoredLinear
from lora_jax.kernels import packed as packing

NEEDED = ("weight", "scales", "biases")
NAMES = frozenset(NEEDED)
_MIDDLE = 8  # code 8 of 0 … 15 is code 0 of −8 … 7


def check(tensors, rows, columns, declared) -> tuple[StoredLinear | None, list[str]]:
    """See stored_linear.Format."""
    words, groups = ((*tensors[name].shape, 0, 0)[1] for name in ("weight", "scales"))
    problems = []
    for name, dtypes, shape in (
        ("weight", ("U32",), (columns, words)),
        ("scales", safetensors_files.FLOATS, (columns, groups)),
        ("biases", safetensors_files.FLOATS, (columns, groups)),
    ):
        problems += stored_linear.mismatches(tensors[name], name, dtypes, shape)
    bits, group = 32 * words // rows, rows // max(groups, 1)
    if not 2 <= bits <= 8 or rows * bits != 32 * words or group % 8 or group * groups != rows:
        problems.append(f"weight and scales have {words} words and {groups} scales in a row, which "
                        f"are no codes of 2 to 8 bits for {rows} columns")  # fmt: skip
    if problems:
        return None, problems
    packed = PackedSpec("int4", stored_linear.split_group(group), True) if bits == 4 else None
    recipe = Recipe(declared.method, rows, columns, f"int{bits}", group, packed)
    return StoredLinear(recipe, tensors, {}), []


def read(linear: StoredLinear, mesh: Mesh, axes) -> dict[str, jax.Array]:
    """See stored_linear.Format."""
    # A word of other than 4 bits may have codes of columns that belong to two devices.
    spec = axes[::-1] if linear.recipe.packed is not None else (axes[1], None)
    return {name: safetensors_files.read(linear.tensors[name], mesh, spec) for name in NEEDED}


def pack(raw: dict[str, jax.Array], recipe: Recipe) -> packing.Packed:
    """See stored_linear.Format."""
    words = raw["weight"].T ^ np.uint32(0x11111111 * _MIDDLE)
    scale, bias = (raw[name].T.astype(jnp.float32) for name in ("scales", "biases"))
    parts = recipe.block // recipe.packed.group_size
    group_bias = jnp.repeat(bias + _MIDDLE * scale, parts, axis=0)
    return packing.Packed(words, jnp.repeat(scale, parts, axis=0), group_bias=group_bias)


def dense(raw: dict[str, jax.Array], recipe: Recipe) -> jax.Array:
    """The weight [N, K] in float32."""
    bits = int(recipe.codes.removeprefix("int"))
    begin = np.arange(recipe.rows) * bits
    word, shift = begin // 32, (begin % 32).astype(np.uint32)[None]
    last = np.minimum(word + 1, raw["weight"].shape[1] - 1)
    low = raw["weight"][:, word] >> shift
    # The rest of a code that reaches into the next word; a shift by 32 would be undefined.
    high = (raw["weight"][:, last] << 1) << (31 - shift)
    codes = ((low | high) & np.uint32(2**bits - 1)).astype(jnp.float32)
    scale, bias = (
        jnp.repeat(raw[name].astype(jnp.float32), recipe.block, axis=1)
        for name in ("scales", "biases")
    )
    return codes * scale + bias
