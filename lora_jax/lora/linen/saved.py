"""Modules of a Flax Linen model that are fully trained and saved: PEFT's modules_to_save."""

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jaxtyping import Array, Num

from lora_jax import errors
from lora_jax.layers import linear_map, places
from lora_jax.lora.linen import sites as linen_sites
from lora_jax.lora.linen import stacks
from lora_jax.lora.linen.tracing import Params, Path
from lora_jax.lora.linen.weights import Flat


def choose(params: Params, ends: tuple[str, ...]) -> tuple[Path, ...]:
    """The paths of the modules that end in one of `ends`, which PEFT's modules_to_save are.

    Raises: UserError if an end matches nothing.
    """
    modules = {path[:n] for path in traverse_util.flatten_dict(params) for n in range(1, len(path))}
    found = {path for path in modules if places.dotted(path).endswith(tuple(ends)) and ends}
    missing = [end for end in ends if not any(places.dotted(path).endswith(end) for path in found)]
    if missing:
        raise errors.UserError(
            expected="modules_to_save that are modules of the model",
            found=[f"{end} matches nothing" for end in missing],
            where="modules that exist: " + ", ".join(sorted({path[-1] for path in modules})),
        )
    inside = {path for path in found for n in range(1, len(path)) if path[:n] in found}
    return tuple(sorted(found - inside))


class Tensor(NamedTuple):
    """A parameter of one fully trained module, which has its own name in PEFT's file.

    path, end: of the module, and of the parameter in it. whole: the shape of the parameter with its
    stack. axes, index: the axes of the stack, and the layer's index there.
    """

    name: str
    path: Path
    end: Path
    whole: tuple[int, ...]
    axes: tuple[int, ...]
    index: tuple[int, ...]
    convolution: bool

    @property
    def turn(self) -> tuple[int, ...]:
        """The order of its axes in the file: outputs first, then inputs, as in PyTorch."""
        ndim = len(self.whole) - len(self.index)
        if self.end[-1] == "kernel" and (ndim == 2 or self.convolution):
            return (ndim - 1, ndim - 2, *range(ndim - 2))
        return tuple(range(ndim))

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape in the file."""
        own = jax.eval_shape(self.layer, jax.ShapeDtypeStruct(self.whole, jnp.float32)).shape
        return tuple(own[axis] for axis in self.turn)

    def layer(self, array: Num[Array, "..."]) -> Num[Array, "..."]:
        """The layer's part of the whole parameter."""
        return jnp.moveaxis(array, self.axes, range(len(self.axes)))[self.index]

    def filled(self, array: Num[Array, "..."], new: Num[np.ndarray, "..."]) -> Num[Array, "..."]:
        """The whole parameter with `new` as the layer's part."""
        front = range(len(self.axes))
        turned = jnp.moveaxis(array, self.axes, front).at[self.index].set(new)
        return jnp.moveaxis(turned, front, self.axes)


def tensors(
    modules: Iterable[Path], sites: Sequence[linen_sites.Site], base: Flat
) -> Iterator[Tensor]:
    """The parameters of fully trained modules. base: the model's params, flat."""
    for path in modules:
        around = (s for s in sites if s.depth is not None and path[: s.depth] == s.at[: s.depth])
        stack = next(around, None)
        for key in sorted(key for key in base if key[: len(path)] == path):
            lead, axes = (stack.stack, stack.axes) if stack else ((), ())
            end, whole = key[len(path) :], base[key].shape
            convolution = any(
                site.path == key[:-1] and isinstance(site.linear_map, linear_map.Conv)
                for site in sites
            )
            leaf = "weight" if end[-1] in ("kernel", "embedding", "scale") else end[-1]
            for index in np.ndindex(*lead):
                name = stacks.numbered(path, stack and stack.depth, index, ())
                name = places.dotted((name, *end[:-1], leaf))
                yield Tensor(name, path, end, whole, axes, index, convolution)


def copies(modules: Iterable[Path], trained: Flat) -> list[tuple[Path, Path]]:
    """(path in params, path in lora) of each parameter of fully trained modules."""
    return [
        ((*path, *key[len(path) + 1 :]), key)
        for path in modules
        for key in trained
        if key[: len(path) + 1] == (*path, "modules_to_save")
    ]
