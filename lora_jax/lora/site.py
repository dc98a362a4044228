"""Where an adapter goes in a model of any framework, and the arrays that it begins with there."""

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Num, PRNGKeyArray

from lora_jax import errors
from lora_jax.layers import linear_map
from lora_jax.lora import adapter as host
from lora_jax.lora import algebra, targets
from lora_jax.lora import config as lora_config

Choices = Sequence[targets.Choice | None]  # one for each layer of a place


class Place(NamedTuple):
    """A layer, or a stack of layers that share their arrays on leading axes.

    names: the dotted path of each layer; lead: the axes of the stack, () if there is none; k, n:
    how many numbers go into a layer, and come out; how: it multiplies; problem: why it cannot be
    adapted, see selection.Candidate.
    """

    names: tuple[str, ...]
    lead: tuple[int, ...]
    k: int
    n: int
    how: linear_map.Layout
    problem: str = ""

    @property
    def shape(self) -> host.Shape:
        kinds = {linear_map.Embedding: "embedding", linear_map.Conv: "conv"}
        return host.Shape(kinds.get(type(self.how), "linear"), self.k, self.n)

    def stacked(self, each: Sequence[Num[np.ndarray, "..."]]) -> Num[Array, "..."]:
        """One array of the layers' own."""
        return jnp.asarray(np.reshape(np.stack(each), (*self.lead, *each[0].shape)))


def each(function: Callable, lead: tuple[int, ...], /, *trees: Any, **settings: Any) -> Any:
    """function(*trees, **settings) for every layer of a stack with those axes, one at a time.

    Compiled once for all layers whose arrays have the same shapes, where `function` is the same.
    """
    return _each(function, len(lead), tuple(settings.items()), trees)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _each(function, num_axes, settings, trees):
    def one(own):
        return function(*own, **dict(settings))

    for _ in range(num_axes):
        one = functools.partial(lax.map, one)
    return one(trees)


def choose(
    places: Sequence[Place],
    config: lora_config.LoRAConfig,
    others: Mapping[str, targets.Candidate] | None = None,
    *,
    strict: bool = True,
) -> list[list[targets.Choice | None]]:
    """For each place how each of its layers is adapted, None where it is not.

    others: what else there is in the model, by path, which cannot be adapted.
    Raises: UserError, see selection.select.
    """
    candidates = {
        name: targets.Candidate(place.shape.kind, place.n, place.problem)
        for place in places
        for name in place.names
    } | dict(others or {})
    choices = targets.select(candidates, config, strict=strict)
    return [[choices.get(name) for name in place.names] for place in places]


def ranks(choices: Choices) -> tuple[int, ...]:
    """The rank of each layer, 0 for none."""
    return tuple(own.rank if own else 0 for own in choices)


def scaling(place: Place, choices: Choices) -> Float[Array, "*lead 1 1"]:
    """The scaling of each layer, 0 for none; so that it meets B [*lead, R, N]."""
    each = [np.float32(own.scaling if own else 0).reshape(1, 1) for own in choices]
    return place.stacked([*each])


def mask(place: Place, choices: Choices) -> Float[Array, "*lead R N"] | None:
    """1 where a row of B and an output belong to the same part of a layer; None: everywhere."""
    if not any(own and own.kept for own in choices):
        return None
    each = np.zeros((len(choices), max(ranks(choices)), place.n), np.float32)
    for layer, own in zip(each, choices, strict=True):
        for rows, columns in _parts(place.n, own) if own else ():
            layer[rows, columns] = 1
    return place.stacked([*each])


def initial(
    place: Place, choices: Choices, key: PRNGKeyArray
) -> tuple[Float[Array, "*lead K R"], Float[Array, "*lead R N"]]:
    """A and B of a new adapter, as in PEFT; zero beyond the rank of each layer."""
    widest, lead = max(ranks(choices)), place.lead
    used = np.arange(widest) < np.reshape(ranks(choices), lead)[..., None]  # [*lead, R]
    if place.shape.kind == "embedding":
        B = algebra.initial_of_embedding(key, lead, widest, place.n)
        return jnp.zeros((*lead, place.k, widest)), jnp.where(used[..., None], B, 0)
    A = algebra.initial(key, lead, place.k, widest)
    return jnp.where(used[..., None, :], A, 0), jnp.zeros((*lead, widest, place.n))


def check_principal(places: Iterable[tuple[Place, Choices]]) -> None:
    """Raises: UserError for ranks that PiSSA cannot take from weights so small."""
    problems = []
    for place, choices in places:
        for name, own in zip(place.names, choices, strict=True):
            for rows, columns in _parts(place.n, own) if own else ():
                most = min(place.k, len(range(place.n)[columns]))
                if rows.stop - rows.start > most:
                    problems.append(f"{name} with rank {rows.stop - rows.start} of {most} at most")
    if problems:
        raise errors.UserError(
            expected="ranks that the weights have, whose principal part PiSSA takes",
            found=problems,
            do="choose a smaller rank, for these in rank_pattern, or init_lora_weights default",
        )


