"""Flax NNX modules whose weights are changed by something else, before each call or each read."""

from flax import nnx


def scaled(model: nnx.Module) -> dict[int, str]:
    """{id of a module: why not} of the modules whose weights are not to be packed or adapted.

    A wrapper would scale such a weight without its adapter; after a merge it scales their sum. So
    would a variable that returns something else than its value.
    """
    nodes = [node for _, node in nnx.iter_graph(model) if isinstance(node, nnx.Pytree)]
    wrapped = {
        id(inner): f"is in a {type(outer).__name__}, which scales its weight"
        for outer in nodes
        if isinstance(outer, nnx.WeightNorm | nnx.SpectralNorm)
        for _, inner in nnx.iter_graph(outer.layer_instance)
    }
    changing = {
        id(node): f"has a {type(part).__name__} that changes its value when it is read"
        for node in nodes
        for part in vars(node).values()
        if isinstance(part, nnx.Param)
        if type(part).get_value is not nnx.Param.get_value
        or part.get_metadata().get("on_get_value")
    }
    return wrapped | changing
