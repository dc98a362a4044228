"""Boxes around parameters, such as flax.linen.Partitioned: taken off and put back."""

from collections.abc import Mapping
from typing import Any

import jax
from flax import core, traverse_util
from flax import linen as nn

from lora_jax.layers import linear_map
from lora_jax.lora.linen.sites import Site
from lora_jax.lora.linen.tracing import Path


def of(tree: Mapping[str, Any]) -> dict[Path, Any]:
    """{path: box} of the parameters of a tree that are in boxes."""
    flat = traverse_util.flatten_dict(core.unfreeze(tree))
    return {path: leaf for path, leaf in flat.items() if isinstance(leaf, nn.meta.AxisMetadata)}


def nested(flat: Mapping[Path, Any], boxes: Mapping[Path, Any], like: Any) -> Mapping[str, Any]:
    """The tree of a flat one, in boxes, a FrozenDict with the empty modules of `like`."""
    own = {path: boxes[path].replace_boxed(array) if path in boxes else array
           for path, array in flat.items()}  # fmt: skip
    whole = traverse_util.flatten_dict(core.unfreeze(like), keep_empty_nodes=True)
    own |= {path: leaf for path, leaf in whole.items() if leaf is traverse_util.empty_node}
    tree = traverse_util.unflatten_dict(own)
    return core.freeze(tree) if isinstance(like, core.FrozenDict) else tree


def beside(site: Site, box: Any, array: jax.Array, ends: str) -> Any:
    """A box for an array beside the site's weight, by the names of the weight's axes.

    ends: the axes of `array` after those of the stack: "K" and "N" have a name, "." has none. No
    box if that of the weight has no names.
    """
    if not isinstance(box, nn.Partitioned):
        return array
    names = [*box.names, *[None] * len(site.shape + site.stack)]
    stack = [names[axis] for axis in site.axes]
    inner = [name for axis, name in enumerate(names) if axis not in site.axes]
    how, before = site.linear_map, len(site.shape) - site.linear_map.ndim
    if isinstance(how, linear_map.Einsum):
        own = dict(zip(how.w, inner[before:], strict=False))
        batch, k, n = [own[axis] for axis in how.batch], own[how.inputs[0]], own[how.outputs[0]]
    else:
        batch, k, n = [], inner[before], inner[before + how.ndim - 1]
    known = {"K": k, "N": n}
    named = *stack, *inner[:before], *batch, *(known.get(axis) for axis in ends)
    return box.replace(value=array, names=named)
