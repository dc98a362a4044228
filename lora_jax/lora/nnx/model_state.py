"""An adapted NNX model as pure dicts: what is trained, and what is frozen."""

from typing import Any, NamedTuple

from flax import nnx

from lora_jax.lora.nnx import variables


class Frozen(NamedTuple):
    """What training leaves alone: the base model, and the shapes of the dropout keys.

    reference: for preferences, A and B as they were before training, when they had no effect.
    """

    base: Any
    dropout_keys: Any
    reference: Any = None


def split(model: nnx.Module) -> tuple[nnx.GraphDef, Any, Frozen]:
    """(graphdef, lora, frozen): the model as pure dicts, which jit dispatches fastest."""
    graphdef, trained, keys, base = nnx.split(model, variables.LoRAParam, variables.DropoutKey, ...)
    trained, keys, base = (nnx.to_pure_dict(part) for part in (trained, keys, base))
    return graphdef, trained, Frozen(base, keys)
