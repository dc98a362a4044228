"""A PEFT adapter folder: adapter_config.json and adapter_model.safetensors, both ways."""

import json
import os
import pathlib
from typing import Any

import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy
from flax import nnx

from lora_jax import config as lora_config
from lora_jax import errors, hub, lora

_PREFIX = "base_model.model."
_READ = {
    *("peft_type", "r", "lora_alpha", "lora_dropout", "target_modules", "exclude_modules"),
    *("layers_to_transform", "rank_pattern", "alpha_pattern", "use_rslora"),
    *("base_model_name_or_path", "bias", "fan_in_fan_out", "init_lora_weights"),
}
# Keys that do not change what a trained adapter computes, whatever their value.
_INERT = {
    *("task_type", "revision", "inference_mode", "peft_version", "auto_mapping"),
    *("layers_pattern", "qalora_group_size", "megatron_core", "ensure_weight_tying"),
    *("loftq_config", "runtime_config"),
}
_EMPTY = (None, False, 0, "", [], {})
_INITS = (True, False, "gaussian", "loftq", "orthogonal")  # these leave the base as it is


def save(
    folder: pathlib.Path,
    model: nnx.Module,
    config: lora_config.LoRAConfig,
    *,
    base_model: str,
    revision: str | None = None,
) -> None:
    """Writes the model's adapters so that PEFT, vLLM and `load` read them; float32."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for name, (site, index) in lora.adapters(model).items():
        rank = site.module.ranks[index]
        lora_A, lora_B = (
            np.asarray(part[index] if site.stacked else part[...], np.float32)
            for part in (site.module.lora_A, site.module.lora_B)
        )
        tensors[f"{_PREFIX}{name}.lora_A.weight"] = np.ascontiguousarray(lora_A[:, :rank].T)
        tensors[f"{_PREFIX}{name}.lora_B.weight"] = np.ascontiguousarray(lora_B[:rank].T)

    def as_list(names):
        return names if isinstance(names, str) else sorted(names)

    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "revision": revision,
        "r": config.rank,
        "lora_alpha": config.alpha,
        "lora_dropout": config.dropout,
        "bias": "none",
        "fan_in_fan_out": False,
        "target_modules": as_list(config.targets),
        "exclude_modules": as_list(config.exclude) or None,
        "modules_to_save": None,
        "init_lora_weights": True,
        "layers_to_transform": None if config.layers is None else list(config.layers),
        "layers_pattern": None,
        "rank_pattern": config.rank_pattern,
        "alpha_pattern": config.alpha_pattern,
        "use_rslora": config.use_rslora,
        "use_dora": False,
        "inference_mode": True,
    }
    # Under other names first: a process killed here leaves what was there whole.
    new = {
        name: folder / f"{name}.new"
        for name in ("adapter_model.safetensors", "adapter_config.json")
    }
    safetensors.numpy.save_file(
        tensors, new["adapter_model.safetensors"], metadata={"format": "pt"}
    )
    new["adapter_config.json"].write_text(json.dumps(settings, indent=2, sort_keys=True))
    for name, path in new.items():
        os.replace(path, folder / name)


def settings(folder: pathlib.Path) -> dict[str, Any]:
    """The parsed adapter_config.json. Raises: UserError when there is none."""
    path = pathlib.Path(folder) / "adapter_config.json"
    if not path.exists():
        raise errors.UserError(
            expected="an adapter folder with adapter_config.json and adapter_model.safetensors",
            found="no adapter_config.json",
            where=str(folder),
            do="pass the folder a training run wrote as OUTPUT_DIR/adapter",
        )
    hub.refuse_lfs_pointer(path)
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise errors.UserError(
            expected="JSON", found=str(error), where=str(path), do="copy the file again"
        ) from None


def config(folder: pathlib.Path) -> lora_config.LoRAConfig:
    """The LoRAConfig in adapter_config.json.

    Raises: UserError naming every key that changes the mathematics and is not implemented.
    """
    raw = settings(folder)
    problems = [f"no {key}" for key in ("r", "lora_alpha", "target_modules") if not raw.get(key)]
    if raw.get("peft_type") != "LORA":
        problems.append(f"peft_type = {raw.get('peft_type')!r} (LORA is implemented)")
    if raw.get("bias", "none") != "none":
        problems.append(f"bias = {raw['bias']!r}")
    if raw.get("init_lora_weights", True) not in _INITS:
        problems.append(f"init_lora_weights = {raw['init_lora_weights']!r} (it changed the base)")
    problems += [
        f"{key} = {value!r}"
        for key, value in raw.items()
        if key not in _READ | _INERT and not any(value is e or value == e for e in _EMPTY)
    ]
    if problems:
        raise errors.UserError(
            expected="a LoRA adapter with settings that lora_jax implements",
            found=problems,
            where=str(pathlib.Path(folder) / "adapter_config.json"),
            do="use PEFT to merge this adapter into its base, and load the merged model",
        )
    layers = raw.get("layers_to_transform")
    return lora_config.LoRAConfig(
        rank=raw["r"],
        alpha=raw["lora_alpha"],
        dropout=raw.get("lora_dropout") or 0.0,
        targets=raw["target_modules"],
        exclude=raw.get("exclude_modules") or (),
        layers=(layers,) if isinstance(layers, int) else layers,
        rank_pattern=raw.get("rank_pattern") or {},
        alpha_pattern=raw.get("alpha_pattern") or {},
        use_rslora=bool(raw.get("use_rslora")),
    )


def load(model: nnx.Module, folder: pathlib.Path | str) -> lora_config.LoRAConfig:
    """Injects the adapter in `folder` into `model`, and gives its settings.

    Every tensor must find its layer and every targeted layer its tensors.
    Raises: UserError listing all that do not fit.
    """
    folder = pathlib.Path(folder)
    adapter_config = config(folder)
    tensors = _tensors(folder)
    lora.inject(model, adapter_config, rngs=nnx.Rngs(0))
    wanted = {}
    for name, (site, index) in lora.adapters(model).items():
        rank = site.module.ranks[index]
        wanted[f"{name}.lora_A"] = (site.module.lora_A, site, index, rank)
        wanted[f"{name}.lora_B"] = (site.module.lora_B, site, index, rank)
    problems = [f"{name}.weight is missing" for name in wanted if name not in tensors]
    problems += [f"{name} has no layer in this model" for name in tensors if name not in wanted]
    for name, (variable, _, _, rank) in wanted.items():
        d_in, d_out = variable.shape[-2:]
        shape = (rank, d_in) if name.endswith("lora_A") else (d_out, rank)
        if name in tensors and tensors[name].shape != shape:
            problems.append(f"{name}.weight has shape {tensors[name].shape}, expected {shape}")
    if problems:
        raise errors.UserError(
            expected="an adapter for this base model",
            found=problems,
            where=str(folder),
            do=f"load it on its own base: {settings(folder).get('base_model_name_or_path')}",
        )
    filled: dict[int, tuple[Any, np.ndarray]] = {}
    for name, (variable, site, index, rank) in wanted.items():
        _, whole = filled.setdefault(id(variable), (variable, np.zeros(variable.shape, np.float32)))
        layer = whole[index] if site.stacked else whole
        if name.endswith("lora_A"):
            layer[:, :rank] = tensors[name].T
        else:
            layer[:rank] = tensors[name].T
    for variable, whole in filled.values():
        variable.set_value(jnp.asarray(whole))
    return adapter_config


def _tensors(folder: pathlib.Path) -> dict[str, np.ndarray]:
    """{`model.layers.0.self_attn.q_proj.lora_A`: array} from the adapter's safetensors file."""
    path = folder / "adapter_model.safetensors"
    if not path.exists():
        pickled = (folder / "adapter_model.bin").exists()
        raise errors.UserError(
            expected="adapter_model.safetensors",
            found="only adapter_model.bin, a pickle, which can run code and is not read"
            if pickled
            else "no weights",
            where=str(folder),
            do="save the adapter with PEFT's save_pretrained(…, safe_serialization=True)",
        )
    hub.refuse_lfs_pointer(path)
    try:
        raw = safetensors.numpy.load_file(path)
    except (safetensors.SafetensorError, OSError) as error:
        raise errors.UserError(
            expected="a whole safetensors file",
            found=str(error),
            where=str(path),
            do="copy or download it again",
        ) from None
    return {
        name.removeprefix(_PREFIX).removesuffix(".weight").removesuffix(".default"): array
        for name, array in raw.items()
    }
