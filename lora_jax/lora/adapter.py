"""An adapter as arrays on the host, for a model of any framework. Imports no jax."""

import dataclasses
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from lora_jax import errors
from lora_jax.lora import config as lora_config
from lora_jax.lora import targets


class Factors(NamedTuple):
    """A [K, R] and B [R, N] of one layer, float32, and DoRA's magnitude [N] if it has one.

    bias: that of B, [N], which is scaled as A B is; see LoRAConfig.lora_bias.
    kind: "linear", "embedding", or "conv" with its window; K is then window · channels.
    An array that a file lacks is None.
    """

    A: np.ndarray | None
    B: np.ndarray | None
    magnitude: np.ndarray | None = None
    kind: str = "linear"
    window: tuple[int, ...] = ()
    bias: np.ndarray | None = None


@dataclasses.dataclass(frozen=True)
class Adapter:
    """The result of LoRA training.

    Args:
      config: its rank, alpha and patterns set the rank and the scaling of every layer. With
        init_lora_weights pissa or olora, A and B are for a base that lacks the initial A B.
      factors: {dotted path of the layer: its A and B}.
      saved: {name in PEFT's file, without the prefix: array as in the file} of everything else:
        fully trained modules (`lm_head.weight`), the rows of single tokens
        (`model.embed_tokens.token_adapter.trainable_tokens_delta`), and the base weight of an
        adapted embedding (`model.embed_tokens.base_layer.weight`).
      base_model: the name of the model it was trained on.
    """

    config: lora_config.LoRAConfig
    factors: Mapping[str, Factors]
    saved: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)
    base_model: str | None = None

    def scaling(self, path: str) -> float:
        """s of ΔW = s · A B for the layer at `path`."""
        return targets.scaling(path, self.factors[path].A.shape[1], self.config)

    def check(
        self,
        configs: Mapping[str, targets.LayerConfig],
        layers: Mapping[str, targets.Layer],
        saved: Mapping[str, tuple[int, ...]],
        where: str,
    ) -> None:
        """Checks that the adapter and a model have the same arrays, of the same shapes.

        configs: the layers of the model that the adapter's config targets. layers: all its layers.
        saved: the shapes of its fully trained modules. Each is by path.
        Raises: UserError that lists everything that does not fit.
        """
        problems = [*self._misfits(configs, layers), *self._misfits_of_saved(layers, saved)]
        if problems:
            raise errors.UserError(
                expected="an adapter for this base model, with layers such as "
                + ", ".join(_some(layers)),
                found=problems,
                where=where,
                do=f"load it on the model that it was trained on: {self.base_model or 'unknown'}",
            )

    def check_effect(self, where: str) -> None:
        """Raises: UserError if the adapter changes nothing."""
        idle = all(not (own.A.any() and own.B.any()) and (own.bias is None or not own.bias.any())
                   for own in self.factors.values())  # fmt: skip
        if idle and not self.config.use_dora and not self.saved:
            raise errors.UserError(
                expected="an adapter that has an effect",
                found=f"A or B is zero in each of its {len(self.factors)} layers",
                where=where,
                do="save the adapter after it was trained",
            )

    def _misfits(self, configs, layers) -> Iterator[str]:
        for path in sorted(configs.keys() | self.factors.keys()):
            own = self.factors.get(path, Factors(None, None))
            if path not in configs:
                why = "no layer in this model" if path not in layers else "no target in its config"
                yield from (f"{path}.{name} has {why}" for name, a in _stored(own) if a is not None)
                continue
            rank, (kind, k, n, _) = configs[path].rank, layers[path]
            wanted = {"lora_A": (rank, k), "lora_B": (n, rank)}
            if self.config.use_dora:
                wanted["lora_magnitude_vector"] = (n,)
            if self.config.lora_bias:
                wanted["lora_B.bias"] = (n,)
            for name, array in _stored(own):
                if array is None and name in wanted:
                    yield f"{path}.{name} is missing"
                elif array is not None and name not in wanted:
                    yield f"{path}.{name} is there, but {_SWITCHES[name]} is false"
                elif array is not None and array.T.shape != wanted[name]:
                    shape = array.T.shape
                    yield f"{path}.{name} has shape {shape}, expected {wanted[name]}"
            if own.A is not None and own.kind != kind:
                yield f"{path} is for a layer of kind {own.kind}; in this model it is {kind}"

    def _misfits_of_saved(self, layers, saved) -> Iterator[str]:
        for name in sorted(saved.keys() - self.saved.keys()):
            yield f"{name} is missing"
        for name, array in self.saved.items():
            expected = saved.get(name)
            if base := re.fullmatch(r"(.+)\.base_layer\.weight", name):
                layer = layers.get(base[1])
                sizes = layer and (layer.in_features, layer.out_features)
                expected = sizes if sizes is None or layer.kind == "embedding" else sizes[::-1]
            if expected is None:
                yield f"{name} has no module in this model, or the config does not save it"
            elif array.shape != tuple(expected):
                yield f"{name} has shape {array.shape}, expected {tuple(expected)}"


def check_mergeable(without_bias: Sequence[str]) -> None:
    """Raises: UserError if there are layers without a bias, to which that of B could be added."""
    if without_bias:
        raise errors.UserError(
            expected="layers that have a bias, to merge an adapter with lora_bias",
            found=[f"{path} has none" for path in without_bias],
            do="use the adapter unmerged; PEFT cannot merge it either",
        )


def _stored(own: Factors) -> list[tuple[str, Any]]:
    return [("lora_A", own.A), ("lora_B", own.B), ("lora_magnitude_vector", own.magnitude),
            ("lora_B.bias", own.bias)]  # fmt: skip


