"""Low-rank adapters: y = base(x) + scaling · (x A) B, injected into a Flax NNX model by path."""

import functools
import math
import re
import zlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int, PRNGKeyArray

from lora_jax import config as lora_config
from lora_jax import errors, quant, siblings
from lora_jax.kernels import matmul


@nnx.register_variable_name("lora", overwrite=True)
class LoRAParam(nnx.Param):
    """A or B: what training updates, float32, in the collection `lora`."""


class LoRAScaling(nnx.Variable):
    """alpha / rank of each layer; 0 where a layer of a stack has no adapter. Never trained."""


class DropoutKey(nnx.Variable):
    """Key data of a layer's dropout mask, or of its mask of each row; `reseed` renews it."""


class LoRALinear(nnx.Module):
    """y = base(x) + scaling · (dropout(x) A) B, for a dense or a quantised linear layer `base`.

    lora_A [d_in, R] and lora_B [R, d_out], with a leading axis [L, …] in a stacked module. They
    are float32; the products take x's dtype and accumulate in float32. `ranks` holds the rank of
    every layer, 0 for none: A and B are zero beyond it, and so are their gradients.
    Source: Hu et al. 2021, https://arxiv.org/abs/2106.09685, eq. 3.
    """

    def __init__(
        self,
        base: nnx.Linear | quant.QuantLinear,
        lora_A: jax.Array,
        lora_B: jax.Array,
        scaling: jax.Array,
        *,
        ranks: tuple[int, ...],
        dropout: float = 0.0,
        dropout_key: jax.Array | None = None,
    ):
        self.base = base
        self.lora_A = LoRAParam(lora_A)
        self.lora_B = LoRAParam(lora_B)
        self.scaling = LoRAScaling(scaling)
        self.ranks = ranks
        self.dropout = dropout
        self.dropout_key = DropoutKey(dropout_key) if dropout else None
        self.deterministic = True  # model.train() and model.eval() set this

    @property
    def out_features(self) -> int:
        """d_out."""
        return self.base.out_features

    def __call__(
        self, x: Float[Array, "*B d_in"], product: Float[Array, "*B d_out"] | None = None
    ) -> Float[Array, "*B d_out"]:
        """product: x · W of the base layer, where it was computed already."""
        y = self.base(x) if product is None else siblings.with_bias(self.base, product)
        if self.dropout and not self.deterministic:
            key = jax.random.wrap_key_data(self.dropout_key[...])
            draw = functools.partial(jax.random.bernoulli, p=1 - self.dropout)
            if key.ndim:
                keep = jax.vmap(lambda own: draw(own, shape=x.shape[1:]))(key)
            else:
                keep = draw(key, shape=x.shape)
            x = jnp.where(keep, x / (1 - self.dropout), 0).astype(x.dtype)
        scaled = self.lora_B[...] * self.scaling[...]
        return y + matmul.matmul(matmul.matmul(x, self.lora_A[...]), scaled).astype(y.dtype)


class Site(NamedTuple):
    """A linear layer in the model: its path, and the dotted path of every layer it stacks."""

    path: tuple[str | int, ...]
    module: nnx.Module
    names: tuple[str, ...]  # one entry, unless stacked
    stacked: bool


def inject(model: nnx.Module, config: lora_config.LoRAConfig, *, rngs: nnx.Rngs) -> dict[str, int]:
    """Puts a LoRALinear in the place of every targeted linear layer; {dotted path: rank}.

    Works on nnx.Linear and QuantLinear anywhere in `model`, also stacked by nnx.vmap, where a
    layer index is part of the path (`model.layers.3.self_attn.q_proj`). The model computes the
    same as before until B is trained: A ~ U(−1/√d_in, 1/√d_in), B = 0, as in PEFT.

    Dropout acts after `model.train()`. Its masks depend on keys in the model. `train.make_step`
    renews them; in a loop of your own do so each step, or every step drops the same:
    `nnx.update(model, reseed(nnx.to_pure_dict(nnx.state(model, DropoutKey)), key))`.

    Raises: UserError when a target matches nothing, with the names that exist.
    """
    sites = list(find(model))
    ranks = _plan([name for site in sites for name in site.names], config)
    for site in sites:
        chosen = [ranks.get(name, 0) for name in site.names]
        if any(chosen):
            quant.replace(model, site.path, _adapted(site, chosen, config, rngs))
    return ranks


