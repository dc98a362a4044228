"""Heads that are tied to the embedding: an adapter that changes one gives it its own weight."""

import contextlib
from collections.abc import Iterator

from flax import nnx

from lora_jax.lora import config as lora_config
from lora_jax.lora import embeddings
from lora_jax.lora.nnx import sites
from lora_jax.models import llama


@contextlib.contextmanager
def untied(
    model: nnx.Module, config: lora_config.LoRAConfig, *, keep: bool = True
) -> Iterator[None]:
    """Within it, the tied LLaMAs whose head `config` changes have one of their own, as in PEFT.

    They keep it afterwards, until `tie_again`, unless there was an error. keep: False for never.
    """
    own = [node for path, node in _llamas(model) if node.config.tie_word_embeddings
           and embeddings.changes_head(sites.dotted((*path, "lm_head")), config)]  # fmt: skip
    kept = False
    for node in own:
        node.untie()
    try:
        yield
        kept = keep
    finally:
        for node in own:
            if kept:
                node.lora_untied = True
            else:
                node.tie()


def is_tied(model: nnx.Module) -> bool:
    """Whether the model is a LLaMA whose head is, or was without its adapter, the embedding."""
    own = isinstance(model, llama.LlamaForCausalLM)
    return own and (model.config.tie_word_embeddings or hasattr(model, "lora_untied"))


def tie_again(model: nnx.Module) -> None:
    """Undoes `untied`, once there are no adapters."""
    for _, node in _llamas(model):
        if hasattr(node, "lora_untied"):
            del node.lora_untied
            node.tie()


def keep_untied(model: nnx.Module) -> None:
    """Makes the heads of `untied` a part of their models."""
    for _, node in _llamas(model):
        if hasattr(node, "lora_untied"):
            del node.lora_untied


def _llamas(model: nnx.Module) -> list[tuple[tuple, llama.LlamaForCausalLM]]:
    return [(path, node) for path, node in nnx.iter_graph(model)
            if isinstance(node, llama.LlamaForCausalLM)]  # fmt: skip
