"""Low-rank adapters: settings, selection of layers, algebra, files, and models that hold them.

May import `kernels`, `layers`, `models`, `quant`. `nnx` puts adapters into Flax NNX models, and
`linen` into Flax Linen models; the other modules are the same for both.
"""

from lora_jax import lazy

_INJECT = (
    *("LoRALayer", "inject", "attach", "collect", "merge", "strip", "effects", "num_params"),
    *("reseed", "reseed_by"),
)
__getattr__, __all__ = lazy.names(
    __name__,
    {name: f"{__name__}.nnx.inject:{name}" for name in _INJECT}
    | {
        name: f"{__name__}.nnx.variables:{name}"
        for name in ("LoRAParam", "LoRAConstant", "DropoutKey")
    }
    | {
        "Adapter": f"{__name__}.adapter:Adapter",
        "Adapters": f"{__name__}.many:Adapters",
        "LoRAConfig": f"{__name__}.config:LoRAConfig",
        "register": "lora_jax.layers.registry:register",
    },
)
