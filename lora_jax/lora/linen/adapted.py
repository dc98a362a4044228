"""A Flax Linen model with low-rank adapters, whose module stays unedited.

    adapted = linen.adapt(model, config, x)      # from shapes alone
    variables = adapted.init(key, params)        # {"params": …, "lora": A and B}
    y = adapted.apply(variables, x)

Calls of the model's layers are intercepted (flax.linen.intercept_methods) and get x A B added. In
the model, A and B are in params beside the layer's own parameters, so that nn.scan, nn.vmap and
nn.remat treat them alike. Outside they are the collection `lora`. A weight that the model reads in
any other way is replaced by W + scaling · A B in params.
"""

import collections
import dataclasses
import math
import zlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import core, traverse_util
from flax import linen as nn
from jaxtyping import PRNGKeyArray

from lora_jax import errors
from lora_jax.layers import places
from lora_jax.lora import adapter as lora_adapter
from lora_jax.lora import algebra, pissa, targets
from lora_jax.lora import config as lora_config
from lora_jax.lora import site as lora_site
from lora_jax.lora.linen import boxes as boxing
from lora_jax.lora.linen import calls, reads, summary, tracing, weights
from lora_jax.lora.linen import saved as linen_saved
from lora_jax.lora.linen.sites import Site
from lora_jax.lora.linen.tracing import Params, Path
from lora_jax.lora.linen.weights import PACKED, Base, Flat


