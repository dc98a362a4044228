"""Low-rank adapters in a Flax NNX model: y = layer(x) + scaling · (x A) B, put in by path."""

import math
import zlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental import multihost_utils
from jaxtyping import Array, Float, Int, Num, PRNGKeyArray

from lora_jax import errors
from lora_jax.layers import linear_map, mixin, projections, registry
from lora_jax.lora import adapter as host
from lora_jax.lora import algebra, forward, side_by_side, targets
from lora_jax.lora import config as lora_config
from lora_jax.lora import site as places
from lora_jax.lora.nnx import saved, sites
from lora_jax.lora.nnx.saved import SavedLayer
from lora_jax.lora.nnx.variables import DropoutKey, LoRAConstant, LoRAParam
from lora_jax.models import llama
from lora_jax.quant import formats
from lora_jax.quant import linear as quant_linear

register = registry.register


class LoRALayer(nnx.Module):
    """y = layer(x) + scaling · (dropout(x) A) B: what a layer becomes an instance of as well.

    It stays an instance of its own class, with all attributes and parameters at their places.
    lora_A [K, R] and lora_B [R, N] (of an embedding lora_embedding_A and _B) have a leading axis
    [L, …] in a stacked module; K and N: see layout.py. They are float32; the products take x's
    dtype and accumulate in float32. lora_ranks holds the rank of every layer, 0 for none: A and B
    are zero beyond it, and so are their gradients. With a lora_magnitude_vector [N] this is DoRA,
    see low_rank.py. Source: Hu et al. 2021, https://arxiv.org/abs/2106.09685, eq. 3.
    """

    # What only some adapters have.
    lora_mask = lora_magnitude_vector = lora_square = lora_dropout_key = None
    lora_initial_A = lora_initial_B = None
    lora_members = 0  # see beside.py

    def __call__(self, x: Num[Array, "..."], *args: Any, **kwargs: Any) -> Num[Array, "..."]:
        return self._adapted(x, super().__call__(x, *args, **kwargs))

    def with_product(self, x: Float[Array, "..."], product: Float[Array, "..."]) -> jax.Array:
        """The same, where x · W was computed already."""
        return self._adapted(x, projections.with_bias(self, product))

    def _adapted(self, x, y):
        dropped, bias = None, getattr(self, "bias", None)
        if self.lora_dropout and not self.deterministic:
            dropped = places.dropped(self.lora_dropout_key[...], self.lora_dropout, x)
        how, packed = registry.layout_of(self), quant_linear.packed_of(self)

        def output(x, y, dropped, factors):
            return forward.output(
                how,
                sites.weight_shape(self),
                x,
                y,
                factors,
                dropped=x if dropped is None else dropped,
                weight=packed.product if packed else how.matrix(registry.weight_of(self)[...]),
                square=self.lora_square[...] if self.lora_square is not None else None,
                bias=None if bias is None else bias[...],
            )

        return side_by_side.each(output, self.lora_members, (x, y, dropped), arrays(self))


# ---------------------------------------------------------------------------------- putting in


