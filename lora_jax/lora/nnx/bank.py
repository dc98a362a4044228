"""Many adapters side by side on the layers of an NNX model, with a weight of each for every row.

For a row with weights w [X] of X slots of rank R: y + ((x A) · w) B + (Σ w v) · (y − bias), where
A [K, X·R] and B [X·R, N] hold the slots side by side, and each w counts for R columns of A. These
are two dense products whatever the rows ask for. B contains the scaling. With DoRA v is
m / ‖W + s A B‖ − 1 and B contains m / ‖W + s A B‖; v is zero without it. So the sum of weighted
adapters is that of their ΔW, also with DoRA, where lora.adapter.combined has none. The base is
weight 0. An adapter of a rank above R takes several slots, of which only the first has its v.

Source of the sharding: Sheng et al. 2023 (S-LoRA), https://arxiv.org/abs/2311.03285, §6.
"""

import contextlib
import contextvars
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jaxtyping import Array, Float, Int, Num

from lora_jax import errors
from lora_jax.kernels import choice, explicit, low_rank, matmul, partitioning
from lora_jax.layers import linear_map, mixin, projections, registry, stack
from lora_jax.lora import config as lora_config
from lora_jax.lora import site as lora_site
from lora_jax.lora.nnx import adapted, sharding, sites
from lora_jax.quant import linear as quant_linear

NAMES = ("bank_A", "bank_B", "bank_stretch")

_WEIGHTS: contextvars.ContextVar[jax.Array | None] = contextvars.ContextVar("weights", default=None)


class BankParam(stack.WholeOnGPU):
    """What a bank holds of all slots: A [L, K, X·R], B [L, X·R, N] or v [L, X, N]."""


class BankLayer(mixin.Mixin):
    """The layer with the adapters of a bank: a second class that it gets, see `add`.

    It computes the base out of the context `mixture`. bank_A and bank_B are in the dtype that the
    layer computes in, and their products accumulate in float32; bank_stretch is in float32.
    """

    def __call__(self, *args: Any, **kwargs: Any) -> Num[Array, "..."]:
        y = super().__call__(*args, **kwargs)
        return self._adapted(registry.input_of(self, args, kwargs), y)

    def with_product(self, x: Float[Array, "..."], product: Float[Array, "..."]) -> jax.Array:
        """The same output, from x · W that was computed already."""
        return self._adapted(x, projections.with_bias(self, product))

    def _adapted(self, x, y):
        weights = _WEIGHTS.get()
        if weights is None:
            return y
        if len(weights) != len(x) or weights.shape[1:] != (self.bank_stretch.shape[-2],):
            raise ValueError(
                f"expected weights {len(x), self.bank_stretch.shape[-2]}, a row for each row of "
                f"the input; found {weights.shape}"
            )
        how = registry.linear_map_of(self)
        is_embedding = isinstance(how, linear_map.Embedding)
        arrays = [getattr(self, name)[...] for name in NAMES]
        layer = stack.here() if arrays[0].ndim == 3 else None
        partition = partition_of(self)

        def output(x, y, weights, A, B, stretch, bias, layer):
            if not is_embedding:
                x = x.astype(jnp.promote_types(x.dtype, y.dtype))  # as the layer itself did
            if layer is not None:
                rows = x.reshape(-1, x.shape[-1])
                if not is_embedding and low_rank.kernel_of(rows, A, B, partition) != choice.XLA:
                    out = _in_place(rows, y, weights, A, B, stretch, bias, layer, partition)
                    return out.reshape(y.shape)
                A, B, stretch = (
                    lax.dynamic_index_in_dim(a, layer, keepdims=False) for a in (A, B, stretch)
                )
            if is_embedding:
                shrunk = how.take(A, x).astype(jnp.float32)
            else:
                shrunk = matmul.matmul(x, A, jnp.float32)
            weights = jnp.expand_dims(weights, range(1, y.ndim - 1))
            mixed = _mixed(shrunk, weights)
            extra = matmul.matmul(mixed.astype(jnp.result_type(A, y)), B, jnp.float32)
            plain = y.astype(jnp.float32)
            unbiased = plain
            if bias is not None:
                unbiased = plain - jnp.expand_dims(bias.astype(jnp.float32), range(y.ndim - 1))
            stretched = matmul.matmul(weights, stretch) * unbiased
            return (plain + extra + stretched).astype(y.dtype)

        bias = registry.bias_of(self)
        return explicit.like(y, output, x, y, weights, *arrays, bias, layer)