def find(model: nnx.Module) -> Iterator[Site]:
    """Every linear layer of the model, wrapped ones included, in the order of their paths."""
    wrapped = {}
    for path, node in sorted(nnx.iter_graph(model), key=lambda item: _dotted(item[0])):
        if isinstance(node, LoRALinear):
            wrapped[(*path, "base")] = path, node
    seen = set()
    for path, node in sorted(nnx.iter_graph(model), key=lambda item: _dotted(item[0])):
        if not isinstance(node, nnx.Linear | quant.QuantLinear) or id(node) in seen:
            continue
        seen.add(id(node))
        path, module = wrapped.get(path, (path, node))
        weight = node.kernel if isinstance(node, nnx.Linear) else node.q
        if weight.ndim == 2:
            yield Site(path, module, (_dotted(path),), stacked=False)
        else:
            depth, layers = _stack_depth(model, path, weight.shape[0]), weight.shape[0]
            names = tuple(_dotted((*path[:depth], i, *path[depth:])) for i in range(layers))
            yield Site(path, module, names, stacked=True)


def adapters(model: nnx.Module) -> dict[str, tuple[Site, int]]:
    """{dotted path of every adapted layer: (its Site, its index in the stack)}."""
    return {
        name: (site, index)
        for site in find(model)
        if isinstance(site.module, LoRALinear)
        for index, name in enumerate(site.names)
        if site.module.ranks[index]
    }


def num_params(model: nnx.Module) -> int:
    """Trainable numbers: d_in · rank + rank · d_out over the adapted layers."""
    return sum(
        site.module.ranks[index] * (site.module.lora_A.shape[-2] + site.module.lora_B.shape[-1])
        for site, index in adapters(model).values()
    )


def merge(model: nnx.Module) -> None:
    """W ← W + scaling · A B in the place of every LoRALinear; a quantised W becomes dense.

    Raises: UserError when the model has no adapter.
    """
    sites = [site for site in find(model) if isinstance(site.module, LoRALinear)]
    if not sites:
        raise errors.UserError(
            expected="a model with adapters to merge", found="none", do="lora.inject or peft.load"
        )
    for site in sites:
        adapter, base = site.module, site.module.base
        if isinstance(base, quant.QuantLinear):
            base = quant.dequantise_linear(base)
        scaled = adapter.lora_B[...] * adapter.scaling[...]
        delta = jnp.matmul(adapter.lora_A[...], scaled, precision="highest")
        kernel = base.kernel[...]
        base.kernel.set_value((kernel.astype(jnp.float32) + delta).astype(kernel.dtype))
        quant.replace(model, site.path, base)


def reseed(state: Any, key: PRNGKeyArray, rows: Int[Array, " B"] | None = None) -> Any:
    """`state` (a pure dict of DropoutKeys, by path) with masks that `key` and the path decide.

    With `rows`, each row of the batch has a mask of its own, which its number decides as well: it
    is then the same however rows are dealt out over micro-batches and devices.
    """

    def new(path, data):
        name = "/".join(str(getattr(part, "key", part)) for part in path)
        own = jax.random.fold_in(key, zlib.crc32(name.encode()))
        keys = own if data.ndim == 1 else jax.random.split(own, data.shape[0])
        if rows is not None:
            of_rows = jax.vmap(jax.random.fold_in, (None, 0))
            of_rows = of_rows if data.ndim == 1 else jax.vmap(of_rows, (0, None))
            keys = of_rows(keys, rows)
        return jax.random.key_data(keys)

    return jax.tree_util.tree_map_with_path(new, state)


def matches(path: str, targets: tuple[str, ...] | str) -> bool:
    """Whether PEFT would take `path` for one of `targets`: see LoRAConfig."""
    if targets == "all-linear":
        return path.split(".")[-1] != "lm_head"
    if isinstance(targets, str):
        return re.fullmatch(targets, path) is not None
    return any(path == target or path.endswith("." + target) for target in targets)


