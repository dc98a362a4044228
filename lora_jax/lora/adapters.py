"""Several adapters on one base: load them by name, switch without recompiling, combine them."""

import pathlib
from collections.abc import Mapping
from typing import Any

from flax import nnx

from lora_jax import errors
from lora_jax.lora import adapter as lora_adapter
from lora_jax.lora import peft
from lora_jax.lora.nnx import collect, inject, merge, vocabulary
from lora_jax.lora.nnx.model_state import LoRAParam


class Adapters:
    """The adapters of an NNX model, of which at most one is active.

    All have arrays of the same shapes (see adapter.aligned), so a function that was compiled for
    the model with one adapter runs with any; a switch replaces the values of A and B. An adapter
    on more layers than those loaded before, or of a larger rank, changes the shapes.
    """

    def __init__(self, model: nnx.Module, *, rank: int = 1):
        """model: without adapters. rank: leaves room for adapters of this rank from the start."""
        self.model, self.active = model, None
        self._rank, self._loaded, self._states, self._config = rank, {}, {}, None

    @property
    def names(self) -> list[str]:
        """The names of the loaded adapters."""
        return list(self._loaded)

    def load(self, name: str, source: lora_adapter.Adapter | pathlib.Path | str) -> None:
        """Loads an adapter, or the one in a folder, under a free name.

        Raises: UserError if the name is taken, if a folder's adapter has no effect, and as
        peft.read, inject.check and adapter.aligned. The loaded and active adapters do not change.
        """
        if name in self._loaded:
            raise errors.UserError(
                expected="a free name",
                found=f"an adapter {name!r}",
                do="unload it first, or choose another name",
            )
        own = isinstance(source, lora_adapter.Adapter)
        where = name if own else str(source)
        adapter = vocabulary.reduced(self.model, source if own else peft.read(source), where)
        inject.check(self.model, adapter, where=where)
        if not own:
            adapter.check_effect(where)
        self._build({**self._loaded, name: adapter})

    def combine(self, name: str, weights: Mapping[str, float], *, rank: int | None = None) -> None:
        """Loads Σ weight · ΔW of loaded adapters as a new adapter: see adapter.combined."""
        parts = [(self._loaded[self._known(part)], weight) for part, weight in weights.items()]
        self.load(name, lora_adapter.combined(parts, rank=rank))

    def unload(self, name: str) -> None:
        """Removes an adapter; the shapes of the others do not change."""
        if self.active == self._known(name):
            self.activate(None)
        del self._loaded[name], self._states[name]

    def activate(self, name: str | None) -> None:
        """Makes the model compute with that adapter; None: with the base alone."""
        nnx.update(self.model, self.state(name))
        self.active = name

    def state(self, name: str | None) -> Any:
        """nnx.state(model, LoRAParam) with that adapter, as an argument of a compiled function."""
        if name is None and not self._states:
            return nnx.state(self.model, LoRAParam)
        return self._states[None if name is None else self._known(name)]

    def adapter(self, name: str) -> lora_adapter.Adapter:
        """The adapter as it was loaded, such as for peft.write."""
        return self._loaded[self._known(name)]

    def _known(self, name: str) -> str:
        if name not in self._loaded:
            raise errors.UserError(
                expected="a loaded adapter", found=repr(name),
                where=f"loaded: {', '.join(self._loaded) or 'none'}",
            )  # fmt: skip
        return name

    def _build(self, loaded: dict[str, lora_adapter.Adapter]) -> None:
        """Makes the states of `loaded`, and arrays for them in the model."""
        aligned = lora_adapter.aligned(loaded, rank=self._rank)
        first = next(iter(aligned.values()))
        if self._states and first.config == self._config:
            missing = [name for name in loaded if name not in self._states]
        else:
            if self._states:
                merge.strip(self.model)
            inject.attach(self.model, first, untrained=True)
            self._states = {None: collect.idle(self.model)}
            missing = list(loaded)
        for name in missing:
            self._states[name] = collect.filled(self.model, aligned[name])
        self._loaded, self._config = loaded, first.config
        self.activate(self.active)