def inject(
    model: nnx.Module,
    config: lora_config.LoRAConfig,
    *,
    rngs: nnx.Rngs,
    principal: "Principal | None" = None,
) -> dict[str, int]:
    """Makes a LoRALayer of every targeted layer; {dotted path: rank}.

    Works on nnx.Linear, LinearGeneral, Einsum, Conv and Embed, on quantized layers, and on what was
    registered, anywhere in `model`, also stacked by nnx.vmap, where a layer index is part of the
    path (`model.layers.3.self_attn.q_proj`). The model computes the same as before until it is
    trained: A ~ U(−1/√K, 1/√K), B = 0, as in PEFT; with PiSSA the base gives up what A B begin
    with. Parameters stay at their paths, so a checkpoint of the base still fits; load it before
    `inject` where A, B or a magnitude begin with the weights (PiSSA, DoRA).

    Dropout acts after `model.train()`. Its masks depend on keys in the model. `train.make_step`
    renews them; in a loop of your own do so each step, or every step drops the same:
    `nnx.update(model, reseed(nnx.state(model, DropoutKey), key))`.

    principal: PiSSA's A and B, which a base that was rounded as it was loaded lacks already.
    Raises: UserError when a target matches nothing, with the names that exist, or something that
    cannot be adapted; when the model has adapters already; for PiSSA on a quantized layer without
    `principal`. The model is then as it was.
    """
    found = _fresh(model)
    wholes = saved.choose(model, found, config.modules_to_save)
    ranks = {}
    chosen = places.choose([site.place for site in found], config, sites.others(model))
    begun = [(site, choices) for site, choices in zip(found, chosen, strict=True) if any(choices)]
    if config.init_lora_weights != "default":
        _check_principal(begun, principal)
    for site, choices in begun:
        ranks |= {name: own.rank for name, own in zip(site.names, choices, strict=True) if own}
        if config.init_lora_weights == "default" or site.place.shape.kind != "linear":
            _adapt(site, choices, config, rngs, *places.initial(site.place, choices, rngs.params()))
        else:
            lacking = _principal(site, choices, config, principal)
            _adapt(site, choices, config, rngs, *lacking)
            # So that `collect` can tell the change of the weight as it was. Copies: a training step
            # may take over the memory of A and B.
            kept = (LoRAConstant(jnp.array(part)) for part in lacking)
            site.module.lora_initial_A, site.module.lora_initial_B = kept
    for whole in wholes:
        whole.begin()
    return ranks


class Principal(dict[str, tuple[np.ndarray, np.ndarray]]):
    """PiSSA's {dotted path: (A, B)} of a model whose weights are rounded as they are loaded.

    principal = Principal(config)
    model = checkpoint.load(folder, quantization="int4", residual=principal.take)
    inject(model, config, rngs=rngs, principal=principal)
    """

    def __init__(self, config: lora_config.LoRAConfig):
        super().__init__()
        self._config = config

    def take(self, path: str, weight: Num[Array, "N K"]) -> Num[Array, "N K"]:
        """The weight without A and B, float32, if the layer at `path` is to be adapted."""
        if not targets.is_chosen(path, self._config):
            return weight
        own = targets.choice(path, len(weight), self._config)
        alone = places.Place((path,), (), weight.shape[1], len(weight), linear_map.LINEAR)
        places.check_principal([(alone, [own])])
        how = own, self._config.init_lora_weights
        A, B = self[path] = places.principal_of_one(_whole_array(weight).T, *how)
        change = np.float32(own.scaling) * B.T @ A.T
        where = weight.sharding
        taken = jax.make_array_from_callback(change.shape, where, lambda part: change[part])
        return weight.astype(jnp.float32) - taken


def attach(
    model: nnx.Module,
    adapter: host.Adapter,
    *,
    untrained: bool = False,
    where: str = "the adapter",
) -> None:
    """Puts `adapter` into `model`: from a model of any framework, on any base of these shapes.

    untrained: it may be without effect, for it is to be trained.
    Raises: UserError listing all that does not fit, see `Adapter.check`; for an adapter without
    effect. The model is then as it was.
    """
    found, config = _fresh(model), adapter.config
    chosen, wholes = _fitting(model, found, adapter, where)
    if not untrained:
        adapter.check_effect(where)
    for site, choices in zip(found, chosen, strict=True):
        if any(choices):
            filled = places.filled(site.place, choices, adapter.factors, config.use_dora)
            _adapt(site, choices, config, nnx.Rngs(0), *filled)
    for whole in wholes:
        whole.begin(adapter.saved)
    for site in found:
        if (base := adapter.saved.get(f"{site.names[0]}.base_layer.weight")) is not None:
            weight = registry.weight_of(site.module)
            turned = base if site.place.shape.kind == "embedding" else base.T
            weight.set_value(jnp.asarray(turned, weight.dtype))


def check(model: nnx.Module, adapter: host.Adapter, *, where: str = "the adapter") -> None:
    """Raises: UserError listing all of `adapter` that does not fit `model`, adapted or not."""
    _fitting(model, list(sites.find(model)), adapter, where)


