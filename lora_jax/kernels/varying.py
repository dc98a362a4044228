"""Arrays that differ between devices inside a jax.shard_map, which has that in their types."""

from typing import Any

import jax
from jax import lax


def axes_of(*trees: Any) -> frozenset[str]:
    """The mesh axes along which these arrays differ; none where shard_map does not check it."""
    return frozenset().union(*(_axes(jax.typeof(leaf)) for leaf in jax.tree.leaves(trees)))


def _axes(aval: Any) -> frozenset[str]:
    kind = getattr(aval, "manual_axis_type", None)  # jax 0.10
    return getattr(aval, "vma", frozenset()) if kind is None else kind.varying


def over(axes: frozenset[str], array: jax.Array) -> jax.Array:
    """The array, typed as one that differs along these mesh axes; its gradient is summed there."""
    new = tuple(axes - axes_of(array))
    return lax.pcast(array, new, to="varying") if new else array
