"""The tokens that a run trains one by one: their ids, and those that are new."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from lora_jax import errors
from lora_jax.lora import new_tokens, outer_names, token_indices
from lora_jax.models import config as model_config
from lora_jax.parallel import mesh as sharding
from lora_jax.training import setup
from lora_jax.training.settings import groups

if TYPE_CHECKING:
    import transformers


def with_ids(
    settings: groups.TrainSettings, reader: "transformers.PreTrainedTokenizerBase"
) -> groups.TrainSettings:
    """The settings with the ids of the tokens in trainable_token_indices.

    Raises: UserError for texts that are no tokens of the tokenizer.
    """
    texts = token_indices.texts(settings.lora)
    if not texts:
        return settings
    known = reader.get_vocab()
    if unknown := [text for text in texts if text not in known]:
        raise errors.UserError(
            expected="tokens of the model's tokenizer, or their ids",
            found=unknown,
            where="--trainable-token-indices",
            do="--add-special-tokens, or --add-tokens for words: they add tokens and train them",
        )
    lora_settings = token_indices.with_ids(settings.lora, known)
    return settings.replace(trainable_token_indices=lora_settings.trainable_token_indices)


def with_new(
    settings: groups.TrainSettings,
    architecture: model_config.LlamaConfig,
    tokens: Sequence[int | str],
) -> groups.TrainSettings:
    """The settings that also train the new tokens; see new_tokens.trained."""
    if not tokens:
        return settings
    config = outer_names.inner_config(settings.lora, architecture)
    config = new_tokens.trained(config, tokens, tied=architecture.tie_word_embeddings)
    return settings.replace(trainable_token_indices=config.trainable_token_indices)


def check_mesh(base: setup.Base, sizes: Mapping[str, int]) -> None:
    """Raises: UserError if a mesh of these sizes does not divide the vocabulary with new tokens."""
    size = sizes[sharding.RULES["vocab"]]
    if base.new_tokens and (more := -base.num_tokens % size):
        raise errors.UserError(
            expected=f"a vocabulary that tensor={size} divides",
            found=f"{base.num_tokens} tokens, {len(base.new_tokens)} of them new",
            where=f"mesh {dict(sizes)}",
            do=f"add {more} more, such as --add-special-tokens … '<|reserved_0|>', or choose a "
            "smaller tensor size in --mesh",
        )
