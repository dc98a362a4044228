"""The weights of a Flax Linen model's sites in its params: read, replaced and quantized."""

from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import traverse_util

from lora_jax import errors
from lora_jax.kernels import packed as packing
from lora_jax.layers import linear_map, placement
from lora_jax.lora import site as lora_site
from lora_jax.lora import targets
from lora_jax.lora.linen.sites import Params, Path, Site
from lora_jax.quant import formats

Flat = dict[Path, jax.Array]
PACKED = "packed"  # holds the arrays of a quantized weight, instead of the weight


def flat(tree: Params) -> Flat:
    """{path: array} of nested params."""
    return dict(traverse_util.flatten_dict(nn.meta.unbox(tree)))


def check(sites: Sequence[Site], params: Params, model: str) -> Flat:
    """`params`, flat. Raises: UserError if they are not those of the model with these sites."""
    base, problems = flat(params), []
    for site in sites:
        name = ".".join((*site.path, site.weight))
        stacked = jax.ShapeDtypeStruct((*site.stack, *site.shape), jnp.float32)
        expected = jax.eval_shape(site.in_params, stacked).shape
        weight = base.get((*site.path, site.weight))
        if weight is None and (*site.path, PACKED, "q") not in base:
            problems.append(f"{name} is missing")
        elif weight is not None and weight.shape != expected:
            problems.append(f"{name} has shape {weight.shape}, expected {expected}")
    if problems:
        raise errors.UserError(
            expected=f"params of the {model} that was adapted",
            found=problems,
            do='pass the collection itself, such as module.init(…)["params"]',
        )
    return base


def to_pack(
    sites: Sequence[Site],
    others: Mapping[str, targets.Layer],
    fmt: str,
    exclude: Sequence[str],
) -> set[Path]:
    """The paths of the linear layers that are to be quantized: all but those in `exclude`.

    Raises: UserError if the weight of such a layer was not found. others: see sites.survey.
    """
    problems = [
        f"{path} {other.problem}" for path, other in others.items()
        if other.kind == "linear" and not targets.matches(path, exclude)
    ]  # fmt: skip
    if problems:
        raise errors.UserError(
            expected=f"layers that can be quantized to {fmt}",
            found=problems,
            do="leave them dense with `exclude`",
        )
    return {
        site.path for site in sites
        if isinstance(site.linear_map, linear_map.Einsum) and not site.linear_map.batch
        and not targets.matches(".".join(site.path), exclude)
    }  # fmt: skip


def matrix(site: Site, base: Flat, fmt: str) -> jax.Array:
    """The site's weight, dense, as matrices [*lead, K, N]. fmt: the format if it is packed."""
    weight = base.get((*site.path, site.weight))
    if weight is not None:
        return placement.matrix(site.linear_map, site.out_of_params(weight))
    arrays = (base.get((*site.path, PACKED, name)) for name in packing.Packed._fields)
    packed = packing.Packed(*(None if a is None else site.out_of_params(a) for a in arrays))
    how = {"fmt": fmt, "rows": site.in_features}
    return lora_site.each(formats.dequantize, site.stack, packed, **how)


def store(site: Site, base: Flat, matrix: jax.Array) -> None:
    """Replaces the site's weight by the dense one with those matrices."""
    weight = (*site.path, site.weight)
    dtype = base[weight].dtype if weight in base else matrix.dtype
    for name in packing.Packed._fields:
        base.pop((*site.path, PACKED, name), None)
    shape = (*site.stack, *site.shape)
    if weight in base:
        like = site.out_of_params(base[weight])
        tensor = placement.tensor(site.linear_map, matrix, like)
    else:
        tensor = placement.unpacked(site.linear_map, matrix, shape)
    base[weight] = site.in_params(tensor.astype(dtype))


def pack(site: Site, base: Flat, fmt: str) -> None:
    """Quantizes the site's weight to `fmt`."""
    dense = matrix(site, base, fmt)
    packed = lora_site.each(formats.quantize, site.stack, dense, fmt=fmt)
    if sharding := placement.sharding_of(dense):
        packed = placement.followed(packed, sharding, len(site.stack))
    del base[(*site.path, site.weight)]
    for name, array in packed._asdict().items():
        if array is not None:
            base[(*site.path, PACKED, name)] = site.in_params(array)
