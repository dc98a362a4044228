"""How a layer multiplies its input by its weight: any linear map, seen as x · W with W [K, N].

LoRA and quantization need this view only: K numbers go in, and N come out. An `Einsum`
("BTD,DNH->BTNH": K = D, N = N·H), an `Embedding` or a `Conv` says what the axes of the real weight
mean. Further axes at the front of a weight are those of stacked layers.
"""

import abc
import collections
import dataclasses
import functools
import math
import re
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh
from jaxtyping import Array, Int, Num

from lora_jax import errors
from lora_jax.kernels import explicit, matmul

# A matrix [*batch, K, N], or a function that multiplies rows [..., K] by one.
Factor = Num[Array, "*batch _ _"] | Callable[[jax.Array], jax.Array]


class LinearMap(abc.ABC):
    """How a layer multiplies: y = x · W, where W of any number of axes is seen as a matrix [K, N].

    `shape` is always the shape of the real weight, with the axes of stacked layers first.
    """

    ndim: int  # the number of axes of one layer's weight

    def lead(self, shape: Sequence[int]) -> tuple[int, ...]:
        """The sizes of the axes that are not part of a matrix: those of stacked layers first."""
        return tuple(shape[: len(shape) - self.ndim])

    @abc.abstractmethod
    def sizes(self, shape: Sequence[int]) -> tuple[int, int]:
        """(K, N)."""

    def matrix_axes(self, axes: Sequence[explicit.Axes]) -> tuple[explicit.Axes, ...]:
        """The names of `matrix`'s axes, from those of the weight's: of mesh axes, or logical."""
        stacked = len(axes) - self.ndim
        return (*axes[:stacked], explicit.joined(axes[stacked:-1]), axes[-1])

    def matrix(self, weight: Num[Array, "..."]) -> Num[Array, "*lead K N"]:
        """The weight as matrices."""
        return weight.reshape(*self.lead(weight.shape), *self.sizes(weight.shape))

    def tensor(self, matrix: Num[Array, "*lead K N"], shape: Sequence[int]) -> Num[Array, "..."]:
        """The inverse of `matrix`: the weight of that shape."""
        return matrix.reshape(*shape)

    @abc.abstractmethod
    def multiply(
        self, x: Num[Array, "..."], *factors: Factor, shape: Sequence[int]
    ) -> Num[Array, "..."]:
        """x · factor · factor …, from the first factor's K to the last one's N, in x's dtype."""

    def spread(
        self, values: Num[Array, "*batch N"], ndim: int, shape: Sequence[int]
    ) -> Num[Array, "..."]:
        """One number for each of the N outputs, with axes that broadcast to a y of `ndim` axes."""
        return jnp.expand_dims(values, range(ndim - 1))


