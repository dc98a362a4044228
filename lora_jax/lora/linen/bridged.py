"""The weights of a Flax NNX module in a Linen model, as nnx.bridge.ToLinen holds it."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from flax import linen as nn
from flax import nnx

from lora_jax.layers import linear_map, registry
from lora_jax.lora.linen.tracing import Path


class Weight(NamedTuple):
    """A parameter. how: its layer multiplies by it, None if that is not known. cls: of its owner.

    bias: the name of the parameter that its layer adds.
    """

    cls: str
    how: linear_map.LinearMap | None = None
    bias: str = ""


def is_bridge(layer: nn.Module) -> bool:
    """Whether the layer is a ToLinen of Flax, or one like it, as MaxText has."""
    names = ("nnx_class", "args", "kwargs", "skip_rng")
    return all(name in type(layer).__dataclass_fields__ for name in names)


def weights(layer: nn.Module) -> Mapping[Path, Weight]:
    """The parameters of the NNX module, by their paths in it; none if it cannot be made here."""

    def make():
        rngs = {} if layer.skip_rng else {"rngs": nnx.Rngs(0)}
        return layer.nnx_class(*layer.args, **layer.kwargs, **rngs)

    try:
        model = nnx.eval_shape(make)
    except Exception:  # it needs something of the call, such as a mesh
        return {}
    nodes = dict(nnx.iter_graph(model))
    return {path: _weight(nodes[path[:-1]], path[-1])
            for path, node in nodes.items() if isinstance(node, nnx.Param)
            if path[:-1] in nodes}  # fmt: skip


def _weight(owner: Any, name: str) -> Weight:
    cls = type(owner)
    known = registry.registration_of(cls)
    if known is None or known.weight != name or registry.problem(owner):
        return Weight(cls.__name__)
    return Weight(cls.__name__, registry.linear_map_of(owner), known.bias)