def _fitting(
    model: nnx.Module, found: list[sites.Site], adapter: host.Adapter, where: str
) -> tuple[list[places.Choices], list[saved.Saved]]:
    """How each site is adapted, and what is saved whole. Raises: UserError as `check`."""
    wholes = saved.choose(model, found, adapter.config.modules_to_save)
    chosen = places.choose([site.place for site in found], adapter.config, strict=False)
    choices = {name: own for site, each in zip(found, chosen, strict=True)
               for name, own in zip(site.names, each, strict=True) if own}  # fmt: skip
    shapes = {name: site.place.shape for site in found for name in site.names}
    of_saved = {name: shape for whole in wholes for name, shape in whole.shapes()}
    adapter.check(choices, shapes, of_saved, where)
    return chosen, wholes


def _fresh(model: nnx.Module) -> list[sites.Site]:
    """The model's sites. Raises: UserError where one has an adapter already."""
    found = list(sites.find(model))
    adapted = [site.names[0] for site in found if isinstance(site.module, LoRALayer)]
    adapted += [sites.dotted(whole.path) for whole in saved.find(model)]
    if adapted:
        raise errors.UserError(
            expected="a model without adapters",
            found=[f"{name} has one" for name in adapted],
            do="load the base model again, or lora.merge(model) first",
        )
    return found


def _adapt(site, choices, config, rngs, A, B, magnitude=None) -> None:
    """Makes the site's layer a LoRALayer with these arrays.

    magnitude: None with DoRA: such that the layer goes on to compute W + s · A B.
    """
    layer, lead = site.module, site.place.lead
    has_switch = "deterministic" in vars(layer)
    mixin.become(layer, LoRALayer)
    for name, array in zip(_names_of_factors(layer), (A, B), strict=True):
        setattr(layer, name, LoRAParam(array))
    scaling = places.scaling(site.place, choices)
    layer.lora_scaling = LoRAConstant(scaling)
    layer.lora_ranks = places.ranks(choices)
    if (mask := places.mask(site.place, choices)) is not None:
        layer.lora_mask = LoRAConstant(mask)
    if config.use_dora:
        if quant_linear.packed_of(layer):
            layer.lora_square = LoRAConstant(_each(algebra.squares, site))
        length = _each(algebra.lengths, site, *arrays(layer))
        if magnitude is not None:
            length = jnp.where(scaling[..., 0] == 0, length, magnitude)
        layer.lora_magnitude_vector = LoRAParam(length)
    drops = site.place.shape.kind != "embedding"  # as in PEFT
    layer.lora_dropout = config.dropout if drops else 0.0
    if layer.lora_dropout:
        keys = jax.random.split(rngs.params(), lead) if lead else rngs.params()
        layer.lora_dropout_key = DropoutKey(jax.random.key_data(keys))
    layer.lora_had_switch = has_switch
    layer.deterministic = True  # model.train() and model.eval() set this


def _restore(layer: nnx.Module) -> None:
    """Makes the layer again what it was before it was adapted."""
    added = [name for name in vars(layer) if name.startswith("lora_")]
    added += [] if layer.lora_had_switch else ["deterministic"]
    mixin.leave(layer, *added)


def _check_principal(begun, given: Mapping[str, Any] | None) -> None:
    """Raises: UserError for layers whose A and B by PiSSA are neither in `given` nor to be had."""
    linear = [(site, choices) for site, choices in begun if site.place.shape.kind == "linear"]
    if given is None:
        places.check_principal((site.place, choices) for site, choices in linear)
    problems = []
    for site, choices in linear:
        packed = quant_linear.packed_of(site.module)
        if given is None and packed:
            problems.append(f"{site.names[0]} is in {packed.fmt}")
        elif given is not None:
            lacking = (name for name, own in zip(site.names, choices, strict=True)
                       if own and name not in given)  # fmt: skip
            problems += [f"{name} is not in `principal`" for name in lacking]
    if problems:
        raise errors.UserError(
            expected="weights as they were before they were rounded, to take PiSSA's A and B from",
            found=problems,
            do="inject before quantizing, or see lora.Principal",
        )


