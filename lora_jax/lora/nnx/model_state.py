"""The state of an adapted Flax NNX model: the types of its variables, and the split by them."""

from typing import Any, NamedTuple

from flax import nnx


@nnx.register_variable_name("lora", overwrite=True)
class LoRAParam(nnx.LoRAParam):
    """What is trained, in the collection `lora`: A, B, magnitudes, and fully trained modules."""


class LoRAConstant(nnx.Variable):
    """What belongs to an adapter and is not trained, such as its scaling."""


class DropoutKey(nnx.Variable):
    """The key data of a layer's dropout mask, or of each row's mask; `lora.reseed` renews it."""


class Frozen(NamedTuple):
    """What training does not change: the base model, and the shapes of the dropout keys.

    reference: for preferences, the initial A and B, which have no effect.
    """

    base: Any
    dropout_keys: Any
    reference: Any = None


def split(model: nnx.Module) -> tuple[nnx.GraphDef, Any, Frozen]:
    """(graphdef, lora, frozen): the model as pure dicts, which jit dispatches fastest."""
    graphdef, trained, keys, base = nnx.split(model, LoRAParam, DropoutKey, ...)
    trained, keys, base = (nnx.to_pure_dict(part) for part in (trained, keys, base))
    return graphdef, trained, Frozen(base, keys)
