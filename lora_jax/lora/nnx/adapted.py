"""What has an adapter in a Flax NNX model."""

import dataclasses

from flax import nnx

from lora_jax import errors
from lora_jax.layers import places
from lora_jax.lora.nnx import layer as lora_layer
from lora_jax.lora.nnx import parameters, saved, sites


def find(model: nnx.Module) -> list[sites.Site]:
    """The sites of the model that have an adapter."""
    layers = (site for site in sites.find(model) if lora_layer.is_adapted(site.module))
    return [dataclasses.replace(site, names=site.module.lora_names)
            for site in (*layers, *parameters.adapted(model))]  # fmt: skip


def refuse(model: nnx.Module, *others: sites.Site) -> None:
    """Raises: UserError if the model has an adapter already. others: sites with one of a bank."""
    found = [site.names[0] for site in (*find(model), *others)]
    found += [places.dotted(whole.path) for whole in saved.find(model)]
    if found:
        raise errors.UserError(
            expected="a model without adapters",
            found=[f"{name} has one" for name in found],
            do="load the base model again, or lora.merge(model) first",
        )


def by_name(model: nnx.Module) -> dict[str, tuple[sites.Site, int]]:
    """{dotted path of each adapted layer: (its site, its index among the site's names)}."""
    return {
        name: (site, index)
        for site in find(model)
        for index, name in enumerate(site.names)
        if site.module.lora_ranks[index]
    }
