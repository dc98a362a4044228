"""The weight of a layer that does not compute with it as it is stored: packed, or adapted.

Flax models read the weights of their layers in other places, too: a tied head, or a subclass with
a `__call__` of its own. In the methods of a module, and in functions that JAX traces,
`layer.kernel` therefore is what the layer computes with. Elsewhere, as in a notebook, it is what is
stored.
"""

import contextlib
import contextvars
import operator
import sys
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from lora_jax import errors

# Classes and not layers, which transformations such as nnx.remat copy.
_AS_STORED: contextvars.ContextVar[frozenset[type]] = contextvars.ContextVar(
    "as_stored", default=frozenset()
)


@contextlib.contextmanager
def as_stored(layer: nnx.Pytree) -> Iterator[None]:
    """In this context the layer's weight is read as it is stored."""
    token = _AS_STORED.set(_AS_STORED.get() | {type(layer)})
    try:
        yield
    finally:
        _AS_STORED.reset(token)


def is_read_as_changed(layer: nnx.Pytree) -> bool:
    """Whether the layer's weight is read to compute with it, out of contexts `as_stored`.

    That is by a method of a module, or by a function that JAX traces.
    """
    return type(layer) not in _AS_STORED.get() and (_is_in_a_method() or _is_traced(layer))


def attribute(name: str, computed: Callable[[Any], Any]) -> property:
    """An attribute of a layer that holds a weight: computed(layer), or what is stored under it."""

    def read(layer):
        if name not in vars(layer) or is_read_as_changed(layer):
            return computed(layer)
        return vars(layer)[name]

    def write(layer, value):
        vars(layer)[name] = value

    def delete(layer):
        del vars(layer)[name]

    return property(read, write, delete)


def _is_traced(layer: nnx.Pytree) -> bool:
    """Whether JAX traces what reads the layer: a program, or one of the layer's arrays."""
    arrays = [jnp.zeros(()), *jax.tree.leaves(nnx.state(layer))]  # a program traces every array
    return any(isinstance(leaf, jax.core.Tracer) for leaf in arrays)


def _is_in_a_method() -> bool:
    """Whether one of the callers is a method of a module, transformed or not.

    `__getattribute__`, which a type checker may wrap, is how others read the weight as well.
    """
    frame = sys._getframe(3)
    while frame is not None:
        code = frame.f_code
        if code.co_argcount and code.co_name != "__getattribute__":
            first = frame.f_locals.get(code.co_varnames[0])
            if isinstance(first, nnx.Pytree) and hasattr(type(first), code.co_name):
                return True
        frame = frame.f_back
    return False


class Computed:
    """A weight that is computed when it is read, with the interface of a variable and of an array.

    Models also read the sizes of their layers from their weights, for which nothing is computed.
    """

    def __init__(self, shape: tuple[int, ...], dtype: Any, compute: Callable[[], jax.Array]):
        self.shape, self.ndim, self.dtype, self._compute = tuple(shape), len(shape), dtype, compute

    @property
    def value(self) -> jax.Array:
        """The array."""
        return self._compute()

    def get_value(self) -> jax.Array:
        """The array."""
        return self._compute()

    def __getitem__(self, index: Any) -> jax.Array:
        return self._compute()[index]

    def __len__(self) -> int:
        return self.shape[0]

    def __iter__(self) -> Iterator[jax.Array]:
        return iter(self._compute())

    def __setitem__(self, index: Any, value: Any) -> None:
        raise self._is_no_variable()

    def __jax_array__(self) -> jax.Array:
        return self._compute()

    def __array__(self, *args: Any, **kwargs: Any) -> Any:
        return self._compute().__array__(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        if name in ("set_value", "raw_value", "update_from_state"):
            raise self._is_no_variable()
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self._compute(), name)  # T, reshape, astype, …

    def _is_no_variable(self) -> errors.UserError:
        return errors.UserError(
            expected="a weight that is stored as it is",
            found=f"a weight of shape {self.shape} that is computed from packed words or an "
            "adapter",
            do="change the variables with nnx.update(model, state), or merge first",
        )


def _unary(function: Callable) -> Callable:
    return lambda self: function(self.value)


def _binary(function: Callable) -> Callable:
    return lambda self, other: function(self.value, other)


def _reflected(function: Callable) -> Callable:
    return lambda self, other: function(other, self.value)


for _name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul"):
    setattr(Computed, f"__{_name}__", _binary(getattr(operator, _name)))
    setattr(Computed, f"__r{_name}__", _reflected(getattr(operator, _name)))
for _name in ("neg", "abs", "pos"):
    setattr(Computed, f"__{_name}__", _unary(getattr(operator, _name)))
