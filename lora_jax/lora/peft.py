"""Read and write PEFT adapter folders: adapter_config.json and adapter_model.safetensors."""

import collections
import json
import os
import pathlib
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
from flax import nnx

from lora_jax import errors, hub
from lora_jax.lora import adapter as lora_adapter
from lora_jax.lora import config as lora_config
from lora_jax.lora import files, mlx
from lora_jax.lora.nnx import collect, inject
from lora_jax.models import names

_PREFIX = "base_model.model."
_READ = {
    *("peft_type", "r", "lora_alpha", "lora_dropout", "target_modules", "exclude_modules"),
    *("layers_to_transform", "layers_pattern", "rank_pattern", "alpha_pattern", "modules_to_save"),
    *("use_rslora", "use_dora", "base_model_name_or_path", "bias", "init_lora_weights"),
    "ensure_weight_tying",
}
# Keys whose value does not change what a trained adapter computes.
_INERT = {
    *("task_type", "revision", "inference_mode", "peft_version", "auto_mapping"),
    *("fan_in_fan_out", "qalora_group_size", "megatron_core"),
    *("loftq_config", "runtime_config"),
}
_NUMBER = (int, float)
_TYPES = {  # of the settings that are read: the type of a value, and of its elements
    "r": (int, ()),
    "lora_alpha": (_NUMBER, ()),
    "lora_dropout": (_NUMBER, ()),
    "target_modules": ((str, list), str),
    "exclude_modules": ((str, list), str),
    "modules_to_save": (list, str),
    "layers_to_transform": ((int, list), int),
    "layers_pattern": ((str, list), str),
    "rank_pattern": (dict, int),
    "alpha_pattern": (dict, _NUMBER),
    "base_model_name_or_path": (str, ()),
}
_EMPTY = (None, False, 0, "", [], {})
_INITS = (True, False, "gaussian", "loftq", "orthogonal", "eva")  # these do not change the base


# ---------------------------------------------------------------------------------- NNX models


def load(
    model: nnx.Module, folder: pathlib.Path | str, *, untrained: bool = False
) -> lora_config.LoRAConfig:
    """The settings of the adapter in `folder`, which it puts into `model`.

    They also name an embedding or a head that only the file names, see embeddings.resolved.
    Raises: UserError as `read` and lora.attach.
    """
    adapter = inject.resolved(model, read(folder))
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
    """Writes the model's adapters in the format that PEFT, vLLM and `load` read."""
    write(folder, collect.collect(model, config, base_model=base_model), revision=revision)


# ---------------------------------------------------------------------------------- writing


def write(
    folder: pathlib.Path | str, adapter: lora_adapter.Adapter, *, revision: str | None = None
) -> None:
    """Writes the folder; A, B and magnitudes in float32, the other arrays in their own dtype."""
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {f"{_PREFIX}{name}": array for name, array in adapter.saved.items()}
    for path, own in adapter.factors.items():
        tensors |= {f"{_PREFIX}{path}.{name}": array for name, array in _tensors(own).items()}
    # Under other names first, so that a killed process leaves the old files intact.
    new = {
        name: folder / f"{name}.new"
        for name in ("adapter_model.safetensors", "adapter_config.json")
    }
    files.write(new["adapter_model.safetensors"], tensors)
    written = _settings(adapter, revision)
    new["adapter_config.json"].write_text(json.dumps(written, indent=2, sort_keys=True))
    for name, path in new.items():
        os.replace(path, folder / name)


def _tensors(own: lora_adapter.Factors) -> dict[str, np.ndarray]:
    """{end of the name in the file: array} of a layer's tensors."""
    A, B, magnitude = own.A.T, own.B.T, own.magnitude
    if own.kind == "conv":
        ones = (1,) * len(own.window)
        A = np.moveaxis(A.reshape(len(A), *own.window, -1), -1, 1)
        B = B.reshape(*B.shape, *ones)
        magnitude = None if magnitude is None else magnitude.reshape(1, -1, *ones)
    if own.kind == "embedding":
        tensors = {"lora_embedding_A": A, "lora_embedding_B": B}
    else:
        tensors = {"lora_A.weight": A, "lora_B.weight": B}
    return tensors if magnitude is None else {**tensors, "lora_magnitude_vector": magnitude}


