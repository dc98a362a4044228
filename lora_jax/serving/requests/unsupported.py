"""Fields of OpenAI's API, vLLM, llama.cpp and mlx-lm that would change the answer, and cannot.

They are refused, unless they have the value that changes nothing. Fields in no table are ignored.
"""

from typing import Any, NamedTuple

from lora_jax.serving.requests import fields


class Known(NamedTuple):
    """neutral: the values that change nothing. do: what to use instead. same: a field that is read
    here and means the same: some programs send both, each with the value that the other has.
    """

    neutral: tuple[Any, ...] = ()
    do: str = "leave it out"
    same: str = ""


BOTH = {
    "best_of": Known(do="use n"),  # but for best_of == n, which the protocol reads itself
    "use_beam_search": Known((False,)),
    "length_penalty": Known((0, 1)),
    "bad_words": Known(([],), "use logit_bias"),
    "allowed_token_ids": Known(([],), "use structured_outputs"),
    "logits_processors": Known(([],)),
    "priority": Known((0,)),
    "prompt_embeds": Known(),
    "cache_salt": Known(("",)),
    "store": Known((False,)),
    # Other servers' names and samplers.
    "repeat_penalty": Known((1,), "use repetition_penalty", "repetition_penalty"),
    "repetition_context_size": Known(),
    "repeat_last_n": Known((-1,)),
    "n_predict": Known((-1,), "use max_tokens", "max_tokens"),
    "max_new_tokens": Known((), "use max_tokens", "max_tokens"),
    "min_new_tokens": Known((0,), "use min_tokens", "min_tokens"),
    "do_sample": Known((True,), "use temperature 0"),
    "num_beams": Known((1,)),
    "typical_p": Known((1,)),
    "typ_p": Known((1,)),
    "top_a": Known((0,)),
    "top_n_sigma": Known((-1, 0)),
    "tfs_z": Known((1,)),
    "mirostat": Known((0,)),
    "dry_multiplier": Known((0,)),
    "xtc_probability": Known((0,)),
    "dynatemp_range": Known((0,)),
    "no_repeat_ngram_size": Known((0,)),
    "grammar": Known(("",), 'use structured_outputs: {"grammar": …} with a Lark grammar'),
    "json_schema": Known(({},), "use response_format"),
    "lora": Known(([],), "use adapters: {name: weight}"),
    "lora_request": Known(do="name the adapter in model"),
    "guided_whitespace_pattern": Known(("",)),
}
CHAT = {
    "functions": Known(([],), "use tools"),
    "function_call": Known(("none", "auto"), "use tool_choice"),
    "audio": Known(),
    "modalities": Known((["text"],)),
    "verbosity": Known(("medium",)),
    "web_search_options": Known(),
    "prompt": Known(("",), "use messages, or /v1/completions"),
    "suffix": Known(("",)),
    "echo": Known((False,), "use /v1/completions"),
    "chat_template": Known(),
    "documents": Known(([],), "put them into a message"),
    "mm_processor_kwargs": Known(({},)),
}
COMPLETION = {
    "suffix": Known(("",), "put it into the prompt"),
    "messages": Known(([],), "use /v1/chat/completions"),
    "tools": Known(([],), "use /v1/chat/completions"),
    "tool_choice": Known(("none", "auto")),
    "top_logprobs": Known((0,), "use logprobs: N"),
    "chat_template_kwargs": Known(({},), "use /v1/chat/completions"),
}


def note(given: fields.Fields, known: dict[str, Known], *, both: dict[str, Known] = BOTH) -> None:
    """Notes the fields that cannot be honored."""
    for name, about in {**both, **known}.items():
        neutral = (*about.neutral, given.get(about.same)) if about.same else about.neutral
        if name in given and not any(_same(given.get(name), each) for each in neutral):
            given.wrong(name, f"not supported here; {about.do}")


def _same(given: object, neutral: object) -> bool:
    number = (int, float)
    if isinstance(given, number) and isinstance(neutral, number):
        return isinstance(given, bool) == isinstance(neutral, bool) and given == neutral
    return type(given) is type(neutral) and given == neutral
