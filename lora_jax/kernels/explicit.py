"""Meshes whose axes are Explicit, as jax.make_mesh makes them: an array's type has its sharding.

There JAX refuses an operation whose result could be sharded in several ways. To a model only the
shardings of what a layer takes and returns matter. In between, the compiler chooses, as on a mesh
with Auto axes.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

Axes = str | tuple[str, ...] | None  # the mesh axes over which one axis of an array is split


def mesh_of(*trees: Any) -> AbstractMesh | None:
    """The mesh of these arrays, else the ambient one, if it has Explicit axes here."""
    meshes = (jax.typeof(leaf).sharding.mesh for leaf in jax.tree.leaves(trees))
    mesh = next((m for m in meshes if not m.empty), jax.sharding.get_abstract_mesh())
    return mesh if mesh.explicit_axes else None


def axes_of(array: jax.Array) -> tuple[Axes, ...]:
    """The Explicit mesh axes over which each axis of the array is split."""
    return padded(jax.typeof(array).sharding.spec, array.ndim)


def padded(spec: Iterable[Axes], ndim: int) -> tuple[Axes, ...]:
    """The entries of a PartitionSpec, one for each axis of an array."""
    return (*spec, *(None,) * (ndim - len(spec)))


def each(axes: Axes) -> tuple[str, ...]:
    return (axes,) if isinstance(axes, str) else tuple(axes or ())


def joined(several: Sequence[Axes]) -> Axes:
    """The mesh axes of several axes of an array that become one."""
    found = tuple(axis for axes in several for axis in each(axes))
    return found if len(found) > 1 else found[0] if found else None


def num_parts(mesh: Mesh | AbstractMesh, axes: Axes) -> int:
    """The number of parts into which these mesh axes split an axis of an array."""
    return math.prod(mesh.shape[axis] for axis in each(axes))


def automatic(function: Callable, *args: Any, out: Any) -> Any:
    """function(*args), with shardings that the compiler chooses; that of the result is `out`.

    args: trees of arrays. An array with Explicit axes must not reach the function in another way.
    out: a tree of NamedSharding, or one for all results; not used on a mesh of Auto axes.
    """
    mesh = jax.tree.leaves(out)[0].mesh
    if not mesh.explicit_axes:
        return function(*args)
    run = jax.sharding.auto_axes(function, axes=tuple(mesh.explicit_axes), out_sharding=out)
    # Without an ambient mesh only a compiled function finds the devices, by its arguments.
    return jax.jit(run)(*args) if jax.sharding.get_abstract_mesh().empty else run(*args)


def like(array: jax.Array, function: Callable, *args: Any) -> Any:
    """`automatic`, with a result that is sharded as `array` is."""
    mesh = mesh_of(array)
    if mesh is None:
        return function(*args)
    return automatic(function, *args, out=sharding(mesh, *axes_of(array)))


def sharding(mesh: Mesh | AbstractMesh, *axes: Axes) -> NamedSharding:
    """That of an array whose axes are split over these mesh axes."""
    return NamedSharding(mesh, PartitionSpec(*axes))
