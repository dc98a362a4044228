"""Chats → token ids and loss masks, rendered by the tokenizer's chat template. Imports no jax."""

import re
import typing

import numpy as np

if typing.TYPE_CHECKING:
    import transformers


class ChatError(Exception):
    """What is wrong with one chat."""


def encode(
    messages: object, tokenizer: "transformers.PreTrainedTokenizerBase"
) -> tuple[np.ndarray, np.ndarray]:
    """(ids, trained) of a chat; the assistant's turns are trained, with the tokens that end them.

    A template with {% generation %} marks the turns itself. Otherwise a turn is what the template
    adds to the chat before it.
    Raises: ChatError if the chat cannot be rendered turn by turn.
    """
    if not isinstance(messages, list) or not all(
        isinstance(m, dict) and isinstance(m.get("role"), str) and m.get("content") is not None
        for m in messages
    ):
        raise ChatError("messages is not a list of {role, content}")
    # Arrow gives every message the fields of all messages; templates test whether a field exists.
    messages = [{k: v for k, v in m.items() if v is not None} for m in messages]

    def render(upto: int, **options: object) -> typing.Any:
        import jinja2

        try:
            return tokenizer.apply_chat_template(
                messages[:upto], tokenize=True, return_dict=True, verbose=False, **options
            )
        except jinja2.TemplateError as error:
            raise ChatError(f"the chat template rejects it: {error}") from error

    if re.search(r"\{%-?\s*generation\s*-?%\}", tokenizer.get_chat_template()):
        rendered = render(len(messages), return_assistant_tokens_mask=True)
        return (
            np.array(rendered["input_ids"], np.int32),
            np.array(rendered["assistant_masks"], bool),
        )

    ids = render(len(messages))["input_ids"]
    trained = np.zeros(len(ids), bool)
    for i, message in enumerate(messages):
        if message["role"] == "assistant":
            before = render(i, add_generation_prompt=True)["input_ids"]
            after = render(i + 1)["input_ids"]
            if after[: len(before)] != before or ids[: len(after)] != after:
                raise ChatError(f"turn {i + 1} changes the tokens of the turns before it")
            trained[len(before) : len(after)] = True
    return np.array(ids, np.int32), trained
