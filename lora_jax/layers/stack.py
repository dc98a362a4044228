"""Layers stacked on a leading axis [L, …], and which of their arrays a scan must not slice.

A scan gives each layer its slice of every array. Our own kernels would need a copy of that slice.
So an array of type `Whole` is not sliced; the layer's `LayerIndex` is, and says where to read.
"""

from typing import Any

from flax import nnx


class Whole(nnx.Variable):
    """An array [L, …] that its layer reads in place."""


class LayerIndex(nnx.Variable):
    """Which layer of the stack a module is: [L] in the stack, a scalar in the scan."""


def split(layers: nnx.Module) -> tuple[nnx.GraphDef, Any, Any]:
    """(graphdef, whole, sliced): scan over `sliced`, and merge each slice with all of `whole`."""
    return nnx.split(layers, Whole, ...)
