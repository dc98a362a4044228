"""What of an adapter keeps it out of a batch with others, as far as its files say."""

from lora_jax.lora import adapter as lora_adapter
from lora_jax.lora import config as lora_config
from lora_jax.lora import tied_head, token_indices
from lora_jax.models import config as model_config


def find(adapter: lora_adapter.Adapter, base: model_config.LlamaConfig, where: str) -> list[str]:
    """All of it; [] if there is none. adapter: as outer_names.inner. Raises: as tied_head.fitted.

    Whether weights of the base that it brings along differ from the base's is not known here.
    """
    size, tied = (base.vocab_size, base.hidden_size), base.tie_word_embeddings
    fitted = tied_head.fitted(adapter, size, tied=tied, where=where)
    return [*of_config(adapter.config), *of_vocabulary(adapter, fitted, size[0], tied=tied)]


def of_config(config: lora_config.LoRAConfig) -> list[str]:
    """What is not A, B or a magnitude."""
    found = [f"{name} in modules_to_save" for name in config.modules_to_save]
    found += ["biases of B (lora_bias)"] if config.lora_bias else []
    if (init := config.init_lora_weights) != "default":
        found.append(f"init_lora_weights {init}, which changes the base")
    return found


def of_vocabulary(
    adapter: lora_adapter.Adapter, fitted: tied_head.Fitted, num_tokens: int, *, tied: bool
) -> list[str]:
    """What there is of an embedding and a head that others compute with. num_tokens: the base's."""
    found = []
    if fitted.num_tokens != num_tokens:
        found.append(f"a vocabulary of {fitted.num_tokens} tokens instead of {num_tokens}")
    if tied or adapter.config.use_dora:
        found += tokens(adapter.config)
    if fitted.plan.own_head or fitted.plan.joined:
        found.append("the head, which the base ties to its embedding")
    return found


def tokens(config: lora_config.LoRAConfig) -> list[str]:
    """The embeddings and heads of which single tokens are trained."""
    return [f"{name} in trainable_token_indices" for name in token_indices.named(config)]
