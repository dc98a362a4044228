"""The layers of a Flax Linen model that LoRA can adapt: found by watching a call of it."""

import contextlib
import functools
from collections.abc import Callable, Hashable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import traverse_util
from jaxtyping import Array, Num

from lora_jax import errors
from lora_jax.layers import linear_map
from lora_jax.lora import site, targets

Path = tuple[str, ...]
Params = Mapping[str, Any]  # nested, as a Linen model's collections are


class _Kind(NamedTuple):
    """How layers of a class multiply: (layer, *arguments of a call) → layout."""

    layout: Callable[..., linear_map.Layout]
    weight: str = "kernel"
    input: int = 0  # which argument of the call is x


_KINDS: dict[type, _Kind] = {}


def register(
    cls: type[nn.Module],
    einsum: str | Callable[..., str],
    *,
    weight: str = "kernel",
    input: int = 0,
) -> None:
    """Has layers of a class of your own adapted.

    Args:
      cls: its __call__ returns einsum(x, W), plus a bias if it has a parameter `bias`.
      einsum: such as "...D,DNH->...NH", or (layer, *arguments of __call__) → that.
      weight: the name of the parameter W.
      input: which argument of __call__ is x.

    Raises: UserError for an einsum that is no product of x with a matrix.
    """
    if isinstance(einsum, str):
        linear_map.parse(einsum)

    def described(layer, *args, **kwargs):
        return linear_map.parse(
            einsum if isinstance(einsum, str) else einsum(layer, *args, **kwargs)
        )

    _KINDS[cls] = _Kind(described, weight, input)
    kind_of.cache_clear()


_tracing_for = jax.make_user_context(default_value=None)


@contextlib.contextmanager
def intercepted(interceptor: Callable, own: Hashable) -> Iterator[None]:
    """As flax.linen.intercept_methods, and inside of what nn.jit has traced before, too.

    own: by this JAX tells the interceptor from others, and traces anew.
    """
    with _tracing_for(own), nn.intercept_methods(interceptor):
        yield


@functools.cache
def kind_of(cls: type) -> _Kind | None:
    return next((_KINDS[base] for base in cls.__mro__ if base in _KINDS), None)


def _tuple(sizes: int | tuple[int, ...]) -> tuple[int, ...]:
    return (sizes,) if isinstance(sizes, int) else tuple(sizes)


def _general(layer: nn.DenseGeneral, x: jax.Array) -> linear_map.Einsum:
    outputs = len(_tuple(layer.features))
    return linear_map.general(_tuple(layer.axis), outputs, _tuple(layer.batch_dims))


def _einsum(layer: nn.Einsum, x: jax.Array, einsum_str: str | None = None) -> linear_map.Einsum:
    return linear_map.parse(einsum_str or layer.einsum_str)


def _conv(layer: nn.Conv, x: jax.Array) -> linear_map.Conv:
    def slide(x, kernel):
        narrow = layer.clone(features=kernel.shape[-1], use_bias=False, parent=None, name=None)
        return narrow.apply({"params": {"kernel": kernel.astype(x.dtype)}}, x)

    return linear_map.Conv(slide, _tuple(layer.kernel_size))


_KINDS |= {
    nn.Dense: _Kind(lambda layer, x: linear_map.LINEAR),
    nn.DenseGeneral: _Kind(_general),
    nn.Einsum: _Kind(_einsum),
    nn.Embed: _Kind(lambda layer, ids: linear_map.Embedding(), "embedding"),
    nn.Conv: _Kind(_conv),
}


class Site(NamedTuple):
    """A layer of a model: its path in params, its place, its weight's name and shape in a call.

    axis: the one of a stack in each parameter: 0, unless nn.scan was told another.
    """

    path: Path
    place: site.Place
    weight: str
    shape: tuple[int, ...]
    axis: int
    depth: int | None  # where in the path the number of a layer stands
    stack: tuple[int, ...]  # sizes

    def in_params(self, array: Num[Array, "..."]) -> Num[Array, "..."]:
        """An array that is stacked on its first axes as it lies in params."""
        return jnp.moveaxis(array, 0, self.axis) if self.axis else array

    def out_of_params(self, array: Num[Array, "..."]) -> Num[Array, "..."]:
        """The reverse."""
        return jnp.moveaxis(array, self.axis, 0) if self.axis else array


