"""int8 and int4 weights in lora_jax's own layout: the arrays of kernels/packed.py, as they are.

P.q, P.scale, P.column_scale
"""

import jax
import numpy as np
from jax.sharding import Mesh

from lora_jax.checkpoints import safetensors_files, safetensors_writer
from lora_jax.checkpoints.safetensors_writer import TensorSpec
from lora_jax.checkpoints.storage import stored_linear
from lora_jax.checkpoints.storage.stored_linear import PackedSpec, Recipe, StoredLinear
from lora_jax.kernels import packed as packing
from lora_jax.quant import formats

NEEDED = ("q", "column_scale")
NAMES = frozenset(("q", "scale", "column_scale"))


def check(tensors, rows, columns, declared) -> tuple[StoredLinear | None, list[str]]:
    """See stored_linear.Format."""
    spec = PackedSpec(declared.fmt)
    problems = []
    for name, shape in spec.shapes(rows, columns, 1)._asdict().items():
        if shape is not None and name in tensors:
            dtype = safetensors_writer.spec_of(shape).dtype
            problems += stored_linear.mismatches(tensors[name], name, (dtype,), shape.shape)
        elif shape is not None:
            problems.append(f"{name} is missing")
        elif name in tensors:
            problems.append(f"{name} is unexpected in {declared.fmt}")
    codes = formats.codes(declared.fmt)
    recipe = Recipe("lora_jax", rows, columns, codes, spec.group_size, spec)
    return StoredLinear(recipe, tensors, {}), problems


def read(linear: StoredLinear, mesh: Mesh, axes) -> dict[str, jax.Array]:
    """See stored_linear.Format."""
    where = {"column_scale": (None, axes[1])}
    return {
        name: safetensors_files.read(tensor, mesh, where.get(name, axes))
        for name, tensor in linear.tensors.items()
    }


def pack(raw: dict[str, jax.Array], recipe: Recipe) -> packing.Packed:
    """See stored_linear.Format."""
    return packing.Packed(**raw)


def tensor_specs(fmt: str, rows: int, columns: int) -> dict[str, TensorSpec | None]:
    """{name: dtype and shape} of what `tensors` returns."""
    shapes = PackedSpec(fmt).shapes(rows, columns, 1)._asdict()
    return {name: safetensors_writer.spec_of(s) for name, s in shapes.items() if s is not None}


def tensors(fmt: str, weight: np.ndarray, *, search: bool) -> dict[str, np.ndarray]:
    """A dense weight [N, K], quantized, as the tensors of this layout."""
    packed = formats.quantize(jax.device_put(weight), fmt, search=search, transposed=True)
    arrays = packed._asdict().items()
    return {name: np.asarray(array) for name, array in arrays if array is not None}
