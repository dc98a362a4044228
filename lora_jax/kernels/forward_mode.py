"""Functions with a derivative of their own, which jax.custom_vjp gives them in reverse mode alone.

In forward mode they have the derivative of a plain function of the same values.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import custom_derivatives
from jaxtyping import Array, Float

from lora_jax.kernels import linear


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def call(
    function: Callable[..., jax.Array], plain: Callable[..., jax.Array], *args: jax.Array
) -> Float[Array, "..."]:
    """function(*args), with its own derivative in reverse mode; in forward mode, that of plain.

    Both are functions of arrays alone. Derivatives of higher order are forward mode over reverse
    mode, as jax.hessian has them, unless `function` itself has others.
    """
    return function(*args)


@functools.partial(call.defjvp, symbolic_zeros=True)
def _jvp(function, plain, primals, tangents):
    moving = [i for i, tangent in enumerate(tangents)
              if not isinstance(tangent, custom_derivatives.SymbolicZero)]  # fmt: skip
    if not moving:
        y = function(*primals)
        return y, jnp.zeros_like(y)
    num = len(primals)

    def at(function, args):
        """The function of the moving arguments alone."""

        def run(*values):
            now = dict(zip(moving, values, strict=True))
            return function(*(now.get(i, own) for i, own in enumerate(args)))

        return run

    values = [primals[i] for i in moving]
    y, pull_back = jax.vjp(at(function, primals), *values)
    saved, tree = jax.tree.flatten(pull_back)

    def forward(*arrays):
        args, dxs = arrays[:num], arrays[num + len(saved) :]
        return [jax.jvp(at(plain, args), tuple(args[i] for i in moving), tuple(dxs))[1]]

    def backward(*arrays):
        return tree.unflatten(arrays[num:-1])(arrays[-1])

    dxs = [tangents[i] for i in moving]
    (dy,) = linear.of_several(forward, backward, (*primals, *saved), dxs, [jax.typeof(y)])
    return y, dy