@dataclasses.dataclass(frozen=True)
class Einsum(LinearMap):
    """y = einsum(x, W), such as "...D,DNH->...NH".

    inputs: the axes of W that are summed with x's. outputs: those that are new in y. Both are in
    W's order. batch: the axes that x, W and y share, such as experts, each with its own matrix.
    An ellipsis stands for any further axes of x.
    """

    x: str
    w: str
    y: str

    @property
    def inputs(self) -> str:
        return "".join(axis for axis in self.w if axis in self.x and axis not in self.y)

    @property
    def outputs(self) -> str:
        return "".join(axis for axis in self.w if axis in self.y and axis not in self.x)

    @property
    def batch(self) -> str:
        return "".join(axis for axis in self.w if axis in self.x and axis in self.y)

    @property
    def ndim(self) -> int:
        return len(self.w)

    def lead(self, shape: Sequence[int]) -> tuple[int, ...]:
        """The sizes of the axes of stacked layers, then of the batch axes."""
        sizes = dict(zip(self.w, shape[len(shape) - self.ndim :], strict=True))
        return (*shape[: len(shape) - self.ndim], *(sizes[axis] for axis in self.batch))

    def sizes(self, shape: Sequence[int]) -> tuple[int, int]:
        sizes = dict(zip(self.w, shape[len(shape) - self.ndim :], strict=True))
        k, n = (math.prod(sizes[axis] for axis in axes) for axes in (self.inputs, self.outputs))
        return k, n

    def matrix_axes(self, axes: Sequence[explicit.Axes]) -> tuple[explicit.Axes, ...]:
        stacked = len(axes) - self.ndim
        own = dict(zip(self.w, axes[stacked:], strict=True))
        k, n = (explicit.joined([own[axis] for axis in of]) for of in (self.inputs, self.outputs))
        return (*axes[:stacked], *(own[axis] for axis in self.batch), k, n)

    def tensor_axes(
        self, k: explicit.Axes, n: explicit.Axes, shape: Sequence[int], mesh: Mesh | AbstractMesh
    ) -> tuple[explicit.Axes, ...]:
        """The mesh axes of one layer's weight of that shape, whose matrix has k and n.

        Of several axes that are one in the matrix, the first that can be split is.
        """
        sizes, own = dict(zip(self.w, shape[-self.ndim :], strict=True)), {}
        for among, axes in ((self.inputs, k), (self.outputs, n)):
            parts = explicit.num_parts(mesh, axes)
            own[next((axis for axis in among if sizes[axis] % parts == 0), None)] = axes
        return tuple(own.get(axis) for axis in self.w)

    def matrix(self, weight: Num[Array, "..."]) -> Num[Array, "*lead K N"]:
        return self._turned(weight).reshape(*self.lead(weight.shape), *self.sizes(weight.shape))

    def tensor(self, matrix: Num[Array, "*lead K N"], shape: Sequence[int]) -> Num[Array, "..."]:
        turned = jax.eval_shape(self._turned, jax.ShapeDtypeStruct(tuple(shape), matrix.dtype))
        stacked = len(shape) - self.ndim
        order = self.batch + self.inputs + self.outputs
        back = [stacked + order.index(axis) for axis in self.w]
        return matrix.reshape(turned.shape).transpose(*range(stacked), *back)

    def _turned(self, weight):
        stacked = weight.ndim - self.ndim
        order = (stacked + self.w.index(a) for a in self.batch + self.inputs + self.outputs)
        return weight.transpose(*range(stacked), *order)

    def multiply(
        self, x: Num[Array, "..."], *factors: Factor, shape: Sequence[int]
    ) -> Num[Array, "..."]:
        axes_x, axes_y = expanded(self.x, x.ndim), expanded(self.y, x.ndim, like=self.x)
        free = [axis for axis in axes_x if axis not in self.w]
        order = [*self.batch, *free, *self.inputs]
        sizes = dict(zip(axes_x, x.shape, strict=True))
        sizes |= dict(zip(self.w, shape[len(shape) - self.ndim :], strict=True))
        x = x.transpose(*(axes_x.index(axis) for axis in order))
        k, _ = self.sizes(shape)
        x = x.reshape(*(sizes[axis] for axis in (*self.batch, *free)), k)
        for factor in factors:
            x = _product(x, factor, len(self.batch))
        y = x.reshape(*(sizes[axis] for axis in (*self.batch, *free, *self.outputs)))
        order = [*self.batch, *free, *self.outputs]
        return y.transpose(*(order.index(axis) for axis in axes_y))

    def spread(
        self, values: Num[Array, "*batch N"], ndim: int, shape: Sequence[int]
    ) -> Num[Array, "..."]:
        sizes = dict(zip(self.w, shape[len(shape) - self.ndim :], strict=True))
        own = self.batch + self.outputs
        values = values.reshape([sizes[axis] for axis in own])
        axes_y = expanded(self.y, ndim)
        values = values.transpose(*(own.index(axis) for axis in axes_y if axis in own))
        missing = [i for i, axis in enumerate(axes_y) if axis not in own]
        return jnp.expand_dims(values, missing)


@dataclasses.dataclass(frozen=True)
class Embedding(LinearMap):
    """y = W[ids], W [K, N]: x · W where x is the one-hot encoding of ids.

    take: (table, ids) → table[ids].
    """

    take: Callable[[jax.Array, jax.Array], jax.Array] = dataclasses.field(
        default=functools.partial(jnp.take, axis=0), compare=False
    )
    ndim = 2

    def sizes(self, shape: Sequence[int]) -> tuple[int, int]:
        return shape[-2], shape[-1]

    def multiply(
        self, ids: Int[Array, "*B"], first: Num[Array, "K _"], *factors: Factor, shape
    ) -> Num[Array, "*B N"]:
        x = self.take(first, ids)
        for factor in factors:
            x = _product(x, factor)
        return x


