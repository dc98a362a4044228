"""Digests of arrays: they tell whether an array has changed."""

import functools
import zlib
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Integer, Shaped


@jax.jit
def of(array: jax.Array) -> jax.Array:
    """Σ word · (2 · position + 1) mod 2³², independent of the sharding.

    Odd factors have an inverse mod 2³², so a change of one word always changes the sum.
    """
    words = array
    if array.dtype != bool:
        words = jax.lax.bitcast_convert_type(array, jnp.dtype(f"uint{array.dtype.itemsize * 8}"))
    position, stride = jnp.zeros(array.shape, jnp.uint32), 1
    for axis in reversed(range(array.ndim)):
        along = jax.lax.broadcasted_iota(jnp.uint32, array.shape, axis)
        position, stride = position + along * np.uint32(stride), stride * array.shape[axis] % 2**32
    return (words.astype(jnp.uint32) * (2 * position + 1)).sum(dtype=jnp.uint32)


def of_host(array: Shaped[np.ndarray, "..."], num_kept: int = 0) -> Integer[np.ndarray, "..."]:
    """CRC-32 of an array on the host, for each index of the first num_kept axes."""
    kept = array.shape[:num_kept]
    found = [
        zlib.crc32(np.ascontiguousarray(array[index]).reshape(-1).view(np.uint8))
        for index in np.ndindex(kept)
    ]
    return np.array(found, np.int64).reshape(kept)


def of_parts(arrays: Sequence[jax.Array], mesh: Mesh) -> Integer[np.ndarray, "D N"]:
    """The digest of what each device of this process holds of each array.

    So a copy that one device alone has is looked at, too. Arrays on CPUs are read where they are,
    because to compile a program for them would take longer than that.
    """
    if mesh.devices.flat[0].platform != "cpu":
        return _of_parts_on_devices(arrays, mesh)
    parts = [[of_host(np.asarray(shard.data)) for shard in a.addressable_shards] for a in arrays]
    return np.array(parts).T


def _of_parts_on_devices(arrays: Sequence[jax.Array], mesh: Mesh) -> Integer[np.ndarray, "D N"]:
    program = _program(mesh, tuple(array.sharding.spec for array in arrays))
    found = program(tuple(arrays))
    return np.concatenate([np.asarray(shard.data) for shard in found.addressable_shards])


@functools.cache
def _program(mesh: Mesh, specs: tuple[PartitionSpec, ...]) -> Callable[..., jax.Array]:
    """Arrays of these shardings → the digests [D, N] of their parts, each on its own device."""
    return jax.jit(
        jax.shard_map(
            lambda parts: jnp.stack([of(part) for part in parts])[None],
            mesh=mesh,
            in_specs=(specs,),
            out_specs=PartitionSpec(mesh.axis_names),
            check_vma=False,
        )
    )
