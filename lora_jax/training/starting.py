"""The adapter that a run trains further, in place of a new one."""

import dataclasses
import hashlib
import json
import pathlib
from typing import NamedTuple

import numpy as np

from lora_jax import hub
from lora_jax.console import say
from lora_jax.lora import adapter as lora_adapter
from lora_jax.lora import peft
from lora_jax.training.output import run_folder
from lora_jax.training.settings import groups


class Start(NamedTuple):
    """An adapter to start from, with the dropout of the run."""

    folder: pathlib.Path
    adapter: lora_adapter.Adapter

    def digest(self) -> str:
        """Of all its arrays, and of its settings but for the dropout."""
        config = dataclasses.asdict(dataclasses.replace(self.adapter.config, dropout=0.0))
        found = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
        arrays = {f"{path}.{name}": array for path, own in self.adapter.factors.items()
                  for name, array in own._asdict().items()
                  if isinstance(array, np.ndarray)} | dict(self.adapter.saved)  # fmt: skip
        for name in sorted(arrays):
            found.update(name.encode())
            found.update(np.ascontiguousarray(arrays[name]).view(np.uint8).data)
        return found.hexdigest()[:16]


def find(
    settings: groups.TrainSettings, *, resuming: bool
) -> tuple[groups.TrainSettings, Start | None]:
    """(the settings with those of the adapter to start from, that adapter); None without one.

    The settings of LoRA are the adapter's, but for a dropout that is given. Without a model in the
    settings, it is the one that the adapter names as its base. resuming: the model is known.
    Raises: UserError if the adapter cannot be read, or if there is no model.
    """
    if settings.loop.init_adapter is None:
        return settings, None
    folder = hub.adapter_folder(settings.loop.init_adapter)
    adapter = peft.read(folder)
    own = adapter.config
    if resuming or "dropout" in settings.given:
        own = dataclasses.replace(own, dropout=settings.lora.dropout)
    settings = dataclasses.replace(settings, lora=own)
    if not resuming and "model" not in settings.given:
        settings = dataclasses.replace(settings, model=_base(settings.model, folder))
    return settings, Start(folder, dataclasses.replace(adapter, config=own))


def _base(model: groups.ModelSettings, folder: pathlib.Path) -> groups.ModelSettings:
    """The settings of the model that the adapter in `folder` names."""
    name, revision = peft.base_of(folder)
    if hub.looks_like_path(name):
        hub.model_folder(name, named_by=folder)  # whose error says who names it
    return dataclasses.replace(model, model=name, revision=model.revision or revision)


def note_other_base(start: Start, quant: str) -> None:
    """Says so if the adapter was trained on a base in another format than `quant`."""
    trained_on = run_folder.quantization_of(start.folder)
    if trained_on not in (None, quant):
        say("note", f"the adapter was trained with --quant {trained_on}, and this is --quant "
            f"{quant}")  # fmt: skip