def principal(
    place: Place,
    choices: Choices,
    init: str,
    weight: Callable[[int], Float[Array, "K N"]],
) -> tuple[Float[Array, "*lead K R"], Float[Array, "*lead R N"]]:
    """A and B by PiSSA; of adapted parts of an output each its own.

    weight: the weight of one layer, by its index among the place's names.
    """
    each = []
    for index, own in enumerate(choices):
        A, B = _zeros(place, choices)
        if own:
            A[:, : own.rank], B[: own.rank] = principal_of_one(weight(index), own, init)
        each.append((A, B))
    A, B = (place.stacked(arrays) for arrays in zip(*each, strict=True))
    return A, B


def principal_of_one(
    weight: Float[Array, "K N"], own: targets.Choice, init: str
) -> tuple[Float[np.ndarray, "K R"], Float[np.ndarray, "R N"]]:
    """`principal` for a layer alone."""
    k, n = weight.shape
    A, B = np.zeros((k, own.rank), np.float32), np.zeros((own.rank, n), np.float32)
    for rows, columns in _parts(n, own):
        how = rows.stop - rows.start, own.scaling, init
        A[:, rows], B[rows, columns] = algebra.pissa(weight[:, columns], *how)
    return A, B


def filled(
    place: Place, choices: Choices, factors: Mapping[str, host.Factors], use_dora: bool
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """A, B and the magnitude (None without DoRA; 1 where there is no adapter) from `factors`."""
    each = []
    for name, own in zip(place.names, choices, strict=True):
        A, B = _zeros(place, choices)
        magnitude = np.ones(place.n, np.float32)
        if own:
            A[:, : own.rank], B[: own.rank], given, *_ = factors[name]
            magnitude = magnitude if given is None else given
        each.append((A, B, magnitude))
    A, B, magnitude = (place.stacked(arrays) for arrays in zip(*each, strict=True))
    return A, B, magnitude if use_dora else None


def collected(
    place: Place,
    index: int,
    rank: int,
    A: jax.Array | np.ndarray,
    B: jax.Array | np.ndarray,
    magnitude: jax.Array | np.ndarray | None = None,
    lacking: tuple[jax.Array | np.ndarray, jax.Array | np.ndarray] | None = None,
) -> host.Factors:
    """What the arrays of a place hold for one of its layers.

    lacking: PiSSA's A and B at the start, which the base lacks: the change of the base as it was is
    told by twice the rank, A B − A₀ B₀.
    """
    at = np.unravel_index(index, place.lead)
    A, B = np.asarray(A[at])[:, :rank], np.asarray(B[at])[:rank]
    if lacking is not None:
        A0, B0 = (np.asarray(part[at]) for part in lacking)
        A, B = np.concatenate([A, A0[:, :rank]], axis=1), np.concatenate([B, -B0[:rank]])
    magnitude = None if magnitude is None else np.asarray(magnitude[at])
    return host.Factors(A, B, magnitude, place.shape.kind, getattr(place.how, "window", ()))


def dropped(
    keys: Num[Array, "*rows words"], rate: float, x: Num[Array, "..."]
) -> Num[Array, "..."]:
    """x with a share of `rate` of it zero, the rest larger; keys: data of one key or one a row."""
    key, keep = jax.random.wrap_key_data(keys), 1 - rate
    if key.ndim:
        kept = jax.vmap(lambda own: jax.random.bernoulli(own, keep, x.shape[1:]))(key)
    else:
        kept = jax.random.bernoulli(key, keep, x.shape)
    return jnp.where(kept, x / keep, 0).astype(x.dtype)


def problem(layer: Any, how: linear_map.Layout) -> str:
    """Why a layer of Flax's that multiplies so cannot be adapted; "" where it can."""
    if not isinstance(how, linear_map.Conv):
        return ""
    if layer.feature_group_count > 1:
        return f"has feature_group_count {layer.feature_group_count}"
    return "" if layer.mask is None else "has a mask"


def misfit(how: linear_map.Layout, shape: Sequence[int]) -> str:
    """Why a weight of that shape cannot be one that a layer multiplies by so; "" if it can."""
    if len(shape) >= how.ndim:
        return ""
    return f"has a weight of {len(shape)} axes, where {how.ndim} are multiplied"


def unknown(cls: str) -> targets.Candidate:
    """A module with parameters that is no layer of a known kind."""
    return targets.Candidate("", 0, f"is of class {cls}, which is of no known kind")


def _zeros(place: Place, choices: Choices) -> tuple[np.ndarray, np.ndarray]:
    widest = max(ranks(choices))
    return np.zeros((place.k, widest), np.float32), np.zeros((widest, place.n), np.float32)


def _parts(n: int, own: targets.Choice) -> list[tuple[slice, slice]]:
    """The rows of B and the outputs of each part that is adapted."""
    kept = own.kept or ((0, n),)
    each = own.rank // len(kept)
    return [(slice(i * each, (i + 1) * each), slice(*columns)) for i, columns in enumerate(kept)]
