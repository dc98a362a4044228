"""A second class for a layer that is there already: it stays what it was, and where it was."""

import functools

from flax import nnx


def become(layer: nnx.Module, kind: type[nnx.Module]) -> None:
    """Makes `layer` an instance of `kind` as well, whose methods go first."""
    object.__setattr__(layer, "__class__", _both(kind, type(layer)))


def leave(layer: nnx.Module, *added: str) -> None:
    """The reverse: the layer is of its own class alone, without the attributes `added`."""
    for name in added:
        delattr(layer, name)
    object.__setattr__(layer, "__class__", type(layer).__mro__[2])


@functools.cache
def _both(kind: type[nnx.Module], cls: type[nnx.Module]) -> type[nnx.Module]:
    return type(f"{kind.__name__}[{cls.__name__}]", (kind, cls), {"__module__": cls.__module__})
