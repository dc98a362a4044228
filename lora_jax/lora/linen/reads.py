"""Which weights a Flax Linen model reads only by calls of their layers that are products.

Such a weight can stay as it is: the call adds x A B. Any other weight may be read anywhere, so it
is replaced by W + scaling · A B before the model runs.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.interpreters import partial_eval

from lora_jax.lora.linen import calls, tracing
from lora_jax.lora.linen.sites import Site
from lora_jax.lora.linen.tracing import Path


def only_by_products(
    module: Any,
    sites: Sequence[Site],
    params: Mapping[Path, Any],
    others: Mapping[str, Any],
    call: tracing.Call,
    **settings: Any,
) -> frozenset[Path]:
    """Site.at of the sites whose weight this call of the module reads in no other way.

    The call is traced, not computed. Each product is replaced by a marker, and the weights are
    followed through the program: they may arrive, unchanged, at their own layers' markers alone.

    params, others: the model's params, flat, and its other collections; arrays or shapes.
    settings: of module.apply, such as rngs and mutable.
    """
    sites = [site for site in sites if site.is_slice]
    if not sites:
        return frozenset()
    by_path = calls.of_paths(sites)
    numbers = {site.key: number for number, site in enumerate(sites)}

    def marked(run, args, kwargs, context):
        layer = context.module
        at_path = by_path.get(layer.path, ()) if tracing.is_own(layer) else ()
        called = ((site, calls.product(site, context, args, kwargs)) for site in at_path)
        site, found = next(((site, own) for site, own in called if own), (None, None))
        result = run(*args, **kwargs)
        if not found or not (found.attends or calls.is_product(site, layer, found)):
            return result
        inputs = [leaf for leaf in jax.tree.leaves((args, kwargs)) if _is_number(leaf)]
        mark = _marker(numbers[site.key])(found.own[site.weight], *inputs)
        return jax.tree.map(lambda y: jnp.zeros(y.shape, y.dtype) + mark.astype(y.dtype), result)

    keys = [(*site.path, site.weight) for site in sites]
    jaxpr = tracing.program(module, params, others, call, marked, first=keys, **settings)
    used, _ = partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars), instantiate=True)
    weights = dict(zip(used.invars, range(len(sites)), strict=False))
    lost: set[int] = set()
    lost |= {number for number in _follow(used, weights, sites, lost) if number is not None}
    return frozenset(site.at for number, site in enumerate(sites) if number not in lost)


def _follow(
    jaxpr: Any, weights: dict[Any, int], sites: Sequence[Site], lost: set[int]
) -> list[int | None]:
    """Which weight each result is. lost: gets the numbers of those that something else reads.

    weights: {variable: number of the weight that it is}.
    """
    for eqn in jaxpr.eqns:
        own = [None if hasattr(var, "val") else weights.get(var) for var in eqn.invars]
        if all(number is None for number in own):
            continue
        name, inner = eqn.primitive.name, eqn.params.get("jaxpr", eqn.params.get("call_jaxpr"))
        if name.startswith("custom_vjp"):  # its derivative may do anything with the weight's
            inner = None
        results = [None] * len(eqn.outvars)
        if (mark := str(eqn.params.get("name", ""))).startswith(_MARKER):
            lost |= {n for i, n in enumerate(own) if n is not None and (i or mark != _name(n))}
        elif name == "scan":
            consts, carry = _consts_and_carry(eqn)
            carried = own[consts : consts + carry]
            given = [*own[:consts], *[None] * carry, *own[consts + carry :]]
            found = _follow_inner(inner, given, sites, lost)
            lost |= {number for number in (*carried, *found) if number is not None}
        elif name == "cond":
            for branch in eqn.params["branches"]:
                found = _follow_inner(branch, own[1:], sites, lost)
                lost |= {number for number in (own[0], *found) if number is not None}
        elif inner is not None and len(getattr(inner, "jaxpr", inner).invars) == len(own):
            results = _follow_inner(inner, own, sites, lost)
        elif name in ("copy", "sharding_constraint", "transpose"):
            if name == "transpose" and not _is_slicing(sites[own[0]], eqn):
                lost.add(own[0])
            results = own
        else:
            lost |= {number for number in own if number is not None}
        for var, number in zip(eqn.outvars, results, strict=True):
            if number is not None:
                weights[var] = number
    return [None if hasattr(var, "val") else weights.get(var) for var in jaxpr.outvars]


def _follow_inner(inner, own, sites, lost):
    jaxpr = getattr(inner, "jaxpr", inner)
    weights = {var: number for var, number in zip(jaxpr.invars, own, strict=True)
               if number is not None}  # fmt: skip
    return _follow(jaxpr, weights, sites, lost)


def _consts_and_carry(scan: Any) -> tuple[int, int]:
    """The numbers of inputs that each turn of a scan shares, and hands to the next.

    What is scanned over has an axis more outside. The names of the parameters that say the same
    depend on JAX's version.
    """
    inner = getattr(scan.params["jaxpr"], "jaxpr", scan.params["jaxpr"])

    def whole(outer, own):
        return len(outer.aval.shape) == len(own.aval.shape)

    carry = sum(map(whole, scan.outvars, inner.outvars))
    return sum(map(whole, scan.invars, inner.invars)) - carry, carry


def _is_slicing(site: Site, eqn: Any) -> bool:
    """Whether a transpose moves an axis of the stack to the front, as nn.scan does."""
    order = eqn.params["permutation"]
    if len(order) <= len(site.shape):
        return False
    moved = [(axis, *(i for i in range(len(order)) if i != axis)) for axis in range(len(order))]
    return tuple(order) in [moved[axis] for axis in range(1, max(site.axes, default=0) + 1)]


_MARKER = "lora_jax_product_"


def _name(number: int) -> str:
    return f"{_MARKER}{number}"


def _marker(number: int) -> Any:
    """A function, jitted by that name, that depends on a weight and on other arrays."""

    def mark(weight, *inputs):
        return sum(jnp.sum(array).astype(jnp.float32) for array in (weight, *inputs))

    mark.__name__ = _name(number)
    return jax.jit(mark)


def _is_number(leaf: Any) -> bool:
    return hasattr(leaf, "dtype") and not jnp.issubdtype(leaf.dtype, jax.dtypes.extended)
