"""Quantized linear layers on disk → packed or dense arrays with exactly the same weights.

One module a format: `bitsandbytes`, `gptq`, `awq`, `compressed_tensors`, `mlx`, and `native` for
lora_jax's own; each defines what stored_linear.Format lists. Here are the functions that choose the
format.
"""

from collections.abc import Iterable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from lora_jax.checkpoints.safetensors_files import StoredTensor
from lora_jax.checkpoints.safetensors_writer import TensorSpec
from lora_jax.checkpoints.storage import (
    awq,
    bitsandbytes,
    compressed_tensors,
    gptq,
    mlx,
    native,
    stored_linear,
)
from lora_jax.checkpoints.storage.stored_linear import PackedSpec, Recipe, StoredLinear
from lora_jax.kernels import packed as packing
from lora_jax.models import quantization_config
from lora_jax.quant import formats

_FORMATS: dict[str, stored_linear.Format] = {
    "bitsandbytes": bitsandbytes,
    "gptq": gptq,
    "awq": awq,
    "compressed-tensors": compressed_tensors,
    "mlx": mlx,
    "lora_jax": native,
}


class Found(NamedTuple):
    """The quantized linear layers of a checkpoint.

    weights: {module: its weight}, for modules without problems. modules: all quantized modules.
    claimed: the names of the tensors that belong to them.
    """

    weights: dict[str, StoredLinear]
    modules: set[str]
    claimed: set[str]
    problems: list[str]


def find(
    declared: quantization_config.Quantization,
    linears: Mapping[str, tuple[int, int]],
    biased: Iterable[str],
    stored: Mapping[str, StoredTensor],
) -> Found:
    """The quantized weights among linear layers {module: (K, N)}, and what is wrong with them.

    biased: the modules that have a bias. Reads only the tensors that describe others.
    """
    fmt = _FORMATS[declared.method]
    found = Found({}, set(), set(), [])
    for module, tensors in _by_module(stored, linears).items():
        own = {name: tensor for name, tensor in tensors.items() if name in fmt.NAMES}
        if not own.keys() - {"weight"}:
            continue  # a dense layer
        found.modules.add(module)
        found.claimed.update(f"{module}.{name}" for name in own)
        missing = [name for name in fmt.NEEDED if name not in own]
        problems = [f"{name} is missing" for name in missing]
        if "weight" in tensors and "weight" not in fmt.NAMES:
            problems.append("weight is present too, dense")
        if not missing:
            weight, others = fmt.check(own, *linears[module], declared)
            problems += others
            if not problems:
                found.weights[module] = weight
        if "bias" in tensors and module not in biased and not tensors["bias"].value().any():
            found.claimed.add(f"{module}.bias")  # some programs write a bias of zeros
        found.problems.extend(f"{module}.{problem}" for problem in problems)
    if not found.weights and not found.problems:
        method = declared.method
        found.problems.append(f"config.json says {method}, but every linear layer is dense")
    return found


def declared_spec(
    declared: quantization_config.Quantization, modules: Iterable[str], rows: int
) -> PackedSpec | None:
    """What a stack of linear layers with K = rows becomes, from config.json alone; None: dense."""
    if any(map(declared.skips, modules)):
        return None
    if declared.method == "bitsandbytes" and rows % bitsandbytes.BLOCK:
        return None
    if declared.method in ("gptq", "awq", "compressed-tensors", "mlx"):
        group = stored_linear.split_group(rows if declared.group == -1 else declared.group)
        return PackedSpec("int4", group, declared.zero_points, declared.act_order)
    return PackedSpec(declared.fmt)


def common_spec(specs: Iterable[PackedSpec | None]) -> PackedSpec | None:
    """The spec that all layers of a stack can have; None: they can only become dense."""
    specs = list(specs)
    if None in specs or len({(s.fmt.removesuffix("-dq"), s.group) for s in specs}) > 1:
        return None
    return PackedSpec(
        min(s.fmt for s in specs),  # without -dq if any is without
        specs[0].group,
        any(s.group_bias for s in specs),
        any(s.order for s in specs),
    )


def read(
    linear: StoredLinear, mesh: Mesh, axes: tuple[str | None, str | None]
) -> dict[str, jax.Array]:
    """The arrays of a weight as they are stored, cut over mesh axes (for K, for N) if possible."""
    return _FORMATS[linear.recipe.method].read(linear, mesh, axes)


class Unpack(NamedTuple):
    """raw → Packed, with the input axis cut into `multiple` parts. Hashable, for jit."""

    recipe: Recipe
    multiple: int

    def __call__(self, raw: dict[str, jax.Array]) -> packing.Packed:
        recipe = self.recipe
        packed = _FORMATS[recipe.method].pack(raw, recipe)
        return jax.tree.map(
            lambda array, shape: jnp.pad(
                array, [(0, size - had) for size, had in zip(shape.shape, array.shape, strict=True)]
            ),
            packed,
            recipe.packed.shapes(recipe.rows, recipe.columns, self.multiple),
        )


class Dequantize(NamedTuple):
    """raw → the dense weight [K, N] in a dtype, or its transpose. Hashable, for jit."""

    recipe: Recipe
    transpose: bool = False

    def __call__(self, raw: dict[str, jax.Array], dtype: jax.typing.DTypeLike) -> jax.Array:
        weight = self._weight(raw, dtype)
        return weight.T if self.transpose else weight

    def _weight(self, raw: dict[str, jax.Array], dtype: jax.typing.DTypeLike) -> jax.Array:
        recipe = self.recipe
        if recipe.packed is None:
            return _FORMATS[recipe.method].dense(raw, recipe).T.astype(dtype)
        packed = _FORMATS[recipe.method].pack(raw, recipe)
        return formats.dequantize(packed, recipe.packed.fmt, recipe.rows, dtype)


def tensor_specs(fmt: str, rows: int, columns: int) -> dict[str, TensorSpec | None]:
    """{name without the module's name: dtype and shape} of what `quantize` returns.

    None where the length depends on the values.
    """
    if fmt in quantization_config.NATIVE:
        return native.tensor_specs(fmt, rows, columns)
    return bitsandbytes.tensor_specs(fmt, rows, columns)


def quantize(fmt: str, weight: np.ndarray, *, search: bool = True) -> dict[str, np.ndarray]:
    """The tensors that store a dense weight [N, K]: in lora_jax's layout, or in bitsandbytes'."""
    if fmt in quantization_config.NATIVE:
        return native.tensors(fmt, weight, search=search)
    return bitsandbytes.tensors(fmt, weight)


def _by_module(
    stored: Mapping[str, StoredTensor], linears: Mapping[str, tuple[int, int]]
) -> dict[str, dict[str, StoredTensor]]:
    """{module: {name without the module's name: tensor}}"""
    found: dict[str, dict[str, StoredTensor]] = {}
    for name, tensor in stored.items():
        parts = name.split(".")
        for cut in range(len(parts) - 1, 0, -1):
            module = ".".join(parts[:cut])
            if module in linears:
                found.setdefault(module, {})[".".join(parts[cut:])] = tensor
                break
    return found
