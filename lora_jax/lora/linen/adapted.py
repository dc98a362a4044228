"""Low-rank adapters for Flax Linen models, whose modules stay unedited.

    adapted = linen.adapt(model, config, x)      # from shapes alone
    variables = adapted.init(key, params)        # {"params": …, "lora": A and B}
    y = adapted.apply(variables, x)

Calls of the model's layers are intercepted (flax.linen.intercept_methods). In the model, A and B
are in params beside the layer's own parameters, so that nn.scan, nn.vmap and nn.remat treat them
alike. Outside they are the collection `lora`.
"""

import dataclasses
import math
import zlib
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import traverse_util
from jaxtyping import PRNGKeyArray

from lora_jax import errors
from lora_jax.lora import adapter as lora_adapter
from lora_jax.lora import algebra, pissa, targets
from lora_jax.lora import config as lora_config
from lora_jax.lora import site as lora_site
from lora_jax.lora.linen import calls, second_uses, sharding, weights
from lora_jax.lora.linen import saved as linen_saved
from lora_jax.lora.linen import sites as linen_sites
from lora_jax.lora.linen.sites import Params, Path, Site
from lora_jax.lora.linen.weights import Flat
from lora_jax.quant import formats


def adapt(
    module: nn.Module,
    config: lora_config.LoRAConfig | None,
    *args: Any,
    quant: str = "none",
    exclude: tuple[str, ...] = ("lm_head",),
    strict: bool = True,
    **kwargs: Any,
) -> "Adapted":
    """`module` with adapters on the layers that `config` targets, on a base in the format `quant`.

    args, kwargs: of a call of the module, arrays or their shapes; nothing is computed.
    config: None for a quantized base alone. exclude: names of layers that are not quantized.
    strict: settings that match nothing are an error; files of other programs have such settings.
    Raises: UserError if a target matches nothing, with the names that exist, or matches something
    that cannot be adapted; if the weight of a layer to quantize is not found; if the model reads
    such a weight in a second place.
    """
    if quant != "none":
        formats.codes(quant)  # raises if unknown
    sites, others, params = linen_sites.survey(module, *args, **kwargs)
    chosen: dict[Path, lora_site.LayerConfigs] = {}
    saved: tuple[Path, ...] = ()
    if config is not None:
        found = lora_site.select(sites, config, others, strict=strict)
        chosen = {site.path: own for site, own in zip(sites, found, strict=True) if any(own)}
        saved = linen_saved.choose(params, config.modules_to_save)
    packs: set[Path] = set()
    if quant != "none":
        packs = weights.to_pack(sites, others, quant, exclude) - set(saved)
        if not packs:
            raise errors.UserError(
                expected=f"linear layers to quantize to {quant}",
                found="none that is not excluded",
                where=", ".join(".".join(site.path) for site in sites) or type(module).__name__,
            )
    changed = [site for site in sites if site.path in packs | chosen.keys()]
    second_uses.refuse(module, changed, args, kwargs)
    return Adapted(module, config, quant, sites, chosen, frozenset(packs), saved)


