"""The weights of a Flax NNX model that no layer of a known kind holds."""

from collections.abc import Iterator
from typing import NamedTuple

from flax import nnx

from lora_jax.layers import places, registry

Path = tuple[str | int, ...]


class Parameter(NamedTuple):
    """A parameter of two axes or more. path: its own, and that of the module that reads it."""

    path: Path
    variable: nnx.Param
    owner: nnx.Pytree
    owner_path: Path

    @property
    def inner(self) -> Path:
        """The path in the owner."""
        return self.path[len(self.owner_path) :]

    @property
    def is_bridged(self) -> bool:
        """Whether it belongs to a Linen module, in nnx.bridge.ToNNX."""
        return is_bridge(self.owner)


def find(model: nnx.Module) -> Iterator[Parameter]:
    """The parameters in the order of their paths."""
    nodes = sorted(nnx.iter_graph(model), key=lambda item: places.dotted(item[0]))
    modules = {path: node for path, node in nodes if isinstance(node, nnx.Pytree)}
    for path, node in nodes:
        if not registry.is_base_param(node) or getattr(node, "ndim", 0) < 2:
            continue
        around = [path[:n] for n in range(len(path)) if path[:n] in modules]
        copied = "modules_to_save" in path or "quantized" in path
        if copied or any(_is_layer(modules[at]) for at in around):
            continue
        bridges = [at for at in around if is_bridge(modules[at])]
        at = bridges[0] if bridges else around[-1]
        yield Parameter(path, node, modules[at], at)


def _is_layer(module: nnx.Pytree) -> bool:
    return registry.registration_of(type(module)) is not None and not registry.problem(module)


def is_bridge(module: nnx.Pytree) -> bool:
    """Whether the module applies a Linen module."""
    return isinstance(module, nnx.bridge.ToNNX)
