"""Prompts in, continuations out: prefill and decoding under one jit, with sampling.

May import `checkpoints`, `lora`, `parallel` and below.
"""

from lora_jax import lazy

__getattr__, __all__ = lazy.names(
    __name__,
    {name: f"{__name__}.continuation:{name}" for name in ("make", "continuations", "check_length")}
    | {"Sampling": f"{__name__}.config:Sampling"},
)
