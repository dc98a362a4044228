"""Settings of a training run. Imports no jax: `--help` reads these defaults."""

import pathlib
from typing import Any

from lora_jax import errors
from lora_jax.models import config as model_config
from lora_jax.models import quantization_config as model_quantization

SEQ_LEN = 1024  # unless the model's context is shorter


def sequence_length(settings: dict[str, Any], context: int) -> int:
    """--seq-len, or its default. Raises: UserError for more than the model's context."""
    seq_len = settings.get("seq_len") or min(SEQ_LEN, context)
    if seq_len > context:
        raise errors.UserError(
            expected=f"rows within the model's context of {context} tokens",
            found=f"--seq-len {seq_len}",
            do=f"--seq-len {context}",
        )
    return seq_len


def line_length(settings: dict[str, Any]) -> int:
    """Tokens of the longest line that a batch can have: of a row, or with --dpo of a pair."""
    return settings["seq_len"] * (2 if settings.get("dpo") else 1)


def resolved_quant(
    settings: dict[str, Any], architecture: model_config.LlamaConfig, folder: pathlib.Path
) -> str:
    """What --quant means for the model in `folder`: as its checkpoint has it, if it was not given.

    Raises: UserError for what it cannot be, and where --quant-fast would have no effect.
    """
    stored = architecture.quantization
    quant = model_quantization.choose(settings.get("quant"), stored, str(folder))
    if stored is not None and settings.get("quant_fast"):
        raise errors.UserError(
            expected="flags that have an effect",
            found=f"--quant-fast with a checkpoint that is quantized already ({stored.fmt})",
            where=str(folder),
            do="leave it out",
        )
    return quant
