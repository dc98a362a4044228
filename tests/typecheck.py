"""The checker that runs every annotation under pytest. As in PEP 484, an int is a float."""

import functools
import types
import typing

import beartype
import jaxtyping

check = beartype.beartype(
    conf=beartype.BeartypeConf(is_pep484_tower=True, violation_type=TypeError)
)
_jaxtyped = jaxtyping.jaxtyped
_ARRAY = type(jaxtyping.Float[jaxtyping.Array, ""])


def begin() -> None:
    """To be called before the packages that are checked are imported.

    jaxtyping's own wrapper checks arguments twice and binds them at every call, also where no
    annotation has a shape: a sixth of the suite.
    """
    jaxtyping.jaxtyped = jaxtyped


def jaxtyped(*, typechecker):
    """A decorator that checks annotations at each call; names of axes hold for one call."""
    return functools.partial(_decorate, typechecker)


def _decorate(typechecker, function):
    if not isinstance(function, types.FunctionType):  # a class
        return _jaxtyped(function, typechecker=typechecker)
    annotations = list(_flat(function.__annotations__.values()))
    if not annotations:
        return function
    if any(isinstance(each, str | typing.ForwardRef) for each in annotations):
        return _jaxtyped(function, typechecker=typechecker)
    checked = typechecker(function)
    if not any(isinstance(each, _ARRAY) for each in annotations):
        return checked

    @functools.wraps(function)
    def wrapped(*args, **kwargs):
        with _jaxtyped("context"):
            return checked(*args, **kwargs)

    return wrapped


def _flat(annotations):
    for annotation in annotations:
        yield annotation
        yield from _flat(getattr(annotation, "__args__", ()))
