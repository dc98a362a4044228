"""PiSSA and OLoRA in a Flax NNX model: A and B are taken from the weights, which keep the rest."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jaxtyping import Array, Num

from lora_jax import errors
from lora_jax.layers import linear_map
from lora_jax.lora import adapter as lora_adapter
from lora_jax.lora import algebra, pissa, targets
from lora_jax.lora import config as lora_config
from lora_jax.lora import site as lora_site
from lora_jax.lora.nnx.sites import Site
from lora_jax.quant import linear as quant_linear


class Principal(dict[str, tuple[np.ndarray, np.ndarray]]):
    """PiSSA's {dotted path: (A, B)} of a model whose weights are quantized as they are loaded.

    principal = Principal(config)
    model = loader.load(folder, quantization="int4", residual=principal.take)
    inject(model, config, rngs=rngs, principal=principal)
    """

    def __init__(self, config: lora_config.LoRAConfig):
        super().__init__()
        self._config = config

    def take(self, path: str, weight: Num[Array, "N K"]) -> Num[Array, "N K"]:
        """The weight without s · A B, float32; the weight itself if `path` is not targeted."""
        if not targets.is_chosen(path, self._config):
            return weight
        n, k = weight.shape
        own = targets.layer_config(path, n, self._config)
        site = lora_site.Site(
            names=(path,), lead=(), linear_map=linear_map.LINEAR, in_features=k, out_features=n
        )
        pissa.check([(site, [own])])
        init = self._config.init_lora_weights
        A, B = self[path] = pissa.initial_of_layer(_whole(weight).T, own, init)
        change = np.float32(own.scaling) * B.T @ A.T
        where = weight.sharding
        taken = jax.make_array_from_callback(change.shape, where, lambda part: change[part])
        return weight.astype(jnp.float32) - taken


def check(
    sites: list[tuple[Site, lora_site.LayerConfigs]], given: Mapping[str, Any] | None
) -> None:
    """Raises: UserError for each linear layer whose A and B are not `given` and not computable."""
    linear = [(site, configs) for site, configs in sites if site.kind == "linear"]
    if given is None:
        pissa.check(linear)
    problems = []
    for site, configs in linear:
        packed = quant_linear.packed_of(site.module)
        if given is None and packed:
            problems.append(f"{site.names[0]} is in {packed.fmt}")
        elif given is not None:
            missing = (name for name, own in zip(site.names, configs, strict=True)
                       if own and name not in given)  # fmt: skip
            problems += [f"{name} is not in `principal`" for name in missing]
    if problems:
        raise errors.UserError(
            expected="weights before quantization, to compute the initial A and B from",
            found=problems,
            do="inject before quantizing, or see lora.Principal; load and merge an adapter with "
            "--quant none",
        )


def take(
    site: Site,
    configs: lora_site.LayerConfigs,
    config: lora_config.LoRAConfig,
    given: Mapping[str, Any] | None,
) -> tuple[jax.Array, jax.Array]:
    """PiSSA's A and B, subtracted from the site's weight unless they are `given`."""
    if given is not None:
        factors = {
            name: lora_adapter.Factors(*map(np.asarray, pair)) for name, pair in given.items()
        }
        plain = dataclasses.replace(config, use_dora=False)
        return lora_site.filled(site, configs, factors, plain)[:2]
    matrix = site.matrix()
    A, B = pissa.initial(
        site,
        configs,
        config.init_lora_weights,
        lambda index: _whole(matrix[np.unravel_index(index, site.lead)]),
    )
    site.set_matrix(site.each(algebra.merged, A, B, -lora_site.scaling(site, configs)))
    return A, B


def _whole(array: jax.Array) -> jax.Array:
    """The array on one device of this process, gathered from all."""
    return jnp.asarray(multihost_utils.process_allgather(array, tiled=True))
