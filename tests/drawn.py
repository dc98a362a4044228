"""Flax Linen variables drawn by numpy; initializers take longer to compile than small models."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn


def variables(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Variables of the shapes of module.init(key, *args, **kwargs); a `bias` is 0, a `scale` 1."""
    rngs = {name: jax.random.key(0) for name in ("params", "dropout")}
    shapes = jax.eval_shape(lambda: module.init(rngs, *args, **kwargs))
    rng = np.random.default_rng(0)

    def draw(path, leaf):
        fixed = {"bias": 0, "scale": 1}.get(path[-1].key if hasattr(path[-1], "key") else "")
        values = rng.normal(0, 0.4, leaf.shape) if fixed is None else np.full(leaf.shape, fixed)
        return jnp.asarray(np.float32(values))

    return jax.tree_util.tree_map_with_path(draw, shapes)
