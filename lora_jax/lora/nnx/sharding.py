"""How the adapters of a Flax NNX model are split over a mesh: as the weights they belong to."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from lora_jax.layers import placement
from lora_jax.lora.nnx import sites
from lora_jax.lora.nnx.model_state import LoRAParam
from lora_jax.quant import linear as quant_linear


def params(
    site: sites.Site, A: jax.Array, *more: jax.Array, kind: type[nnx.Variable] = LoRAParam
) -> tuple[nnx.Variable, ...]:
    """A [*lead, K, R] has the weight's input axis, and B [*lead, R, N] its output axis.

    more: B, and others of its axes.
    """
    num_lead = len(site.lead)
    lead = range(num_lead)
    split = (_param(site, array, (*lead, None, num_lead + 1), kind) for array in more)
    return _param(site, A, (*lead, num_lead, None), kind), *split


def outputs(site: sites.Site, array: jax.Array) -> LoRAParam:
    """A magnitude or a bias [*lead, N] has the output axis."""
    num_lead = len(site.lead)
    return _param(site, array, (*range(num_lead), num_lead + 1), LoRAParam)


def whole(site: sites.Site, array: jax.Array) -> LoRAParam:
    """A parameter that every device has whole."""
    return _param(site, array, (None,) * array.ndim, LoRAParam)


def _param(
    site: sites.Site, array: jax.Array, which: Sequence[int | None], kind: type[nnx.Variable]
) -> Any:
    """A parameter whose axes are the axes `which` of the weight's matrix [*lead, K, N].

    It has their mesh axes if the weight is on a mesh, and their names in Flax's metadata.
    """
    if packed := quant_linear.packed_of(site.module):
        sharding, metadata = placement.sharding_of(packed.q[...]), placement.metadata(packed.q)
    else:
        how, weight, axis = site.linear_map, site.weight, site.axis

        def turned(names):
            return how.matrix_axes((names[axis], *names[:axis], *names[axis + 1 :]))

        sharding = placement.of_matrix(how, _moved(weight[...], axis, 0))
        metadata = placement.metadata(weight, turned)
    if sharding is not None:
        array = placement.placed(array, placement.fitting(sharding, array.shape, which))
    if metadata:
        names = [None if i is None else metadata["out_sharding"][i] for i in which]
        names.insert(site.axis, names.pop(0))
        metadata["out_sharding"] = tuple(names)
    return kind(_moved(array, 0, site.axis), **metadata)


def _moved(array: jax.Array, source: int, target: int) -> jax.Array:
    """jnp.moveaxis, which also copies an array whose axes stay where they are."""
    return array if source == target else jnp.moveaxis(array, source, target)
