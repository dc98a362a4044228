"""Layers stacked on a leading axis [L, …], and which of their arrays a scan must not slice.

A scan gives each layer its slice of every array. Our own kernels would need a copy of that slice.
So an array of type `Whole` is not sliced; the layer's `LayerIndex` is, and says where to read. A
scan may also slice the parameters alone. So a LayerIndex is a parameter, though an integer.
An array of type `WholeOnGPU` is sliced on other platforms; the layer reads it at `here`.
"""

import contextlib
import contextvars
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from lora_jax.kernels import platform


class Whole(nnx.Variable):
    """An array [L, …] that its layer reads in place."""


class WholeOnGPU(nnx.Variable):
    """An array [L, …] that its layer reads in place on a GPU, and gets its slice of elsewhere."""


class LayerIndex(nnx.Param):
    """Which layer of the stack a module is: of L numbers in the stack, one in the scan."""


class Layers(tuple):
    """The arrays of a stack one by one, for where a slice of the stack would be a copy."""


jax.tree_util.register_pytree_node(
    Layers, lambda own: (tuple(own), None), lambda _, own: Layers(own)
)


def index(num_layers: int, axis: int = 0) -> LayerIndex:
    """A LayerIndex, for a scan that slices parameters on that axis."""
    return LayerIndex(jnp.expand_dims(jnp.arange(num_layers), range(axis)))


def current(index: LayerIndex | None, axis: int = 0) -> jax.Array | None:
    """The number of the layer that a scan is at; None outside of a scan."""
    value = None if index is None else index[...]
    return value.reshape(()) if value is not None and value.ndim == axis else None


def split(layers: nnx.Module) -> tuple[nnx.GraphDef, Any, Any]:
    """(graphdef, whole, sliced): scan over `sliced`, and merge each slice with all of `whole`.

    Run what is merged within `running`.
    """
    on_gpu = platform.platform_here() == "gpu"
    return nnx.split(layers, (Whole, WholeOnGPU) if on_gpu else Whole, ...)


_HERE: contextvars.ContextVar[jax.Array | None] = contextvars.ContextVar("layer", default=None)


@contextlib.contextmanager
def running(index: jax.Array) -> Iterator[None]:
    """A context in which `here` is that layer."""
    token = _HERE.set(index)
    try:
        yield
    finally:
        _HERE.reset(token)


def here() -> jax.Array | None:
    """The number of the layer that runs, of a stack that `split` has split; None outside of one."""
    return _HERE.get()


def unstacked(tree: Any) -> Any:
    """Stacked arrays [L, …] as Layers; call it under jit."""
    return jax.tree.map(lambda array: Layers(array[i] for i in range(len(array))), tree)


def at(sliced: Any, index: int) -> Any:
    """What a scan over `sliced` would give its layer `index`."""
    return jax.tree.map(
        lambda array: array[index], sliced, is_leaf=lambda own: isinstance(own, Layers)
    )