class Found(NamedTuple):
    """A model's layers, what else has parameters in it, by dotted path, and the shapes of all.

    Among the others: a layer whose weight is not where its kind has it (nn.share_scope).
    """

    sites: tuple[Site, ...]
    others: dict[str, targets.Candidate]
    params: Params


def find(module: nn.Module, *args: Any, **kwargs: Any) -> tuple[Site, ...]:
    """Every layer of `module` that can be adapted, as it is called by `module(*args, **kwargs)`.

    args: arrays, or their shapes; nothing is computed.
    Raises: UserError for a layer whose calls differ in what its weight's axes are for.
    """
    return survey(module, *args, **kwargs).sites


def survey(module: nn.Module, *args: Any, **kwargs: Any) -> Found:
    """The same, and what else there is in `module`."""
    calls: dict[Path, list[tuple[nn.Module, linear_map.Layout, str, tuple[int, ...]]]] = {}
    classes: dict[Path, str] = {}
    astray: dict[Path, str] = {}

    def record(call, args, kwargs, context):
        y, layer = call(*args, **kwargs), context.module
        if context.method_name != "__call__" or layer.scope is None:
            return y
        kind, cls = kind_of(type(layer)), type(layer).__name__
        classes.setdefault(layer.path, cls)
        if kind and layer.has_variable("params", kind.weight):
            weight = nn.meta.unbox(layer.get_variable("params", kind.weight))
            try:
                how = kind.layout(layer, *args, **kwargs)
                misfit = site.misfit(how, weight.shape)
            except errors.UserError as error:  # of an einsum that is no product with a matrix
                misfit = f"has an einsum that is {error.found}"
            if misfit:
                astray[layer.path] = misfit
            else:
                seen = layer, how, kind.weight, weight.shape
                calls.setdefault(layer.path, []).append(seen)
        elif kind:
            astray[layer.path] = f"holds a {cls} without the parameter {kind.weight!r} of its kind"
        return y

    params = shapes(module, args, kwargs, record)
    sites = []
    for path, seen in sorted(calls.items()):
        layer, how, name, shape = seen[0]
        if any(other[1] != how for other in seen):
            raise errors.UserError(
                expected="calls of a layer that agree on what its weight's axes are for",
                found=sorted({str(other[1]) for other in seen}),
                where=".".join(path),
                do="leave it out of the model's layers, or of the targets by its own class",
            )
        whole = nn.meta.unbox(_at(params, path))[name].shape
        lead, axis = _stack(shape, whole, path)
        depth = _depth(params, path, lead, axis)
        inner = how.lead(shape)
        names = tuple(numbered(path, depth, index[: len(lead)], index[len(lead) :])
                      for index in np.ndindex(*lead, *inner))  # fmt: skip
        problem = site.problem(layer, how)
        where = site.Place(names, (*lead, *inner), *how.sizes(shape), how, problem)
        sites.append(Site(path, where, name, shape, axis, depth, lead))
    owners = {path[:-1] for path in traverse_util.flatten_dict(nn.meta.unbox(params))} - {()}
    others = {".".join(path): site.unknown(classes.get(path, "unknown"))
              for path in owners - calls.keys()}  # fmt: skip
    others |= {".".join(path): targets.Candidate("linear", 0, problem)
               for path, problem in astray.items()}  # fmt: skip
    return Found(tuple(sites), others, params)


def shapes(
    module: nn.Module, args: tuple, kwargs: Mapping[str, Any], interceptor: Callable | None = None
) -> Params:
    """The shapes of module's params; each call of a layer goes through the interceptor."""
    leaves, tree = jax.tree.flatten((args, kwargs))
    dynamic = [i for i, leaf in enumerate(leaves) if hasattr(leaf, "shape")]

    def init(*arrays):
        filled = list(leaves)
        for index, array in zip(dynamic, arrays, strict=True):
            filled[index] = array
        args, kwargs = jax.tree.unflatten(tree, filled)
        rngs = {name: jax.random.key(0) for name in ("params", "dropout")}
        watching = (
            intercepted(interceptor, interceptor) if interceptor else contextlib.nullcontext()
        )
        with watching:
            return module.init(rngs, *args, **kwargs)

    return jax.eval_shape(init, *(leaves[i] for i in dynamic))["params"]


