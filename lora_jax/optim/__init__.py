"""One optimizer step: loss (also of DPO), gradient and AdamW, for one adapter or several at once.

May import `data`, `lora`, `parallel` and below.
"""

from lora_jax import lazy

_STEP = ("State", "start", "make_step", "make_eval_loss", "steps")
__getattr__, __all__ = lazy.names(
    __name__,
    {name: f"{__name__}.adamw:{name}" for name in ("make", "schedule", "frozen", "labels")}
    | {name: f"{__name__}.step:{name}" for name in _STEP}
    | {"Batch": f"{__name__}.loss:Batch", "OptimConfig": f"{__name__}.config:OptimConfig"},
)
