"""A training run: settings, data, the loop, evaluation, checkpoints, and the output folder.

May import `planning` and below.
"""

from lora_jax import lazy

_STEP = ("Batch", "State", "start", "make_step", "make_eval_loss", "steps")
__getattr__, __all__ = lazy.names(
    __name__,
    {name: f"lora_jax.optim:{name}" for name in _STEP}
    | {name: f"{__name__}.entry:{name}" for name in ("resume", "run")}
    | {
        "Outcome": f"{__name__}.outcome:Outcome",
        "TrainSettings": f"{__name__}.settings:TrainSettings",
        "settings": f"{__name__}.settings",
    },
)
