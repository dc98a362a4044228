"""Functions that are linear in arrays, with a transpose of our own and derivatives of any order.

jax.custom_vjp has no forward mode, and jax.custom_derivatives.linear_call cannot be batched.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.extend import core
from jax.interpreters import ad, batching, mlir
from jaxtyping import Array, Float

from lora_jax.kernels import varying


def linear(
    function: Callable[..., jax.Array], transpose: Callable[..., jax.Array], *arrays: jax.Array
) -> Float[Array, "..."]:
    """y = function(*constants, x), which is linear in x; dx = transpose(*constants, dy).

    arrays: the constants, which are all that the derivative saves, and x. Derivatives with respect
    to the constants are those that JAX finds for the two functions. Functions that stay the same
    from call to call are traced once for each of their inputs' shapes.
    """
    *constants, x = arrays
    # In a shard_map, x may be the same on devices where the constants differ: sum dx over them.
    x = varying.over(varying.axes_of(constants), x)
    program = jax.make_jaxpr(function)(*constants, x)
    return _linear.bind(
        *constants,
        x,
        function=core.jaxpr_as_fun(program),
        transpose=_listed(transpose),
        types=tuple(program.out_avals),
        num_linear=1,
    )[0]


def of_several(
    function: Callable[..., Sequence[jax.Array]],
    transpose: Callable[..., Sequence[jax.Array]],
    constants: Sequence[jax.Array],
    xs: Sequence[jax.Array],
    types: Sequence[Any],
) -> list[Float[Array, "..."]]:
    """ys = function(*constants, *xs), which is linear in xs; dxs = transpose(*constants, *dys).

    types: of ys (jax.typeof). The functions are traced where they are needed, and not here.
    """
    return _linear.bind(
        *constants,
        *xs,
        function=function,
        transpose=transpose,
        types=tuple(types),
        num_linear=len(xs),
    )


def _run(*args: jax.Array, function: Callable, **_: Any) -> list[jax.Array]:
    return list(function(*args))


def _jvp(primals, tangents, *, num_linear, **how):
    constants, xs = primals[:-num_linear], primals[-num_linear:]
    of_constants, of_xs = tangents[:-num_linear], tangents[-num_linear:]
    terms = []
    if not all(isinstance(tangent, ad.Zero) for tangent in of_xs):
        dxs = map(ad.instantiate_zeros, of_xs)
        terms.append(_linear.bind(*constants, *dxs, num_linear=num_linear, **how))
    moving = [i for i, tangent in enumerate(of_constants) if not isinstance(tangent, ad.Zero)]
    if moving:

        def run(*values):
            now = dict(zip(moving, values, strict=True))
            args = [now.get(i, constant) for i, constant in enumerate(constants)]
            return _run(*args, *xs, **how)

        at, direction = ([each[i] for i in moving] for each in (constants, of_constants))
        terms.append(jax.jvp(run, at, direction)[1])
    ys = _linear.bind(*primals, num_linear=num_linear, **how)
    return ys, [sum(each[1:], each[0]) for each in zip(*terms, strict=True)]


def _transpose(dys, *args, function, transpose, num_linear, **_):
    constants, xs = args[:-num_linear], args[-num_linear:]
    unknown = [ad.is_undefined_primal(x) for x in xs]
    types = tuple(x.aval if new else jax.typeof(x) for x, new in zip(xs, unknown, strict=True))
    dxs = _linear.bind(
        *constants,
        *map(ad.instantiate_zeros, dys),
        function=transpose,
        transpose=function,
        types=types,
        num_linear=len(dys),
    )
    dxs = [dx if new else None for dx, new in zip(dxs, unknown, strict=True)]
    return *(None for _ in constants), *dxs


def _batch(axis, args, axes, *, function, transpose, num_linear, **how):
    if all(each is None for each in axes):
        ys = _linear.bind(
            *args, function=function, transpose=transpose, num_linear=num_linear, **how
        )
        return ys, [None] * len(ys)
    constants, xs = args[:-num_linear], args[-num_linear:]
    of_constants, of_xs = axes[:-num_linear], axes[-num_linear:]
    xs = [batching.bdim_at_front(x, of_x, axis.size) for x, of_x in zip(xs, of_xs, strict=True)]

    def each(function, num_linear):
        return jax.vmap(
            function,
            in_axes=(*of_constants, *[0] * num_linear),
            axis_name=axis.name,
            axis_size=axis.size,
            spmd_axis_name=axis.spmd_name,
        )

    function = each(function, num_linear)
    types = tuple(jax.make_jaxpr(function)(*constants, *xs).out_avals)
    ys = _linear.bind(
        *constants,
        *xs,
        function=function,
        transpose=each(transpose, len(types)),
        types=types,
        num_linear=num_linear,
    )
    return ys, [0] * len(ys)


def _listed(function):
    return lambda *args: [function(*args)]


_linear = core.Primitive("linear")
_linear.multiple_results = True
_linear.def_impl(_run)
_linear.def_abstract_eval(lambda *args, types, **_: list(types))
mlir.register_lowering(_linear, mlir.lower_fun(_run, multiple_results=True), cacheable=False)
ad.primitive_jvps[_linear] = _jvp
ad.primitive_transposes[_linear] = _transpose
batching.fancy_primitive_batchers[_linear] = _batch
