"""Single rows of an embedding, or of a head, that are trained: PEFT's trainable_token_indices."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jaxtyping import Array, Float, Int

from lora_jax import errors
from lora_jax.kernels import explicit, matmul, partitioning
from lora_jax.layers import mixin, places, registry, weight
from lora_jax.lora import config as lora_config
from lora_jax.lora import token_indices
from lora_jax.lora.nnx import layer as lora_layer
from lora_jax.lora.nnx import sharding, sites
from lora_jax.quant import linear as quant_linear


class TokenLayer(mixin.Mixin):
    """A layer that computes with rows of its own for some tokens: a second class that it gets.

    trainable_tokens_delta [n, D], float32: not differences, but the rows themselves, in the order
    of token_indices; they are rounded to the dtype of the layer's weight. The weight does not
    change, for others that use it.
    """

    lora_members = 0  # see layer.per_member
    token_indices: tuple[int, ...]

    @classmethod
    def mixin_attributes(cls, original: type[nnx.Module]) -> dict[str, Any]:
        name = registry.registration_of(original).weight
        return {name: weight.attribute(name, _changed_weight)}

    def _rows(self) -> Float[Array | np.ndarray, "*S n D"]:
        return self.trainable_tokens_delta[...]

    def _replaced(self, replace: Callable, y: jax.Array, x: jax.Array) -> jax.Array:
        """replace(y, x, rows): an output y of the layer, which was computed from x."""

        def computed(x, y, rows):
            rows = rows.astype(registry.weight_of(self).dtype)
            return explicit.like(y, replace, y, x, rows)

        return lora_layer.per_member(computed, self.lora_members, (x, y), self._rows())

    def _with_outputs(self, y: Float[Array, "*B V"], x: Float[Array, "*B D"]) -> jax.Array:
        """y = x · Wᵀ with the outputs of the trained tokens."""

        def replace(y, x, rows):
            wide = x.astype(jnp.promote_types(x.dtype, rows.dtype))
            return _with_columns(y, self.token_indices, matmul.matmul(wide, rows.T, y.dtype))

        return self._replaced(replace, y, x)


def _with_columns(
    y: Float[Array, "*B V"], columns: Sequence[int], own: Float[Array, "*B n"]
) -> Float[Array, "*B V"]:
    """y with these columns in place of its own."""
    if partitioning.num_devices() == 1:
        return y.at[..., np.array(columns)].set(own)
    # Where V is sharded, XLA's partitioner aborts at the derivative of that, a gather, within a
    # shard_map over some of a mesh's axes (jaxlib 0.10.2).
    each = lax.broadcasted_iota(jnp.int32, (len(columns), y.shape[-1]), 1)
    at = each == np.expand_dims(columns, 1)
    spread = jnp.matmul(own, at.astype(own.dtype), precision="highest")
    return jnp.where(jnp.expand_dims(at.any(axis=0), range(y.ndim - 1)), spread, y)


class TokenEmbedding(TokenLayer):
    """y = W[ids], with the trained rows in place of those of W."""

    def __call__(self, ids: Int[Array, "*B"], *args: Any, **kwargs: Any) -> jax.Array:
        def replace(y, ids, rows):
            hits = ids[..., None] == np.expand_dims(self.token_indices, tuple(range(ids.ndim)))
            # A product and no lookup: its derivative sums in one order on every device.
            own = jnp.matmul(hits.astype(y.dtype), rows.astype(y.dtype), precision="highest")
            return jnp.where(hits.any(axis=-1, keepdims=True), own, y)

        with weight.as_stored(self):
            y = super().__call__(ids, *args, **kwargs)
        return self._replaced(replace, y, ids)

    def attend(self, query: Float[Array, "*B D"], *args: Any, **kwargs: Any) -> jax.Array:
        """query · Wᵀ, with the trained rows in place of those of W."""
        with weight.as_stored(self):
            y = super().attend(query, *args, **kwargs)
        return self._with_outputs(y, query)


class TokenHead(TokenLayer):
    """y = x · W, with the trained rows in place of those columns of W."""

    def __call__(self, x: Float[Array, "*B D"], *args: Any, **kwargs: Any) -> jax.Array:
        with weight.as_stored(self):
            y = super().__call__(x, *args, **kwargs)
        return self._with_outputs(y, x)


def _changed_weight(layer: TokenLayer) -> weight.Computed:
    stored = registry.weight_of(layer)

    def compute():
        if layer.lora_members:
            raise errors.UserError(
                expected="layers with trained tokens that are only called, for a sweep",
                found=f"a {mixin.original(layer).__name__} whose weight is read",
                do="train one adapter, or leave trainable_token_indices out",
            )
        put = _FUNCTIONS[isinstance(layer, TokenEmbedding)][1]
        own = np.array(layer.token_indices), layer._rows()
        return explicit.like(stored[...], put, stored[...], *own)

    return weight.Computed(stored.shape, stored.dtype, compute)


def _rows(matrix, at):
    return matrix[at]


def _columns(matrix, at):
    return matrix[:, at].T


def _set_rows(matrix, at, rows):
    return matrix.at[at].set(rows.astype(matrix.dtype))


def _set_columns(matrix, at, rows):
    return matrix.at[:, at].set(rows.astype(matrix.dtype).T)


# {whether of an embedding: how to read its trained tokens' rows, and how to set them}
_FUNCTIONS = {True: (_rows, _set_rows), False: (_columns, _set_columns)}


class Tokens(NamedTuple):
    """A layer that is or becomes a TokenLayer, and the ids of its trained tokens."""

    site: sites.Site
    ids: tuple[int, ...]

    @property
    def path(self) -> tuple[str | int, ...]:
        return self.site.path

    @property
    def extent(self) -> str:
        """What of the layer is trained."""
        return f"{len(self.ids)} tokens"

    @property
    def depths(self) -> tuple[int, ...]:
        """That it is in no stack, see Saved."""
        return ()

    @property
    def names(self) -> tuple[str, ...]:
        """The path of the layer, see Saved."""
        return (places.dotted(self.site.path),)

    def begin(self, given: Mapping[str, np.ndarray] | None = None) -> None:
        """Makes the layer a TokenLayer; its rows are those `given`, or those of its weight."""
        is_embedding = self.site.kind == "embedding"
        if given is None:
            rows = self.site.each(_FUNCTIONS[is_embedding][0], jnp.array(self.ids))
        else:
            rows = given[self._name]
        layer = self.site.begin(TokenEmbedding if is_embedding else TokenHead)
        layer.token_indices = self.ids
        rows = jnp.asarray(rows, jnp.float32)
        layer.trainable_tokens_delta = sharding.whole(self.site, rows)

    def end(self) -> None:
        """Makes the layer what it was before."""
        added = "trainable_tokens_delta", "token_indices"
        self.site.end(TokenLayer, *added)

    def merge(self, where: places.Places) -> None:
        """The same as `end`, but the layer's weight gets the trained rows. where: see Saved."""
        put = _FUNCTIONS[self.site.kind == "embedding"][1]
        rows = self.site.module._rows()
        self.site.set_matrix(self.site.each(put, jnp.array(self.ids), rows))
        self.end()

    def shapes(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """(name, shape) of the rows in PEFT's file."""
        site = self.site
        width = site.out_features if site.kind == "embedding" else site.in_features
        yield self._name, (len(self.ids), width)

    def files(self) -> Iterator[tuple[str, np.ndarray]]:
        """(name, rows) in PEFT's file; float32, as A and B."""
        yield self._name, np.asarray(self.site.module._rows())

    @property
    def _name(self) -> str:
        return token_indices.tensor(places.dotted(self.site.path))


def find(found: Sequence[sites.Site]) -> list[Tokens]:
    """The layers with trained tokens among the sites of a model."""
    return [Tokens(site, site.module.token_indices) for site in found
            if isinstance(site.module, TokenLayer)]  # fmt: skip


def choose(found: Sequence[sites.Site], config: lora_config.LoRAConfig) -> list[Tokens]:
    """The layers of which `config` trains single tokens, among the sites of a model.

    Raises: UserError if a name matches nothing or no embedding or head, for tokens that are not
    there, and for layers that are trained in another way, too.
    """
    if not config.trainable_token_indices:
        return []
    embeddings = {places.dotted(site.path) for site in found if isinstance(site.module, nnx.Embed)}
    default = token_indices.DEFAULT
    if len(embeddings) == 1:
        (default,) = embeddings
    taken, problems = [], []
    for end, ids in token_indices.named(config, default).items():
        own = [site for site in found if places.dotted(site.path).endswith(end)]
        problems += [] if own else [f"{end} matches nothing"]
        for site in own:
            path = places.dotted(site.path)
            token_indices.check({path: site.kind}, config, "the LoRA settings")
            why = [f"{path} {why}" for why in _problems(site, ids)]
            why += [f"{path} by two names" for other in taken if other.path == site.path]
            taken += [] if why else [Tokens(site, ids)]
            problems += why
    if problems:
        raise errors.UserError(
            expected="trainable_token_indices of embeddings or heads of the model, which have "
            "these tokens",
            found=problems,
            where=f"embeddings that exist: {', '.join(sorted(embeddings)) or 'none'}",
            do="take the ids from the model's tokenizer; name an embedding, as in "
            "trainable_token_indices: {embed_tokens: [5, 7]}",
        )
    return taken


def _problems(site: sites.Site, ids: token_indices.Ids) -> Iterator[str]:
    """Why single tokens of the layer cannot be trained, in words that continue its path."""
    if site.problem:
        yield site.problem
    elif quant_linear.packed_of(site.module):
        yield "is quantized"
    elif not isinstance(site.module, nnx.Embed | nnx.Linear):
        yield f"is a {type(site.module).__name__}"
    elif site.lead:
        yield "is a stack of layers"
    elif site.kind != "embedding" and registry.bias_of(site.module) is not None:
        yield "has a bias"
    else:
        size = site.in_features if site.kind == "embedding" else site.out_features
        beyond = [repr(token) for token in ids if isinstance(token, str) or token >= size]
        if beyond:
            yield f"has the tokens 0 to {size - 1}, and not {', '.join(beyond)}"
