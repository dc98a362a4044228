"""Functions that are linear in one array, with a transpose of our own and derivatives of any order.

jax.custom_vjp has no forward mode, and jax.custom_derivatives.linear_call cannot be batched.
"""

from collections.abc import Callable

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
    return _linear.bind(*constants, x, program=program, transpose=transpose)


def _run(*args: jax.Array, program: core.ClosedJaxpr, transpose: Callable) -> jax.Array:
    return core.jaxpr_as_fun(program)(*args)[0]


def _jvp(primals, tangents, *, program, transpose):
    *constants, x = primals
    *of_constants, of_x = tangents
    terms = []
    if not isinstance(of_x, ad.Zero):
        terms.append(_linear.bind(*constants, of_x, program=program, transpose=transpose))
    moving = [i for i, tangent in enumerate(of_constants) if not isinstance(tangent, ad.Zero)]
    if moving:

        def run(*values):
            now = dict(zip(moving, values, strict=True))
            args = [now.get(i, constant) for i, constant in enumerate(constants)]
            return _run(*args, x, program=program, transpose=transpose)

        at, direction = ([each[i] for i in moving] for each in (constants, of_constants))
        terms.append(jax.jvp(run, at, direction)[1])
    y = _linear.bind(*primals, program=program, transpose=transpose)
    return y, sum(terms[1:], terms[0])


def _transpose(dy, *args, program, transpose):
    *constants, _ = args
    dy = ad.instantiate_zeros(dy)
    back = jax.make_jaxpr(transpose)(*constants, dy)
    dx = _linear.bind(*constants, dy, program=back, transpose=_first(core.jaxpr_as_fun(program)))
    return *(None for _ in constants), dx


def _batch(axis, args, axes, *, program, transpose):
    if all(each is None for each in axes):
        return _linear.bind(*args, program=program, transpose=transpose), None
    *constants, x = args
    *of_constants, of_x = axes
    x = batching.bdim_at_front(x, of_x, axis.size)

    def each(function):
        return jax.vmap(
            function,
            in_axes=(*of_constants, 0),
            axis_name=axis.name,
            axis_size=axis.size,
            spmd_axis_name=axis.spmd_name,
        )

    program = jax.make_jaxpr(each(_first(core.jaxpr_as_fun(program))))(*constants, x)
    return _linear.bind(*constants, x, program=program, transpose=each(transpose)), 0


def _first(function):
    return lambda *args: function(*args)[0]


_linear = core.Primitive("linear")
_linear.def_impl(_run)
_linear.def_abstract_eval(lambda *args, program, transpose: program.out_avals[0])
mlir.register_lowering(_linear, mlir.lower_fun(_run, multiple_results=False), cacheable=False)
ad.primitive_jvps[_linear] = _jvp
ad.primitive_transposes[_linear] = _transpose
batching.fancy_primitive_batchers[_linear] = _batch
