"""Where an adapter can go in a model of any framework, and the adapter's arrays there."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Num, PRNGKeyArray

from lora_jax.layers import linear_map, placement
from lora_jax.lora import adapter as lora_adapter
from lora_jax.lora import algebra, targets
from lora_jax.lora import config as lora_config

KINDS = {"embedding": "an embedding", "conv": "a convolution"}  # other than linear, in messages
LayerConfigs = Sequence[targets.LayerConfig | None]  # of each layer of a site, None: not adapted


@dataclasses.dataclass(frozen=True, kw_only=True)
class Site:
    """Where an adapter can go: a layer, or a stack of layers that share their arrays.

    names: the dotted path of each layer. lead: the sizes of the stack's axes, which are the first
    axes of the arrays; () for a single layer. in_features, out_features: K and N. problem: why the
    site cannot be adapted, see targets.Layer.
    """

    names: tuple[str, ...]
    lead: tuple[int, ...]
    linear_map: linear_map.LinearMap
    in_features: int
    out_features: int
    problem: str = ""

    @property
    def kind(self) -> str:
        """One of "linear", "embedding" and "conv"."""
        kinds = {linear_map.Embedding: "embedding", linear_map.Conv: "conv"}
        return kinds.get(type(self.linear_map), "linear")

    @property
    def layer(self) -> targets.Layer:
        """What each of its layers is to target selection."""
        kind = "" if self.problem else self.kind
        return targets.Layer(kind, self.in_features, self.out_features, self.problem)

    def stacked(self, each: Sequence[Num[np.ndarray, "..."]]) -> Num[Array, "..."]:
        """The arrays of the layers as one array."""
        whole = np.reshape(np.stack(each), (*self.lead, *each[0].shape))
        return jnp.asarray(whole, whole.dtype)  # without a dtype, jax compiles a program a shape


def each(function: Callable, lead: tuple[int, ...], /, *trees: Any, **settings: Any) -> Any:
    """function(*trees, **settings) for every layer of a stack with those axes, one at a time.

    The first of the trees is the layers' matrix, as which the results are split on a mesh.
    The same function is compiled once for all stacks whose arrays have the same shapes.
    """

    def whole(*trees):
        return _each(function, len(lead), tuple(settings.items()), trees)

    return placement.computed(whole, len(lead), *trees)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _each(function, num_axes, settings, trees):
    def one(own):
        return function(*own, **dict(settings))

    for _ in range(num_axes):
        one = functools.partial(lax.map, one)
    return one(trees)


# ---------------------------------------------------------------------------------- selection


def select(
    sites: Sequence[Site],
    config: lora_config.LoRAConfig,
    others: Mapping[str, targets.Layer] | None = None,
    *,
    strict: bool = True,
) -> list[list[targets.LayerConfig | None]]:
    """For each site, how each of its layers is adapted; None for a layer that is not.

    others: {path: module} of the other modules of the model, which cannot be adapted.
    Raises: UserError as targets.select.
    """
    layers = {name: site.layer for site in sites for name in site.names}
    # A Linen module in a bridge has the path of the bridge, whose class is not registered.
    layers |= {name: other for name, other in (others or {}).items() if name not in layers}
    configs = targets.select(layers, config, strict=strict)
    return [[configs.get(name) for name in site.names] for site in sites]


def misfit(how: linear_map.LinearMap, shape: Sequence[int]) -> str:
    """Why a layer cannot multiply so by a weight of that shape; "" if it can."""
    if len(shape) >= how.ndim:
        return ""
    return f"has a weight of {len(shape)} axes, but multiplies by one of {how.ndim}"


def unregistered(cls: str) -> targets.Layer:
    """A module with parameters whose class is not registered."""
    return targets.Layer("", problem=f"is of class {cls}, which is not registered")


# ---------------------------------------------------------------------------------- arrays


def ranks(configs: LayerConfigs) -> tuple[int, ...]:
    """The rank of each layer, 0 for none."""
    return tuple(own.rank if own else 0 for own in configs)


def scaling(site: Site, configs: LayerConfigs) -> Float[Array, "*lead 1 1"]:
    """The scaling of each layer, 0 for none; it broadcasts to B [*lead, R, N]."""
    each = [np.float32(own.scaling if own else 0).reshape(1, 1) for own in configs]
    return site.stacked([*each])


def mask(site: Site, configs: LayerConfigs) -> Float[Array, "*lead R N"] | None:
    """1 where a row of B and an output belong to the same part of a layer; None: everywhere."""
    if not any(own and own.kept for own in configs):
        return None
    each = np.zeros((len(configs), max(ranks(configs)), site.out_features), np.float32)
    for layer, own in zip(each, configs, strict=True):
        for rows, columns in parts(site.out_features, own) if own else ():
            layer[rows, columns] = 1
    return site.stacked([*each])


def parts(out_features: int, own: targets.LayerConfig) -> list[tuple[slice, slice]]:
    """The rows of B and the outputs of each adapted part of a layer's output."""
    kept = own.kept or ((0, out_features),)
    each = own.rank // len(kept)
    return [(slice(i * each, (i + 1) * each), slice(*columns)) for i, columns in enumerate(kept)]


