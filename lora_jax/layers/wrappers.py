"""Flax NNX modules that change the weights of the layer in them, before each call of it."""

from flax import nnx


def scaled(model: nnx.Module) -> dict[int, str]:
    """{id of a module: why not} of the modules whose weights are not to be packed or adapted.

    The wrapper would scale such a weight without its adapter; after a merge it scales their sum.
    """
    return {
        id(inner): f"is in a {type(outer).__name__}, which scales its weight"
        for _, outer in nnx.iter_graph(model)
        if isinstance(outer, nnx.WeightNorm | nnx.SpectralNorm)
        for _, inner in nnx.iter_graph(outer.layer_instance)
    }
