"""Low-rank adapters for Flax Linen models: the user's module unedited, or `LoRADense` in it.

    adapted = linen.adapt(model, config, x)      # from shapes alone
    variables = adapted.init(key, params)        # {"params": …, "lora": A and B}
    y = adapted.apply(variables, x)

Calls of the model's layers are intercepted (flax.linen.intercept_methods). Inside the model A and B
lie beside their layer's own parameters, so that nn.scan, nn.vmap and nn.remat hand them on as they
do those; outside they are the collection `lora`.
"""

import dataclasses
import functools
import inspect
import math
import zlib
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import traverse_util
from jaxtyping import Array, Float, PRNGKeyArray

from lora_jax import errors
from lora_jax.kernels import int4_matmul, int8_matmul, matmul
from lora_jax.kernels import packed as packing
from lora_jax.layers import linear_map
from lora_jax.lora import adapter as host
from lora_jax.lora import algebra, targets
from lora_jax.lora import config as lora_config
from lora_jax.lora import forward as adapting
from lora_jax.lora import site as place
from lora_jax.lora.linen import sites as linen_sites
from lora_jax.lora.linen.sites import Params, Path
from lora_jax.quant import formats

register, find = linen_sites.register, linen_sites.find
Flat = dict[Path, jax.Array]
_PACKED = "packed"  # what stands in the place of a quantized weight: its arrays


def adapt(
    module: nn.Module,
    config: lora_config.LoRAConfig | None,
    *args: Any,
    quant: str = "none",
    exclude: tuple[str, ...] = ("lm_head",),
    strict: bool = True,
    **kwargs: Any,
) -> "Adapted":
    """`module` with adapters where `config` has them, on a base in the format `quant`.

    args, kwargs: of a call of the module, arrays or their shapes; nothing is computed.
    config: None for a quantized base alone. exclude: names of layers that are not quantized.
    strict: settings that match nothing are an error; the files of other programs have such.
    Raises: UserError when a target matches nothing, with the names that exist, or something that
    cannot be adapted; for a layer that is to be quantized, and whose weight is not found.
    """
    if quant != "none":
        formats.codes(quant)  # refuses an unknown one
    sites, others, params = linen_sites.survey(module, *args, **kwargs)
    chosen: dict[Path, place.Choices] = {}
    saved: tuple[Path, ...] = ()
    if config is not None:
        found = place.choose([site.place for site in sites], config, others, strict=strict)
        chosen = {site.path: own for site, own in zip(sites, found, strict=True) if any(own)}
        saved = linen_sites.whole(params, config.modules_to_save)
    astray = [
        f"{path} {other.problem}" for path, other in others.items()
        if quant != "none" and other.kind == "linear" and not targets.matches(path, exclude)
    ]  # fmt: skip
    if astray:
        raise errors.UserError(
            expected=f"layers that can be quantized to {quant}",
            found=astray,
            do="leave them dense with `exclude`",
        )
    packs = {
        site.path for site in sites
        if quant != "none" and isinstance(site.place.how, linear_map.Einsum)
        and not site.place.how.batch and not targets.matches(".".join(site.path), exclude)
        and site.path not in saved
    }  # fmt: skip
    if quant != "none" and not packs:
        raise errors.UserError(
            expected=f"linear layers to quantize to {quant}",
            found="none that is not excluded",
            where=", ".join(".".join(site.path) for site in sites) or type(module).__name__,
        )
    return Adapted(module, config, quant, sites, chosen, frozenset(packs), saved)