def _mixed(shrunk, weights):
    """(x A) · w [..., X·R], from x A and w [..., X]."""
    each = jnp.repeat(weights, shrunk.shape[-1] // weights.shape[-1], axis=-1)
    # Where it is zero, not even an infinite product of another row's adapter counts.
    return jnp.where(each == 0, 0, shrunk * each)


def _in_place(rows, y, weights, A, B, stretch, bias, layer, partition):
    """The output [M, N] for rows [M, K] of x, from the stacks of all layers."""
    weights = jnp.repeat(weights, len(rows) // len(weights), axis=0)
    mixed = _mixed(low_rank.shrink(rows, A, layer, partition), weights).astype(B.dtype)
    y = y.reshape(len(rows), -1)
    return low_rank.expand(y, mixed, B, weights, stretch, bias, layer, partition)


@contextlib.contextmanager
def mixture(weights: Num[Array | np.ndarray, "B X"]) -> Iterator[None]:
    """In this context each row of a model's input gets the adapters with its weights.

    What counts is where a function is traced: enter it inside of a jitted function, with weights
    that are an argument of it.
    """
    token = _WEIGHTS.set(jnp.asarray(weights, jnp.float32))
    try:
        yield
    finally:
        _WEIGHTS.reset(token)


def add(
    model: nnx.Module, *, slots: int, rank: int, targets: Sequence[str] | str = "all-linear"
) -> tuple[str, ...]:
    """The dotted paths of the layers to which it gives an empty bank.

    targets: as LoRAConfig.targets. All layers of a stack get a bank if one is targeted. On a mesh
    A and B are split as the weights are, the input axis of A and the output axis of B.
    Raises: UserError if a target matches nothing or a layer that cannot have a bank; if the model
    has adapters. The model is then unchanged.
    """
    if slots < 1 or rank < 1:
        raise errors.UserError(
            expected="a bank of at least one slot of rank 1", found=f"{slots} slots of rank {rank}"
        )
    adapted.refuse(model, *find(model))
    found = list(sites.find(model))
    selected = lora_site.select(
        found, lora_config.LoRAConfig(rank=rank, targets=targets), sites.others(model)
    )
    chosen = [site for site, own in zip(found, selected, strict=True) if any(own)]
    if refused := [f"{site.names[0]} {why}" for site in chosen if (why := _refusal(site))]:
        raise errors.UserError(
            expected="layers that multiply by a matrix, or embeddings, for adapters in one batch",
            found=refused,
            do="leave them out of the targets, or merge the adapters that change them",
        )
    for site in chosen:
        _begin(site, slots, rank)
    return tuple(name for site in chosen for name in site.names)


def _refusal(site: sites.Site) -> str:
    if not isinstance(site.linear_map, linear_map.Embedding) and (
        site.linear_map != linear_map.LINEAR or not isinstance(site.module, _LINEAR)
    ):
        return f"is a {type(site.module).__name__}"
    if not registry.is_usual(site.module):
        return "multiplies by functions of its own"
    return f"is stacked on axis {site.axis}" if site.axis else ""


_LINEAR = (nnx.Linear, quant_linear.QuantLinear)


def _begin(site: sites.Site, slots: int, rank: int) -> None:
    module = site.begin(BankLayer)
    lead, k, n = site.lead, site.in_features, site.out_features
    dtype = dtype_of(site)
    shapes = (*lead, k, slots * rank), (*lead, slots * rank, n), (*lead, slots, n)
    arrays = map(jnp.zeros, shapes, (dtype, dtype, jnp.float32))
    params = sharding.params(site, *arrays, kind=BankParam)
    for name, param in zip(NAMES, params, strict=True):
        setattr(module, name, param)
    module.bank_names = site.names


def dtype_of(site: sites.Site) -> jnp.dtype:
    """The dtype in which the layer computes with A and B."""
    packed = quant_linear.packed_of(site.module)
    stored = site.weight.dtype if packed is None else packed.param_dtype
    return jnp.dtype(site.module.dtype or stored)


def partition_of(module: nnx.Module) -> partitioning.Partition:
    """How a mesh splits the product of the layer."""
    return getattr(module, "partition", partitioning.WHOLE)


def find(model: nnx.Module) -> list[sites.Site]:
    """The sites of the model that have a bank."""
    return [site for site in sites.find(model) if isinstance(site.module, BankLayer)]


def size(model: nnx.Module) -> tuple[int, int]:
    """(X slots, rank R) of the model's bank."""
    module = find(model)[0].module
    slots = module.bank_stretch.shape[-2]
    return slots, module.bank_A.shape[-1] // slots


def state(model: nnx.Module) -> dict[str, Any]:
    """The arrays of the bank as a pure dict, which nnx.merge takes for its part of the model."""
    return nnx.to_pure_dict(nnx.state(model, BankParam))


def slot_of(
    where: Sequence[sites.Site], factors: Mapping[tuple, Sequence[np.ndarray]], rank: int
) -> dict[str, Any]:
    """What `write` puts into one slot: a tree as `state`, with zeros where `factors` has nothing.

    factors: {path of a site: (A [L, K, R], B [L, R, N], v [L, 1, N])}.
    """
    flat = {}
    for site in where:
        lead, k, n = site.lead, site.in_features, site.out_features
        arrays = factors.get(site.path)
        if arrays is None:
            dtype = dtype_of(site)
            shapes = (*lead, k, rank), (*lead, rank, n), (*lead, 1, n)
            arrays = [*map(np.zeros, shapes, (dtype, dtype, np.float32))]
        flat |= {(*site.path, name): array for name, array in zip(NAMES, arrays, strict=True)}
    return nnx.traversals.unflatten_mapping(flat)


def writer(state: Any) -> Callable[[Any, Any, Int[Array, ""] | int], Any]:
    """The jitted (state, slot_of(…), slot) → state with that slot written. It reuses the memory.

    One compilation serves all slots and adapters. A slot of zeros clears it.
    """
    split = jax.tree.map(_sharding, state)

    def write(state, new, slot):
        return jax.tree.map(lambda whole, part: _put(whole, part, slot), state, new)

    return jax.jit(write, donate_argnums=0, out_shardings=split)


def _sharding(array: jax.Array) -> Any:
    return array.sharding if array.sharding.num_devices > 1 else None


def _put(whole: jax.Array, part: jax.Array, slot: jax.Array) -> jax.Array:
    """`part` in place of the slot, on the one axis on which the arrays differ."""
    sizes = zip(whole.shape, part.shape, strict=True)
    axis = next((axis for axis, (n, own) in enumerate(sizes) if n != own), 0)

    def put(whole, part, slot):
        start = slot * part.shape[axis] if whole.shape != part.shape else 0
        return lax.dynamic_update_slice_in_dim(whole, part, start, axis)

    return explicit.like(whole, put, whole, part, slot)
