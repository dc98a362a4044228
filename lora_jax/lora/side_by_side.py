"""Several adapters side by side on one base, each with rows of its own in every batch.

A batch has S · B rows, those of the first adapter first. All layers of the base take all rows at
once; only what differs between the adapters, whose arrays have an axis [S, …], is computed for each
by itself.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax


def each(function: Callable, num_members: int, rows: Sequence[Any], own: Any) -> Any:
    """function(*rows, own), of each adapter's rows with its own arrays.

    num_members: S; 0: one adapter alone, whose arrays lack that axis.
    """
    if not num_members:
        return function(*rows, own)

    def split(array):
        return array.reshape(num_members, -1, *array.shape[1:])

    found = jax.vmap(function)(*jax.tree.map(split, tuple(rows)), own)
    return jax.tree.map(lambda array: array.reshape(-1, *array.shape[2:]), found)