def _principal(site, choices, config, given) -> tuple[jax.Array, jax.Array]:
    """PiSSA's A and B; takes them off the site's weight, unless they were `given`."""
    place, layer = site.place, site.module
    if given is not None:
        factors = {name: host.Factors(*map(np.asarray, pair)) for name, pair in given.items()}
        return places.filled(place, choices, factors, False)[:2]
    matrix = place.how.matrix(registry.weight_of(layer)[...])
    A, B = places.principal(
        place,
        choices,
        config.init_lora_weights,
        lambda index: _whole_array(matrix[np.unravel_index(index, place.lead)]),
    )
    _set_weight(site, _each(algebra.merged, site, A, B, -places.scaling(place, choices)))
    return A, B


def _set_weight(site: sites.Site, matrix: jax.Array) -> None:
    """Gives the site's layer the weight with that matrix."""
    weight = registry.weight_of(site.module)
    weight.set_value(site.place.how.tensor(matrix, weight.shape).astype(weight.dtype))


# ---------------------------------------------------------------------------------- reading out


def adapters(model: nnx.Module) -> dict[str, tuple[sites.Site, int]]:
    """{dotted path of every adapted layer: (its Site, its index among the Site's names)}."""
    return {
        name: (site, index)
        for site in sites.find(model)
        if isinstance(site.module, LoRALayer)
        for index, name in enumerate(site.names)
        if site.module.lora_ranks[index]
    }


def factors(layer: LoRALayer) -> tuple[LoRAParam, LoRAParam]:
    """A and B."""
    A, B = (getattr(layer, name) for name in _names_of_factors(layer))
    return A, B


def num_params(model: nnx.Module) -> int:
    """Trainable numbers: K · R + R · N of each adapted layer, magnitudes, modules saved whole."""
    total = 0
    for site, index in adapters(model).values():
        place, layer = site.place, site.module
        at, rank = np.unravel_index(index, place.lead), layer.lora_ranks[index]
        mask = layer.lora_mask
        total += rank * place.k + (rank * place.n if mask is None else int(mask[...][at].sum()))
        total += place.n if layer.lora_magnitude_vector is not None else 0
    for whole in saved.find(model):
        total += sum(math.prod(shape) for _, shape in whole.shapes())
    return total


def collect(
    model: nnx.Module, config: lora_config.LoRAConfig, *, base_model: str | None = None
) -> host.Adapter:
    """The model's adapters as arrays on the host, for a file or another model.

    Its config may differ from `config`, but means the same: adapters that began with PiSSA, or are
    on parts of a layer's output, become plain LoRA of the weights as they were.

    Raises: UserError when the model has no adapter.
    """
    wholes = saved.find(model)
    _check_adapted(model, wholes)
    found = {}
    for name, (site, index) in adapters(model).items():
        layer = site.module
        A, B, _, *magnitude = arrays(layer)
        lacking = None
        if layer.lora_initial_A is not None:
            lacking = layer.lora_initial_A[...], layer.lora_initial_B[...]
        own = layer.lora_ranks[index], A, B, *(magnitude or [None]), lacking
        found[name] = places.collected(site.place, index, *own)
    ranks = {name: own.B.shape[0] for name, own in found.items()}
    whole = {name: array for one in wholes for name, array in one.files()}
    for name, (site, _) in adapters(model).items():
        if targets.saves_base(name, config):
            base = np.asarray(registry.weight_of(site.module)[...])
            turned = base if site.place.shape.kind == "embedding" else base.T
            whole[f"{name}.base_layer.weight"] = turned
    return host.Adapter(targets.with_ranks(config, ranks), found, whole, base_model)


