"""Frozen weights in int8, int4, NF4 or FP4: the formats, and layers that compute with them.

May import `kernels`, `layers`. `formats` quantizes arrays; `linear` puts quantized layers into a
Flax NNX model.
"""

from lora_jax import lazy

QUANTS = ("none", "int8", "int4", "int4-g64", "int4-g128", "nf4", "nf4-dq", "fp4", "fp4-dq")

_LINEAR = (
    *("QuantLinear", "QuantLayer", "quantize_model", "dequantize_model"),
    *("quantize_linear", "dequantize_linear"),
)
__getattr__, __all__ = lazy.names(
    __name__,
    {name: f"{__name__}.linear:{name}" for name in _LINEAR}
    | {name: f"{__name__}.{name}" for name in ("formats", "linear")},
)
