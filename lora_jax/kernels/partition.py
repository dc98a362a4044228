"""How a mesh deals out the product with a weight, where XLA's partitioner is not left to decide."""

import math
from typing import NamedTuple

import jax


class Partition(NamedTuple):
    """Mesh axes over which a product is dealt out: x's rows, and the weight's K and N.

    A weight that is stored over the axis `gathered` is made whole, packed as it is, before it is
    multiplied. XLA cannot split a kernel of our own by itself, and would gather its own forms of
    the weight dense, or whole stacks of it.
    """

    rows: tuple[str, ...] = ()
    k: str | None = None
    n: str | None = None
    gathered: str | None = None

    def stored(self) -> tuple[str | None, str | None]:
        """The axes that K and N are stored over, of those that the ambient mesh has open."""
        axes = open_axes()
        return tuple(axis if axes.get(axis, 1) > 1 else None for axis in (self.k, self.n))

    def computed(self, num_rows: int) -> "Partition":
        """The axes of which each device computes a part: all but `gathered`, where rows are even.

        Rows that cannot be dealt out evenly are not.
        """
        axes = open_axes()
        rows = tuple(axis for axis in self.rows if axes.get(axis, 1) > 1)
        if num_rows % math.prod(axes[axis] for axis in rows):
            rows = ()
        return Partition(rows, *(None if a == self.gathered else a for a in self.stored()))


WHOLE = Partition()  # on one device


def open_axes() -> dict[str, int]:
    """{axis: size} of the ambient mesh, without those that a shard_map around has dealt out."""
    mesh = jax.sharding.get_abstract_mesh()
    return {axis: size for axis, size in mesh.shape.items() if axis not in mesh.manual_axes}


def num_devices() -> int:
    """Over how many devices what is computed here is still to be dealt out."""
    return math.prod(open_axes().values())
