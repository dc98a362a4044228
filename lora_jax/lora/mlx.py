"""An adapter folder of mlx-lm: its own kind of adapter_config.json, and adapters.safetensors."""

import pathlib
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from lora_jax import errors
from lora_jax.lora import adapter as lora_adapter
from lora_jax.lora import config as lora_config

FILE = "adapters.safetensors"
_NAME = re.compile(r"(.+)\.(lora_a|lora_b|m)")


def is_settings(raw: Mapping[str, Any]) -> bool:
    """Whether `raw` is the adapter_config.json of mlx-lm."""
    return "lora_parameters" in raw or "fine_tune_type" in raw


def adapter(
    raw: Mapping[str, Any], arrays: Mapping[str, np.ndarray], *, where: pathlib.Path
) -> lora_adapter.Adapter:
    """The adapter: y = W x + scale · B A x, so alpha = scale · rank.

    Raises: UserError if it is not LoRA or DoRA of linear layers and embeddings.
    """
    kind, own = raw.get("fine_tune_type", "lora"), raw.get("lora_parameters") or {}
    own = own if isinstance(own, dict) else {}
    parts: dict[str, dict[str, np.ndarray]] = {}
    problems = [] if kind in ("lora", "dora") else [f"fine_tune_type = {kind!r}"]
    problems += [
        f"no {key} in lora_parameters" for key in ("rank", "scale") if own.get(key) is None
    ]
    problems += [f"{key} = {own[key]!r}" for key in ("rank", "scale", "dropout")
                 if not isinstance(own.get(key) or 0, int | float)]  # fmt: skip
    for name, array in arrays.items():
        match = _NAME.fullmatch(name)
        if match is None or array.ndim > 2:
            problems.append(f"{name} {array.shape}")
        else:
            parts.setdefault(match[1], {})[match[2]] = array.astype(np.float32)
    if problems:
        raise errors.UserError(
            expected="mlx-lm's LoRA or DoRA of linear layers and embeddings",
            found=problems,
            where=str(where),
            do="fuse it into its base with mlx_lm.fuse, and load the fused model",
        )
    return lora_adapter.Adapter(
        lora_config.LoRAConfig(
            rank=own["rank"],
            alpha=own["scale"] * own["rank"],
            dropout=own.get("dropout") or 0.0,
            targets=tuple(parts),
            use_dora=kind == "dora",
        ),
        {
            path: lora_adapter.Factors(
                found.get("lora_a"),
                found.get("lora_b"),
                found.get("m"),
                "embedding" if path.endswith("embed_tokens") else "linear",
            )
            for path, found in parts.items()
        },
        base_model=raw.get("model"),
    )
