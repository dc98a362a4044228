"""Read and write PEFT adapter folders: adapter_config.json and adapter_model.safetensors."""

import json
import os
import pathlib
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy
from flax import nnx

from lora_jax import errors, hub
from lora_jax.lora import adapter as lora_adapter
from lora_jax.lora import config as lora_config
from lora_jax.lora import mlx, peft_config, peft_tensors, targets
from lora_jax.lora.nnx import collect, inject, names

_WEIGHTS, _SETTINGS = "adapter_model.safetensors", "adapter_config.json"

# ---------------------------------------------------------------------------------- NNX models


def load(
    model: nnx.Module, folder: pathlib.Path | str, *, untrained: bool = False
) -> lora_config.LoRAConfig:
    """The settings of the adapter in `folder`, which it puts into `model`.

    Raises: UserError as `read` and lora.attach.
    """
    adapter = names.of_model(model, read(folder))
    inject.attach(model, adapter, untrained=untrained, where=str(folder))
    return adapter.config


def save(
    folder: pathlib.Path | str,
    model: nnx.Module,
    config: lora_config.LoRAConfig,
    *,
    base_model: str | None = None,
    revision: str | None = None,
) -> None:
    """Writes the model's adapters in the format that PEFT, vLLM and `load` read.

    Those of the language model in a composite model are for PEFT on the whole model.
    """
    adapter = collect.collect(model, config, base_model=base_model)
    write(folder, names.of_file(model, adapter), revision=revision)


# ---------------------------------------------------------------------------------- writing


def write(
    folder: pathlib.Path | str, adapter: lora_adapter.Adapter, *, revision: str | None = None
) -> None:
    """Writes the folder; A, B and magnitudes in float32, the other arrays in their own dtype."""
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    # Not save_file, whose file only its owner may read. Under other names first, so that a killed
    # process leaves the old files intact.
    content = {
        _WEIGHTS: safetensors.numpy.save(peft_tensors.tensors(adapter), {"format": "pt"}),
        _SETTINGS: json.dumps(
            peft_config.written(adapter, revision), indent=2, sort_keys=True
        ).encode(),
    }
    for name, data in content.items():
        (folder / f"{name}.new").write_bytes(data)
    for name in content:
        os.replace(folder / f"{name}.new", folder / name)


# ---------------------------------------------------------------------------------- reading


def read(folder: pathlib.Path | str) -> lora_adapter.Adapter:
    """The adapter in `folder`: PEFT's, or mlx-lm's (adapters.safetensors).

    Raises: UserError if a file is missing, damaged, a pickle or a git-lfs pointer; if the adapter
    is not LoRA, or has settings that change the mathematics and are not implemented.
    """
    folder = pathlib.Path(folder)
    raw = settings(folder)
    if mlx.is_settings(raw):
        return mlx.adapter(raw, _arrays(folder, mlx.FILE), where=folder)
    where = str(folder / _SETTINGS)
    peft_config.parse(raw, where, ["unknown"])  # fails before the tensors are read
    factors, saved = peft_tensors.parse(_arrays(folder, _WEIGHTS), str(folder))
    own = peft_config.parse(raw, where, list(factors))
    if biases := [name for name in saved if _is_bias(name, own)]:
        raise errors.UserError(
            expected="biases that were not trained",
            found=[f"{name}, with bias = {raw.get('bias')!r}" for name in biases],
            where=str(folder),
            do="use PEFT to merge this adapter into its base, and load the merged model",
        )
    changed = [name for name in saved if name.endswith(".base_layer.weight")]
    if changed and own.init_lora_weights != "default":
        raise errors.UserError(
            expected="no weights of the base beside A and B that change it",
            found=[f"{name}, with init_lora_weights = {own.init_lora_weights!r}"
                   for name in changed],
            where=str(folder),
            do="save the adapter with path_initial_model_for_weight_conversion, or merge it with "
            "PEFT",
        )  # fmt: skip
    return lora_adapter.Adapter(own, factors, saved, raw.get("base_model_name_or_path"))


def _is_bias(name: str, config: lora_config.LoRAConfig) -> bool:
    path, _, leaf = name.rpartition(".")
    return leaf == "bias" and not targets.saves(path, config)


def settings(folder: pathlib.Path | str) -> dict[str, Any]:
    """The parsed adapter_config.json. Raises: UserError if it is missing or not a JSON object."""
    path = pathlib.Path(folder) / _SETTINGS
    if not path.is_file():
        raise errors.UserError(
            expected="an adapter folder with adapter_config.json and adapter_model.safetensors",
            found="no adapter_config.json",
            where=str(folder),
            do=_inside(pathlib.Path(folder))
            or "pass the folder that a training run wrote as OUTPUT_DIR/adapter",
        )
    hub.refuse_lfs_pointer(path)
    try:
        raw = json.loads(path.read_text(encoding="utf-8-sig"))
        if not isinstance(raw, dict):
            raise ValueError(f"a {type(raw).__name__}")
    except (OSError, ValueError, RecursionError) as error:
        raise errors.UserError(
            expected="a JSON object", found=str(error), where=str(path), do="copy the file again"
        ) from None
    return raw


def base_of(folder: pathlib.Path | str) -> tuple[str, str | None]:
    """(name, revision) of the model that the adapter in `folder` names as its base.

    Raises: UserError as `settings`, or if it names none.
    """
    raw = settings(folder)
    name = raw.get("model" if mlx.is_settings(raw) else "base_model_name_or_path")
    if not (name and isinstance(name, str)):
        raise errors.UserError(
            expected="base_model_name_or_path in adapter_config.json",
            found="none",
            where=str(folder),
            do="give the base model with --model",
        )
    return name, raw.get("revision")


def _inside(folder: pathlib.Path) -> str:
    """What to do about the folder of a run that was passed in place of its adapter; "" if not."""
    found = sorted(path.parent for path in folder.glob(f"*/{_SETTINGS}"))
    newest = max(found, key=lambda path: path.stat().st_mtime, default=None)
    return f"pass one of the adapters in it, such as {newest}" if newest else ""


def config(folder: pathlib.Path | str) -> lora_config.LoRAConfig:
    """The LoRAConfig in adapter_config.json.

    Raises: UserError that names every key that changes the mathematics and is not implemented.
    """
    return peft_config.parse(settings(folder), str(pathlib.Path(folder) / _SETTINGS))


def _arrays(folder: pathlib.Path, file: str) -> dict[str, np.ndarray]:
    """{name: array} of a safetensors file. Raises: UserError if it is missing or damaged."""
    path = folder / file
    if not path.is_file():
        pickled = (folder / "adapter_model.bin").exists()
        raise errors.UserError(
            expected=file,
            found="only adapter_model.bin, a pickle, which can run code and is not read"
            if pickled
            else "no weights",
            where=str(folder),
            do=f"convert it where you trust it: python -c 'import torch, safetensors.torch as s; "
            f's.save_file(torch.load("{folder}/adapter_model.bin", "cpu", weights_only=True), '
            f'"{path}", {{"format": "pt"}})\''
            if pickled
            else "save the adapter with PEFT's save_pretrained, which writes this file",
        )
    hub.refuse_lfs_pointer(path)
    try:
        stored = safetensors.deserialize(path.read_bytes())
    except (safetensors.SafetensorError, OSError) as error:
        raise errors.UserError(
            expected="a complete safetensors file",
            found=str(error),
            where=str(path),
            do="copy or download it again",
        ) from None
    return peft_tensors.decode(stored, str(path))
