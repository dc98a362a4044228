"""Preferences: rows with a chosen and a rejected answer → prompt and two answers.

Imports no jax.
"""

import typing
from collections.abc import Sequence

from lora_jax.data import kinds, messages
from lora_jax.data.template import ChatError, Message


class Texts(typing.NamedTuple):
    """A prompt, and the texts of chosen and rejected that continue it."""

    prompt: str
    answers: tuple[str, str]


class Chats(typing.NamedTuple):
    """The whole chats with chosen and rejected, and how many messages of them are the prompt."""

    num_prompt: int
    chats: tuple[list[Message], list[Message]]


def read(fields: kinds.Fields) -> Texts | Chats:
    """The two answers of a row. Without a prompt, what both begin with is the prompt.

    Raises: ChatError if a field is missing or is neither a string nor a list of messages.
    """
    values = {name: _value(fields.get(name)) for name in kinds.PREFERENCE}
    prompt, chosen, rejected = (values[name] for name in kinds.PREFERENCE)
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
        return _texts(prompt, chosen, rejected)
    return _chats(prompt, chosen, rejected)


def _value(value: object) -> object:
    """The value; message lists that a CSV file has as JSON text are parsed."""
    found = messages.parsed(value)
    is_list = isinstance(found, list) and all(
        isinstance(each, dict) and {"role", "from"} & each.keys() for each in found
    )
    return found if is_list and found else value


def _texts(prompt: str | None, chosen: str, rejected: str) -> Texts:
    if prompt is None:
        size = _common(chosen, rejected)
        # The space in front of a word belongs to the word, as tokens have it.
        while 0 < size < max(len(chosen), len(rejected)) and chosen[size - 1] == " ":
            size -= 1
        prompt, chosen, rejected = chosen[:size], chosen[size:], rejected[size:]
    return Texts(prompt, (chosen, rejected))


def _chats(prompt: object, *answers: object) -> Chats:
    before = [] if prompt is None else messages.read_as("user", prompt, "prompt")
    both = [
        messages.read_as("assistant", answer, name)
        for answer, name in zip(answers, ("chosen", "rejected"), strict=True)
    ]
    size = len(before)
    if isinstance(prompt, str) and all(_begins(chat, prompt) for chat in both):
        size = 0  # whole chats, which begin with the prompt
    elif size and all(chat[:size] == before and len(chat) > size for chat in both):
        size = 0
    whole = [(before if size else []) + chat for chat in both]
    # What comes before the first difference has nothing to prefer.
    shared = max(size, _common(*whole)) if prompt is None or not size else size
    return Chats(min(shared, *(len(chat) - 1 for chat in whole)), (whole[0], whole[1]))


def _begins(chat: list[Message], prompt: str) -> bool:
    """Whether a chat's first message of a user is the prompt."""
    asked = [message for message in chat if message["role"] == "user"]
    return bool(asked) and asked[0].get("content") == prompt


def _common(chosen: Sequence[typing.Any], rejected: Sequence[typing.Any]) -> int:
    """How many elements both have in common at their beginning."""
    size = 0
    while size < min(len(chosen), len(rejected)) and chosen[size] == rejected[size]:
        size += 1
    return size
