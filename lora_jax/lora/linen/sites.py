"""The layers of a Flax Linen model that LoRA can adapt: found by tracing a call of it."""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import traverse_util
from jaxtyping import Array, Num

from lora_jax import errors
from lora_jax.layers import linear_map
from lora_jax.lora import site as lora_site
from lora_jax.lora import targets
from lora_jax.lora.linen import registry

Path = tuple[str, ...]
Params = Mapping[str, Any]  # nested, as the collections of a Linen model are


@dataclasses.dataclass(frozen=True, kw_only=True)
class Site(lora_site.Site):
    """Where an adapter can go in a Linen model: the layer's path in params, and its weight.

    weight, shape: the name of the weight, and its shape in a call. axis: the axis of the stack in
    each parameter; 0, unless nn.scan uses another. depth: where in the path the number of a stacked
    layer is inserted. stack: the sizes of the stack's axes.
    """

    path: Path
    weight: str
    shape: tuple[int, ...]
    axis: int
    depth: int | None
    stack: tuple[int, ...]

    def in_params(self, array: Num[Array, "..."]) -> Num[Array, "..."]:
        """An array whose first axis is the stack's, with its axes ordered as in params."""
        return jnp.moveaxis(array, 0, self.axis) if self.axis else array

    def out_of_params(self, array: Num[Array, "..."]) -> Num[Array, "..."]:
        """The inverse of `in_params`."""
        return jnp.moveaxis(array, self.axis, 0) if self.axis else array


_tracing_for = jax.make_user_context(default_value=None)


@contextlib.contextmanager
def intercepted(interceptor: Callable, own: Hashable) -> Iterator[None]:
    """As flax.linen.intercept_methods, also in functions that nn.jit has traced before.

    own: identifies the interceptor, so that JAX traces again for another one.
    """
    with _tracing_for(own), nn.intercept_methods(interceptor):
        yield


def find(module: nn.Module, *args: Any, **kwargs: Any) -> tuple[Site, ...]:
    """Every site of `module`, as it is called by `module(*args, **kwargs)`.

    args: arrays, or their shapes; nothing is computed.
    Raises: UserError if the calls of a layer differ in how they multiply.
    """
    return survey(module, *args, **kwargs)[0]


def survey(
    module: nn.Module, *args: Any, **kwargs: Any
) -> tuple[tuple[Site, ...], dict[str, targets.Layer], Params]:
    """(sites, others, params): as `find`, the other modules by path, and the shapes of params.

    Only others that have parameters; among them layers whose weight is not where their class is
    registered to have it (nn.share_scope).
    """
    calls: dict[Path, list[tuple[nn.Module, linear_map.LinearMap, str, tuple[int, ...]]]] = {}
    classes: dict[Path, str] = {}
    astray: dict[Path, str] = {}

    def record(call, args, kwargs, context):
        y, layer = call(*args, **kwargs), context.module
        if context.method_name != "__call__" or layer.scope is None:
            return y
        known, cls = registry.registration_of(type(layer)), type(layer).__name__
        classes.setdefault(layer.path, cls)
        if known and layer.has_variable("params", known.weight):
            weight = nn.meta.unbox(layer.get_variable("params", known.weight))
            try:
                how = known.linear_map_of(layer, *args, **kwargs)
                misfit = lora_site.misfit(how, weight.shape)
            except errors.UserError as error:  # the einsum is not a product with a matrix
                misfit = f"has an einsum that is {error.found}"
            if misfit:
                astray[layer.path] = misfit
            else:
                seen = layer, how, known.weight, weight.shape
                calls.setdefault(layer.path, []).append(seen)
        elif known:
            astray[layer.path] = f"holds a {cls} without its registered parameter {known.weight!r}"
        return y

    params = shapes(module, args, kwargs, record)
    sites = []
    for path, seen in sorted(calls.items()):
        layer, how, name, shape = seen[0]
        if any(other[1] != how for other in seen):
            raise errors.UserError(
                expected="calls of a layer that multiply by its weight in the same way",
                found=sorted({str(other[1]) for other in seen}),
                where=".".join(path),
                do="leave its class unregistered, or use a separate layer for each way",
            )
        whole = nn.meta.unbox(_at(params, path))[name].shape
        lead, axis = _stack(shape, whole, path)
        depth = _depth(params, path, lead, axis)
        inner = how.lead(shape)
        names = tuple(numbered(path, depth, index[: len(lead)], index[len(lead) :])
                      for index in np.ndindex(*lead, *inner))  # fmt: skip
        in_features, out_features = how.sizes(shape)
        sites.append(
            Site(
                names=names,
                lead=(*lead, *inner),
                linear_map=how,
                in_features=in_features,
                out_features=out_features,
                problem=lora_site.problem(layer, how),
                path=path,
                weight=name,
                shape=shape,
                axis=axis,
                depth=depth,
                stack=lead,
            )
        )
    owners = {path[:-1] for path in traverse_util.flatten_dict(nn.meta.unbox(params))} - {()}
    others = {".".join(path): lora_site.unregistered(classes.get(path, "unknown"))
              for path in owners - calls.keys()}  # fmt: skip
    others |= {".".join(path): targets.Layer("linear", problem=problem)
               for path, problem in astray.items()}  # fmt: skip
    return tuple(sites), others, params