def _settings(adapter: lora_adapter.Adapter, revision: str | None) -> dict[str, Any]:
    config = adapter.config

    def as_list(names):
        return names if isinstance(names, str) else sorted(names)

    targets, layers, layers_pattern = config.targets, config.layers, config.layers_pattern
    if isinstance(targets, str) and layers is not None:
        # PEFT does not accept layers_to_transform with a regex.
        targets, layers, layers_pattern = tuple(adapter.factors), None, None
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": adapter.base_model,
        "revision": revision,
        "r": config.rank,
        "lora_alpha": config.alpha,
        "lora_dropout": config.dropout,
        "bias": "none",
        "fan_in_fan_out": False,
        "target_modules": as_list(targets),
        "exclude_modules": as_list(config.exclude) or None,
        "modules_to_save": list(config.modules_to_save) or None,
        "init_lora_weights": True,
        "layers_to_transform": None if layers is None else list(layers),
        "layers_pattern": list(layers_pattern)
        if isinstance(layers_pattern, tuple)
        else layers_pattern,
        "rank_pattern": config.rank_pattern,
        "alpha_pattern": config.alpha_pattern,
        "use_rslora": config.use_rslora,
        "use_dora": config.use_dora,
        "inference_mode": True,
    } | ({"ensure_weight_tying": True} if adapter.ensure_weight_tying else {})


# ---------------------------------------------------------------------------------- reading


def read(folder: pathlib.Path | str) -> lora_adapter.Adapter:
    """The adapter in `folder`: PEFT's, or mlx-lm's (adapters.safetensors).

    Names of wrappers such as torch.compile's, and the adapter's own, are left out of the tensors'
    names.
    Raises: UserError if a file is missing, damaged, a pickle or a git-lfs pointer, or has tensors
    that are not finite; if the adapter is not LoRA, or has settings that change the mathematics and
    are not implemented.
    """
    folder = pathlib.Path(folder)
    raw = settings(folder)
    if mlx.is_settings(raw):
        return mlx.adapter(raw, files.read(folder, mlx.FILE), where=folder)
    own = config(folder)
    arrays, problems = files.read(folder, "adapter_model.safetensors"), []
    factors: dict[str, dict[str, Any]] = {}
    saved: dict[str, np.ndarray] = {}
    adapters, keys = set(), collections.defaultdict(list)
    for key, array in arrays.items():
        name = names.of_adapter(key)
        if match := _NAME.fullmatch(name):
            part = match["part"]
            if not array.size or array.ndim < 1 + part.endswith(("A", "B")):
                problems.append(f"{name} has shape {array.shape}")
                continue
            factors.setdefault(match["path"], {})[part] = array
            name = f"{match['path']}.{part}"
        elif "lora_" in name:
            problems.append(f"{name}, of an unknown kind")
        else:
            match = _SAVED.fullmatch(name)
            name = f"{match['path']}.{match['end']}" if match else name
            saved[name] = array
        adapters.add(match["adapter"] if match else None)
        keys[name].append(key)
    problems += [" and ".join(sorted(same)) for same in keys.values() if len(same) > 1]
    if len(own_names := sorted(adapters - {None})) > 1:
        problems.append(f"{len(own_names)} adapters: {', '.join(own_names)}")
    if problems:
        raise errors.UserError(
            expected="tensors lora_A, lora_B, lora_embedding_A, lora_embedding_B, "
            "lora_magnitude_vector, or of fully trained modules",
            found=problems,
            where=str(folder),
            do="save one adapter with PEFT's save_pretrained, or merge it into its base with PEFT",
        )
    return lora_adapter.Adapter(
        own,
        {path: _factors(parts) for path, parts in factors.items()},
        saved,
        raw.get("base_model_name_or_path"),
        bool(raw.get("ensure_weight_tying")),
    )


_NAME = re.compile(  # the adapter's own name is there in files that PEFT did not write itself
    r"(?P<path>.+)\.(?P<part>lora_(?:embedding_)?[AB]|lora_magnitude_vector)"
    r"(?:\.(?!weight$)(?P<adapter>[^.]+))?(?:\.weight)?"
)
_SAVED = re.compile(r"(?P<path>.+)\.modules_to_save\.(?P<adapter>[^.]+)\.(?P<end>.+)")


def _factors(parts: Mapping[str, np.ndarray]) -> lora_adapter.Factors:
    """The inverse of `_tensors`."""
    kind = "embedding" if any("embedding" in name for name in parts) else "linear"
    A, B = (parts.get(f"lora_embedding_{x}", parts.get(f"lora_{x}")) for x in "AB")
    magnitude, window = parts.get("lora_magnitude_vector"), ()
    if A is not None and A.ndim > 2:
        kind, window = "conv", A.shape[2:]
        A = np.moveaxis(A, 1, -1).reshape(len(A), -1)
    if B is not None:
        B = B.reshape(B.shape[:2])
    A, B = (None if part is None else part.astype(np.float32).T for part in (A, B))
    if magnitude is not None:
        magnitude = magnitude.astype(np.float32).reshape(-1)
    return lora_adapter.Factors(A, B, magnitude, kind, window)


