"""A training run: settings, data, the loop, evaluation, checkpoints, and the folder it leaves.

May import `planning` and below.
"""

from lora_jax import lazy

__getattr__, __all__ = lazy.names(
    __name__,
    {name: f"lora_jax.optim:{name}" for name in ("Batch", "State", "start", "make_step", "steps")},
)
