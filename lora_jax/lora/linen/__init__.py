"""LoRA in Flax Linen models: in an unedited module by `adapt`, or as the layer `LoRADense`."""

from lora_jax import lazy

__getattr__, __all__ = lazy.names(
    __name__,
    {
        "Call": f"{__name__}.tracing:Call",
        "Adapted": f"{__name__}.adapted:Adapted",
        "LoRADense": f"{__name__}.dense:LoRADense",
        "adapt": f"{__name__}.adapting:adapt",
        "find": f"{__name__}.sites:find",
        "register": f"{__name__}.registry:register",
    },
)
