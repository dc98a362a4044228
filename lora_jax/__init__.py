"""QLoRA for JAX: import the rooms, e.g. `from lora_jax import checkpoints, lora, peft`.

Importing the package imports nothing else, jax included; what it names loads when first used.
"""

from lora_jax import lazy

__version__ = "0.1.0"

_ROOMS = (
    *("checkpoints", "data", "generation", "kernels", "layers", "lora", "models", "optim"),
    *("parallel", "planning", "quant", "training"),
    *("assets", "console", "errors", "hub", "tokenizer"),
)
_INSIDE = {  # used so often that they have a name of their own
    "adapters": "lora.adapters",
    "config": "lora.config",
    "linen": "lora.linen",
    "peft": "lora.peft",
}
__getattr__, __all__ = lazy.names(
    __name__,
    {name: f"{__name__}.{name}" for name in _ROOMS}
    | {name: f"{__name__}.{module}" for name, module in _INSIDE.items()},
)
