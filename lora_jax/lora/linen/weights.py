"""The variables of a Flax Linen model: its weights are read, replaced and quantized."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import core, traverse_util

from lora_jax import errors
from lora_jax.kernels import packed as packing
from lora_jax.layers import placement, places
from lora_jax.lora import site as lora_site
from lora_jax.lora.linen import boxes as boxing
from lora_jax.lora.linen import tracing
from lora_jax.lora.linen.sites import Site
from lora_jax.lora.linen.tracing import Params, Path
from lora_jax.quant import formats

Flat = dict[Path, Any]  # arrays, or their shapes
PACKED = "packed"  # holds the arrays of a quantized weight, beside a layer's other parameters
WAS = "was"  # a zero of the dtype that the weight had
OWN = ("lora", "lora_constants", "quantized")  # the collections that are not the model's


def flat(tree: Params, *, constrained: bool = True) -> Flat:
    """{path: array} of nested params, without boxes; constrained: see tracing.unboxed."""
    plain = tracing.unboxed(tree, constrained=constrained)
    return dict(traverse_util.flatten_dict(core.unfreeze(plain)))


@dataclasses.dataclass
class Base:
    """The weights of a model.

    params: flat, without boxes. packed: the quantized ones, {(*Site.key, name): array [*stack, …]}.
    fmt: their format. boxes: those of params and packed. tree: params as they were given. others:
    the model's other collections.
    """

    params: Flat
    packed: Flat
    fmt: str
    boxes: dict[Path, Any]
    tree: Params
    others: dict[str, Params]

    @classmethod
    def of(cls, given: Mapping[str, Any], fmt: str) -> "Base":
        """given: variables, or the collection `params` alone."""
        if not isinstance(given.get("params"), Mapping):
            given = {"params": given}
        tree, packed = given["params"], given.get("quantized", {})
        others = {name: part for name, part in given.items() if name not in ("params", *OWN)}
        boxes = boxing.of(tree) | boxing.of(packed)
        # Packed arrays are split where they can be: they may be too short for their names.
        arrays = flat(tree), flat(packed, constrained=False)
        return cls(*arrays, fmt, boxes, tree, others)

    def check(self, sites: Iterable[Site], model: str) -> None:
        """Raises: UserError if these are not the weights of the model with these sites."""
        problems = []
        for site in sites:
            name, weight = places.dotted(site.key), self.params.get(site.key)
            if weight is None and (*site.key, "q") not in self.packed:
                problems.append(f"{name} is missing")
            elif weight is not None and weight.shape != site.whole:
                problems.append(f"{name} has shape {weight.shape}, expected {site.whole}")
        if problems:
            raise errors.UserError(
                expected=f"params of the {model} that was adapted",
                found=problems,
                do='pass the collection itself, such as module.init(…)["params"]; to `apply`, the '
                "variables that `init` or `attach` made",
            )

    def matrix(self, site: Site) -> jax.Array:
        """The site's weight, dense, as matrices [*lead, K, N]."""
        weight = self.params.get(site.key)
        if weight is not None:
            return placement.matrix(site.linear_map, site.out_of_params(weight))
        arrays = (self.packed.get((*site.key, name)) for name in packing.Packed._fields)
        how = {"fmt": self.fmt, "rows": site.in_features}
        dense = lora_site.each(formats.dequantize, site.stack, packing.Packed(*arrays), **how)
        return dense.astype(self.packed[(*site.key, WAS)].dtype)

    def store(self, site: Site, matrix: jax.Array) -> None:
        """Makes the site's weight the dense one with those matrices."""
        dtype, how = matrix.dtype, site.linear_map
        if (weight := self.params.get(site.key)) is None:
            tensor = placement.unpacked(how, matrix, (*site.stack, *site.shape))
        else:
            dtype = weight.dtype
            tensor = placement.tensor(how, matrix, site.out_of_params(weight))
        self.params[site.key] = site.in_params(tensor.astype(dtype))
        for name in (*packing.Packed._fields, WAS):
            self.packed.pop((*site.key, name), None)

    def add_to_bias(self, site: Site, change: jax.Array) -> None:
        """Adds that much [*lead, N] to the bias of the site's layers."""
        bias = site.out_of_params(self.params[site.of_bias])
        whole = bias.astype(jnp.float32) + change.reshape(bias.shape)
        self.params[site.of_bias] = site.in_params(whole.astype(bias.dtype))

    def pack(self, site: Site) -> None:
        """Quantizes the site's weight."""
        dense = self.matrix(site)
        quantized = lora_site.each(formats.quantize, site.stack, dense, fmt=self.fmt)
        if sharding := placement.sharding_of(dense):
            quantized = placement.followed(quantized, sharding, len(site.stack))
        found = {name: array for name, array in quantized._asdict().items() if array is not None}
        found[WAS] = jnp.zeros((*site.stack, 1), self.params.pop(site.key).dtype)
        box = self.boxes.pop(site.key, None)
        for name, array in found.items():
            key = *site.key, name
            self.packed[key] = array
            if box is not None:
                ends = {"q": "KN", "scale": "KN", "column_scale": ".N"}.get(name, ".")
                if array.ndim == len(site.lead) + len(ends):
                    self.boxes[key] = boxing.beside(site, box, array, ends)

    def placed(self, site: Site, array: jax.Array, ends: str) -> jax.Array:
        """A new array beside the site's weight, split over a mesh as the weight is.

        ends: as of boxes.beside.
        """
        if (weight := self.params.get(site.key)) is None:
            sharding = placement.sharding_of(self.packed[(*site.key, "q")])
        else:
            sharding = placement.of_matrix(site.linear_map, site.out_of_params(weight))
        if sharding is None:
            return array
        num_lead = len(site.lead)
        known = {"K": num_lead, "N": num_lead + 1}
        which = (*range(num_lead), *(known.get(axis) for axis in ends))
        return placement.placed(array, placement.fitting(sharding, array.shape, which))

    def shapes(self, sites: Sequence[Site]) -> Flat:
        """params as the model expects them: the packed ones dense, as shapes."""
        dense = {site.key: jax.ShapeDtypeStruct(site.whole, self.packed[(*site.key, WAS)].dtype)
                 for site in sites if site.key not in self.params}  # fmt: skip
        return {**self.params, **dense}

    def collections(self) -> dict[str, Params]:
        """The variables, in boxes: params, `quantized` if there are any, and the others."""
        found = {"params": boxing.nested(self.params, self.boxes, self.tree), **self.others}
        if self.packed:
            found["quantized"] = boxing.nested(self.packed, self.boxes, {})
        return found