def shapes(
    module: nn.Module, args: tuple, kwargs: Mapping[str, Any], interceptor: Callable | None = None
) -> Params:
    """The shapes of the module's params. interceptor: is called for each call of a layer."""
    arrays, filled = split_arrays(args, kwargs)

    def init(*arrays):
        args, kwargs = filled(arrays)
        rngs = {name: jax.random.key(0) for name in ("params", "dropout")}
        watching = (
            intercepted(interceptor, interceptor) if interceptor else contextlib.nullcontext()
        )
        with watching:
            return module.init(rngs, *args, **kwargs)

    return jax.eval_shape(init, *arrays)["params"]


def split_arrays(
    args: tuple, kwargs: Mapping[str, Any]
) -> tuple[list[Any], Callable[[Sequence[Any]], tuple[tuple, dict[str, Any]]]]:
    """(the arrays among the arguments, a function from others in their place to the arguments)."""
    leaves, tree = jax.tree.flatten((args, kwargs))
    dynamic = [i for i, leaf in enumerate(leaves) if hasattr(leaf, "shape")]

    def filled(arrays):
        own = dict(zip(dynamic, arrays, strict=True))
        return jax.tree.unflatten(tree, [own.get(i, leaf) for i, leaf in enumerate(leaves)])

    return [leaves[i] for i in dynamic], filled


def _stack(shape, whole, path) -> tuple[tuple[int, ...], int]:
    """(sizes, axis) of the stack. shape: of the weight in a call; whole: of the parameter."""
    more = len(whole) - len(shape)
    if whole[more:] == shape:
        return whole[:more], 0
    for axis in range(1, len(whole)):
        if more == 1 and whole[:axis] + whole[axis + 1 :] == shape:
            return (whole[axis],), axis
    raise errors.UserError(
        expected="a stack of layers on one axis, or on the first axes",
        found=f"a weight of shape {whole} that has shape {shape} in a call",
        where=".".join(path),
        do="use 0 for params in variable_axes",
    )


def _depth(params: Params, path: Path, lead: tuple[int, ...], axis: int) -> int | None:
    """The length of the shortest part of `path` below which all parameters are stacked."""
    if not lead:
        return None

    def stacked(leaf):
        return leaf.shape[axis : axis + len(lead)] == lead

    for depth in range(len(path)):
        if all(map(stacked, jax.tree.leaves(nn.meta.unbox(_at(params, path[:depth]))))):
            return depth
    return len(path)


def numbered(path: Path, depth: int | None, lead: tuple[int, ...], batch: tuple[int, ...]) -> str:
    """The dotted path of one layer: its number in the stack at `depth`, that in the batch last."""
    parts = path if depth is None else (*path[:depth], *map(str, lead), *path[depth:])
    return ".".join((*parts, *map(str, batch)))


def _at(tree: Params, path: Path) -> Any:
    return functools.reduce(lambda part, name: part[name], path, tree)
