"""Many adapters on one base: loaded by name, switched without compiling anew, weighted."""

import pathlib
from collections.abc import Mapping
from typing import Any

from flax import nnx

from lora_jax import errors
from lora_jax.lora import adapter as host
from lora_jax.lora import peft
from lora_jax.lora.nnx import inject as lora


class Adapters:
    """The adapters of an NNX model, of which one is active, or none.

    All are kept with arrays of the same shapes (see adapter.aligned), so a function that was
    compiled for the model with one of them runs with any: to switch is to put other A and B into
    it. A first adapter on more layers than the others, or of a larger rank, changes the shapes.
    """

    def __init__(self, model: nnx.Module, *, rank: int = 1):
        """model: without adapters. rank: room for adapters of that rank, from the start."""
        self.model, self.active = model, None
        self._rank, self._loaded, self._states, self._config = rank, {}, {}, None

    @property
    def names(self) -> list[str]:
        """Those that are loaded."""
        return list(self._loaded)

    def load(self, name: str, source: host.Adapter | pathlib.Path | str) -> None:
        """Loads an adapter, or the one in a folder, under a name that is free.

        Raises: UserError for a name that is taken, a folder's adapter without effect, and as
        peft.read, lora.check and adapter.aligned. What is loaded and active is then as it was.
        """
        if name in self._loaded:
            raise errors.UserError(
                expected="a name that is free",
                found=f"an adapter {name!r}",
                do="unload it first, or choose another name",
            )
        own = isinstance(source, host.Adapter)
        adapter = source if own else peft.read(source)
        lora.check(self.model, adapter, where=name if own else str(source))
        if not own:
            adapter.check_effect(str(source))
        self._build({**self._loaded, name: adapter})

    def combine(self, name: str, weights: Mapping[str, float], *, rank: int | None = None) -> None:
        """Loads Σ weight · ΔW of adapters that are loaded, as one: see adapter.combined."""
        parts = [(self._loaded[self._known(part)], weight) for part, weight in weights.items()]
        self.load(name, host.combined(parts, rank=rank))

    def unload(self, name: str) -> None:
        """Forgets an adapter; the shapes of the others stay."""
        if self.active == self._known(name):
            self.activate(None)
        del self._loaded[name], self._states[name]

    def activate(self, name: str | None) -> None:
        """Has the model compute with that adapter; None: with its base."""
        nnx.update(self.model, self.state(name))
        self.active = name

    def state(self, name: str | None) -> Any:
        """A and B of that adapter, as nnx.state(model, lora.LoRAParam): for functions of both."""
        if name is None and not self._states:
            return nnx.state(self.model, lora.LoRAParam)
        return self._states[None if name is None else self._known(name)]

    def adapter(self, name: str) -> host.Adapter:
        """The adapter as it was loaded, for peft.write."""
        return self._loaded[self._known(name)]

    def _known(self, name: str) -> str:
        if name not in self._loaded:
            raise errors.UserError(
                expected="an adapter that is loaded", found=repr(name),
                where=f"loaded are: {', '.join(self._loaded) or 'none'}",
            )  # fmt: skip
        return name

    def _build(self, loaded: dict[str, host.Adapter]) -> None:
        """Makes the states of `loaded`, and room for them in the model."""
        aligned = host.aligned(loaded, rank=self._rank)
        first = next(iter(aligned.values()))
        if self._states and first.config == self._config:
            missing = [name for name in loaded if name not in self._states]
        else:
            if self._states:
                lora.strip(self.model)
            lora.attach(self.model, first, untrained=True)
            self._states = {None: lora.idle(self.model)}
            missing = list(loaded)
        for name in missing:
            self._states[name] = lora.filled(self.model, aligned[name])
        self._loaded, self._config = loaded, first.config
        self.activate(self.active)
