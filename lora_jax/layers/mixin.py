"""Give an existing layer a second class; it stays the same object, in the same place."""

import functools

from flax import nnx


def become(layer: nnx.Module, kind: type[nnx.Module]) -> None:
    """Makes `layer` an instance of `kind`, too, whose methods take precedence."""
    object.__setattr__(layer, "__class__", _both(kind, type(layer)))


def leave(layer: nnx.Module, *added: str) -> None:
    """The inverse of `become`; also deletes the attributes `added`."""
    for name in added:
        delattr(layer, name)
    object.__setattr__(layer, "__class__", type(layer).__bases__[1])


@functools.cache
def _both(kind: type[nnx.Module], cls: type[nnx.Module]) -> type[nnx.Module]:
    return type(f"{kind.__name__}[{cls.__name__}]", (kind, cls), {"__module__": cls.__module__})