@dataclasses.dataclass(frozen=True)
class Conv(LinearMap):
    """y = conv(x, W), W [*window, C, N], K = window · C; of several factors the first convolves.

    slide: (x, W) → y without a bias, with the layer's own strides and padding.
    """

    slide: Callable[[jax.Array, jax.Array], jax.Array] = dataclasses.field(compare=False)
    window: tuple[int, ...]

    @property
    def ndim(self) -> int:
        return len(self.window) + 2

    def sizes(self, shape: Sequence[int]) -> tuple[int, int]:
        return math.prod(shape[len(shape) - self.ndim : -1]), shape[-1]

    def multiply(
        self, x: Num[Array, "..."], first: Num[Array, "K _"], *factors: Factor, shape
    ) -> Num[Array, "..."]:
        x = self.slide(x, first.reshape(*self.window, -1, first.shape[-1]))
        for factor in factors:
            x = _product(x, factor)
        return x


def unknown(x: jax.Array, weight: jax.Array) -> jax.Array:
    """`slide` of a weight of which only the shape is known."""
    raise NotImplementedError("expected a product that is computed with the whole weight")


LINEAR = Einsum("...i", "io", "...o")


@functools.cache
def parse(text: str) -> Einsum:
    """The linear map that an einsum of x and W describes.

    Raises: UserError if the einsum is not a product of x with a matrix: an operand has an axis
    twice, an axis of x alone or of W alone is summed, or W has an ellipsis.
    """
    match = re.fullmatch(r"([\w.]+),(\w+)->([\w.]+)", text.replace(" ", ""))
    problems = [] if match else ["not of the form x,W->y, with no ellipsis in W"]
    if match:
        x, w, y = match.groups()
        for name, axes in (("x", x), ("W", w), ("y", y)):
            letters = axes.replace("...", "", 1)
            twice = [axis for axis, n in collections.Counter(letters).items() if n > 1]
            problems += [f"axis {axis} twice in {name}" for axis in twice]
        problems += [f"axis {axis} of x is in neither W nor y" for axis in x if axis not in w + y]
        problems += [f"axis {axis} of W is in neither x nor y" for axis in w if axis not in x + y]
        problems += [f"axis {axis} of y is new" for axis in y if axis not in x + w]
        if not problems and not (Einsum(x, w, y).inputs and Einsum(x, w, y).outputs):
            problems.append("W has no axis that is summed, or none that is new")
    if problems:
        raise errors.UserError(
            expected='an einsum of an input and a weight, such as "...D,DNH->...NH"',
            found=problems,
            where=repr(text),
        )
    return Einsum(x, w, y)


def general(axis: Sequence[int], num_outputs: int, batch: Sequence[int] = ()) -> Einsum:
    """The linear map of a LinearGeneral or DenseGeneral: W [*batch, *axis, *outputs].

    axis: x's axes that are summed, in any order, as W has them sorted: those counted from the
    front, then those from the back. batch: the first axes of x, which are the first axes of y in
    the same order.
    """
    axis = sorted(axis, key=lambda number: (number < 0, number))
    letters = iter("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ")
    shared = [next(letters) for _ in batch]
    summed = {number: next(letters) for number in axis}
    new = "".join(next(letters) for _ in range(num_outputs))
    front, back = ([n for n in axis if (n < 0) == negative] for negative in (False, True))
    first = shared + ["_"] * (max(front, default=len(shared) - 1) + 1 - len(shared))
    last = ["_"] * -min(back, default=0)
    for number, letter in summed.items():
        (last if number < 0 else first)[number] = letter
    first, last = ([next(letters) if a == "_" else a for a in axes] for axes in (first, last))
    kept = ["".join(a for a in axes if a not in summed.values()) for axes in (first, last)]
    w = "".join(shared) + "".join(summed[number] for number in axis) + new
    return parse(f"{''.join(first)}...{''.join(last)},{w}->{kept[0]}...{kept[1]}{new}")


def _product(x, matrix, batch=0):
    if callable(matrix):
        return matrix(x)
    if not batch:
        return matmul.matmul(x, matrix)
    rows = math.prod(x.shape[batch:-1])
    middle = x.reshape(*x.shape[:batch], rows, x.shape[-1])
    y = jnp.matmul(middle, matrix.astype(x.dtype), preferred_element_type=jnp.float32)
    return y.astype(x.dtype).reshape(*x.shape[:-1], matrix.shape[-1])


def expanded(axes: str, ndim: int, like: str | None = None) -> list[str]:
    """The axes of an operand one by one; an ellipsis becomes numbered axes, as many as it means.

    like: the axes of the operand that has `ndim` axes, if that is another one.
    """
    if "..." not in axes:
        return list(axes)
    more = ndim - len((like or axes).replace("...", ""))
    before, after = axes.split("...")
    return [*before, *map(str, range(more)), *after]
