"""How a mesh splits the product of a kernel over its devices.

XLA's partitioner cannot split a kernel of our own, so the kernel does it itself in a shard_map. A
Partition names the mesh axes, which parallel/mesh.py sets on the layers.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax


class Partition(NamedTuple):
    """The mesh axes over which a product is split: x's rows, and the weight's K and N.

    A weight that is sharded over the axis `gathered` is gathered before a product of many rows
    (for_rows), while it is still packed. XLA would gather a dense weight, or a whole stack of
    layers.
    """

    rows: tuple[str, ...] = ()
    k: str | None = None
    n: str | None = None
    gathered: str | None = None

    def splits(self) -> bool:
        """Whether several devices share the product here."""
        return self != WHOLE and num_devices() > 1

    def stored(self) -> tuple[str | None, str | None]:
        """The axes over which K and N are sharded, without those that are not open (open_axes)."""
        axes = open_axes()
        return tuple(axis if axes.get(axis, 1) > 1 else None for axis in (self.k, self.n))

    def computed(self, num_rows: int) -> "Partition":
        """The axes over which devices share the computation: all but `gathered` for K and N.

        Rows are split only if the number of devices divides them.
        """
        axes = open_axes()
        rows = tuple(axis for axis in self.rows if axes.get(axis, 1) > 1)
        if num_rows % math.prod(axes[axis] for axis in rows):
            rows = ()
        return Partition(rows, *(None if a == self.gathered else a for a in self.stored()))

    def for_rows(self, num_rows: int, k: int) -> "Partition":
        """The partition of a product of so many rows with a weight of k rows.

        With few rows nothing is gathered, and devices exchange rows: then each one sends and
        receives about 4 bytes for each row and column of the weight, instead of k / 2 per column.
        """
        axes = open_axes()
        rows = tuple(axis for axis in self.rows if axis != self.gathered)
        if 8 * num_rows > k * math.prod(axes.get(axis, 1) for axis in rows):
            return self
        return Partition(rows, self.k, self.n)


WHOLE = Partition()  # not split


def open_axes() -> dict[str, int]:
    """{axis: size} of the ambient mesh, without those of an enclosing shard_map."""
    mesh = jax.sharding.get_abstract_mesh()
    return {axis: size for axis, size in mesh.shape.items() if axis not in mesh.manual_axes}


def num_devices() -> int:
    """The number of devices over which a computation can still be split here."""
    return math.prod(open_axes().values())


def shard_map(function: Callable, in_specs, out_specs) -> Callable:
    """function, computed by each device of the open axes from its part of the arguments."""
    return jax.shard_map(
        function,
        in_specs=in_specs,
        out_specs=out_specs,
        axis_names=set(open_axes()),
        check_vma=False,
    )
