"""Frozen weights in int8, int4, NF4 or FP4: the formats, and layers that compute with them.

May import `kernels`, `layers`. `formats` quantizes arrays, and `product` multiplies by them.
`conversion` quantizes the layers of a Flax NNX model, which are then those of `linear`.
"""

from lora_jax import lazy

QUANTS = ("none", "int8", "int4", "int4-g64", "int4-g128", "nf4", "nf4-dq", "fp4", "fp4-dq")

_CONVERSION = ("quantize_model", "dequantize_model", "quantize_linear", "dequantize_linear")
__getattr__, __all__ = lazy.names(
    __name__,
    {name: f"{__name__}.linear:{name}" for name in ("QuantLinear", "QuantLayer")}
    | {name: f"{__name__}.conversion:{name}" for name in _CONVERSION}
    | {name: f"{__name__}.{name}" for name in ("conversion", "formats", "linear")},
)
