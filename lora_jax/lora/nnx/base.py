"""The base model in an adapted Flax NNX model."""

import contextlib
from collections.abc import Iterator
from typing import Any

from flax import nnx

from lora_jax.layers import stack, undo
from lora_jax.lora.nnx import merge
from lora_jax.lora.nnx.model_state import DropoutKey, LoRAConstant, LoRAParam

_ADDED = (
    *(LoRAParam, LoRAConstant, DropoutKey, stack.LayerIndex),
    nnx.PathContains("lora_dropout_stream"),
)


@contextlib.contextmanager
def disabled(model: nnx.Module) -> Iterator[nnx.Module]:
    """In this context the model computes without its adapters, and has none.

    Raises: as merge.strip.
    """
    with undo.always(model):
        merge.strip(model)
        yield model


def get_base_model(model: nnx.Module) -> nnx.Module:
    """A model without adapters, as it was before `inject`. `model` itself does not change.

    Raises: as merge.strip.
    """
    base = nnx.clone(model)  # strip may change variables, which split and merge would share
    merge.strip(base)
    return base


def base_state(model: nnx.Module) -> Any:
    """The state of the base alone, at the paths that it has without adapters.

    A checkpoint of the base fits it: nnx.update(model, checkpointer.restore(folder,
    base_state(model))).
    """
    return nnx.state(model, nnx.Not(nnx.Any(*_ADDED)))
