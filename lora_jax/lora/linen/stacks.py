"""The layers that nn.scan and nn.vmap stack in one parameter: along which axes, and their names."""

import itertools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import traverse_util

from lora_jax.layers import places
from lora_jax.lora.linen import tracing
from lora_jax.lora.linen.tracing import Path


def axes(module, calls, variables, key, shape) -> tuple[int, ...] | None:
    """The axes of the stack in a parameter, by its shape in a call.

    Where the sizes do not tell, an array of other sizes is put beside it. The model slices that as
    it slices the parameter, and fails at any other axis.
    """
    flat = traverse_util.flatten_dict(tracing.unboxed(variables["params"]))
    stack = flat[key].shape
    candidates = [
        axes for axes in itertools.combinations(range(len(stack)), max(len(stack) - len(shape), 0))
        if tuple(size for axis, size in enumerate(stack) if axis not in axes) == shape
    ]  # fmt: skip
    if len(candidates) == 1:
        return candidates[0]
    probe = (*key[:-1], "lora_probe")
    for axes in candidates:
        sizes = iter(size + max(stack) for size in shape)
        own = tuple(stack[i] if i in axes else next(sizes) for i in range(len(stack)))
        given = {**flat, probe: jax.ShapeDtypeStruct(own, jnp.float32)}
        expected = tuple(size for i, size in enumerate(own) if i not in axes)
        found: set[tuple[int, ...]] = set()

        def look(run, args, kwargs, context, found=found):
            layer = context.module
            if tracing.is_own(layer) and layer.path == key[:-1]:
                found |= {leaf.shape for name, leaf in layer.variables["params"].items()
                          if name == "lora_probe"}  # fmt: skip
            return run(*args, **kwargs)

        for call in calls:
            try:
                tracing.program(module, given, variables, call, look)
            except Exception:  # of Flax or JAX: the sizes do not fit
                found.clear()
        if found == {expected}:
            return axes
    return None


def depth(flat: Mapping[Path, Any], at: Path, lead, axes) -> int | None:
    """The length of the shortest part of `at` below which all parameters are stacked."""
    if not lead:
        return None

    def stacked(shape):
        return len(shape) > max(axes) and tuple(shape[axis] for axis in axes) == lead

    for depth in range(len(at)):
        if all(stacked(p.shape) for path, p in flat.items() if path[:depth] == at[:depth]):
            return depth
    return len(at)


def numbered(path: Path, depth: int | None, lead: tuple[int, ...], batch: tuple[int, ...]) -> str:
    """The dotted path of one layer: its number in the stack at `depth`, that in the batch last."""
    parts = path if depth is None else (*path[:depth], *map(str, lead), *path[depth:])
    return places.dotted((*parts, *batch))
