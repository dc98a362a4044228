"""Flax NNX models without arrays, as nnx.eval_shape makes them."""

import jax
from flax import nnx

from lora_jax import errors


def refuse(model: nnx.Module) -> None:
    """Raises: UserError if the parameters of the model are shapes and not arrays."""
    params = jax.tree.leaves(nnx.state(model, nnx.Param))
    if num_shapes := sum(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in params):
        raise errors.UserError(
            expected="a model with arrays",
            found=f"{num_shapes} parameters of which only the shapes are there",
            where=type(model).__name__,
            do="nnx.eval_shape of a function that makes the model, quantizes and adapts it",
        )
