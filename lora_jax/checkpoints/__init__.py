"""Model folders: load, quantize, merge and write them, tensor by tensor.

May import `hub`, `lora`, `models`, `parallel`, `quant`.
"""

from lora_jax import lazy

__getattr__, __all__ = lazy.names(
    __name__,
    {
        "load": f"{__name__}.loader:load",
        "num_params": f"{__name__}.inventory:num_params",
        "loaded_bytes": f"{__name__}.inventory:loaded_bytes",
        "fingerprint": f"{__name__}.fingerprints:fingerprint",
    },
)
