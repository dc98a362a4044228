"""Where the parts of a Flax NNX model are: one variable or module may be in several places."""

import collections
from collections.abc import Iterable
from typing import Any, NamedTuple

from flax import nnx


class Place(NamedTuple):
    """An attribute of a module, or an item of a container."""

    holder: Any
    key: Any
    path: tuple[Any, ...]

    def put(self, new: Any) -> None:
        """Replaces what is in this place."""
        # Some versions of Flax keep the items of an nnx.List as attributes with numbers for names.
        if isinstance(self.holder, nnx.Pytree) and isinstance(self.key, str):
            setattr(self.holder, self.key, new)
        else:
            self.holder[self.key] = new


Places = dict[int, list[Place]]


def find(model: nnx.Module) -> Places:
    """{id of a variable or module: all its places}."""
    found: Places = collections.defaultdict(list)
    for path, node in nnx.iter_graph(model):
        for key, part in _parts(node):
            if isinstance(part, nnx.Variable | nnx.Pytree):
                found[id(part)].append(Place(node, key, (*path, key)))
    return found


def at(module: Any, path: tuple[Any, ...]) -> Any:
    """The part of the module at that path."""
    for key in path:  # as it is stored, see layers/weight.py
        attributes = vars(module) if isinstance(module, nnx.Pytree) else {}
        if key in attributes:
            module = attributes[key]
        elif isinstance(key, str) and not hasattr(module, "keys"):
            module = getattr(module, key)  # a NamedTuple, or a dataclass
        else:
            module = module[key]
    return module


def dotted(path: Iterable[Any]) -> str:
    """The path as one text, as PEFT and messages have it."""
    return ".".join(map(str, path))


def _parts(node: Any) -> list[tuple[Any, Any]]:
    if isinstance(node, nnx.Variable):
        return []
    if isinstance(node, nnx.Pytree):
        node = vars(node)
    if isinstance(node, dict):
        return [*node.items()]
    return [*enumerate(node)] if isinstance(node, list | tuple) else []
