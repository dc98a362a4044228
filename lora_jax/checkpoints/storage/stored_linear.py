"""A quantized linear layer on disk, and what the modules of all formats share."""

import functools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from lora_jax.checkpoints import safetensors_files
from lora_jax.checkpoints.safetensors_files import StoredTensor
from lora_jax.kernels import packed as packing
from lora_jax.models import quantization_config
from lora_jax.quant import formats

_LARGEST_GROUP = 128  # no kernel reads a larger one, and padding would grow: it is split


class PackedSpec(NamedTuple):
    """Which arrays a packed weight consists of.

    group: how many rows share a scale; the scale is float32 unless fmt is nested. None: the arrays
    are those that formats.quantize makes for fmt.
    """

    fmt: str
    group: int | None = None
    group_bias: bool = False
    order: bool = False

    @property
    def group_size(self) -> int:
        """How many rows share a scale."""
        return self.group or formats.FORMATS[self.fmt].group

    @property
    def nested(self) -> bool:
        return formats.FORMATS[self.fmt].nested

    def fitted(self, rows: int, multiple: int) -> "PackedSpec":
        """The spec for an input axis that is cut into `multiple` parts.

        Scales that need padding cannot stay nested.
        """
        if self.nested and rows % (self.group_size * multiple):
            return self._replace(fmt=self.fmt.removesuffix("-dq"))
        return self

    def shapes(self, rows: int, columns: int, multiple: int) -> packing.Packed:
        """The arrays of a weight [rows, columns] whose input axis is cut into `multiple` parts."""
        if self.group is None:
            return _quantized_shapes(self.fmt, rows, columns, multiple)
        groups = -(-rows // (self.group * multiple)) * multiple

        def array(exists, dtype, *shape):
            return jax.ShapeDtypeStruct(shape, dtype) if exists else None

        return packing.Packed(
            array(True, jnp.uint32, groups * self.group // 8, columns),
            array(True, jnp.uint8 if self.nested else jnp.float32, groups, columns),
            group_bias=array(self.group_bias, jnp.float32, groups, columns),
            nested_scale=array(
                self.nested, jnp.float32, -(-groups * columns // packing.NESTED_BLOCK)
            ),
            nested_offset=array(self.nested, jnp.float32, 1),
            order=array(self.order, jnp.int32, rows),
        )


@functools.cache
def _quantized_shapes(fmt: str, rows: int, columns: int, multiple: int) -> packing.Packed:
    """Cached, because tracing the quantizer is slow and a model has few shapes."""
    weight = jax.ShapeDtypeStruct((rows, columns), jnp.float32)
    found = jax.eval_shape(lambda w: formats.quantize(w, fmt, multiple, search=False), weight)
    # Without the sharding that an explicit mesh in use gives them: the next call may have another.
    return jax.tree.map(lambda array: jax.ShapeDtypeStruct(array.shape, array.dtype), found)


class Recipe(NamedTuple):
    """How a weight [rows, columns] is stored: all that determines the program that unpacks it.

    block: how many entries share a scale on disk. packed: what the weight becomes in memory; None
    means it can only become dense.
    """

    method: str
    rows: int
    columns: int
    codes: str
    block: int
    packed: PackedSpec | None
    zero_offset: int = 0


class StoredLinear(NamedTuple):
    """The quantized weight of a linear layer on disk.

    tensors: {name without the module's name: tensor}. state: bitsandbytes' quant_state.
    """

    recipe: Recipe
    tensors: Mapping[str, StoredTensor]
    state: Mapping[str, Any]


class Format(Protocol):
    """What the module of a format defines.

    NEEDED: the tensors that every layer has; NAMES: all that a layer may have; both without the
    module's name.
    """

    NEEDED: Sequence[str]
    NAMES: frozenset[str]

    @staticmethod
    def check(
        tensors: Mapping[str, StoredTensor],
        rows: int,
        columns: int,
        declared: quantization_config.Quantization,
    ) -> tuple[StoredLinear | None, list[str]]:
        """(the weight [rows, columns] in these tensors, what is wrong with them)."""
        ...

    @staticmethod
    def read(
        linear: StoredLinear, mesh: Mesh, axes: tuple[str | None, str | None]
    ) -> dict[str, jax.Array]:
        """The arrays as they are stored, cut over mesh axes (for K, for N) where possible."""
        ...

    @staticmethod
    def pack(raw: dict[str, jax.Array], recipe: Recipe) -> packing.Packed:
        """The packed weight, made of what `read` returned."""
        ...

    @staticmethod
    def dense(raw: dict[str, jax.Array], recipe: Recipe) -> jax.Array:
        """The weight [N, K] in float32. Only formats with weights that cannot be packed need it."""
        ...


def split_group(group: int) -> int:
    """The size of the equal parts that a group is split into, so that kernels can read them."""
    return group if group <= _LARGEST_GROUP else math.gcd(group, _LARGEST_GROUP)


def mismatches(
    tensor: StoredTensor, name: str, dtypes: Iterable[str], shape: tuple[int, ...]
) -> list[str]:
    """What is wrong with a tensor's dtype and shape."""
    problems = []
    if tensor.dtype not in dtypes:
        problems.append(f"{name} has dtype {tensor.dtype}, expected {' or '.join(sorted(dtypes))}")
    if tensor.shape != shape:
        problems.append(f"{name} has shape {list(tensor.shape)}, expected {list(shape)}")
    return problems


def replicated(array: np.ndarray, mesh: Mesh) -> jax.Array:
    """The whole array on every device."""
    return safetensors_files.place(array.shape, mesh, (), lambda *_: array)