def settings(folder: pathlib.Path | str) -> dict[str, Any]:
    """The parsed adapter_config.json. Raises: UserError if it is missing or not a JSON object."""
    path = pathlib.Path(folder) / "adapter_config.json"
    if not path.is_file():
        raise errors.UserError(
            expected="an adapter folder with adapter_config.json and adapter_model.safetensors",
            found="no adapter_config.json",
            where=str(folder),
            do="pass the folder that a training run wrote as OUTPUT_DIR/adapter",
        )
    hub.refuse_lfs_pointer(path)
    try:
        raw = json.loads(path.read_text())
        if not isinstance(raw, dict):
            raise ValueError(f"a {type(raw).__name__}")
    except (OSError, ValueError, RecursionError) as error:
        raise errors.UserError(
            expected="a JSON object", found=str(error), where=str(path), do="copy the file again"
        ) from None
    return raw


def config(folder: pathlib.Path | str) -> lora_config.LoRAConfig:
    """The LoRAConfig in adapter_config.json.

    Raises: UserError that names every key that changes the mathematics and is not implemented.
    """
    raw = settings(folder)
    kind = raw.get("peft_type")
    if kind != "LORA":
        raise errors.UserError(
            expected="a LoRA adapter (peft_type LORA)",
            found=f"peft_type = {kind!r}",
            where=str(pathlib.Path(folder) / "adapter_config.json"),
            do="train it with LoRA; other kinds of adapters are not implemented",
        )
    problems = [f"no {key}" for key in ("r", "lora_alpha") if not raw.get(key)]
    if not raw.get("target_modules") and not raw.get("modules_to_save"):
        problems.append("no target_modules")
    if raw.get("bias", "none") != "none":
        problems.append(f"bias = {raw['bias']!r}")
    init = raw.get("init_lora_weights", True)
    if init not in _INITS:
        problems.append(
            f"init_lora_weights = {init!r} (it changed the base: save the adapter with "
            "path_initial_model_for_weight_conversion)"
        )
    problems += [
        f"{key} = {value!r}"
        for key, value in raw.items()
        if key not in _READ | _INERT and not any(value is e or value == e for e in _EMPTY)
    ]
    where = str(pathlib.Path(folder) / "adapter_config.json")
    malformed = _malformed(raw)
    if problems or malformed:
        raise errors.UserError(
            expected="a LoRA adapter with settings that lora_jax implements",
            found=[*malformed, *problems],
            where=where,
            do="copy the file again, or correct it"
            if malformed
            else "use PEFT to merge this adapter into its base, and load the merged model",
        )
    try:
        return _config(raw)
    except errors.UserError as error:
        raise errors.UserError(
            expected="LoRA settings in their valid range",
            found=error.found,
            where=where,
            do="copy the file again, or correct it",
        ) from None


def _malformed(raw: Mapping[str, Any]) -> list[str]:
    """The settings whose type is not the one PEFT writes."""
    found = []
    for key, (own, of_each) in _TYPES.items():
        value = raw.get(key)
        held = value.values() if isinstance(value, dict) else value
        parts = held if isinstance(value, list | dict) else ()
        right = isinstance(value, own) and all(isinstance(part, of_each) for part in parts)
        if value is not None and not right:
            found.append(f"{key} = {value!r}")
    return found


def _config(raw: Mapping[str, Any]) -> lora_config.LoRAConfig:
    layers = raw.get("layers_to_transform")
    return lora_config.LoRAConfig(
        rank=raw["r"],
        alpha=raw["lora_alpha"],
        dropout=raw.get("lora_dropout") or 0.0,
        targets=raw.get("target_modules") or (),
        exclude=raw.get("exclude_modules") or (),
        layers=(layers,) if isinstance(layers, int) else layers or None,
        layers_pattern=raw.get("layers_pattern") or None,
        rank_pattern=raw.get("rank_pattern") or {},
        alpha_pattern=raw.get("alpha_pattern") or {},
        modules_to_save=raw.get("modules_to_save") or (),
        use_rslora=bool(raw.get("use_rslora")),
        use_dora=bool(raw.get("use_dora")),
    )
