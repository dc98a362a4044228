"""New dropout masks for the adapters of a Flax NNX model; `site.dropped` draws them."""

import zlib
from typing import Any

import jax
from jaxtyping import Array, Int, Integer, PRNGKeyArray


def reseed(state: Any, key: PRNGKeyArray, rows: Int[Array, " B"] | None = None) -> Any:
    """`state` with masks that depend on `key` and on each layer's path.

    state: the model's DropoutKeys, also as a pure dict.
    rows: the numbers of the batch's rows. Each row then has its own mask, which also depends on
    its number, so it does not depend on how rows are divided among micro-batches and devices.
    """

    def new(path, data):
        # Without a Variable's own step in the path, a state and a pure dict have the same masks.
        parts = (part for part in path if not isinstance(part, jax.tree_util.GetAttrKey))
        name = "/".join(str(getattr(part, "key", part)) for part in parts)
        own = jax.random.fold_in(key, zlib.crc32(name.encode()))
        lead = data.shape[:-1]
        keys = jax.random.split(own, lead) if lead else own
        if rows is not None:
            of_rows = jax.vmap(jax.random.fold_in, (None, 0))
            for _ in lead:
                of_rows = jax.vmap(of_rows, (0, None))
            keys = of_rows(keys, rows)
        return jax.random.key_data(keys)

    return jax.tree_util.tree_map_with_path(new, state)


def reseed_by(state: Any, number: Integer[Array, ""]) -> Any:
    """`state`, the model's DropoutKeys, with different masks for each number."""

    def new(data):
        keys = jax.random.wrap_key_data(data)
        of_all = jax.vmap(jax.random.fold_in, (0, None))(keys.reshape(-1), number)
        return jax.random.key_data(of_all.reshape(keys.shape))

    return jax.tree.map(new, state)
