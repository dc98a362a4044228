"""Tokens whose rows are zero in the base are named, unless they are trained."""

import functools

import jax.numpy as jnp
import numpy as np
import pytest
import tiny_tokenizer
from flax import nnx

from lora_jax import tokenizer
from lora_jax.lora import config as lora_config
from lora_jax.models import config as model_config
from lora_jax.models import llama
from lora_jax.training import untrained_tokens

USED = np.zeros(96, bool)
USED[[3, 5, 7]] = True


@functools.cache
def model(tied):
    """Rows 4 and 5 of the embedding are zero; in a head of its own, row 7."""
    config = model_config.LlamaConfig(96, 16, 32, 1, 2, 2, 8, 64, tie_word_embeddings=tied)
    made = llama.LlamaForCausalLM(config, rngs=nnx.Rngs(0))
    table = made.model.embed_tokens.embedding
    table.set_value(table[...].at[4:6].set(jnp.asarray([[1e-20], [0]])))
    if not tied:
        made.lm_head.kernel.set_value(made.lm_head.kernel[...].at[:, 7].set(0))
    return made


@pytest.mark.parametrize(
    "tied, settings, named",
    [
        (True, {}, [5]),
        (False, {}, [5, 7]),
        (False, {"trainable_token_indices": (5,)}, [7]),
        (False, {"trainable_token_indices": {"lm_head": (7,), "embed_tokens": (5,)}}, []),
        (False, {"modules_to_save": ("lm_head",)}, [5]),
        (True, {"targets": ("q_proj", "embed_tokens")}, []),
    ],
)
def test_tokens_of_zeros_in_the_data_are_named(tied, settings, named, tmp_path):
    reader = tokenizer.load(tiny_tokenizer.save(tmp_path))
    config = lora_config.LoRAConfig(**settings)
    found = untrained_tokens.note(model(tied), USED, config, reader)
    texts = " ".join(f'"{reader.convert_ids_to_tokens(id_)}"' for id_ in named)
    assert found.endswith(f"--trainable-token-indices {texts}") if named else found == ""
    assert untrained_tokens.note(model(tied), np.zeros_like(USED), config, reader) == ""
