"""The names of a LLaMA inside of a composite model, for a model of any kind: see outer_names."""

from flax import nnx

from lora_jax.lora import adapter as lora_adapter
from lora_jax.lora import config as lora_config
from lora_jax.lora import outer_names
from lora_jax.models import llama


def of_config(model: nnx.Module, config: lora_config.LoRAConfig) -> lora_config.LoRAConfig:
    """The settings with the model's own names."""
    if not isinstance(model, llama.LlamaForCausalLM):
        return config
    return outer_names.inner_config(config, model.config)


def of_model(model: nnx.Module, adapter: lora_adapter.Adapter) -> lora_adapter.Adapter:
    """The adapter with the model's own names."""
    if not isinstance(model, llama.LlamaForCausalLM):
        return adapter
    return outer_names.inner(adapter, model.config)


def of_file(model: nnx.Module, adapter: lora_adapter.Adapter) -> lora_adapter.Adapter:
    """The model's adapter with the names that it has in PEFT's file."""
    if not isinstance(model, llama.LlamaForCausalLM):
        return adapter
    return outer_names.outer(adapter, model.config)