@dataclasses.dataclass(frozen=True, eq=False)
class Adapted:
    """A Linen model with adapters; made by `adapt`.

    Its variables are `params`, and in `lora` what is trained, float32: under the path of each layer
    lora_A [*stack, K, R] and lora_B [*stack, R, N]. Where something of the base must be known there
    is a collection `lora_constants` too.
    """

    module: nn.Module
    config: lora_config.LoRAConfig | None
    quant: str
    sites: tuple[linen_sites.Site, ...]  # every layer
    choices: Mapping[Path, place.Choices]  # how those are adapted that are
    packs: frozenset[Path]  # those that are quantized
    saved: tuple[Path, ...]  # modules that are trained whole

    def init(self, key: PRNGKeyArray, params: Params) -> dict[str, Params]:
        """Variables with fresh adapters on `params`, which are quantized if that is asked for.

        The model computes the same as before (but for rounding): B = 0. With PiSSA params give up
        what A and B begin with, before they are rounded.
        Raises: UserError for params that are not of this model.
        """
        base, factors, lacking = self._base(params), {}, {}
        if self.config is not None and self.config.init_lora_weights != "default":
            linear = (site for site in self._adapted() if site.place.shape.kind == "linear")
            place.check_principal((site.place, self.choices[site.path]) for site in linear)
        for site in self._adapted():
            choices = self.choices[site.path]
            if self.config.init_lora_weights == "default" or site.place.shape.kind != "linear":
                own = jax.random.fold_in(key, zlib.crc32(".".join(site.path).encode()))
                factors[site.path] = *place.initial(site.place, choices, own), None
            else:
                A, B = lacking[site.path] = self._principal(site, base)
                factors[site.path] = A, B, None
        return self._variables(base, factors, lacking)

    def attach(self, params: Params, adapter: host.Adapter) -> dict[str, Params]:
        """Variables with that adapter's A and B, from a model of any framework.

        Raises: UserError listing all that does not fit, see Adapter.check; for an adapter without
        effect, or with settings by which this config would compute something else; for params that
        are not of this model.
        """
        base = self._base(params)
        names = {name: own for site in self._adapted()
                 for name, own in zip(site.place.names, self.choices[site.path], strict=True)
                 if own}  # fmt: skip
        shapes = {name: site.place.shape for site in self.sites for name in site.place.names}
        saved = {tensor.name: tensor.shape for tensor in self._tensors(base)}
        adapter.check(names, shapes, saved, "the adapter")
        adapter.check_effect("the adapter")
        factors, problems = {}, []
        if adapter.config.use_dora != (self.config is not None and self.config.use_dora):
            problems.append(f"use_dora = {adapter.config.use_dora}")
        for name, own in names.items():
            if not math.isclose(given := adapter.scaling(name), own.scaling, rel_tol=1e-6):
                problems.append(f"{name} is scaled by {given:g}, here by {own.scaling:g}")
        for site in self._adapted():
            choices = self.choices[site.path]
            filled = place.filled(site.place, choices, adapter.factors, adapter.config.use_dora)
            factors[site.path], mask = filled, place.mask(site.place, choices)
            if mask is not None and (filled[1] * (1 - mask)).any():
                problems.append(f"{site.place.names[0]} has B beyond the parts that are adapted")
        if problems:
            raise errors.UserError(
                expected="an adapter with the settings that the model was adapted with",
                found=problems,
                where="the adapter",
                do="linen.adapt(module, adapter.config, …)",
            )
        return self._variables(base, factors, {}, adapter.saved)

    def apply(
        self,
        variables: Mapping[str, Params],
        *args: Any,
        rngs: Mapping[str, PRNGKeyArray] | None = None,
        **kwargs: Any,
    ) -> Any:
        """module.apply with the adapters. rngs: a key named `lora` has their inputs dropped out."""
        rngs = dict(rngs or {})
        merged = self._merged(variables, rngs.pop("lora", None))
        own = ("params", "lora", "lora_constants")
        others = {name: part for name, part in variables.items() if name not in own}
        with linen_sites.intercepted(self._intercept, self):
            return self.module.apply({"params": merged, **others}, *args, rngs=rngs, **kwargs)

    def collect(
        self, variables: Mapping[str, Params], *, base_model: str | None = None
    ) -> host.Adapter:
        """The adapters as arrays on the host: for a file, see peft.write, or any other model.

        Raises: UserError for variables without "lora".
        """
        trained, found = self._trained(variables), {}
        constants = _flat(variables.get("lora_constants", {}))
        for site in self._adapted():
            A, B, _, *magnitude = self._arrays(site, trained)
            lacking = tuple(constants.get((*site.path, name)) for name in _LACKING)
            lacking = None if lacking[0] is None else lacking
            choices = zip(site.place.names, self.choices[site.path], strict=True)
            for index, (name, own) in enumerate(choices):
                if own:
                    arrays = own.rank, A, B, *(magnitude or [None]), lacking
                    found[name] = place.collected(site.place, index, *arrays)
        base, saved = _flat(variables["params"]), {}
        for tensor in self._tensors(base):
            array = tensor.layer(trained[(*tensor.path, "modules_to_save", *tensor.end)])
            array = array.astype(base[(*tensor.path, *tensor.end)].dtype)
            saved[tensor.name] = np.asarray(array).transpose(tensor.turn)
        ranks = {name: own.B.shape[0] for name, own in found.items()}
        return host.Adapter(targets.with_ranks(self.config, ranks), found, saved, base_model)

    def merge(self, variables: Mapping[str, Params]) -> Params:
        """params with W + scaling · A B in the place of W, all of them dense.

        Raises: UserError for variables without "lora", where there are adapters.
        """
        base = _flat(variables["params"])
        trained = self._trained(variables) if self.choices or self.saved else {}
        for site in self.sites:
            if site.path in self.choices:
                own = self._matrix(site, base), *self._arrays(site, trained)
                self._store(site, base, place.each(algebra.merged, site.place.lead, *own))
            elif site.path in self.packs:
                self._store(site, base, self._matrix(site, base))
        for of_base, copied in self._copies(trained):
            base[of_base] = trained[copied].astype(base[of_base].dtype)
        return traverse_util.unflatten_dict(base)

    # ------------------------------------------------------------------------------ variables

    def _base(self, params: Params) -> Flat:
        """`params`, flat. Raises: UserError where they are not of this model."""
        base, problems = _flat(params), []
        for site in self.sites:
            name = ".".join((*site.path, site.weight))
            stacked = jax.ShapeDtypeStruct((*site.stack, *site.shape), jnp.float32)
            expected = jax.eval_shape(site.in_params, stacked).shape
            weight = base.get((*site.path, site.weight))
            if weight is None and (*site.path, _PACKED, "q") not in base:
                problems.append(f"{name} is missing")
            elif weight is not None and weight.shape != expected:
                problems.append(f"{name} has shape {weight.shape}, expected {expected}")
        if problems:
            raise errors.UserError(
                expected=f"params of the {type(self.module).__name__} that was adapted",
                found=problems,
                do='give the collection itself, such as module.init(…)["params"]',
            )
        return base

    def _trained(self, variables: Mapping[str, Params]) -> Flat:
        """What is in "lora", flat. Raises: UserError where it is not there."""
        if self.config is None or "lora" not in variables:
            raise errors.UserError(
                expected='variables with adapters, in "lora"',
                found="a base alone" if self.config is None else ", ".join(variables),
                do="linen.adapt with a LoRAConfig, then init or attach",
            )
        return _flat(variables["lora"])

    def _adapted(self) -> Iterator[linen_sites.Site]:
        return (site for site in self.sites if site.path in self.choices)

    def _variables(self, base, factors, lacking, given=None) -> dict[str, Params]:
        """The collections. base: flat, as yet dense; factors: {path: (A, B, magnitude or None)}."""
        # Copies: a training step may take over the memory of A and B.
        constants = {(*path, name): jnp.array(array) for path, own in lacking.items()
                     for name, array in zip(_LACKING, own, strict=True)}  # fmt: skip
        for site in self.sites:
            if site.path in self.packs and (*site.path, site.weight) in base:
                self._pack(site, base)
        trained = {}
        for site in self._adapted():
            A, B, magnitude = factors[site.path]
            trained[(*site.path, "lora_A")], trained[(*site.path, "lora_B")] = A, B
            if self.config.use_dora:
                weight, scaling = self._matrix(site, base), self._scaling(site)
                length = place.each(algebra.lengths, site.place.lead, weight, A, B, scaling)
                if magnitude is not None:
                    length = jnp.where(scaling[..., 0] == 0, length, magnitude)
                trained[(*site.path, "lora_magnitude_vector")] = length
                if site.path in self.packs:
                    square = place.each(algebra.squares, site.place.lead, weight)
                    constants[(*site.path, "lora_square")] = square
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
        """What the module is applied with: params, and beside each layer's what goes with it."""
        base, trained = _flat(variables["params"]), _flat(variables.get("lora", {}))
        for of_base, copied in self._copies(trained):
            base[of_base] = trained.pop(copied).astype(base[of_base].dtype)
        more = trained | _flat(variables.get("lora_constants", {}))
        for site in self._adapted():
            own = {"lora_scaling": self._scaling(site),
                   "lora_mask": place.mask(site.place, self.choices[site.path])}  # fmt: skip
            if key is not None and self.config.dropout and site.place.shape.kind != "embedding":
                each = jax.random.fold_in(key, zlib.crc32(".".join(site.path).encode()))
                lead = site.stack
                keys = jax.random.split(each, lead) if lead else each
                own["lora_dropout_key"] = jax.random.key_data(keys)
            own |= {at[-1]: array for at, array in more.items() if at[:-1] == site.path}
            for name, array in own.items():
                if array is not None and name not in _LACKING:
                    base[(*site.path, name)] = site.in_params(array)
        return traverse_util.unflatten_dict(base)

    def _copies(self, trained: Flat) -> list[tuple[Path, Path]]:
        """(path in params, path in lora) of each parameter of modules that are trained whole."""
        return [
            ((*path, *key[len(path) + 1 :]), key)
            for path in self.saved
            for key in trained
            if key[: len(path) + 1] == (*path, "modules_to_save")
        ]

    def _scaling(self, site: linen_sites.Site) -> jax.Array:
        return place.scaling(site.place, self.choices[site.path])

    def _arrays(self, site: linen_sites.Site, trained: Flat) -> tuple[jax.Array, ...]:
        """A, B (zero where it is masked), the scaling, and with DoRA the magnitude."""
        A, B = trained[(*site.path, "lora_A")], trained[(*site.path, "lora_B")]
        mask = place.mask(site.place, self.choices[site.path])
        magnitude = trained.get((*site.path, "lora_magnitude_vector"))
        B = B if mask is None else B * mask
        return (A, B, self._scaling(site), *([] if magnitude is None else [magnitude]))

    def _matrix(self, site: linen_sites.Site, base: Flat) -> jax.Array:
        """The site's weight, dense, as matrices [*stack, K, N]."""
        weight = base.get((*site.path, site.weight))
        if weight is not None:
            return site.place.how.matrix(site.out_of_params(weight))
        arrays = (base.get((*site.path, _PACKED, name)) for name in packing.Packed._fields)
        packed = packing.Packed(*(None if a is None else site.out_of_params(a) for a in arrays))
        how = {"fmt": self.quant, "rows": site.place.k}
        return place.each(formats.dequantize, site.stack, packed, **how)

    def _store(self, site: linen_sites.Site, base: Flat, matrix: jax.Array) -> None:
        """Puts the weight with those matrices in the place of the site's."""
        shape = (*site.stack, *site.shape)
        weight = (*site.path, site.weight)
        dtype = base[weight].dtype if weight in base else matrix.dtype
        for name in packing.Packed._fields:
            base.pop((*site.path, _PACKED, name), None)
        base[weight] = site.in_params(site.place.how.tensor(matrix, shape).astype(dtype))

    def _pack(self, site: linen_sites.Site, base: Flat) -> None:
        dense = self._matrix(site, base)
        packed = place.each(formats.quantize, site.stack, dense, fmt=self.quant)
        del base[(*site.path, site.weight)]
        for name, array in packed._asdict().items():
            if array is not None:
                base[(*site.path, _PACKED, name)] = site.in_params(array)

    def _principal(self, site: linen_sites.Site, base: Flat) -> tuple[jax.Array, jax.Array]:
        """PiSSA's A and B; takes them off the site's weight."""
        if (*site.path, site.weight) not in base:
            raise errors.UserError(
                expected="weights before they were rounded, to take PiSSA's A and B from",
                found="packed ones",
                where=".".join(site.path),
                do="give `init` the dense params",
            )
        matrix, choices = self._matrix(site, base), self.choices[site.path]
        A, B = place.principal(
            site.place,
            choices,
            self.config.init_lora_weights,
            lambda index: matrix[np.unravel_index(index, site.place.lead)],
        )
        rest = place.each(algebra.merged, site.place.lead, matrix, A, B, -self._scaling(site))
        self._store(site, base, rest)
        return A, B

    def _tensors(self, base: Flat) -> Iterator[linen_sites.Tensor]:
        """What modules that are trained whole look like in PEFT's file."""
        for path in self.saved:
            around = (
                s
                for s in self.sites
                if s.depth is not None and path[: s.depth] == s.path[: s.depth]
            )
            stack = next(around, None)
            for key in sorted(key for key in base if key[: len(path)] == path):
                lead, axis = (stack.stack, stack.axis) if stack else ((), 0)
                end, whole = key[len(path) :], base[key].shape
                convolution = any(
                    site.path == key[:-1] and isinstance(site.place.how, linear_map.Conv)
                    for site in self.sites
                )
                leaf = "weight" if end[-1] in ("kernel", "embedding", "scale") else end[-1]
                for index in np.ndindex(*lead):
                    name = linen_sites.numbered(path, stack and stack.depth, index, ())
                    name = ".".join((name, *end[:-1], leaf))
                    yield linen_sites.Tensor(name, path, end, whole, axis, index, convolution)

    # ------------------------------------------------------------------------------ a call

    def _intercept(self, call, args, kwargs, context):
        layer = context.module
        kind = linen_sites.kind_of(type(layer))
        if kind is None or context.method_name != "__call__" or layer.scope is None:
            return call(*args, **kwargs)
        own = layer.variables.get("params", {})
        if "lora_A" not in own and _PACKED not in own:
            return call(*args, **kwargs)
        how = kind.layout(layer, *args, **kwargs)
        bound = inspect.signature(type(layer).__call__).bind(layer, *args, **kwargs)
        x = list(bound.arguments.values())[1 + kind.input]
        bias = own.get("bias")
        site = next(site for site in self.sites if site.path == layer.path)
        if _PACKED in own:
            packed = packing.Packed(
                **{name: own[_PACKED].get(name) for name in packing.Packed._fields}
            )
            weight = functools.partial(_product, packed=packed, fmt=self.quant)
            dtype = getattr(layer, "dtype", None) or jnp.result_type(x)
            y = how.multiply(x.astype(dtype), weight, shape=site.shape)
            if bias is not None:
                y = y + how.spread(bias.reshape(-1).astype(y.dtype), y.ndim, site.shape)
        else:
            weight, y = how.matrix(own[kind.weight]), call(*args, **kwargs)
        if "lora_A" not in own:
            return y
        B = own["lora_B"] * own["lora_mask"] if "lora_mask" in own else own["lora_B"]
        magnitude = [own[name] for name in ("lora_magnitude_vector",) if name in own]
        dropped = x
        if "lora_dropout_key" in own:
            dropped = place.dropped(own["lora_dropout_key"], self.config.dropout, x)
        return adapting.output(
            how,
            site.shape,
            x,
            y,
            (own["lora_A"], B, own["lora_scaling"], *magnitude),
            dropped=dropped,
            weight=weight,
            square=own.get("lora_square"),
            bias=bias,
        )


