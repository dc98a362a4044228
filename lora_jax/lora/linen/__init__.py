"""LoRA in Flax Linen models: the user's module unedited (`adapt`), or `LoRADense` in it."""

from lora_jax import lazy

__getattr__, __all__ = lazy.names(
    __name__,
    {name: f"{__name__}.adapted:{name}" for name in ("adapt", "Adapted", "LoRADense")}
    | {"register": f"{__name__}.sites:register"},
)
