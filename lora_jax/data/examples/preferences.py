"""Preferences: rows with a chosen and a rejected answer → prompt and two answers.

Imports no jax.
"""

import typing
from collections.abc import Mapping

from lora_jax.data.chats import messages, turn_ends
from lora_jax.data.chats.template import ChatError, Message
from lora_jax.data.examples import kinds


class Texts(typing.NamedTuple):
    """A prompt, and the texts of chosen and rejected that continue it."""

    prompt: str
    answers: tuple[str, str]


class Chats(typing.NamedTuple):
    """The whole chats with chosen and rejected, and how many messages of them are the prompt."""

    num_prompt: int
    chats: tuple[list[Message], list[Message]]


# Of OpenAI's rows; the first has the messages and the tools.
_OPENAI = ("input", "preferred_output", "non_preferred_output")


def plain(fields: kinds.Fields) -> kinds.Fields:
    """A row with the fields prompt, chosen, rejected and tools, also if it is one of OpenAI's."""
    given, chosen, rejected = (messages.parsed(fields.get(name)) for name in _OPENAI)
    if not isinstance(given, Mapping) or chosen is None or rejected is None:
        return fields
    own = {"prompt": given.get("messages"), "chosen": chosen, "rejected": rejected}
    return {**fields, **own, "tools": given.get("tools")}


def read(fields: kinds.Fields) -> Texts | Chats:
    """The two answers of a row. Without a prompt, what both begin with is the prompt.

    An answer may be one message, without the list. Raises: ChatError if a field is missing or is
    neither text nor messages, if there is no prompt, or if it is not in chats that have one.
    """
    values = {name: _value(fields.get(name)) for name in ("chosen", "rejected")}
    chosen, rejected = values.values()
    prompt = values["prompt"] = _prompt(fields, source(fields))
    wrong = [
        f"{name} is a {type(value).__name__}"
        for name, value in values.items()
        if not isinstance(value, str | list) and not (name == "prompt" and value is None)
    ]
    if chosen is None or rejected is None or wrong:
        present = ", ".join(kinds.fields_present(fields)) or "(nothing)"
        missing = chosen is None or rejected is None
        raise ChatError(f"the fields {present}" if missing else ", ".join(wrong))
    if isinstance(chosen, str) and isinstance(rejected, str) and not isinstance(prompt, list):
        if kinds.history(fields):
            raise ChatError(kinds.HISTORY)
        return _texts(prompt, chosen, rejected)
    return _chats(fields, prompt, chosen, rejected)


def used(fields: kinds.Fields) -> set[str]:
    """The fields of a row that are trained on or go to the chat template."""
    if plain(fields) is not fields:
        return {*_OPENAI, *kinds.BESIDE_CHATS}
    prompt, answers = source(fields), [fields.get(name) for name in ("chosen", "rejected")]
    of_text = ("input",) if prompt == "instruction" else ()
    beside = of_text if all(isinstance(each, str) for each in answers) else kinds.BESIDE_CHATS
    return {prompt, "chosen", "rejected", *beside}


def source(fields: kinds.Fields) -> str:
    """The field that has the prompt: `prompt`, or another if the answers do not have it in them."""
    answers = [_value(fields.get(name)) for name in ("chosen", "rejected")]
    if fields.get("prompt") is None and not any(map(_is_whole, answers)):
        are_texts = all(isinstance(each, str) for each in answers)
        others = [name for name in kinds.PROMPTS if name != "instruction" or are_texts]
        return next((name for name in others if fields.get(name) is not None), "prompt")
    return "prompt"


def _prompt(fields: kinds.Fields, source: str) -> object:
    if source == "instruction" and isinstance(fields[source], str):
        if not isinstance(fields.get("input") or "", str):
            raise ChatError(f"input is a {type(fields['input']).__name__}")
        return kinds.prompt_and_completion({**fields, "output": ""}, kinds.ALPACA)[0]
    return _value(fields.get(source))


def _is_whole(answer: object) -> bool:
    """Whether an answer is a whole chat, which has the prompt in it."""
    return isinstance(answer, list) and any(
        isinstance(each, dict) and messages.role_of(each) == "user" for each in answer
    )


def _value(value: object) -> object:
    """The value; messages that a CSV file has as JSON text are parsed. One becomes a list, but not
    as text: an answer may be a JSON object."""
    if isinstance(value, dict) and {"role", "from"} & value.keys():
        return [value]
    return messages.in_text(value)


def _texts(prompt: str | None, chosen: str, rejected: str) -> Texts:
    if prompt is None:
        size = turn_ends.common(chosen, rejected)
        # The space in front of a word belongs to the word, as tokens have it.
        while 0 < size < max(len(chosen), len(rejected)) and chosen[size - 1] == " ":
            size -= 1
        if size == 0:
            raise ChatError("no prompt, and chosen and rejected begin differently")
        prompt, chosen, rejected = chosen[:size], chosen[size:], rejected[size:]
    return Texts(prompt, (chosen, rejected))


def _chats(fields: kinds.Fields, prompt: object, *answers: object) -> Chats:
    before = [] if prompt is None else messages.read_as("user", prompt, "prompt")
    both = [
        messages.read_as("assistant", answer, name)
        for answer, name in zip(answers, ("chosen", "rejected"), strict=True)
    ]
    size = len(before)
    if prompt is None and not any(message["role"] == "user" for message in both[0]):
        raise ChatError("no prompt, and chosen has no message of a user")
    if isinstance(prompt, str) and all(map(_is_begun, both)):
        if not all(_asks(chat, prompt) for chat in both):
            raise ChatError("chosen and rejected begin with a user's message, but not the prompt")
        size = 0  # whole chats, which have the prompt in them
    elif size and all(chat[:size] == before and len(chat) > size for chat in both):
        size = 0
    whole = [(before if size else []) + chat for chat in both]
    # What comes before the first difference has nothing to prefer.
    shared = max(size, turn_ends.common(*whole)) if prompt is None or not size else size
    size = min(shared, *(len(chat) - 1 for chat in whole))
    full = [messages.with_system(chat, fields) for chat in whole]
    return Chats(size + len(full[0]) - len(whole[0]), (full[0], full[1]))


def _is_begun(chat: list[Message]) -> bool:
    """Whether a chat is whole: a user begins it."""
    return next((m["role"] for m in chat if m["role"] not in messages.SYSTEM), None) == "user"


def _asks(chat: list[Message], prompt: str) -> bool:
    """Whether a user says the prompt, of which data sets have the first or the last message, or all
    of them in one text."""
    said = [messages.text_of(message).strip() for message in chat if message["role"] == "user"]
    return any(text == prompt.strip() or (text and text in prompt) for text in said)
