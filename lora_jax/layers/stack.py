"""Layers stacked on a leading axis [L, …], and what of them a scan must not slice.

A scan hands each layer its slice of every array. For a kernel of our own that slice would be
copied out first; so an array of type `Whole` stays as it is, and the layer's `LayerIndex`, which is
sliced, says where in it to read.
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
