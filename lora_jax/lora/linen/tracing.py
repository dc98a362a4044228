"""Calls of a Flax Linen model: run with a function that sees every call of its layers, or traced
from shapes."""

import contextlib
import dataclasses
import functools
import inspect
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import core, traverse_util
from flax import linen as nn

from lora_jax import errors

Path = tuple[str | int, ...]  # of a module or parameter; with numbers in an NNX module
Params = Mapping[str, Any]  # nested, as the collections of a Linen model are


@dataclasses.dataclass(frozen=True, init=False)
class Call:
    """A call of a Linen model: the arguments, arrays or their shapes, and the method.

    method: a name, or a function of the module, as in flax.linen.Module.apply.
    """

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    method: str | Callable | None

    def __init__(self, *args: Any, method: str | Callable | None = None, **kwargs: Any):
        for name, value in (("args", args), ("kwargs", kwargs), ("method", method)):
            object.__setattr__(self, name, value)

    def of(self, module: nn.Module) -> Callable:
        """The method as a function of `module` when it is bound; its scopes are marked."""
        method = self.method.__func__ if inspect.ismethod(self.method) else self.method

        def run(bound, *args, **kwargs):
            bound.scope.flags = core.freeze({**bound.scope.flags, _MARK: True})
            # Bound again, because the modules in its fields got their scopes before the mark.
            own = module.clone(parent=bound.scope.rewound(), _deep_clone=True)
            if method is None or isinstance(method, str):
                return getattr(own, method or "__call__")(*args, **kwargs)
            return method(own, *args, **kwargs)

        return run


def calls_of(args: tuple, kwargs: Mapping[str, Any]) -> tuple[Call, ...]:
    """The example calls: `args` if they are Calls, otherwise the one with these arguments."""
    several = [isinstance(arg, Call) for arg in args]
    if any(several) and not (all(several) and not kwargs):
        raise errors.UserError(
            expected="the arguments of one call of the model, or a Call for each",
            found="both",
            do='linen.Call(x, method="encode"), linen.Call(z, method="decode")',
        )
    return args if any(several) else (Call(*args, **kwargs),)


def is_own(layer: nn.Module) -> bool:
    """Whether the layer is part of the model that a Call runs.

    Others are modules that the model itself applies to arrays, such as nn.Dense(3).apply(…).
    """
    return layer.scope is not None and layer.scope.has_flag(_MARK)


_MARK = "lora_jax"
_tracing_for = jax.make_user_context(default_value=None)


@contextlib.contextmanager
def intercepted(interceptor: Callable, own: Hashable) -> Iterator[None]:
    """As flax.linen.intercept_methods, also in functions that nn.jit has traced before.

    own: identifies the interceptor, so that JAX traces again for another one.
    """
    with _tracing_for(own), nn.intercept_methods(interceptor):
        yield


def shapes(module: nn.Module, call: Call, interceptor: Callable | None = None) -> Mapping[str, Any]:
    """The shapes of the variables that module.init makes, with their boxes.

    interceptor: is called for each call of a layer.
    """
    arrays, filled = split_arrays((call.args, dict(call.kwargs)))

    def init(*arrays):
        args, kwargs = filled(arrays)
        rngs = {name: jax.random.key(0) for name in ("params", "dropout")}
        watching = (
            intercepted(interceptor, interceptor) if interceptor else contextlib.nullcontext()
        )
        with watching:
            return module.init(rngs, *args, method=call.of(module), **kwargs)

    return jax.eval_shape(init, *arrays)


def unboxed(tree: Any, *, constrained: bool = False) -> Any:
    """The tree without boxes such as nn.Partitioned.

    constrained: on a mesh, arrays are sharded by the names of their boxes, as Flax does.
    """

    def value(leaf):
        is_array = not isinstance(getattr(leaf, "value", None), jax.ShapeDtypeStruct)
        if isinstance(leaf, nn.Partitioned) and not (constrained and is_array):
            return leaf.value
        return nn.meta.unbox(leaf)

    return jax.tree.map(value, tree, is_leaf=lambda leaf: isinstance(leaf, nn.meta.AxisMetadata))


def program(
    module: nn.Module,
    params: Mapping[tuple[str | int, ...], Any],
    variables: Mapping[str, Any],
    call: Call,
    interceptor: Callable,
    *,
    first: Sequence[tuple[str | int, ...]] = (),
    rngs: Mapping[str, Any] | None = None,
    **settings: Any,
) -> Any:
    """The jaxpr of a call of module.apply; its first inputs are the params at the paths `first`.

    params: flat; arrays or shapes. variables: the other collections. settings: of module.apply; by
    default all collections but params may change.
    """
    settings = settings or {"mutable": core.DenyList(("params",))}
    if rngs is None:
        rngs = {name: jax.random.key(0) for name in ("params", "dropout")}
    others = {name: part for name, part in variables.items() if name != "params"}
    rest = {key: array for key, array in params.items() if key not in first}
    arrays, filled = split_arrays((list(rest.values()), others, rngs, call.args, dict(call.kwargs)))

    def output(own, arrays):
        others_of_params, others, rngs, args, kwargs = filled(arrays)
        flat = dict(zip(first, own, strict=True)) | dict(zip(rest, others_of_params, strict=True))
        given = {"params": traverse_util.unflatten_dict(flat), **others}
        with intercepted(interceptor, interceptor):
            found = module.apply(
                given, *args, rngs=rngs, method=call.of(module), **settings, **kwargs
            )
        return [leaf for leaf in jax.tree.leaves(found) if hasattr(leaf, "shape")]

    return jax.make_jaxpr(output)([params[key] for key in first], arrays).jaxpr


def split_arrays(tree: Any) -> tuple[list[Any], Callable[[Sequence[Any]], Any]]:
    """(the arrays of the tree, a function from others in their place to the tree)."""
    leaves, structure = jax.tree.flatten(tree)
    dynamic = [i for i, leaf in enumerate(leaves)
               if hasattr(leaf, "shape") and not isinstance(leaf, np.generic)]  # fmt: skip

    def filled(arrays):
        own = dict(zip(dynamic, arrays, strict=True))
        return jax.tree.unflatten(structure, [own.get(i, leaf) for i, leaf in enumerate(leaves)])

    return [leaves[i] for i in dynamic], filled


def signature(tree: Any) -> Hashable | None:
    """What a trace of a function of the tree depends on; None if that cannot be compared."""
    leaves, structure = jax.tree.flatten(tree)
    own = tuple(
        (leaf.shape, leaf.dtype) if hasattr(leaf, "shape") and not isinstance(leaf, np.generic)
        else (type(leaf), leaf)
        for leaf in leaves
    )  # fmt: skip
    try:
        hash((own, structure))
    except TypeError:
        return None
    return own, structure


@functools.cache
def function_of(cls: type[nn.Module], name: str) -> Callable:
    """The method of a class as it is written, without what Flax wraps around it."""
    method = getattr(cls, name)
    return getattr(method, "__wrapped__", method)
