"""What a request may ask for: its length, its tokens, its adapters."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from lora_jax import errors, tokenizer
from lora_jax.generation import config
from lora_jax.generation import pool as pools

_STEP = 32  # tokens: contexts of whole runs are multiples of it


def check(
    prompt: Sequence[int],
    sampling: config.Sampling,
    adapters: Mapping[str, float],
    *,
    reader: Any,
    eos_ids: Sequence[int],
    context: int,
    vocab_size: int,
    pool: pools.Pool | None,
) -> None:
    """Raises UserError with everything that is wrong with a request; see generation.Engine."""
    problems: list[errors.UserError] = []
    with errors.noted(problems):
        check_length(len(prompt), sampling.max_new_tokens, context)
    with errors.noted(problems):
        tokenizer.check_ids(reader, [prompt], vocab_size)
    with errors.noted(problems):
        if pool:
            pool.check(adapters)
        elif adapters:
            raise errors.UserError(
                expected="a model that has adapters by name",
                found=f"a request for {', '.join(adapters)}",
            )
    for where, ids in (
        ("logit_bias", [token for token, _ in sampling.logit_bias]),
        ("stop_token_ids", sampling.stop_token_ids),
    ):
        if unknown := [str(token) for token in ids if not 0 <= token < vocab_size]:
            problems.append(errors.UserError(
                expected=f"ids from 0 to {vocab_size - 1}", found=unknown, where=where
            ))  # fmt: skip
    if sampling.min_tokens > sampling.max_new_tokens:
        problems.append(errors.UserError(
            expected=f"at most max_new_tokens, {sampling.max_new_tokens}",
            found=f"{sampling.min_tokens}", where="min_tokens",
        ))  # fmt: skip
    stops = len(sampling.stop_token_ids) + len(eos_ids)
    if sampling.min_tokens and stops > config.MOST_STOP_IDS:
        problems.append(errors.UserError(
            expected=f"at most {config.MOST_STOP_IDS} stop tokens with min_tokens",
            found=f"{stops}", where="stop_token_ids",
        ))  # fmt: skip
    if problems:
        raise errors.UserError.together(problems)


def context(prompts: Iterable[Sequence[int]], max_new_tokens: int, most: int) -> int:
    """The tokens of the longest prompt and its output, rounded up, but `most` at the most.

    So other prompts of about this length need the same programs, which are in jax's cache.
    """
    longest = max(map(len, prompts)) + max_new_tokens
    return min(-(-longest // _STEP) * _STEP, most)


def check_length(
    num_prompt_tokens: int, max_new_tokens: int, context: int, *, where: str = "--prompt"
) -> None:
    """Raises UserError if the prompt has no tokens, or leaves no room for the new ones."""
    if num_prompt_tokens == 0:
        raise errors.UserError(
            expected="a prompt of at least one token",
            found="an empty prompt, and a tokenizer that adds no BOS",
            where=where,
        )
    if num_prompt_tokens + max_new_tokens > context:
        raise errors.UserError(
            expected=f"prompt + new tokens within the model's context of {context} tokens",
            found=f"a prompt of {num_prompt_tokens} tokens + {max_new_tokens} new ones",
            where=where,
            do=f"shorten the prompt, or --max-new-tokens {max(context - num_prompt_tokens, 1)}"
            if num_prompt_tokens < context
            else "shorten the prompt",
        )
