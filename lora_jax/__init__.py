"""QLoRA for JAX: import the modules, e.g. `from lora_jax import checkpoint, lora, peft`.

Importing the package imports nothing else, jax included; its modules load when first used.
"""

import importlib

__version__ = "0.1.0"
__all__ = [
    "adapter",
    "adapters",
    "checkpoint",
    "config",
    "data",
    "errors",
    "evaluate",
    "generate",
    "hub",
    "linen",
    "lora",
    "optim",
    "peft",
    "quant",
    "quantised",
    "sharding",
    "snapshot",
    "sources",
    "tokenizer",
    "train",
]


def __getattr__(name: str):
    if name in __all__:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
