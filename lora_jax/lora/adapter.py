"""An adapter as arrays on the host, whichever model it came from or goes to. Imports no jax."""

import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from lora_jax import errors
from lora_jax.lora import config as lora_config
from lora_jax.lora import targets


class Factors(NamedTuple):
    """A [K, R] and B [R, N] of one layer, float32, and DoRA's magnitude [N] if it has one.

    kind: "linear", "embedding", or "conv" with its window, K then being window · channels.
    None where a file lacks one.
    """

    A: np.ndarray | None
    B: np.ndarray | None
    magnitude: np.ndarray | None = None
    kind: str = "linear"
    window: tuple[int, ...] = ()


class Shape(NamedTuple):
    """Of a layer that could take an adapter: its kind, as in `Factors`, K and N."""

    kind: str
    k: int
    n: int


@dataclasses.dataclass(frozen=True)
class Adapter:
    """What a LoRA run makes of a model.

    Args:
      config: what it is for; its rank and patterns say the rank and the scaling of every layer.
      factors: {dotted path of the layer: its A and B}.
      saved: {name in PEFT's file, without its prefix: array as it lies there} of all else: modules
        trained whole (`lm_head.weight`), and the base of an adapted embedding.
      base_model: the name of the model that it was trained on.
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
        choices: Mapping[str, targets.Choice],
        shapes: Mapping[str, Shape],
        saved: Mapping[str, tuple[int, ...]],
        where: str,
    ) -> None:
        """That it fits a model: every array has its place there, and every place its array.

        choices: what its config targets there; shapes: of all layers by path; saved: what modules
        trained whole look like there.
        Raises: UserError that lists all that does not fit.
        """
        problems = [*self._misfits(choices, shapes), *self._misfits_of_saved(shapes, saved)]
        if problems:
            raise errors.UserError(
                expected="an adapter for this base model, whose layers are such as "
                + ", ".join(_some(shapes)),
                found=problems,
                where=where,
                do=f"load it on its own base: {self.base_model or 'which it does not name'}",
            )

    def check_effect(self, where: str) -> None:
        """Raises: UserError for an adapter that changes nothing."""
        idle = all(not (own.A.any() and own.B.any()) for own in self.factors.values())
        if idle and not self.config.use_dora and not self.saved:
            raise errors.UserError(
                expected="an adapter that has an effect",
                found=f"A or B is zero in each of its {len(self.factors)} layers",
                where=where,
                do="save the adapter after it was trained",
            )

    def _misfits(self, choices, shapes) -> Iterator[str]:
        for path in sorted(choices.keys() | self.factors.keys()):
            own = self.factors.get(path, Factors(None, None))
            if path not in choices:
                why = "no layer in this model" if path not in shapes else "no target in its config"
                yield from (f"{path}.{name} has {why}" for name, a in _stored(own) if a is not None)
                continue
            rank, (kind, k, n) = choices[path].rank, shapes[path]
            wanted = {"lora_A": (rank, k), "lora_B": (n, rank)}
            if self.config.use_dora:
                wanted["lora_magnitude_vector"] = (n,)
            for name, array in _stored(own):
                if array is None and name in wanted:
                    yield f"{path}.{name} is missing"
                elif array is not None and name not in wanted:
                    yield f"{path}.{name} is there, but use_dora is false"
                elif array is not None and array.T.shape != wanted[name]:
                    shape = array.T.shape
                    yield f"{path}.{name} has shape {shape}, expected {wanted[name]}"
            if own.A is not None and own.kind != kind:
                yield f"{path} is of a layer of kind {own.kind}, here it is {kind}"

    def _misfits_of_saved(self, shapes, saved) -> Iterator[str]:
        for name in sorted(saved.keys() - self.saved.keys()):
            yield f"{name} is missing"
        for name, array in self.saved.items():
            expected = saved.get(name)
            if base := re.fullmatch(r"(.+)\.base_layer\.weight", name):
                shape = shapes.get(base[1])
                expected = shape and ((shape.k, shape.n) if shape.kind == "embedding"
                                      else (shape.n, shape.k))  # fmt: skip
            if expected is None:
                yield f"{name} has no module in this model, or its config does not save it"
            elif array.shape != tuple(expected):
                yield f"{name} has shape {array.shape}, expected {tuple(expected)}"


def _stored(own: Factors) -> list[tuple[str, Any]]:
    return [("lora_A", own.A), ("lora_B", own.B), ("lora_magnitude_vector", own.magnitude)]


def _some(shapes: Mapping[str, Any]) -> list[str]:
    """The paths of a model's layers, those that differ in a number once."""
    return list(dict.fromkeys(re.sub(r"\.\d+\.", ".N.", path) for path in shapes))[:8]


def combined(parts: Sequence[tuple[Adapter, float]], *, rank: int | None = None) -> Adapter:
    """The adapter with ΔW = Σ weight · ΔW of the parts: exact, its rank the sum of theirs.

    rank: at most so large, by the largest singular values of each ΔW.
    Raises: UserError for DoRA, whose change is no sum, for modules saved whole, and for no parts.
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
    """The same adapters with one config: on the same layers, of the same ranks, with scaling 1.

    What each lacks is zero. Models adapted with them have arrays of the same shapes, so what is
    compiled for one serves all. rank: at least so large, to leave room for others.
    Raises: UserError where some are DoRA and some not, and for modules saved whole.
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
    """A config of plain LoRA, of exactly these layers with these ranks, with scaling 1."""
    ranks = {path: own.A.shape[1] for path, own in factors.items()}
    most = max(ranks.values(), default=1)
    config = lora_config.LoRAConfig(rank=most, alpha=most, targets=tuple(factors) or ("none",))
    return targets.with_ranks(config, ranks)


def _nearest(A: np.ndarray, B: np.ndarray, rank: int) -> tuple[np.ndarray, np.ndarray]:
    """Factors of that rank whose product is nearest to A B."""
    (Q, R), (P, S) = np.linalg.qr(A), np.linalg.qr(B.T)
    U, values, Vt = np.linalg.svd(R @ S.T)
    root = np.sqrt(values[:rank])
    return Q @ (U[:, :rank] * root), (root[:, None] * Vt[:rank]) @ P.T


def _refuse_unlike(adapters: Sequence[Adapter], *, dora: bool) -> None:
    problems = []
    if any(adapter.saved for adapter in adapters):
        problems.append("modules saved whole, or the base of an embedding")
    kinds = {adapter.config.use_dora for adapter in adapters}
    if len(kinds) > 1 or (dora and kinds == {True}):
        problems.append("DoRA" + ("" if dora else " beside plain LoRA"))
    if problems:
        raise errors.UserError(
            expected="adapters of A and B alone" + ("" if dora else ", or all with DoRA"),
            found=problems,
            do="merge such an adapter into a base of its own, with scripts/merge.py",
        )
