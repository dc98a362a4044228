"""Lookup in a frozen embedding table, which may be sharded over a mesh."""

import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from lora_jax.kernels import partitioning


def lookup(
    table: Float[Array, "V D"],
    ids: Int[Array, "B T"],
    *,
    partition: partitioning.Partition = partitioning.WHOLE,
) -> Float[Array, "B T D"]:
    """table[ids].

    partition: how the ambient mesh (jax.set_mesh) splits the rows of ids, and V and D of the table.
    The table is not moved; devices exchange ids and results. XLA's partitioner could do that too,
    but aborts within a shard_map over some of a mesh's axes (jaxlib 0.10.2).
    """
    if not partition.splits():
        return jnp.take(table, ids, axis=0)
    (rows, *_), (over_v, over_d) = partition.computed(len(ids)), partition.stored()
    moved = over_d if over_d in rows else None  # an axis that splits both the rows and D

    def each(table, ids):
        if moved:
            ids = lax.all_gather(ids, moved, axis=0, tiled=True)
        if over_v:
            ids = ids - lax.axis_index(over_v) * len(table)
            here = (ids >= 0) & (ids < len(table))
            found = jnp.take(table, jnp.where(here, ids, 0), axis=0)
            found = lax.psum(jnp.where(here[..., None], found, 0), over_v)
        else:
            found = jnp.take(table, ids, axis=0)
        if moved:
            return lax.all_to_all(found, moved, split_axis=0, concat_axis=2, tiled=True)
        return lax.all_gather(found, over_d, axis=2, tiled=True) if over_d else found

    specs = PartitionSpec(over_v, over_d), PartitionSpec(rows)
    return partitioning.shard_map(each, specs, PartitionSpec(rows))(table, ids)
