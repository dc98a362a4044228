"""One optimizer step: losses, gradients, AdamW on A and B; several adapters at once; DPO.

May import `data`, `lora`, `parallel` and below.
"""

from lora_jax import lazy

_STEP = ("Batch", "State", "start", "make_step", "make_eval_loss", "steps")
__getattr__, __all__ = lazy.names(
    __name__,
    {name: f"{__name__}.adamw:{name}" for name in ("make", "schedule", "frozen", "labels")}
    | {name: f"{__name__}.step:{name}" for name in _STEP}
    | {"OptimConfig": f"{__name__}.config:OptimConfig"},
)