def scaling(path: str, rank: int, config: lora_config.LoRAConfig) -> float:
    """alpha / rank of the layer at `path`, or alpha / √rank with rsLoRA."""
    alpha = _pattern(path, config.alpha_pattern, config.alpha)
    return alpha / (math.sqrt(rank) if config.use_rslora else rank)


def _plan(paths: list[str], config: lora_config.LoRAConfig) -> dict[str, int]:
    """{path: rank} of the layers that `config` targets among `paths`."""

    def chosen(path: str, targets) -> bool:
        indices = [int(part) for part in path.split(".") if part.isdigit()]
        in_layers = config.layers is None or any(i in config.layers for i in indices[:1])
        return in_layers and matches(path, targets) and not matches(path, config.exclude)

    def each(names):
        return [names] if isinstance(names, str) else [(name,) for name in names]

    unmatched = [
        f"target {_shown(target)} matches none"
        for target in each(config.targets)
        if not any(chosen(path, target) for path in paths)
    ]
    unmatched += [
        f"exclude {_shown(name)} matches none"
        for name in each(config.exclude)
        if not any(matches(path, name) for path in paths)
    ]
    present = {int(part) for path in paths for part in path.split(".") if part.isdigit()}
    unmatched += [f"layer {i} does not exist" for i in config.layers or () if i not in present]
    unmatched += [
        f"pattern {pattern!r} matches none"
        for pattern in {**config.rank_pattern, **config.alpha_pattern}
        if not any(_is_pattern_of(pattern, path) for path in paths)
    ]
    if unmatched:
        raise errors.UserError(
            expected="settings that name linear layers of the model",
            found=unmatched,
            where="names that exist: " + ", ".join(sorted({p.split(".")[-1] for p in paths})),
            do='choose among these, or use "all-linear"',
        )
    return {
        path: _pattern(path, config.rank_pattern, config.rank)
        for path in paths
        if chosen(path, config.targets)
    }


def _pattern(path: str, patterns: dict[str, Any], default: Any) -> Any:
    return next((v for pattern, v in patterns.items() if _is_pattern_of(pattern, path)), default)


def _is_pattern_of(pattern: str, path: str) -> bool:
    return re.match(rf"(.*\.)?({pattern})$", path) is not None


def _shown(target: str | tuple[str]) -> str:
    return repr(target if isinstance(target, str) else target[0])


def _adapted(site: Site, ranks: list[int], config: lora_config.LoRAConfig, rngs: nnx.Rngs):
    base = site.module
    if isinstance(base, LoRALinear):
        raise errors.UserError(
            expected="a model without adapters",
            found=f"{site.names[0]} has one",
            do="load the base model again, or lora.merge(model) first",
        )
    widest = max(ranks)
    lead = (len(ranks),) if site.stacked else ()
    bound = 1 / math.sqrt(base.in_features)
    lora_A = jax.random.uniform(
        rngs.params(), (*lead, base.in_features, widest), minval=-bound, maxval=bound
    )
    own = np.arange(widest) < np.array(ranks)[:, None]  # [L, R]
    scalings = [
        scaling(name, rank, config) if rank else 0.0
        for name, rank in zip(site.names, ranks, strict=True)
    ]
    key = None
    if config.dropout:
        key = jax.random.key_data(jax.random.split(rngs.params(), lead) if lead else rngs.params())
    return LoRALinear(
        base,
        jnp.where(own[:, None] if lead else own, lora_A, 0),
        jnp.zeros((*lead, widest, base.out_features)),
        # [L, 1, 1], so that it meets B [L, R, d_out] stacked and unstacked alike
        jnp.array(scalings, jnp.float32).reshape((*lead, 1, 1)),
        ranks=tuple(ranks),
        dropout=config.dropout,
        dropout_key=key,
    )


def _stack_depth(model: nnx.Module, path: tuple[str | int, ...], layers: int) -> int:
    """Length of the shortest prefix of `path` below which every array has `layers` entries."""
    module: Any = model
    for depth in range(len(path)):
        leaves = jax.tree.leaves(nnx.state(module))
        if all(leaf.ndim and leaf.shape[0] == layers for leaf in leaves):
            return depth
        part = path[depth]
        module = getattr(module, part) if isinstance(part, str) else module[part]
    return len(path)


def _dotted(path: tuple[str | int, ...]) -> str:
    return ".".join(map(str, path))