def filled(model: nnx.Module, adapter: host.Adapter) -> Any:
    """What is trained in an adapted model, with the values of an adapter of the same shapes.

    To go into the model by nnx.update, or into a function beside it. See adapter.aligned.
    """
    state = dict(nnx.to_flat_state(nnx.state(model, LoRAParam)))
    found = [site for site in sites.find(model) if isinstance(site.module, LoRALayer)]
    for site, choices in zip(
        found, places.choose([site.place for site in found], adapter.config), strict=True
    ):
        own = places.filled(site.place, choices, adapter.factors, adapter.config.use_dora)
        names = (*_names_of_factors(site.module), "lora_magnitude_vector")
        for name, array in zip(names, own, strict=True):
            if array is not None:
                variable = state[(*site.path, name)]
                where = variable[...].sharding
                state[(*site.path, name)] = variable.replace(jax.device_put(array, where))
    return nnx.from_flat_state(state.items())


def idle(model: nnx.Module) -> Any:
    """What is trained in an adapted model, with values that leave it as it was without adapters."""
    state = dict(nnx.to_flat_state(nnx.state(model, LoRAParam)))
    for site in sites.find(model):
        if isinstance(site.module, LoRALayer):
            layer = site.module
            A, B, scaling, *magnitude = arrays(layer)
            if layer.lora_initial_A is None:
                A, B = 0 * A, 0 * B
            else:  # what PiSSA has taken off the weight
                A, B = layer.lora_initial_A[...], layer.lora_initial_B[...]
            own = dict(zip(_names_of_factors(layer), (A, B), strict=True))
            if magnitude:
                length = _each(algebra.lengths, site, A, B, scaling)
                own["lora_magnitude_vector"] = length
            for name, array in own.items():
                state[(*site.path, name)] = state[(*site.path, name)].replace(array)
    return nnx.from_flat_state(state.items())


def strip(model: nnx.Module) -> None:
    """Takes the adapters out of a model, which is then as it was before.

    Raises: UserError where a packed weight lacks what PiSSA began with; the model stays adapted.
    """
    lacking = [site for site in sites.find(model) if isinstance(site.module, LoRALayer)
               and site.module.lora_initial_A is not None]  # fmt: skip
    packed = [(site, layer) for site in lacking if (layer := quant_linear.packed_of(site.module))]
    if packed:
        raise errors.UserError(
            expected="weights that can take back what PiSSA began with",
            found=[f"{site.names[0]} is in {layer.fmt}" for site, layer in packed],
            do="load the base model again",
        )
    for site in lacking:
        layer = site.module
        A, B = layer.lora_initial_A[...], layer.lora_initial_B[...]
        _set_weight(site, _each(algebra.merged, site, A, B, layer.lora_scaling[...]))
    for whole in saved.find(model):
        whole.end()
    for _, layer in list(nnx.iter_graph(model)):
        if isinstance(layer, LoRALayer):
            _restore(layer)


def effects(model: nnx.Module) -> dict[str, float]:
    """{dotted path: ‖ΔW‖ / ‖W‖} of every adapted layer, Frobenius norms."""
    found = {}
    for site in sites.find(model):
        if isinstance(site.module, LoRALayer):
            ratios = _each(algebra.effect, site, *arrays(site.module))
            rated = zip(site.names, site.module.lora_ranks, ratios.reshape(-1), strict=True)
            found |= {name: ratio.item() for name, rank, ratio in rated if rank}
    return found


def merge(model: nnx.Module) -> None:
    """W ← W + scaling · A B in every LoRALayer, which is then a plain layer again.

    A quantized W becomes dense. A module that was saved whole takes the values of its copy. Where
    embeddings change, a LLaMA whose head is tied to them gets a head of its own first.

    Raises: UserError when the model has no adapter.
    """
    found = [site for site in sites.find(model) if isinstance(site.module, LoRALayer)]
    wholes = saved.find(model)
    _check_adapted(model, wholes)
    if isinstance(model, llama.LlamaForCausalLM):
        embedding = model.model.embed_tokens
        if isinstance(embedding, LoRALayer | SavedLayer) and model.config.tie_word_embeddings:
            model.untie()
    for site in found:
        layer = site.module
        merged = _each(algebra.merged, site, *arrays(layer))
        if isinstance(layer, quant_linear.QuantLinear):
            quant_linear.replace(model, site.path, quant_linear.as_linear(layer, merged))
        elif isinstance(layer, quant_linear.QuantLayer):
            weight = site.place.how.tensor(merged, layer.quantized_shape)
            _restore(layer)
            quant_linear.make_dense(layer, weight)
        else:
            _set_weight(site, merged)
            _restore(layer)
    for whole in wholes:
        whole.merge()


