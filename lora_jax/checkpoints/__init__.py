"""Model folders: reading, writing, quantizing and merging them, tensor by tensor.

May import `hub`, `lora`, `models`, `parallel`, `quant`.
"""

from lora_jax import lazy

__getattr__, __all__ = lazy.names(
    __name__,
    {
        name: f"{__name__}.loader:{name}"
        for name in ("load", "num_params", "loaded_bytes", "fingerprint")
    },
)
