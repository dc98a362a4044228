"""What of an adapter goes into the slots of a bank: all checks, and the arrays on the host."""

import dataclasses
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from flax import nnx

from lora_jax import errors
from lora_jax.layers import places, registry
from lora_jax.lora import adapter as lora_adapter
from lora_jax.lora import algebra, targets, tied_head, token_indices, unshared
from lora_jax.lora import site as lora_site
from lora_jax.lora.nnx import bank, names, sites
from lora_jax.models import llama
from lora_jax.quant import linear as quant_linear

Slot = Mapping[tuple, Sequence[np.ndarray]]  # {path of a site: (A, B, v)}, see bank.slot_of


class Contents(NamedTuple):
    """An adapter for a bank: what goes into each of its slots. digest: of all the arrays."""

    digest: str
    slots: tuple[Slot, ...]

    @property
    def num_bytes(self) -> int:
        return sum(array.nbytes for slot in self.slots for own in slot.values() for array in own)


class Bank:
    """The bank of a model, and what of the model adapters are checked against.

    slots, rank: X and R. banked: the sites that have a bank. The model may be in use by another
    thread: of it, only the frozen weights are read.
    """

    def __init__(self, model: nnx.Module):
        self.banked = bank.find(model)
        self.slots, self.rank = bank.size(model)
        self._sites = list(sites.with_aliases(model))
        self._llama = model if isinstance(model, llama.LlamaForCausalLM) else None

    def contents(self, adapter: lora_adapter.Adapter, where: str) -> Contents:
        """The adapter for this bank; DoRA's lengths are those on this base.

        Raises: UserError that lists every reason why the adapter cannot be in the bank.
        """
        if self._llama is not None:
            adapter = names.of_model(self._llama, adapter)
        problems: list[errors.UserError] = []
        with errors.noted(problems):
            adapter.check_effect(where)
        fitted, unbatched = adapter, unshared.of_config(adapter.config)
        with errors.noted(problems):
            fitted, more = self._own_part(adapter, where)
            unbatched += [*more, *self._changed_weights(fitted)]
        chosen = []
        with errors.noted(problems):
            chosen = self._chosen(fitted, where)
        rank = max((own.rank for _, configs in chosen for own in configs if own), default=1)
        num_slots = -(-rank // self.rank)
        problems += self._misfits(unbatched, chosen, rank, num_slots, where)
        if problems:
            raise errors.UserError.together(problems)
        slots: list[dict] = [{} for _ in range(num_slots)]
        for site, configs in chosen:
            arrays = _arrays(site, configs, fitted, num_slots, self.rank)
            for slot, own in zip(slots, arrays, strict=True):
                slot[site.path] = own
        _check_finite(slots, where)
        return Contents(_digest(slots), tuple(slots))

    def _misfits(self, unbatched, chosen, rank, num_slots, where) -> Iterator[errors.UserError]:
        """Why an adapter on the `chosen` sites cannot be in it. unbatched: what else it changes."""
        if unbatched:
            yield errors.UserError(
                expected="an adapter of only A, B and magnitudes, which can share a batch",
                found=unbatched,
                where=where,
                do="merge it into a copy of its base with lora-jax merge, and use that",
            )
        paths = {site.path for site in self.banked}
        if unbanked := [site.names[0] for site, _ in chosen if site.path not in paths]:
            yield errors.UserError(
                expected=f"an adapter on {', '.join(_last(self.banked))}, which have a bank",
                found=[f"it is on {name}, which has none" for name in unbanked],
                where=where,
                do="make the bank with these targets, too, or merge the adapter into a copy of "
                "its base with lora-jax merge",
            )
        if num_slots > self.slots:
            yield errors.UserError(
                expected=f"a rank of at most {self.slots * self.rank}, which a bank of "
                f"{self.slots} slots of rank {self.rank} can hold",
                found=f"rank {rank}, which takes {num_slots} slots",
                where=where,
                do="choose more slots or a larger rank of them",
            )

    def empty(self) -> dict[str, Any]:
        """What `bank.writer` puts into a slot to clear it."""
        return bank.slot_of(self.banked, {}, self.rank)

    def filled(self, slot: Slot) -> dict[str, Any]:
        """What `bank.writer` puts into a slot for it."""
        return bank.slot_of(self.banked, slot, self.rank)

    def _own_part(self, adapter, where) -> tuple[lora_adapter.Adapter, list[str]]:
        """(the adapter as one of A and B without base weights, what cannot be in a bank)."""
        tokens = unshared.tokens(adapter.config)
        if self._llama is None:
            return adapter, tokens
        model, tied = self._llama, self._llama.config.tie_word_embeddings
        embedding = model.model.embed_tokens.embedding[...]
        fitted = tied_head.fitted(adapter, embedding.shape, tied=tied, where=where)
        found = unshared.of_vocabulary(adapter, fitted, len(embedding), tied=tied)
        if fitted.num_tokens == len(embedding) and fitted.base:
            head = embedding if tied else registry.weight_of(model.lm_head)[...].T
            weights = {tied_head.EMBEDDING: embedding, tied_head.HEAD: head}
            found += [f"weights of {path} that differ from the base's"
                      for path, new in fitted.base.items()
                      if not jnp.array_equal(weights[path], new.astype(head.dtype))]  # fmt: skip
        own = fitted.adapter
        if tokens and not found:
            head = registry.weight_of(model.lm_head)[...]
            rows_of = {tied_head.EMBEDDING: lambda ids: embedding[ids],
                       tied_head.HEAD: lambda ids: head[:, ids].T}  # fmt: skip
            own = token_indices.as_factors(own, rows_of, len(embedding), where)
        if fitted.plan.own_head or fitted.plan.joined:
            layers = {path: each for path, each in own.factors.items() if path != tied_head.HEAD}
            own = dataclasses.replace(own, factors=layers)
        return own, found

    def _changed_weights(self, adapter: lora_adapter.Adapter) -> Iterator[str]:
        """The layers of which the adapter's file has other weights than the base."""
        for site, _ in self._sites:
            for index, name in enumerate(site.names):
                new = adapter.saved.get(f"{name}.base_layer.weight")
                if new is None:
                    continue
                packed, own = quant_linear.packed_of(site.module), new
                if packed is None:
                    own = site.matrix()[np.unravel_index(index, site.lead)]
                    own = own if site.kind == "embedding" else own.T
                if packed or not jnp.array_equal(own, new.astype(own.dtype)):
                    yield f"weights of {name} that differ from the base's"

    def _chosen(self, adapter, where) -> list[tuple[sites.Site, lora_site.LayerConfigs]]:
        """The sites that the adapter is on. Raises: UserError as `Adapter.check`."""
        found = [sites.renamed(site, others, adapter.config) for site, others in self._sites]
        selected = lora_site.select(found, adapter.config, strict=False)
        configs = {name: own for site, each in zip(found, selected, strict=True)
                   for name, own in zip(site.names, each, strict=True) if own}  # fmt: skip
        layers = {name: site.layer for site in found for name in site.names}
        # What the config names is reported by its name, or has become A and B.
        of_saved = {name: array.shape for name, array in adapter.saved.items()
                    if targets.saves(name.rpartition(".")[0], adapter.config)
                    or token_indices.has_rows(name, adapter.config)}  # fmt: skip
        adapter.check(configs, layers, of_saved, where)
        return [(site, own) for site, own in zip(found, selected, strict=True) if any(own)]


def _last(banked: Sequence[sites.Site]) -> list[str]:
    return list(dict.fromkeys(str(site.path[-1]) for site in banked))


def _arrays(
    site: sites.Site,
    configs: lora_site.LayerConfigs,
    adapter: lora_adapter.Adapter,
    num_slots: int,
    rank: int,
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """(A [L, K, R], B [L, R, N], v [L, 1, N]) of the site for each slot."""
    whole, (k, n) = num_slots * rank, (site.in_features, site.out_features)
    A = np.zeros((len(configs), k, whole), np.float32)
    B = np.zeros((len(configs), whole, n), np.float32)
    magnitude = np.ones((len(configs), n), np.float32)
    scaling = np.zeros((len(configs), 1, 1), np.float32)
    for index, (name, own) in enumerate(zip(site.names, configs, strict=True)):
        if own:
            factors = adapter.factors[name]
            A[index, :, : own.rank] = factors.A
            for rows, columns in lora_site.parts(n, own):
                B[index, rows, columns] = factors.B[rows, columns]
            scaling[index] = own.scaling
            if factors.magnitude is not None:
                magnitude[index] = factors.magnitude
    A, B, magnitude, scaling = (
        array.reshape(*site.lead, *array.shape[1:]) for array in (A, B, magnitude, scaling)
    )
    ratio = np.ones_like(magnitude)
    if adapter.config.use_dora:
        ratio = np.asarray(site.each(_ratio, *map(jnp.asarray, (A, B, scaling, magnitude))))
    B *= scaling * ratio[..., None, :]
    dtype = bank.dtype_of(site)
    for slot in range(num_slots):
        columns = slice(slot * rank, (slot + 1) * rank)
        stretch = (ratio - 1 if slot == 0 else np.zeros_like(ratio))[..., None, :]
        with np.errstate(over="ignore"):  # `_check_finite` reports it
            own = A[..., columns].astype(dtype), B[..., columns, :].astype(dtype)
        yield (*own, stretch)


def _ratio(weight, A, B, scaling, magnitude):
    """m / ‖W + s A B‖ of a layer; 1 without an adapter."""
    length = jnp.maximum(algebra.lengths(weight, A, B, scaling), jnp.finfo(jnp.float32).tiny)
    return algebra.stretch(magnitude, length, scaling)


def _check_finite(slots: Sequence[Slot], where: str) -> None:
    """Raises: UserError for numbers that would be NaN or infinite in the other rows of a batch."""
    bad = dict.fromkeys(
        places.dotted(path)
        for slot in slots
        for path, arrays in slot.items()
        if not all(np.isfinite(array.astype(np.float32)).all() for array in arrays)
    )
    if bad:
        raise errors.UserError(
            expected="finite numbers in A, B and the magnitudes, in the dtype of the model",
            found=[f"NaN or infinity in {path}" for path in bad],
            where=where,
            do="train the adapter again with a lower learning rate, or load the base in another "
            "dtype",
        )


def _digest(slots: Sequence[Slot]) -> str:
    found = hashlib.sha256()
    for slot in slots:
        for path, arrays in sorted(slot.items(), key=lambda item: places.dotted(item[0])):
            found.update(places.dotted(path).encode())
            for array in arrays:
                found.update(np.ascontiguousarray(array).view(np.uint8).data)
        found.update(b"|")
    return found.hexdigest()