def put_beside(model: nnx.Module, num_members: int) -> None:
    """Has every adapted layer compute with so many adapters, whose arrays it holds: see beside.py.

    Their axis [S] stands behind the axes of stacked layers.
    """
    for _, layer in nnx.iter_graph(model):
        if isinstance(layer, LoRALayer | SavedLayer):
            layer.lora_members = num_members


def reseed(state: Any, key: PRNGKeyArray, rows: Int[Array, " B"] | None = None) -> Any:
    """`state`, of the model's DropoutKeys or as a pure dict, with masks by `key` and the path.

    With `rows`, each row of the batch has a mask of its own, which its number decides as well: it
    is then the same however rows are dealt out over micro-batches and devices.
    """

    def new(path, data):
        # A Variable's own step is left out, so that a state and a pure dict have the same masks.
        parts = (part for part in path if not isinstance(part, jax.tree_util.GetAttrKey))
        name = "/".join(str(getattr(part, "key", part)) for part in parts)
        own = jax.random.fold_in(key, zlib.crc32(name.encode()))
        lead = data.shape[:-1]
        keys = jax.random.split(own, lead) if lead else own
        if rows is not None:
            of_rows = jax.vmap(jax.random.fold_in, (None, 0))
            for _ in lead:
                of_rows = jax.vmap(of_rows, (0, None))
            keys = of_rows(keys, rows)
        return jax.random.key_data(keys)

    return jax.tree_util.tree_map_with_path(new, state)


def reseed_by(state: Any, number: Int[Array, ""]) -> Any:
    """`state`, of the model's DropoutKeys, with other masks for each number."""

    def new(data):
        keys = jax.random.wrap_key_data(data)
        of_all = jax.vmap(jax.random.fold_in, (0, None))(keys.reshape(-1), number)
        return jax.random.key_data(of_all.reshape(keys.shape))

    return jax.tree.map(new, state)


def _check_adapted(model: nnx.Module, wholes: list[saved.Saved]) -> None:
    """Raises: UserError when the model has no adapter."""
    if not wholes and not adapters(model):
        raise errors.UserError(
            expected="a model with adapters", found="none", do="lora.inject or peft.load"
        )


def _names_of_factors(layer: nnx.Module) -> tuple[str, str]:
    if isinstance(layer, nnx.Embed):
        return "lora_embedding_A", "lora_embedding_B"
    return "lora_A", "lora_B"


def arrays(layer: LoRALayer) -> tuple[jax.Array | np.ndarray, ...]:
    """A, B (zero where it is masked), the scaling, and with DoRA the magnitude."""
    A, B = (part[...] for part in factors(layer))
    if layer.lora_mask is not None:
        B = B * layer.lora_mask[...]
    magnitude = layer.lora_magnitude_vector
    return (A, B, layer.lora_scaling[...], *([] if magnitude is None else [magnitude[...]]))


def _each(function: Callable, site: sites.Site, *arrays: jax.Array) -> jax.Array:
    """function(W, *arrays) for every layer of the site: W [K, N] is dense, one at a time."""
    lead, quantized = site.place.lead, quant_linear.packed_of(site.module)
    if quantized:
        how = {"function": function, "fmt": quantized.fmt, "rows": quantized.in_features}
        return places.each(_of_packed, lead, quantized.packed, *arrays, **how)
    weight = registry.weight_of(site.module)[...]
    return places.each(function, lead, site.place.how.matrix(weight), *arrays)


def _of_packed(packed, *arrays, function, fmt, rows):
    return function(formats.dequantize(packed, fmt, rows), *arrays)


def _whole_array(array: jax.Array) -> jax.Array:
    """On one device of this process, from wherever its parts are."""
    return jnp.asarray(multihost_utils.process_allgather(array, tiled=True))