def zeros(site: Site, configs: LayerConfigs) -> tuple[np.ndarray, np.ndarray]:
    """A and B of zeros for one of the site's layers, of the largest rank in the site."""
    widest = max(ranks(configs))
    A = np.zeros((site.in_features, widest), np.float32)
    return A, np.zeros((widest, site.out_features), np.float32)


def initial(
    site: Site, configs: LayerConfigs, key: PRNGKeyArray
) -> tuple[Float[Array, "*lead K R"], Float[Array, "*lead R N"]]:
    """A and B of a new adapter, as in PEFT; zero beyond the rank of each layer."""
    own, lead = ranks(configs), site.lead
    if site.kind == "embedding":
        A = jnp.zeros((*lead, site.in_features, max(own)))
        return A, _initial_B(key, lead, site.out_features, own)
    B = jnp.zeros((*lead, max(own), site.out_features))
    return _initial_A(key, lead, site.in_features, own), B


# Random numbers take long to compile, so that all layers with inputs of one size share a program.
@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def _initial_A(key, lead, k, ranks):
    A = algebra.initial(key, lead, k, max(ranks))
    return jnp.where(_used(lead, ranks)[..., None, :], A, 0)


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def _initial_B(key, lead, n, ranks):
    B = algebra.initial_of_embedding(key, lead, max(ranks), n)
    return jnp.where(_used(lead, ranks)[..., None], B, 0)


def _used(lead, ranks):
    """Which entries of the rank each layer has: [*lead, R]."""
    return np.arange(max(ranks)) < np.reshape(ranks, lead)[..., None]


def filled(
    site: Site,
    configs: LayerConfigs,
    factors: Mapping[str, lora_adapter.Factors],
    config: lora_config.LoRAConfig,
) -> tuple[jax.Array, jax.Array, jax.Array | None, jax.Array | None]:
    """A, B, the magnitude and the bias of B from `factors`, by the layers' paths.

    The magnitude is None without DoRA, and 1 in a layer that is not adapted. The bias is None
    without lora_bias, and 0 there.
    """
    each = []
    for name, own in zip(site.names, configs, strict=True):
        A, B = zeros(site, configs)
        magnitude, bias = np.ones(site.out_features, np.float32), np.zeros(site.out_features)
        if own:
            A[:, : own.rank], B[: own.rank] = factors[name].A, factors[name].B
            magnitude = factors[name].magnitude if config.use_dora else magnitude
            bias = factors[name].bias if config.lora_bias else bias
        each.append((A, B, magnitude, bias.astype(np.float32)))
    A, B, magnitude, bias = (site.stacked(arrays) for arrays in zip(*each, strict=True))
    return A, B, magnitude if config.use_dora else None, bias if config.lora_bias else None


def collected(
    site: Site,
    index: int,
    rank: int,
    A: jax.Array | np.ndarray,
    B: jax.Array | np.ndarray,
    magnitude: jax.Array | np.ndarray | None = None,
    start: tuple[jax.Array | np.ndarray, jax.Array | np.ndarray] | None = None,
    bias: jax.Array | np.ndarray | None = None,
) -> lora_adapter.Factors:
    """The inverse of `filled`: what a site's arrays hold for its layer with that index.

    start: A₀ and B₀ of PiSSA, which the base lacks. The change of the original base is
    A B − A₀ B₀, which takes twice the rank.
    """
    at = np.unravel_index(index, site.lead)
    A, B = _read(A, at)[:, :rank], _read(B, at)[:rank]
    if start is not None:
        A0, B0 = (_read(part, at) for part in start)
        A, B = np.concatenate([A, A0[:, :rank]], axis=1), np.concatenate([B, -B0[:rank]])
    magnitude, bias = (None if part is None else _read(part, at) for part in (magnitude, bias))
    window = getattr(site.linear_map, "window", ())
    return lora_adapter.Factors(A, B, magnitude, site.kind, window, bias)


def _read(stack: jax.Array | np.ndarray, at: tuple[np.intp, ...]) -> np.ndarray:
    """stack[at], on the host."""
    if isinstance(stack, jax.Array) and not (
        stack.is_fully_addressable or stack.is_fully_replicated
    ):
        return np.asarray(stack[at])
    # Read whole, which jax does once: slicing on the device compiles programs for each shape.
    return np.asarray(stack)[at]


def dropped(
    keys: Num[Array, "*rows words"], rate: float, x: Num[Array, "..."]
) -> Num[Array, "..."]:
    """Dropout: x with a share `rate` of it zero, and the rest scaled by 1 / (1 − rate).

    keys: the data of one key, or of one key for each of x's first axis.
    """
    key, keep = jax.random.wrap_key_data(keys), 1 - rate
    if key.ndim:
        kept = jax.vmap(lambda own: jax.random.bernoulli(own, keep, x.shape[1:]))(key)
    else:
        kept = jax.random.bernoulli(key, keep, x.shape)
    return jnp.where(kept, x / keep, 0).astype(x.dtype)
