"""The types of an adapter's variables in a Flax NNX model, by which nnx.split tells them apart."""

from flax import nnx


@nnx.register_variable_name("lora", overwrite=True)
class LoRAParam(nnx.Param):
    """What training updates, in the collection `lora`: A, B, a magnitude, a module saved whole."""


class LoRAConstant(nnx.Variable):
    """What goes with A and B and is never trained: their scaling, a mask of B, …"""


class DropoutKey(nnx.Variable):
    """Key data of a layer's dropout mask, or of its mask of each row; `lora.reseed` renews it."""
