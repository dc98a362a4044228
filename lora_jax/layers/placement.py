"""Where new arrays of a layer go on a mesh: they are split as the weight that they belong to."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
from flax import nnx
from jax.sharding import NamedSharding
from jaxtyping import Array, Num

from lora_jax.kernels import explicit
from lora_jax.layers import linear_map


def sharding_of(array: jax.Array) -> NamedSharding | None:
    """The array's sharding, an entry for each axis; None on one device, and if it is not known."""
    sharding = jax.typeof(array).sharding
    if not isinstance(array, jax.core.Tracer):
        sharding = getattr(array, "sharding", None)
    if not isinstance(sharding, NamedSharding) or sharding.mesh.size <= 1:
        return None
    return explicit.sharding(sharding.mesh, *explicit.padded(sharding.spec, array.ndim))


def of_matrix(how: linear_map.LinearMap, weight: Num[Array, "..."]) -> NamedSharding | None:
    """The sharding that the weight's matrix [*lead, K, N] has."""
    sharding = sharding_of(weight)
    if sharding is None:
        return None
    return explicit.sharding(sharding.mesh, *how.matrix_axes(tuple(sharding.spec)))


def matrix(how: linear_map.LinearMap, weight: Num[Array, "..."]) -> Num[Array, "*lead K N"]:
    """how.matrix(weight), split as the weight is."""
    mesh = explicit.mesh_of(weight)
    if mesh is None:
        return _placed(how.matrix(weight), of_matrix(how, weight))
    axes = how.matrix_axes(explicit.axes_of(weight))
    return explicit.automatic(how.matrix, weight, out=explicit.sharding(mesh, *axes))


def tensor(
    how: linear_map.LinearMap, matrix: Num[Array, "*lead K N"], like: Num[Array, "..."]
) -> Num[Array, "..."]:
    """how.tensor(matrix), a weight of the shape and sharding of `like`, which it replaces."""
    tensor = explicit.like(like, lambda matrix: how.tensor(matrix, like.shape), matrix)
    return _placed(tensor, sharding_of(like))


def unpacked(
    how: linear_map.Einsum, matrix: Num[Array, "*lead K N"], shape: Sequence[int]
) -> Num[Array, "..."]:
    """how.tensor(matrix, shape), for a weight that there is only as a matrix."""
    own = sharding_of(matrix)
    if own is None:
        return how.tensor(matrix, shape)
    *lead, k, n = own.spec
    out = explicit.sharding(own.mesh, *lead, *how.tensor_axes(k, n, shape, own.mesh))
    return _placed(explicit.automatic(lambda m: how.tensor(m, shape), matrix, out=out), out)


def fitting(
    sharding: NamedSharding, shape: Sequence[int], which: Sequence[int | None]
) -> NamedSharding:
    """The sharding of an array whose axes are the axes `which` of one with that sharding.

    None: a new axis. An axis that cannot be divided evenly is not split.
    """
    axes = [None if number is None else sharding.spec[number] for number in which]
    parts = [explicit.num_parts(sharding.mesh, own) for own in axes]
    fits = [None if n % p else own for n, p, own in zip(shape, parts, axes, strict=True)]
    return explicit.sharding(sharding.mesh, *fits)


def following(sharding: NamedSharding, num_lead: int, array: Any) -> NamedSharding:
    """The sharding of an array [*lead, K, N], [*lead, N] or [*lead].

    sharding: of matrices [*lead, K, N].
    """
    own = array.ndim - num_lead
    which = (*range(num_lead), *range(num_lead + 2 - own, num_lead + 2))
    return fitting(sharding, array.shape, which)


def placed(array: jax.Array, where: NamedSharding) -> jax.Array:
    """The array with that sharding; as it is where JAX chooses, and on devices of other hosts."""
    traced = isinstance(array, jax.core.Tracer)
    if where.mesh.explicit_axes and (traced or not jax.sharding.get_abstract_mesh().empty):
        return jax.sharding.reshard(array, where)
    if traced or not where.is_fully_addressable:
        return array
    return jax.device_put(array, where)


def _placed(array: jax.Array, where: NamedSharding | None) -> jax.Array:
    return array if where is None else placed(array, where)


def computed(function: Callable, num_lead: int, matrix: Any, *trees: Any) -> Any:
    """function(matrix, *trees), arrays as `following`, which are split as the matrix is.

    matrix: [*lead, K, N], or the words of a packed one.
    """
    first, mesh = jax.tree.leaves(matrix)[0], explicit.mesh_of(matrix, trees)
    if mesh is None:
        return function(matrix, *trees)
    whole = functools.partial(explicit.automatic, function, out=explicit.sharding(mesh))
    shapes = jax.eval_shape(whole, matrix, *trees)
    split = explicit.sharding(mesh, *explicit.axes_of(first))
    out = jax.tree.map(functools.partial(following, split, num_lead), shapes)
    return explicit.automatic(function, matrix, *trees, out=out)


def followed(tree: Any, sharding: NamedSharding, num_lead: int) -> Any:
    """The arrays of the tree, placed as `following`."""
    return jax.tree.map(lambda a: placed(a, following(sharding, num_lead, a)), tree)


def metadata(
    variable: nnx.Variable, turned: Callable[[tuple], tuple] | None = None
) -> dict[str, Any]:
    """The metadata by which Flax knows the variable's sharding, for another one; {} if none.

    turned: the names of the other's axes, from those of the variable's.
    """
    own = variable.get_metadata()
    names = own.get("out_sharding")
    names = getattr(names, "spec", names)
    if not names:
        return {}
    more = variable.ndim - len(names)  # nnx.vmap adds no name of its own for a stack
    names = (*(None,) * more, *names)
    found = {name: own[name] for name in ("sharding_rules", "mesh") if name in own}
    # The array is placed already.
    return {**found, "out_sharding": turned(names) if turned else names, "eager_sharding": False}