@dataclasses.dataclass(frozen=True, eq=False)
class Adapted:
    """A Linen model with adapters; made by `adapt`. `print` shows what was taken and left.

    Its variables are `params`; `quantized`, the arrays of packed weights, by their parameters'
    paths; and `lora`, which is trained, in float32: lora_A [*stack, K, R] and lora_B [*stack, R, N]
    under the path of each adapted layer or parameter. If adapters need constants computed from the
    base, there is a collection `lora_constants` too. Boxes, such as nn.Partitioned, stay as they
    are, and new arrays get boxes like those of their weight.
    """

    module: nn.Module
    config: lora_config.LoRAConfig | None
    quant: str
    sites: tuple[Site, ...]  # all, also those that are not adapted
    layer_configs: Mapping[Path, lora_site.LayerConfigs]  # by Site.at, of the adapted sites
    packs: frozenset[Path]  # Site.at of the quantized sites
    saved: tuple[Path, ...]  # the fully trained modules
    left: Mapping[str, str]  # why a weight is not adapted or not quantized, by its name
    shapes: Mapping[str, Params] = dataclasses.field(repr=False)  # of the module's variables
    examples: tuple[tracing.Call, ...] = dataclasses.field(repr=False)
    _known: dict[Any, frozenset[Path]] = dataclasses.field(default_factory=dict, repr=False)

    def __str__(self) -> str:
        """A line for each weight of two or more axes: what it has, and why it lacks something."""
        base = Base.of(self.shapes, self.quant)
        found = [self._products(base, call, None, {}) for call in self.examples]
        return summary.text(self, frozenset.intersection(*found))

    def init(self, key: PRNGKeyArray, params: Params) -> dict[str, Params]:
        """Variables with new adapters on `params`, which it quantizes if `quant` is a format.

        params: the collection, or all variables, whose other collections are kept.
        The model's output does not change (except by rounding): B = 0. With PiSSA, A B is
        subtracted from params before they are quantized.
        Raises: UserError if params are not those of this model.
        """
        base, factors, start = self._base(params), {}, {}
        if self.config is not None and self.config.init_lora_weights != "default":
            linear = (site for site in self._adapted() if site.kind == "linear")
            pissa.check((site, self.layer_configs[site.at]) for site in linear)
        for site in self._adapted():
            configs = self.layer_configs[site.at]
            if self.config.init_lora_weights == "default" or site.kind != "linear":
                own = jax.random.fold_in(key, _number(site))
                factors[site.at] = *lora_site.initial(site, configs, own), None, None
            else:
                A, B = start[site.at] = self._principal(site, base, self.config)
                factors[site.at] = A, B, None, None
        return self._variables(base, factors, start)

    def attach(self, params: Params, adapter: lora_adapter.Adapter) -> dict[str, Params]:
        """Variables with the A and B of an adapter from a model of any framework.

        params: see `init`.
        Raises: UserError that lists everything that does not fit, see Adapter.check; if the adapter
        has no effect, or has settings with which this config computes something else; if params
        are not those of this model.
        """
        base = self._base(params)
        names = {name: own for site in self._adapted()
                 for name, own in zip(site.names, self.layer_configs[site.at], strict=True)
                 if own}  # fmt: skip
        layers = {name: site.layer for site in self.sites for name in site.names}
        saved = {tensor.name: tensor.shape for tensor in self._tensors(base)}
        adapter.check(names, layers, saved, "the adapter")
        adapter.check_effect("the adapter")
        factors, start, problems = {}, {}, []
        for name in ("use_dora", "lora_bias"):
            if (given := getattr(adapter.config, name)) != getattr(self.config, name, False):
                problems.append(f"{name} = {given}")
        for name, own in names.items():
            if not math.isclose(given := adapter.scaling(name), own.scaling, rel_tol=1e-6):
                problems.append(f"{name} is scaled by {given:g}, in this model by {own.scaling:g}")
        for site in self._adapted():
            configs = self.layer_configs[site.at]
            if adapter.config.init_lora_weights != "default" and site.kind == "linear":
                start[site.at] = self._principal(site, base, adapter.config)
            filled = lora_site.filled(site, configs, adapter.factors, adapter.config)
            factors[site.at], mask = filled, lora_site.mask(site, configs)
            if mask is not None and (filled[1] * (1 - mask)).any():
                problems.append(f"{site.names[0]} has B outside the adapted parts")
        if problems:
            raise errors.UserError(
                expected="an adapter with the settings of the adapted model",
                found=problems,
                where="the adapter",
                do="linen.adapt(module, adapter.config, …)",
            )
        return self._variables(base, factors, start, adapter.saved)

    def apply(
        self,
        variables: Mapping[str, Params],
        *args: Any,
        rngs: Mapping[str, PRNGKeyArray] | None = None,
        method: str | Callable | None = None,
        mutable: Any = False,
        capture_intermediates: Any = False,
        **kwargs: Any,
    ) -> Any:
        """module.apply with the adapters. rngs: a key named `lora` turns their dropout on.

        Raises: UserError if the weights are neither in "params" nor in "quantized"; for dropout on
        a weight that this call reads in another way than by a product, so that the adapter has no
        input of its own.
        """
        rngs = dict(rngs or {})
        key = rngs.pop("lora", None)
        key = key if self.config is not None and self.config.dropout else None
        base, call = Base.of(variables, self.quant), tracing.Call(*args, method=method, **kwargs)
        if self.packs and "quantized" not in variables:
            base.check(self.sites, type(self.module).__name__)  # they may be dense
        if mutable is not False:
            mutable = core.scope.subtract_filters(mutable, ("params", *weights.OWN))
        settings = {"mutable": mutable, "capture_intermediates": capture_intermediates}
        trained = weights.flat(variables.get("lora", {}))
        for of_base, copied in linen_saved.copies(self.saved, trained):
            base.params[of_base] = trained.pop(copied).astype(base.params[of_base].dtype)
        direct = self._products(base, call, rngs, settings)
        constants = weights.flat(variables.get("lora_constants", {}))
        params = self._merged(base, trained, constants, direct, key)
        sites = [site for site in self.sites if site.at in direct]
        rate = 0.0 if self.config is None else self.config.dropout
        intercept = calls.interceptor(sites, self.quant, rate)
        with tracing.intercepted(intercept, (self, direct)):
            return self.module.apply(
                {"params": params, **base.others}, *args, rngs=rngs, method=call.of(self.module),
                **settings, **kwargs,
            )  # fmt: skip

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
            start = tuple(constants.get((*site.at, name)) for name in _START)
            start = None if start[0] is None else start
            configs = zip(site.names, self.layer_configs[site.at], strict=True)
            for index, (name, own) in enumerate(configs):
                if own:
                    arrays = own.rank, A, B, *(magnitude or [None]), start
                    of_b = self._bias_of_b(site, trained)
                    found[name] = lora_site.collected(site, index, *arrays, of_b)
        base, saved = Base.of(variables, self.quant), {}
        for tensor in self._tensors(base):
            array = tensor.layer(trained[(*tensor.path, "modules_to_save", *tensor.end)])
            array = array.astype(base.params[(*tensor.path, *tensor.end)].dtype)
            saved[tensor.name] = np.asarray(array).transpose(tensor.turn)
        ranks = {name: own.B.shape[0] for name, own in found.items()}
        config = targets.with_ranks(self.config, ranks)
        return lora_adapter.Adapter(config, found, saved, base_model)

    def merge(self, variables: Mapping[str, Params]) -> Params:
        """params with W + scaling · A B instead of W, all of them dense; the tree that `init` got.

        With lora_bias, a layer's own bias changes by scaling · lora_bias.
        Raises: UserError if there are adapters and variables have no "lora"; for lora_bias, if a
        layer has no bias.
        """
        base = Base.of(variables, self.quant)
        trained = self._trained(variables) if self.layer_configs or self.saved else {}
        if self.config is not None and self.config.lora_bias:
            lora_adapter.check_mergeable([summary.name(site) for site in self._adapted()
                                          if site.of_bias not in base.params])  # fmt: skip
        of_module = boxing.of(self.shapes["params"])
        for site in self.sites:
            if site.key not in base.params and (*site.key, "q") in base.boxes:
                base.boxes[site.key] = of_module[site.key]
            if site.at in self.layer_configs:
                own = base.matrix(site), *self._arrays(site, trained)
                base.store(site, lora_site.each(algebra.merged, site.lead, *own))
                if (of_b := self._bias_of_b(site, trained)) is not None:
                    base.add_to_bias(site, of_b * self._scaling(site)[..., 0])
            elif site.at in self.packs:
                base.store(site, base.matrix(site))
        for of_base, copied in linen_saved.copies(self.saved, trained):
            base.params[of_base] = trained[copied].astype(base.params[of_base].dtype)
        return base.collections()["params"]

    def _trained(self, variables: Mapping[str, Params]) -> Flat:
        """The collection "lora", flat. Raises: UserError if it is missing."""
        if self.config is None or "lora" not in variables:
            raise errors.UserError(
                expected='variables with adapters, in "lora"',
                found="a base alone" if self.config is None else ", ".join(variables),
                do="linen.adapt with a LoRAConfig, then init or attach",
            )
        return weights.flat(variables["lora"])

    def _base(self, given: Mapping[str, Any]) -> Base:
        base = Base.of(given, self.quant)
        base.check(self.sites, type(self.module).__name__)
        return base

    def _adapted(self) -> Iterator[Site]:
        return (site for site in self.sites if site.at in self.layer_configs)

    def _products(self, base: Base, call: tracing.Call, rngs, settings) -> frozenset[Path]:
        """Site.at of the changed sites whose weight the call reads only by products."""
        sites = [site for site in self.sites if site.at in self.packs | self.layer_configs.keys()]
        given = tracing.signature((base.others, rngs, call.args, dict(call.kwargs)))
        known = given, call.method, repr(settings)
        if given is None or known not in self._known:
            found = reads.only_by_products(
                self.module, sites, base.shapes(sites), base.others, call, rngs=rngs, **settings
            )
            if given is None:
                return found
            self._known[known] = found
        return self._known[known]

    def _variables(self, base: Base, factors, start, given=None) -> dict[str, Params]:
        """The collections.

        base: not yet quantized. factors: {Site.at: (A, B, magnitude or None, bias of B or None)}.
        start: {Site.at: PiSSA's A and B}. given: values of fully trained modules.
        """
        of_module, boxes = boxing.of(self.shapes["params"]), {}
        # Copies, because a training step may reuse the memory of A and B.
        constants = {(*at, name): jnp.array(array) for at, own in start.items()
                     for name, array in zip(_START, own, strict=True)}  # fmt: skip
        for site in self.sites:
            if site.key in base.boxes or (*site.key, "q") in base.boxes:
                boxes[site.at] = base.boxes.get(site.key) or of_module[site.key]
            if site.at in self.packs and site.key in base.params:
                base.pack(site)
        trained, boxed = {}, {}
        for site in self._adapted():
            A, B, magnitude, of_b = factors[site.at]
            own = {"lora_A": (A, "K."), "lora_B": (B, ".N")}
            if self.config.use_dora:
                weight, scaling = base.matrix(site), self._scaling(site)
                length = lora_site.each(algebra.lengths, site.lead, weight, A, B, scaling)
                if magnitude is not None:
                    length = jnp.where(scaling[..., 0] == 0, length, magnitude)
                own["lora_magnitude_vector"] = length, "N"
                if site.at in self.packs:
                    square = lora_site.each(algebra.squares, site.lead, weight)
                    constants[(*site.at, "lora_square")] = square
            if self.config.lora_bias:
                zeros = jnp.zeros((*site.lead, site.out_features))
                own["lora_bias"] = zeros if of_b is None else of_b, "N"
            for name, (array, ends) in own.items():
                key = (*site.at, name)
                trained[key] = base.placed(site, array, ends)
                if site.at in boxes:
                    boxed[key] = boxing.beside(site, boxes[site.at], array, ends)
        for path in self.saved:
            for key in [key for key in base.params if key[: len(path)] == path]:
                copied = (*path, "modules_to_save", *key[len(path) :])
                trained[copied] = jnp.array(base.params[key], jnp.float32)
                if key in base.boxes:
                    boxed[copied] = base.boxes[key]
        for tensor in self._tensors(base) if given else ():
            key = (*tensor.path, "modules_to_save", *tensor.end)
            array = given[tensor.name].astype(np.float32).transpose(np.argsort(tensor.turn))
            trained[key] = tensor.filled(trained[key], array)
        found = {**base.collections(), "lora": boxing.nested(trained, boxed, {})}
        if constants:
            found["lora_constants"] = traverse_util.unflatten_dict(constants)
        return found

    def _merged(self, base: Base, trained: Flat, constants: Flat, direct, key) -> Params:
        """The params to apply the module with: of `direct` sites, the weight with the adapter's
        arrays beside it; of the others, W + scaling · A B."""
        flat, refused = base.params, []
        more: dict[Path, Flat] = collections.defaultdict(dict)  # what lies at a path
        for path, array in (trained | constants | base.packed).items():
            more[path[:-1]][path[-1]] = array
        for site in self.sites:
            adapted = site.at in self.layer_configs
            if site.at not in direct:
                if adapted:
                    if key is not None and site.kind != "embedding":
                        refused.append(summary.name(site))
                    if self.config.lora_bias:
                        refused.append(f"{summary.name(site)}, with lora_bias")
                    base.store(
                        site, algebra.merged(base.matrix(site), *self._arrays(site, trained))
                    )
                elif site.at in self.packs:
                    base.store(site, base.matrix(site))
                continue
            if site.at in self.packs:
                for name, array in more[site.key].items():
                    flat[(*site.beside, PACKED, name)] = site.in_params(array)
            if adapted:
                own = {"lora_scaling": self._scaling(site),
                       "lora_mask": lora_site.mask(site, self.layer_configs[site.at])}  # fmt: skip
                if key is not None and site.kind != "embedding":
                    each, lead = jax.random.fold_in(key, _number(site)), site.stack
                    keys = jax.random.split(each, lead) if lead else each
                    own["lora_dropout_key"] = jax.random.key_data(keys)
                own |= more[site.at]
                for name, array in own.items():
                    if array is not None and name not in _START:
                        flat[(*site.beside, name)] = site.in_params(array)
        if refused:
            raise errors.UserError(
                expected="dropout and lora_bias on adapters of layers that only multiply by their "
                "weight",
                found=[f"the model reads the weight of {name} in another way" for name in refused],
                do="use dropout=0, leave these layers out, or call `apply` without the key `lora`; "
                "with lora_bias, leave them out",
            )
        return traverse_util.unflatten_dict(flat)

    def _scaling(self, site: Site) -> jax.Array:
        return lora_site.scaling(site, self.layer_configs[site.at])

    def _arrays(self, site: Site, trained: Flat) -> tuple[jax.Array, ...]:
        """A, B (zero where it is masked), the scaling, and with DoRA the magnitude."""
        A, B = trained[(*site.at, "lora_A")], trained[(*site.at, "lora_B")]
        mask = lora_site.mask(site, self.layer_configs[site.at])
        magnitude = trained.get((*site.at, "lora_magnitude_vector"))
        B = B if mask is None else B * mask
        return (A, B, self._scaling(site), *([] if magnitude is None else [magnitude]))

    def _bias_of_b(self, site: Site, trained: Flat) -> jax.Array | None:
        """The bias of B, zero at outputs that are not adapted; None without lora_bias."""
        bias = trained.get((*site.at, "lora_bias"))
        mask = lora_site.mask(site, self.layer_configs[site.at])
        return bias if bias is None or mask is None else bias * mask.max(axis=-2)

    def _principal(
        self, site: Site, base: Base, config: lora_config.LoRAConfig
    ) -> tuple[jax.Array, jax.Array]:
        """The initial A and B of PiSSA or OLoRA, which it subtracts from the site's weight."""
        if site.key not in base.params:
            raise errors.UserError(
                expected="weights before quantization, to compute the initial A and B from",
                found="a packed weight",
                where=places.dotted(site.path),
                do="pass the dense params to `init`",
            )
        matrix, configs = base.matrix(site), self.layer_configs[site.at]
        A, B = pissa.initial(
            site,
            configs,
            config.init_lora_weights,
            lambda index: matrix[np.unravel_index(index, site.lead)],
        )
        rest = lora_site.each(algebra.merged, site.lead, matrix, A, B, -self._scaling(site))
        base.store(site, rest)
        return A, B

    def _tensors(self, base: Base) -> Iterator[linen_saved.Tensor]:
        return linen_saved.tensors(self.saved, self.sites, base.params)


def _number(site: Site) -> int:
    """A number of its own for each site's random keys."""
    return zlib.crc32(places.dotted(site.at).encode())


_START = ("lora_initial_A", "lora_initial_B")  # what PiSSA subtracted from the base