@dataclasses.dataclass(frozen=True, eq=False)
class Adapted:
    """A Linen model with adapters; made by `adapt`.

    Its variables are `params`, and `lora`, which is trained, in float32: lora_A [*stack, K, R] and
    lora_B [*stack, R, N] under the path of each adapted layer. If adapters need constants computed
    from the base, there is a collection `lora_constants` too.
    """

    module: nn.Module
    config: lora_config.LoRAConfig | None
    quant: str
    sites: tuple[Site, ...]  # all, also those that are not adapted
    layer_configs: Mapping[Path, lora_site.LayerConfigs]  # of the adapted sites
    packs: frozenset[Path]  # the quantized sites
    saved: tuple[Path, ...]  # the fully trained modules

    def init(self, key: PRNGKeyArray, params: Params) -> dict[str, Params]:
        """Variables with new adapters on `params`, which it quantizes if `quant` is a format.

        The model's output does not change (except by rounding): B = 0. With PiSSA, A B is
        subtracted from params before they are quantized.
        Raises: UserError if params are not those of this model.
        """
        base, factors, start = self._base(params), {}, {}
        if self.config is not None and self.config.init_lora_weights != "default":
            linear = (site for site in self._adapted() if site.kind == "linear")
            pissa.check((site, self.layer_configs[site.path]) for site in linear)
        for site in self._adapted():
            configs = self.layer_configs[site.path]
            if self.config.init_lora_weights == "default" or site.kind != "linear":
                own = jax.random.fold_in(key, zlib.crc32(".".join(site.path).encode()))
                factors[site.path] = *lora_site.initial(site, configs, own), None
            else:
                A, B = start[site.path] = self._principal(site, base)
                factors[site.path] = A, B, None
        return self._variables(base, sharding.boxes(params), factors, start)

    def attach(self, params: Params, adapter: lora_adapter.Adapter) -> dict[str, Params]:
        """Variables with the A and B of an adapter from a model of any framework.

        Raises: UserError that lists everything that does not fit, see Adapter.check; if the adapter
        has no effect, or has settings with which this config computes something else; if params
        are not those of this model.
        """
        base = self._base(params)
        names = {name: own for site in self._adapted()
                 for name, own in zip(site.names, self.layer_configs[site.path], strict=True)
                 if own}  # fmt: skip
        layers = {name: site.layer for site in self.sites for name in site.names}
        saved = {tensor.name: tensor.shape for tensor in self._tensors(base)}
        adapter.check(names, layers, saved, "the adapter")
        adapter.check_effect("the adapter")
        factors, problems = {}, []
        if adapter.config.use_dora != (self.config is not None and self.config.use_dora):
            problems.append(f"use_dora = {adapter.config.use_dora}")
        for name, own in names.items():
            if not math.isclose(given := adapter.scaling(name), own.scaling, rel_tol=1e-6):
                problems.append(f"{name} is scaled by {given:g}, in this model by {own.scaling:g}")
        for site in self._adapted():
            configs = self.layer_configs[site.path]
            filled = lora_site.filled(site, configs, adapter.factors, adapter.config.use_dora)
            factors[site.path], mask = filled, lora_site.mask(site, configs)
            if mask is not None and (filled[1] * (1 - mask)).any():
                problems.append(f"{site.names[0]} has B outside the adapted parts")
        if problems:
            raise errors.UserError(
                expected="an adapter with the settings of the adapted model",
                found=problems,
                where="the adapter",
                do="linen.adapt(module, adapter.config, …)",
            )
        return self._variables(base, sharding.boxes(params), factors, {}, adapter.saved)

    def apply(
        self,
        variables: Mapping[str, Params],
        *args: Any,
        rngs: Mapping[str, PRNGKeyArray] | None = None,
        **kwargs: Any,
    ) -> Any:
        """module.apply with the adapters. rngs: a key named `lora` turns their dropout on."""
        rngs = dict(rngs or {})
        merged = self._merged(variables, rngs.pop("lora", None))
        own = ("params", "lora", "lora_constants")
        others = {name: part for name, part in variables.items() if name not in own}
        rate = 0.0 if self.config is None else self.config.dropout
        intercept = calls.interceptor(self.sites, self.quant, rate)
        with linen_sites.intercepted(intercept, self):
            return self.module.apply({"params": merged, **others}, *args, rngs=rngs, **kwargs)

    def collect(
        self, variables: Mapping[str, Params], *, base_model: str | None = None
    ) -> lora_adapter.Adapter:
        """The adapters as arrays on the host, for peft.write or another model.

        Raises: UserError if variables have no "lora".
        """
        trained, found = self._trained(variables), {}
        constants = weights.flat(variables.get("lora_constants", {}))
        for site in self._adapted():
            A, B, _, *magnitude = self._arrays(site, trained)
            start = tuple(constants.get((*site.path, name)) for name in _START)
            start = None if start[0] is None else start
            configs = zip(site.names, self.layer_configs[site.path], strict=True)
            for index, (name, own) in enumerate(configs):
                if own:
                    arrays = own.rank, A, B, *(magnitude or [None]), start
                    found[name] = lora_site.collected(site, index, *arrays)
        base, saved = weights.flat(variables["params"]), {}
        for tensor in self._tensors(base):
            array = tensor.layer(trained[(*tensor.path, "modules_to_save", *tensor.end)])
            array = array.astype(base[(*tensor.path, *tensor.end)].dtype)
            saved[tensor.name] = np.asarray(array).transpose(tensor.turn)
        ranks = {name: own.B.shape[0] for name, own in found.items()}
        config = targets.with_ranks(self.config, ranks)
        return lora_adapter.Adapter(config, found, saved, base_model)

    def merge(self, variables: Mapping[str, Params]) -> Params:
        """params with W + scaling · A B instead of W, all of them dense.

        Raises: UserError if there are adapters and variables have no "lora".
        """
        base = weights.flat(variables["params"])
        trained = self._trained(variables) if self.layer_configs or self.saved else {}
        for site in self.sites:
            if site.path in self.layer_configs:
                own = self._matrix(site, base), *self._arrays(site, trained)
                weights.store(site, base, lora_site.each(algebra.merged, site.lead, *own))
            elif site.path in self.packs:
                weights.store(site, base, self._matrix(site, base))
        for of_base, copied in linen_saved.copies(self.saved, trained):
            base[of_base] = trained[copied].astype(base[of_base].dtype)
        return traverse_util.unflatten_dict(base)

    def _trained(self, variables: Mapping[str, Params]) -> Flat:
        """The collection "lora", flat. Raises: UserError if it is missing."""
        if self.config is None or "lora" not in variables:
            raise errors.UserError(
                expected='variables with adapters, in "lora"',
                found="a base alone" if self.config is None else ", ".join(variables),
                do="linen.adapt with a LoRAConfig, then init or attach",
            )
        return weights.flat(variables["lora"])

    def _base(self, params: Params) -> Flat:
        return weights.check(self.sites, params, type(self.module).__name__)

    def _adapted(self) -> Iterator[Site]:
        return (site for site in self.sites if site.path in self.layer_configs)

    def _variables(self, base, boxes, factors, start, given=None) -> dict[str, Params]:
        """The collections.

        base: params, flat and not yet quantized. boxes: see sharding.boxes. factors: {path: (A, B,
        magnitude or None)}.
        start: {path: PiSSA's A and B}. given: values of fully trained modules.
        """
        # Copies, because a training step may reuse the memory of A and B.
        constants = {(*path, name): jnp.array(array) for path, own in start.items()
                     for name, array in zip(_START, own, strict=True)}  # fmt: skip
        for site in self.sites:
            if site.path in self.packs and (*site.path, site.weight) in base:
                weights.pack(site, base, self.quant)
        trained = {}
        for site in self._adapted():
            A, B, magnitude = factors[site.path]
            if self.config.use_dora:
                weight, scaling = self._matrix(site, base), self._scaling(site)
                length = lora_site.each(algebra.lengths, site.lead, weight, A, B, scaling)
                if magnitude is not None:
                    length = jnp.where(scaling[..., 0] == 0, length, magnitude)
                length = sharding.magnitude(site, base, boxes, length)
                trained[(*site.path, "lora_magnitude_vector")] = length
                if site.path in self.packs:
                    square = lora_site.each(algebra.squares, site.lead, weight)
                    constants[(*site.path, "lora_square")] = square
            A, B = sharding.params(site, base, boxes, A, B)
            trained[(*site.path, "lora_A")], trained[(*site.path, "lora_B")] = A, B
        for path in self.saved:
            for key in [key for key in base if key[: len(path)] == path]:
                copied = (*path, "modules_to_save", *key[len(path) :])
                trained[copied] = jnp.array(base[key], jnp.float32)
        for tensor in self._tensors(base) if given else ():
            key = (*tensor.path, "modules_to_save", *tensor.end)
            array = given[tensor.name].astype(np.float32).transpose(np.argsort(tensor.turn))
            trained[key] = tensor.filled(trained[key], array)
        found = {"params": base, "lora": trained} | (
            {"lora_constants": constants} if constants else {}
        )
        return {name: traverse_util.unflatten_dict(flat) for name, flat in found.items()}

    def _merged(self, variables, key) -> Params:
        """The params to apply the module with: those of each layer, with its adapter's arrays."""
        base, trained = weights.flat(variables["params"]), weights.flat(variables.get("lora", {}))
        for of_base, copied in linen_saved.copies(self.saved, trained):
            base[of_base] = trained.pop(copied).astype(base[of_base].dtype)
        more = trained | weights.flat(variables.get("lora_constants", {}))
        for site in self._adapted():
            own = {"lora_scaling": self._scaling(site),
                   "lora_mask": lora_site.mask(site, self.layer_configs[site.path])}  # fmt: skip
            if key is not None and self.config.dropout and site.kind != "embedding":
                each = jax.random.fold_in(key, zlib.crc32(".".join(site.path).encode()))
                lead = site.stack
                keys = jax.random.split(each, lead) if lead else each
                own["lora_dropout_key"] = jax.random.key_data(keys)
            own |= {at[-1]: array for at, array in more.items() if at[:-1] == site.path}
            for name, array in own.items():
                if array is not None and name not in _START:
                    base[(*site.path, name)] = site.in_params(array)
        return traverse_util.unflatten_dict(base)

    def _scaling(self, site: Site) -> jax.Array:
        return lora_site.scaling(site, self.layer_configs[site.path])

    def _arrays(self, site: Site, trained: Flat) -> tuple[jax.Array, ...]:
        """A, B (zero where it is masked), the scaling, and with DoRA the magnitude."""
        A, B = trained[(*site.path, "lora_A")], trained[(*site.path, "lora_B")]
        mask = lora_site.mask(site, self.layer_configs[site.path])
        magnitude = trained.get((*site.path, "lora_magnitude_vector"))
        B = B if mask is None else B * mask
        return (A, B, self._scaling(site), *([] if magnitude is None else [magnitude]))

    def _principal(self, site: Site, base: Flat) -> tuple[jax.Array, jax.Array]:
        """PiSSA's A and B, which it subtracts from the site's weight."""
        if (*site.path, site.weight) not in base:
            raise errors.UserError(
                expected="weights before quantization, to compute PiSSA's A and B from",
                found="a packed weight",
                where=".".join(site.path),
                do="pass the dense params to `init`",
            )
        matrix, configs = self._matrix(site, base), self.layer_configs[site.path]
        A, B = pissa.initial(
            site,
            configs,
            self.config.init_lora_weights,
            lambda index: matrix[np.unravel_index(index, site.lead)],
        )
        rest = lora_site.each(algebra.merged, site.lead, matrix, A, B, -self._scaling(site))
        weights.store(site, base, rest)
        return A, B

    def _matrix(self, site: Site, base: Flat) -> jax.Array:
        return weights.matrix(site, base, self.quant)

    def _tensors(self, base: Flat) -> Iterator[linen_saved.Tensor]:
        return linen_saved.tensors(self.saved, self.sites, base)


_START = ("lora_initial_A", "lora_initial_B")  # what PiSSA subtracted from the base
