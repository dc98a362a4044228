"""How the adapters of a Flax Linen model are split over a mesh: as the weights they belong to."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
from flax import linen as nn
from flax import traverse_util

from lora_jax.layers import placement
from lora_jax.lora.linen import weights
from lora_jax.lora.linen.sites import Params, Path, Site

Boxes = Mapping[Path, nn.Partitioned]


def boxes(params: Params) -> Boxes:
    """{path: box} of the parameters that have names of their axes (nn.with_partitioning)."""
    flat = traverse_util.flatten_dict(params)
    return {path: box for path, box in flat.items() if isinstance(box, nn.Partitioned)}


def params(
    site: Site, base: weights.Flat, boxes: Boxes, A: jax.Array, B: jax.Array
) -> tuple[Any, Any]:
    """A [*lead, K, R] has the weight's input axis, and B [*lead, R, N] its output axis."""
    num_lead = len(site.lead)
    lead = range(num_lead)
    return (
        _param(site, base, boxes, A, (*lead, num_lead, None)),
        _param(site, base, boxes, B, (*lead, None, num_lead + 1)),
    )


def magnitude(site: Site, base: weights.Flat, boxes: Boxes, array: jax.Array) -> Any:
    """m [*lead, N] has the output axis."""
    num_lead = len(site.lead)
    return _param(site, base, boxes, array, (*range(num_lead), num_lead + 1))


def _param(site, base, boxes, array, which: Sequence[int | None]) -> Any:
    """The array, placed as the axes `which` of the weight's matrix; boxed if the weight was."""
    weight = (*site.path, site.weight)
    if weight in base:
        sharding = placement.of_matrix(site.linear_map, site.out_of_params(base[weight]))
    else:
        packed = base[(*site.path, weights.PACKED, "q")]
        sharding = placement.sharding_of(site.out_of_params(packed))
    if sharding is not None:
        array = placement.placed(array, placement.fitting(sharding, array.shape, which))
    if (box := boxes.get(weight)) is None:
        return array
    names = [*(None,) * (box.value.ndim - len(box.names)), *box.names]
    if site.axis:
        names.insert(0, names.pop(site.axis))
    names = site.linear_map.matrix_axes(names)
    return box.replace(value=array, names=tuple(None if i is None else names[i] for i in which))