_SWITCHES = {"lora_magnitude_vector": "use_dora", "lora_B.bias": "lora_bias"}


def _some(paths: Iterable[str]) -> list[str]:
    """Some of the paths; those that differ only in a number are listed once."""
    return list(dict.fromkeys(re.sub(r"\.\d+\.", ".N.", path) for path in paths))[:8]


def combined(parts: Sequence[tuple[Adapter, float]], *, rank: int | None = None) -> Adapter:
    """The adapter with ΔW = Σ weight · ΔW of the parts, exactly: its rank is the sum of theirs.

    rank: the largest rank; each ΔW keeps its largest singular values.
    Raises: UserError for DoRA, whose ΔW do not add up, for fully trained modules, for lora_bias,
    and for no parts.
    """
    if not parts:
        raise errors.UserError(expected="adapters to combine", found="none")
    _refuse_unlike([adapter for adapter, _ in parts], dora=True)
    found = {}
    for path in dict.fromkeys(path for adapter, _ in parts for path in adapter.factors):
        own = [(adapter.factors[path], weight * adapter.scaling(path))
               for adapter, weight in parts if path in adapter.factors]  # fmt: skip
        A = np.concatenate([factors.A for factors, _ in own], axis=1)
        B = np.concatenate([scale * factors.B for factors, scale in own])
        found[path] = own[0][0]._replace(A=A, B=B)
        if rank is not None and rank < A.shape[1]:
            found[path] = own[0][0]._replace(**dict(zip("AB", _nearest(A, B, rank), strict=True)))
    return Adapter(_plain(found), found, base_model=parts[0][0].base_model)


def aligned(adapters: Mapping[str, Adapter], *, rank: int = 1) -> dict[str, Adapter]:
    """The same adapters under one config: on the same layers, of the same ranks, with scaling 1.

    Arrays are padded with zeros. Models with any of these adapters have arrays of the same shapes,
    so a function compiled for one runs with all. rank: the smallest rank, to leave room for others.
    Raises: UserError if only some are DoRA, for fully trained modules, and for lora_bias.
    """
    _refuse_unlike(list(adapters.values()), dora=False)
    largest: dict[str, Factors] = {}
    for adapter in adapters.values():
        for path, own in adapter.factors.items():
            if path not in largest or largest[path].A.shape[1] < own.A.shape[1]:
                largest[path] = own
    empty = {path: own._replace(
        A=np.zeros((len(own.A), max(rank, own.A.shape[1])), np.float32),
        B=np.zeros((max(rank, own.A.shape[1]), own.B.shape[1]), np.float32),
    ) for path, own in largest.items()}  # fmt: skip
    use_dora = next(iter(adapters.values())).config.use_dora
    config = dataclasses.replace(_plain(empty), use_dora=use_dora)

    def filled(adapter: Adapter) -> Adapter:
        found = {}
        for path, room in empty.items():
            A, B, magnitude = room.A.copy(), room.B.copy(), room.magnitude
            if path in adapter.factors:
                own, own_rank = adapter.factors[path], adapter.factors[path].A.shape[1]
                A[:, :own_rank], B[:own_rank] = own.A, adapter.scaling(path) * own.B
                magnitude = own.magnitude
            elif use_dora:
                raise errors.UserError(
                    expected="DoRA adapters on the same layers",
                    found=f"one without a magnitude for {path}",
                    do="load one at a time",
                )
            found[path] = room._replace(A=A, B=B, magnitude=magnitude)
        return Adapter(config, found, base_model=adapter.base_model)

    return {name: filled(adapter) for name, adapter in adapters.items()}


def _plain(factors: Mapping[str, Factors]) -> lora_config.LoRAConfig:
    """A config of plain LoRA for exactly these layers, with these ranks and scaling 1."""
    ranks = {path: own.A.shape[1] for path, own in factors.items()}
    most = max(ranks.values(), default=1)
    config = lora_config.LoRAConfig(rank=most, alpha=most, targets=tuple(factors) or ("none",))
    return targets.with_ranks(config, ranks)


def _nearest(A: np.ndarray, B: np.ndarray, rank: int) -> tuple[np.ndarray, np.ndarray]:
    """The factors of that rank whose product is nearest to A B."""
    (Q, R), (P, S) = np.linalg.qr(A), np.linalg.qr(B.T)
    U, values, Vt = np.linalg.svd(R @ S.T)
    root = np.sqrt(values[:rank])
    return Q @ (U[:, :rank] * root), (root[:, None] * Vt[:rank]) @ P.T


def _refuse_unlike(adapters: Sequence[Adapter], *, dora: bool) -> None:
    problems = []
    if any(adapter.saved for adapter in adapters):
        problems.append("fully trained modules or tokens, or the base weight of an embedding")
    if any(adapter.config.lora_bias for adapter in adapters):
        problems.append("biases of B (lora_bias)")
    changing = (adapter.config.init_lora_weights for adapter in adapters)
    problems += [f"init_lora_weights {init}, which changes the base" for init in {*changing}
                 if init != "default"]  # fmt: skip
    kinds = {adapter.config.use_dora for adapter in adapters}
    if len(kinds) > 1 or (dora and kinds == {True}):
        problems.append("DoRA" + ("" if dora else " beside plain LoRA"))
    if problems:
        raise errors.UserError(
            expected="adapters of only A and B" + ("" if dora else ", or all with DoRA"),
            found=problems,
            do="merge such an adapter into its own copy of the base, with lora-jax merge",
        )
