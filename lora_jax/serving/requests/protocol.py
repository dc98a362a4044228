"""The bodies of /v1/chat/completions and /v1/completions → what is asked, checked.

Takes OpenAI's fields, and vLLM's names for more. Every problem of a body is in one 400.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from lora_jax import errors
from lora_jax.generation import config
from lora_jax.serving.requests import fields as reading
from lora_jax.serving.requests import structure, unsupported

_MOST_STOPS = 64
_SEED = 2**63
_MOST_FLOAT = 1e30  # which float32 has, and its reciprocal


@dataclasses.dataclass(frozen=True)
class Asked:
    """What both endpoints read.

    model: None: the base. adapters: {name: weight} beside it. max_tokens: None: up to the context.
    sampling: without max_new_tokens and grammar, which need the prompt and the tokenizer.
    prompt_logprobs: how many of each token of the prompt are shown; echo may need more.
    structure: what the text must follow. truncate: keep so many tokens of the prompt, its last;
    −1: those of the context. add_special_tokens: None: as the endpoint does.
    """

    model: str | None
    adapters: Mapping[str, float]
    n: int
    max_tokens: int | None
    sampling: config.Sampling
    prompt_logprobs: int | None
    structure: structure.Structure | None
    stream: bool
    include_usage: bool
    continuous_usage: bool
    truncate: int | None
    add_special_tokens: bool | None
    return_token_ids: bool
    tokens_as_ids: bool


@dataclasses.dataclass(frozen=True)
class Chat:
    """The messages of a chat, and how its template renders them."""

    asked: Asked
    messages: list[Any]
    tools: list[dict[str, Any]]
    tool_choice: str | dict[str, Any]
    parallel_tool_calls: bool
    template_kwargs: Mapping[str, Any]
    generate: bool
    continues: bool


@dataclasses.dataclass(frozen=True)
class Completion:
    """The prompts, as texts or token ids. echo: the text begins with the prompt."""

    asked: Asked
    prompts: list[str] | list[list[int]]
    echo: bool


def chat(body: Mapping[str, Any]) -> Chat:
    """Reads a chat request. Raises: Refusal."""
    given = reading.Fields(body)
    unsupported.note(given, unsupported.CHAT)
    logprobs = given.flag("logprobs")
    top = given.whole("top_logprobs", 0, least=0, most=config.MOST_LOGPROBS)
    if top and not logprobs:
        given.wrong("top_logprobs", "needs logprobs: true")
    most = given.whole("max_tokens", least=1)
    most = given.whole("max_completion_tokens", most, least=1)
    tools, choice = structure.tools(given)
    asked = _asked(given, most, top if logprobs else None)
    if asked.structure and asked.structure.param != "response_format" and choice != "none":
        given.wrong(
            asked.structure.param, 'cannot be combined with tools; response_format or '
            'tool_choice: "none" can'
        )  # fmt: skip
    continues = given.flag("continue_final_message")
    generate = given.flag("add_generation_prompt", not continues)
    if generate and continues:
        given.wrong("continue_final_message", "cannot be combined with add_generation_prompt: true")
    messages = given.get("messages")
    if not isinstance(messages, list) or not messages:
        given.wrong("messages", "expected an array with at least one message")
    kwargs = dict(given.object("chat_template_kwargs"))
    if effort := given.text("reasoning_effort"):
        kwargs.setdefault("reasoning_effort", effort)
    parallel = given.flag("parallel_tool_calls", True)
    given.raise_problems()
    return Chat(asked, messages, tools, choice, parallel, kwargs, generate, continues)


def completion(body: Mapping[str, Any]) -> Completion:
    """Reads a completion request. Raises: Refusal."""
    given = reading.Fields(body)
    n, best_of = given.get("n"), given.get("best_of")
    if best_of is not None and best_of == (1 if n is None else n):
        given = reading.Fields({**body, "best_of": None})
    unsupported.note(given, unsupported.COMPLETION)
    logprobs = given.get("logprobs")
    if logprobs is True:  # llama.cpp and mlx-lm take chat's form here too
        logprobs = 0
    elif logprobs is False:
        logprobs = None
    else:
        logprobs = given.whole("logprobs", least=0, most=config.MOST_LOGPROBS)
    most = given.whole("max_tokens", least=0)
    most = given.whole("max_completion_tokens", most, least=0)
    echo = given.flag("echo")
    asked = _asked(given, most, logprobs)
    if echo and logprobs is not None:
        most = max(logprobs, asked.prompt_logprobs or 0)
        sampling = dataclasses.replace(asked.sampling, prompt_logprobs=most)
        asked = dataclasses.replace(asked, sampling=sampling)
    texts = prompts(given)
    given.raise_problems()
    return Completion(asked, texts, echo)


def prompts(given: reading.Fields) -> list[Any]:
    """The prompts of a completion: a text, token ids, or a list of either."""
    prompt = given.get("prompt")
    if isinstance(prompt, str):
        return [prompt]
    if isinstance(prompt, list) and prompt:
        if all(isinstance(each, str) for each in prompt):
            return prompt
        if all(map(_is_id, prompt)):
            return [prompt]
        if all(isinstance(each, list) and each and all(map(_is_id, each)) for each in prompt):
            return prompt
    given.wrong("prompt", "expected a string, an array of strings, an array of token ids, or an "
                "array of such arrays, none of them empty")  # fmt: skip
    return []


def _is_id(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**31


def _asked(given: reading.Fields, max_tokens: int | None, logprobs: int | None) -> Asked:
    stream = given.flag("stream")
    options = given.object("stream_options")
    if options and not stream:
        given.wrong("stream_options", "needs stream: true")
    within = reading.Fields(options, "stream_options.")
    usage, continuous = within.flag("include_usage"), within.flag("continuous_usage_stats")
    truncate = given.whole("truncate_prompt_tokens", least=-1)
    if truncate == 0:
        given.wrong("truncate_prompt_tokens", "0 leaves no prompt; −1 is the context")
    adapters = {}
    for name, weight in given.object("adapters").items():
        if reading.is_number(weight):
            adapters[name] = float(weight)
        else:
            given.wrong("adapters", f"the weight of {name!r} is no number")
    sampling = _sampling(given, logprobs)
    if stream and sampling.prompt_logprobs is not None:
        given.wrong("prompt_logprobs", "not in a stream; echo with logprobs is")
    read = Asked(
        model=given.text("model"),
        adapters=adapters,
        n=given.whole("n", 1, least=1),
        max_tokens=max_tokens,
        sampling=sampling,
        prompt_logprobs=sampling.prompt_logprobs,
        structure=structure.read(given),
        stream=stream,
        include_usage=usage,
        continuous_usage=usage and continuous,
        truncate=truncate,
        add_special_tokens=given.flag("add_special_tokens")
        if "add_special_tokens" in given
        else None,
        return_token_ids=given.flag("return_token_ids"),
        tokens_as_ids=given.flag("return_tokens_as_token_ids"),
    )
    given.problems += within.problems
    return read


def _sampling(given: reading.Fields, logprobs: int | None) -> config.Sampling:
    """The settings of sampling; OpenAI's defaults where a field is missing."""
    seed = given.whole("seed", least=-_SEED, most=_SEED - 1)
    top_k = given.whole("top_k", 0, least=-1)
    top_p = given.number("top_p", 1.0, least=0, most=1)
    if top_p == 0:  # only the most likely token, as transformers and OpenAI read it
        top_k, top_p = 1, 1.0
    values = {
        "temperature": given.number("temperature", 1.0, least=0, most=_MOST_FLOAT),
        "top_k": max(top_k, 0),
        "top_p": top_p,
        "min_p": given.number("min_p", 0.0, least=0, most=1),
        "repetition_penalty": given.number(
            "repetition_penalty", 1.0, least=1 / _MOST_FLOAT, most=_MOST_FLOAT
        ),
        "presence_penalty": given.number("presence_penalty", 0.0, least=-2, most=2),
        "frequency_penalty": given.number("frequency_penalty", 0.0, least=-2, most=2),
        "logit_bias": _logit_bias(given),
        "seed": None if seed in (None, -1) else seed % _SEED,  # −1 as in vLLM and llama.cpp
        "stop": _stop(given),
        "stop_token_ids": _stop_ids(given),
        "min_tokens": given.whole("min_tokens", 0, least=0),
        "ignore_eos": given.flag("ignore_eos"),
        "logprobs": logprobs,
        "prompt_logprobs": given.whole("prompt_logprobs", least=0, most=config.MOST_LOGPROBS),
        "include_stop": given.flag("include_stop_str_in_output"),
        "skip_special_tokens": given.flag("skip_special_tokens", True),
    }
    try:
        return config.Sampling(**values)
    except errors.UserError as error:
        given.wrong("sampling", error.on_one_line())
        return config.Sampling()


