"""A layer with a low-rank adapter: y = layer(x) + scaling · (x A) B, in a Flax NNX model."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Num

from lora_jax.layers import projections, registry
from lora_jax.lora import algebra
from lora_jax.lora import site as lora_site
from lora_jax.lora.nnx import sites
from lora_jax.lora.nnx.model_state import LoRAParam
from lora_jax.quant import linear as quant_linear


class LoRALayer(nnx.Module):
    """y = layer(x) + scaling · (dropout(x) A) B: a second class that an adapted layer gets.

    The layer keeps its own class, and its attributes and parameters stay where they are.
    lora_A [K, R] and lora_B [R, N] (of an embedding lora_embedding_A and _B) have leading axes
    [L, …] in a stacked module; see linear_map.py for K and N. They are float32; the products take
    x's dtype and accumulate in float32. lora_ranks holds the rank of each layer, 0 for none. A, B
    and their gradients are zero beyond it. With a lora_magnitude_vector [N] this is DoRA, see
    algebra.py. Source: Hu et al. 2021, https://arxiv.org/abs/2106.09685, eq. 3.
    """

    # Only some adapters have these.
    lora_mask = lora_magnitude_vector = lora_square = lora_dropout_key = None
    lora_initial_A = lora_initial_B = None
    lora_members = 0  # see `per_member`

    def __call__(self, x: Num[Array, "..."], *args: Any, **kwargs: Any) -> Num[Array, "..."]:
        return self._adapted(x, super().__call__(x, *args, **kwargs))

    def with_product(self, x: Float[Array, "..."], product: Float[Array, "..."]) -> jax.Array:
        """The same output, from x · W that was computed already."""
        return self._adapted(x, projections.with_bias(self, product))

    def _adapted(self, x, y):
        dropped, bias = None, getattr(self, "bias", None)
        if self.lora_dropout and not self.deterministic:
            dropped = lora_site.dropped(self.lora_dropout_key[...], self.lora_dropout, x)
        how, packed = registry.linear_map_of(self), quant_linear.packed_of(self)

        def output(x, y, dropped, factors):
            return algebra.output(
                how,
                sites.weight_shape(self),
                x,
                y,
                factors,
                dropped=x if dropped is None else dropped,
                weight=packed.product if packed else how.matrix(registry.weight_of(self)[...]),
                square=self.lora_square[...] if self.lora_square is not None else None,
                bias=None if bias is None else bias[...],
            )

        return per_member(output, self.lora_members, (x, y, dropped), arrays(self))


class LoRAEmbedding(LoRALayer):
    """An adapted embedding. Where it is also the output, it computes with the same weight there."""

    def attend(self, query: Float[Array, "*B N"], *args: Any, **kwargs: Any) -> jax.Array:
        """query · (W + scaling · A B)ᵀ, as after a merge."""
        plain, weight = super().attend, registry.weight_of(self)[...]

        def output(query, factors):
            def attend(query):
                return plain(query, *args, **kwargs)

            return algebra.attended(attend, weight, query, factors)

        return per_member(output, self.lora_members, (query,), arrays(self))


def per_member(function: Callable, num_members: int, rows: Sequence[Any], own: Any) -> Any:
    """function(*rows, own), for the rows of each member of a sweep with its own arrays.

    Several adapters are trained on one base: a batch has S · B rows, those of the first adapter
    first. The base's layers take all rows at once. Only the adapters, whose arrays have an axis
    [S, …], are computed one by one.
    num_members: S; 0 for a single adapter, whose arrays lack that axis.
    """
    if not num_members:
        return function(*rows, own)

    def split(array):
        return array.reshape(num_members, -1, *array.shape[1:])

    found = jax.vmap(function)(*jax.tree.map(split, tuple(rows)), own)
    return jax.tree.map(lambda array: array.reshape(-1, *array.shape[2:]), found)


def names_of_factors(layer: nnx.Module) -> tuple[str, str]:
    """The attributes that hold A and B."""
    if isinstance(layer, nnx.Embed):
        return "lora_embedding_A", "lora_embedding_B"
    return "lora_A", "lora_B"


def factors(layer: LoRALayer) -> tuple[LoRAParam, LoRAParam]:
    """A and B."""
    A, B = (getattr(layer, name) for name in names_of_factors(layer))
    return A, B


def arrays(layer: LoRALayer) -> tuple[jax.Array | np.ndarray, ...]:
    """A, B (zero where it is masked), the scaling, and with DoRA the magnitude."""
    A, B = (part[...] for part in factors(layer))
    if layer.lora_mask is not None:
        B = B * layer.lora_mask[...]
    magnitude = layer.lora_magnitude_vector
    return (A, B, layer.lora_scaling[...], *([] if magnitude is None else [magnitude[...]]))


def adapted(model: nnx.Module) -> list[sites.Site]:
    """The sites of the model that have an adapter."""
    return [site for site in sites.find(model) if isinstance(site.module, LoRALayer)]


def adapters(model: nnx.Module) -> dict[str, tuple[sites.Site, int]]:
    """{dotted path of each adapted layer: (its site, its index among the site's names)}."""
    return {
        name: (site, index)
        for site in adapted(model)
        for index, name in enumerate(site.names)
        if site.module.lora_ranks[index]
    }
