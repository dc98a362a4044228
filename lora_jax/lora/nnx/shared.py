"""Weights of a Flax NNX model that are in two places, where an adapter would be in one of them."""

import collections
from collections.abc import Iterable

from flax import nnx

from lora_jax import errors
from lora_jax.layers import registry
from lora_jax.lora.nnx import saved, sites
from lora_jax.quant import linear as quant_linear


def refuse(model: nnx.Module, adapted: Iterable[sites.Site], wholes: Iterable[saved.Saved]) -> None:
    """Raises: UserError if a weight that would be adapted or trained is in a second place, too.

    One layer that is used twice has one place.
    """
    places = collections.defaultdict(list)
    for path, node in nnx.iter_graph(model):
        impl = None if isinstance(node, nnx.Variable) else nnx.graph.get_node_impl(node)
        for name, value in impl.node_dict(node).items() if impl else ():
            if isinstance(value, nnx.Variable):
                places[id(value)].append(sites.dotted((*path, name)))
    changed = [registry.weight_of(site.module) for site in adapted
               if not quant_linear.packed_of(site.module)]  # fmt: skip
    changed += [part for whole in wholes for _, part in nnx.iter_graph(whole.module)
                if isinstance(part, nnx.Param)]  # fmt: skip
    found = {id(weight): places[id(weight)] for weight in changed if len(places[id(weight)]) > 1}
    if found:
        raise errors.UserError(
            expected="adapters on weights that are in one place of the model",
            found=[" is the same nnx.Param as ".join(sorted(each)) for each in found.values()],
            do="adapt other layers, or give each place a weight of its own, such as "
            "b.kernel = nnx.Param(a.kernel[...])",
        )
