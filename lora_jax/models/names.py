"""The names of a checkpoint's tensors: without wrappers, and inside of a composite model."""

import functools
import re
from collections.abc import Iterable, Sequence

from lora_jax.models import composite

# What torch.compile, FSDP and activation checkpointing put before the names of modules.
_WRAPPERS = re.compile(r"(?<![^.])(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
# What DDP and PEFT put before all names.
_OUTERMOST = re.compile(r"^(module\.|base_model\.model\.)+")
_PEFT = re.compile(r"^(module\.)*(base_model\.model\.)+(module\.(?=model\.|lm_head\.))?")


def unwrapped(key: str) -> str:
    """The name of a tensor in a LLaMA."""
    return _OUTERMOST.sub("", _WRAPPERS.sub("", key))


def of_adapter(key: str) -> str:
    """The name of a tensor of an adapter, in a model of any kind, which may have a `module`."""
    name = _WRAPPERS.sub("", key)
    outer = _PEFT.match(name)
    return name[outer.end() :] if outer else _OUTERMOST.sub("", name)


# ---------------------------------------------------------------------------------- composites


def inner(name: str, model_type: str) -> str:
    """The name in a LLaMA of a tensor or module of the language model in a composite model.

    model_type: the composite's; "" for a model that is none, whose names stay. The names of
    transformers 4.52 and newer, `model.language_model.layers…` and `lm_head`, and the older ones,
    `language_model.model.layers…` and `language_model.lm_head`, become `model.layers…` and
    `lm_head`. Others stay, such as the older ones of Qwen2-VL, which are those of a LLaMA.
    """
    if not model_type:
        return name
    match = _language_model(model_type).match(name)
    if match is None:
        return name
    return name[match.end() :] if match["head"] else f"model.{name[match.end() :]}"


def outer(name: str, model_type: str, *, old: bool = False) -> str:
    """The inverse of `inner`: the name in the composite model. old: as before transformers 4.52."""
    if not model_type:
        return name
    inside = composite.COMPOSITES[model_type].inside
    if old:
        return name if composite.COMPOSITES[model_type].was_plain else f"{inside}.{name}"
    return re.sub(r"^model\.", f"model.{inside}.", name)


def are_old(names: Iterable[str], model_type: str) -> bool:
    """Whether names in a composite model are those of transformers before 4.52."""
    own = composite.COMPOSITES[model_type]
    old = "model.layers." if own.was_plain else f"{own.inside}."
    return any(name.startswith(old) for name in names)


def is_beside(name: str, model_type: str) -> bool:
    """Whether a tensor or module of a composite model is not of its language model."""
    return bool(model_type) and _beside(model_type).match(name) is not None


def beside(names: Sequence[str], model_type: str) -> list[str]:
    """What of a composite model these tensors are of that are not of its language model."""
    found = (_beside(model_type).match(name) for name in names) if model_type else ()
    return list(dict.fromkeys(match["part"] for match in found if match))


@functools.cache
def _language_model(model_type: str) -> re.Pattern[str]:
    inside = composite.COMPOSITES[model_type].inside
    return re.compile(rf"(?:model\.)?{inside}\.(?:(?=(?P<head>lm_head)(?:\.|$))|(?:model\.)?)")


@functools.cache
def _beside(model_type: str) -> re.Pattern[str]:
    parts = "|".join(composite.COMPOSITES[model_type].beside)
    return re.compile(rf"(?:model\.)?(?P<part>{parts})(?:\.|$)")