_LACKING = ("lora_initial_A", "lora_initial_B")  # what PiSSA has taken off the base


def _flat(tree: Params) -> Flat:
    return dict(traverse_util.flatten_dict(nn.meta.unbox(tree)))


def _product(x: jax.Array, packed: packing.Packed, fmt: str) -> jax.Array:
    codes = formats.codes(fmt)
    if codes == "int8":
        return int8_matmul.int8_matmul(x, packed.q, packed.column_scale)
    return int4_matmul.int4_matmul(x, packed, codes=codes)


# --------------------------------------------------------------------------------- one's own model


class LoRADense(nn.Module):
    """y = x W + b + scaling · (dropout(x) A) B, for a model of one's own: nn.Dense and an adapter.

    W and b are in `params`, A and B in the collection `lora`, float32; under nn.scan or nn.vmap
    name that one too in variable_axes. With `train` the input of A is dropped out, by the key
    `dropout` of rngs. Source: Hu et al. 2021, https://arxiv.org/abs/2106.09685, eq. 3.
    """

    features: int
    rank: int = lora_config.LoRAConfig.rank
    alpha: float = lora_config.LoRAConfig.alpha
    dropout: float = 0.0
    use_bias: bool = True
    dtype: Any = None
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "*B d_in"], *, train: bool = False
    ) -> Float[Array, "*B d_out"]:
        base = nn.Dense(
            self.features, use_bias=self.use_bias, dtype=self.dtype, param_dtype=self.param_dtype,
            name="base",
        )  # fmt: skip
        y, d_in = base(x), x.shape[-1]

        def initial():
            return algebra.initial(self.make_rng("params"), (), d_in, self.rank)

        A = self.variable("lora", "lora_A", initial).value
        B = self.variable("lora", "lora_B", jnp.zeros, (self.rank, self.features)).value
        if train and self.dropout:
            x = nn.Dropout(self.dropout, deterministic=False)(x)
        scaled = B * (self.alpha / self.rank)
        return y + matmul.matmul(matmul.matmul(x, A), scaled).astype(y.dtype)