def _stack(shape, whole, path) -> tuple[tuple[int, ...], int]:
    """(sizes, axis) of the stack that a weight of that shape in a call is part of."""
    more = len(whole) - len(shape)
    if whole[more:] == shape:
        return whole[:more], 0
    for axis in range(1, len(whole)):
        if more == 1 and whole[:axis] + whole[axis + 1 :] == shape:
            return (whole[axis],), axis
    raise errors.UserError(
        expected="a stack of layers on one axis, or on the first ones",
        found=f"a weight {whole} that a call sees as {shape}",
        where=".".join(path),
        do="use 0 for params in variable_axes",
    )


def _depth(params: Params, path: Path, lead: tuple[int, ...], axis: int) -> int | None:
    """The length of the shortest part of `path` below which all parameters are on the stack."""
    if not lead:
        return None

    def stacked(leaf):
        return leaf.shape[axis : axis + len(lead)] == lead

    for depth in range(len(path)):
        if all(map(stacked, jax.tree.leaves(nn.meta.unbox(_at(params, path[:depth]))))):
            return depth
    return len(path)


def numbered(path: Path, depth: int | None, lead: tuple[int, ...], batch: tuple[int, ...]) -> str:
    """The dotted path of one layer: its number in the stack at `depth`, that in a batch last."""
    parts = path if depth is None else (*path[:depth], *map(str, lead), *path[depth:])
    return ".".join((*parts, *map(str, batch)))


def _at(tree: Params, path: Path) -> Any:
    return functools.reduce(lambda part, name: part[name], path, tree)


def whole(params: Params, ends: tuple[str, ...]) -> tuple[Path, ...]:
    """The paths of the modules whose names end so. Raises: UserError for an end without one."""
    modules = {path[:n] for path in traverse_util.flatten_dict(params) for n in range(1, len(path))}
    found = {path for path in modules if ".".join(path).endswith(tuple(ends)) and ends}
    missing = [end for end in ends if not any(".".join(path).endswith(end) for path in found)]
    if missing:
        raise errors.UserError(
            expected="modules_to_save that are modules of the model",
            found=[f"{end} matches none" for end in missing],
            where="modules that exist: " + ", ".join(sorted({path[-1] for path in modules})),
        )
    inside = {path for path in found for n in range(1, len(path)) if path[:n] in found}
    return tuple(sorted(found - inside))


class Tensor(NamedTuple):
    """A parameter of one module that is trained whole, as it lies in PEFT's file.

    end: its path in the module; whole, axis, index: the shape of the parameter with its stack,
    where the stack is, and which of it this is.
    """

    name: str
    path: Path
    end: Path
    whole: tuple[int, ...]
    axis: int
    index: tuple[int, ...]
    convolution: bool

    @property
    def turn(self) -> tuple[int, ...]:
        """The order of its axes in the file: torch has outputs first, then inputs."""
        ndim = len(self.whole) - len(self.index)
        if self.end[-1] == "kernel" and (ndim == 2 or self.convolution):
            return (ndim - 1, ndim - 2, *range(ndim - 2))
        return tuple(range(ndim))

    @property
    def shape(self) -> tuple[int, ...]:
        """In the file."""
        own = jax.eval_shape(self.layer, jax.ShapeDtypeStruct(self.whole, jnp.float32)).shape
        return tuple(own[axis] for axis in self.turn)

    def layer(self, array: Num[Array, "..."]) -> Num[Array, "..."]:
        """Its part of the whole parameter."""
        return (jnp.moveaxis(array, self.axis, 0) if self.axis else array)[self.index]

    def filled(self, array: Num[Array, "..."], new: Num[np.ndarray, "..."]) -> Num[Array, "..."]:
        """The whole parameter with `new` in its part."""
        turned = jnp.moveaxis(array, self.axis, 0) if self.axis else array
        turned = turned.at[self.index].set(new)
        return jnp.moveaxis(turned, 0, self.axis) if self.axis else turned