def _stop(given: reading.Fields) -> tuple[str, ...]:
    value = given.get("stop")
    stops = [value] if isinstance(value, str) else given.array("stop", str, "strings")
    if not all(stops):
        given.wrong("stop", "an empty string would end every text")
    if len(stops) > _MOST_STOPS:
        given.wrong("stop", f"{len(stops)} strings are more than {_MOST_STOPS}")
    return tuple(dict.fromkeys(each for each in stops if each))


def _stop_ids(given: reading.Fields) -> tuple[int, ...]:
    ids = given.array("stop_token_ids", int, "token ids")
    if not all(map(_is_id, ids)):
        given.wrong("stop_token_ids", "a token id is a whole number from 0")
    if len(ids) > config.MOST_STOP_IDS:
        given.wrong("stop_token_ids", f"{len(ids)} ids are more than {config.MOST_STOP_IDS}")
    return tuple(dict.fromkeys(ids))


def _logit_bias(given: reading.Fields) -> tuple[tuple[int, float], ...]:
    bias = {}
    for token, value in given.object("logit_bias").items():
        if not token.isascii() or not token.isdigit() or len(token) > 10:
            given.wrong("logit_bias", f"{token[:40]!r} is no token id")
        elif not reading.is_number(value) or abs(value) > 100:
            given.wrong("logit_bias", f"the bias of {token} is no number from −100 to 100")
        else:
            bias[int(token)] = float(value)
    return tuple(bias.items())
