"""The names of a checkpoint's tensors, without what wrappers of the model put into them."""

import re

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
