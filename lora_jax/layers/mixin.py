"""Give an existing layer further classes; it stays the same object, in the same place."""

import functools
from typing import Any

from flax import nnx

from lora_jax.layers import weight


class Mixin(nnx.Module):
    """A class that layers get in addition to their own, see `become`."""

    mixin_original: type[nnx.Pytree]  # the layer's own class
    mixin_kinds: tuple[type, ...] = ()  # those that it got, the last one first
    mixin_base: type[nnx.Pytree]  # the class whose methods they come before

    def __init_subclass__(cls, **kwargs: Any) -> None:
        # Not that of the layer's class, which may register its subclasses, or ask for arguments.
        nnx.Module.__init_subclass__.__func__(cls, **kwargs)

    @classmethod
    def mixin_attributes(cls, original: type[nnx.Pytree]) -> dict[str, Any]:
        """Attributes of a class that adds this one to `original`."""
        return {}

    def _graph_node_set_key(self, key: Any, value: Any) -> None:
        with weight.as_stored(self):  # nnx.update changes what is stored
            super()._graph_node_set_key(key, value)

    def _graph_node_pop_key(self, key: Any) -> Any:
        with weight.as_stored(self):
            return super()._graph_node_pop_key(key)

    def __reduce__(self) -> tuple[Any, ...]:
        # Such a class is made when it is needed, so pickle cannot find it by its name.
        return _empty, (self.mixin_original, self.mixin_kinds, self.mixin_base), vars(self).copy()


def become(layer: nnx.Pytree, kind: type[Mixin], base: type[nnx.Pytree] | None = None) -> None:
    """Makes `layer` an instance of `kind`, too, whose methods come right before those of `base`.

    base: a base class of the layer's class, whose own methods then call those of `kind` with
    super(); None: the layer's class itself.
    """
    cls = type(layer)
    original = cls.mixin_original if issubclass(cls, Mixin) else cls
    kinds = cls.mixin_kinds if issubclass(cls, Mixin) else ()
    _set(layer, original, (kind, *kinds), base or original)


def leave(layer: nnx.Pytree, kind: type[Mixin], *added: str) -> None:
    """The inverse of `become`; also deletes the attributes `added`."""
    for name in added:
        delattr(layer, name)
    cls = type(layer)
    kinds = tuple(other for other in cls.mixin_kinds if not issubclass(other, kind))
    _set(layer, cls.mixin_original, kinds, cls.mixin_base)


def original(layer: nnx.Pytree) -> type[nnx.Pytree]:
    """The layer's own class."""
    return getattr(type(layer), "mixin_original", type(layer))


def _set(layer, cls, kinds, base) -> None:
    object.__setattr__(layer, "__class__", _mixed(cls, kinds, base) if kinds else cls)


def _empty(cls, kinds, base) -> nnx.Pytree:
    return object.__new__(_mixed(cls, kinds, base))


@functools.cache
def _mixed(cls: type, kinds: tuple[type[Mixin], ...], base: type) -> type:
    name = f"{kinds[0].__name__}[{cls.__name__}]"
    own = {"mixin_original": cls, "mixin_kinds": kinds, "mixin_base": base}
    own |= {"__module__": cls.__module__, "__doc__": cls.__doc__}
    for kind in reversed(kinds):
        own |= kind.mixin_attributes(cls)
    pytree = cls._pytree__is_pytree  # of a class made with pytree=False, Flax finds parts otherwise
    if base is cls:
        return type(name, (*kinds, cls), own, pytree=pytree)
    inner = type(f"{kinds[0].__name__}[{base.__name__}]", (*kinds, base), {}, pytree=pytree)
    return type(name, (_First, cls, inner), own, pytree=pytree)


class _First(nnx.Module):
    """A base class before the layer's own, whose __init_subclass__ is not called then."""

    __init_subclass__ = Mixin.__init_subclass__.__func__
