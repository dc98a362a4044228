"""Random models and weights, made on the device in their packed form: they are never dense."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from lora_jax.kernels import packed as packing
from lora_jax.lora.nnx import model_state
from lora_jax.planning import job as jobs
from lora_jax.quant import formats

_SMALL = 1 << 20  # entries, up to which the host draws them: compiling a program takes longer


def model(job: jobs.Job, mesh: Mesh) -> tuple[nnx.GraphDef, Any, model_state.Frozen]:
    """(graphdef, lora, frozen) that a run of the job would load, with random values."""
    graphdef, trained, frozen, _ = jobs.model_parts(job, mesh)
    trained, frozen = arrays(jobs.shapes((trained, frozen), mesh))
    return graphdef, trained, frozen


def stack(fmt: str, layers: int, k: int, n: int) -> packing.Packed:
    """Weights [layers, k, n] in a format."""
    each = functools.partial(formats.quantize, fmt=fmt)
    dense = jax.ShapeDtypeStruct((layers, k, n), jnp.bfloat16)
    return arrays(jax.eval_shape(lambda weights: jax.lax.map(each, weights), dense))


def arrays(tree: Any) -> Any:
    """Arrays of the shapes in `tree`, drawn according to their names.

    The largest first, so that the memory that drawing takes is not added to that of all others.
    """
    flat, structure = jax.tree_util.tree_flatten_with_path(tree)
    leaves: list[Any] = [None] * len(flat)
    for index in sorted(range(len(flat)), key=lambda index: -flat[index][1].size):
        path, leaf = flat[index]
        name = str(getattr(path[-1], "key", getattr(path[-1], "name", "")))
        if leaf.size > _SMALL:
            made = _drawn(jax.random.key(index, impl="rbg"), name, leaf.shape, leaf.dtype)
        else:
            made = _on_host(index, name, leaf.shape, leaf.dtype)
        # Waits, so that drawing takes the memory of one array at a time.
        leaves[index] = jax.block_until_ready(jax.device_put(made, leaf.sharding))
    return jax.tree.unflatten(structure, leaves)


def _constant(name: str, shape: tuple[int, ...], dtype: Any) -> Any:
    """The values that are not drawn; None for all others."""
    if name == "layer":
        return jnp.arange(shape[0], dtype=dtype)
    if name in ("weight", "scaling"):
        return jnp.ones(shape, dtype)
    if name == "column_scale":  # codes of ±8 times scales of ±127: weights of about 0.02
        return jnp.full(shape, 6e-5, dtype)
    return None


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def _drawn(key, name, shape, dtype):
    if (constant := _constant(name, shape, dtype)) is not None:
        return constant
    if jnp.issubdtype(dtype, jnp.unsignedinteger):  # codes, and scales of nested scales
        return jax.random.bits(key, shape, dtype)
    if dtype == jnp.int8:
        return jax.lax.bitcast_convert_type(jax.random.bits(key, shape, jnp.uint8), dtype)
    return 0.02 * jax.random.normal(key, shape, dtype)


def _on_host(seed, name, shape, dtype):
    if (constant := _constant(name, shape, dtype)) is not None:
        return constant
    rng = np.random.default_rng(seed)
    if jnp.issubdtype(dtype, jnp.integer):
        limits = jnp.iinfo(dtype)
        return rng.integers(limits.min, limits.max, shape, dtype, endpoint=True)
    return jnp.asarray(0.02 * rng.standard_normal(shape, np.float32), dtype)
