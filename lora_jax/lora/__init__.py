"""Low-rank adapters: settings, target selection, algebra, files, and models that hold them.

May import `kernels`, `layers`, `models`, `quant`. `nnx` puts adapters into Flax NNX models, and
`linen` into Flax Linen models; the other modules serve both.
"""

from lora_jax import lazy

_NNX = {
    "layer": ("LoRALayer",),
    "model_state": ("LoRAParam", "LoRAConstant", "DropoutKey", "split"),
    "inject": ("inject", "attach"),
    "pissa": ("Principal",),
    "merge": ("merge", "strip"),
    "collect": ("collect", "effects", "num_params"),
    "summary": ("summary",),
    "base": ("disabled", "get_base_model", "base_state"),
    "dropout": ("reseed", "reseed_by"),
}
__getattr__, __all__ = lazy.names(
    __name__,
    {name: f"{__name__}.nnx.{module}:{name}" for module, names in _NNX.items() for name in names}
    | {
        "Adapter": f"{__name__}.adapter:Adapter",
        "Adapters": f"{__name__}.adapters:Adapters",
        "LoRAConfig": f"{__name__}.config:LoRAConfig",
        "register": "lora_jax.layers.registry:register",
    },
)
