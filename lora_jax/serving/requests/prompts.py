"""Chats and texts → the token ids of prompts, as in training and generation."""

import contextlib
import inspect
import typing
from collections.abc import Iterator

from lora_jax import errors
from lora_jax import tokenizer as tokenizing
from lora_jax.data.chats import chat as chats
from lora_jax.data.chats import messages as reading
from lora_jax.serving import refusal
from lora_jax.serving.requests import protocol

if typing.TYPE_CHECKING:
    import transformers


class Prompts:
    """Encodes prompts. Its methods take as long as the text is long, and are for one thread.

    reader: the tokenizer. vocab_size: the rows of the model's embedding. context: the most tokens
    of prompt and output. most: of a prompt.
    """

    def __init__(
        self,
        reader: "transformers.PreTrainedTokenizerBase",
        vocab_size: int,
        context: int,
        most: int | None = None,
    ):
        self._reader, self._vocab_size, self._context = reader, vocab_size, context
        self._most = min(context - 1, most or context)
        # Characters: no token has more than its name, in which bytes are characters.
        self._most_text = self._most * max(map(len, reader.get_vocab()), default=1)
        self._encoder = chats.Encoder(reader)
        self._own = inspect.signature(reader.apply_chat_template).parameters.keys()

    def chat(self, chat: protocol.Chat) -> list[int]:
        """The ids of a chat. Raises: Refusal if it cannot be rendered or is too long."""
        if not self._reader.chat_template:
            raise refusal.Refusal(
                "The model has no chat template; use /v1/completions.", param="messages"
            )
        self._check_template(chat)
        fields = {"tools": chat.tools or None, "chat_template_kwargs": dict(chat.template_kwargs)}
        with _refused("messages"):
            text = self._encoder.prompt_text(
                reading.read([_with_content(each) for each in chat.messages]),
                fields,
                generate=chat.generate,
                continues=chat.continues,
            )
        ids = self._reader(
            self._short(text, chat.asked.truncate, "messages"),
            add_special_tokens=bool(chat.asked.add_special_tokens),
            verbose=False,
        ).input_ids
        return self._fitting(ids, chat.asked.truncate, "messages")

    def completion(self, completion: protocol.Completion) -> list[list[int]]:
        """The ids of each prompt. Raises: Refusal if one is too long."""
        asked = completion.asked
        texts = [self._short(each, asked.truncate, "prompt") for each in completion.prompts]
        return [
            self._fitting(self.encode(each, asked.add_special_tokens), asked.truncate, "prompt")
            for each in texts
        ]

    def encode(self, prompt: str | list[int], add_special_tokens: bool | None = None) -> list[int]:
        """The ids of a text: by default as generation encodes it. Ids stay as they are."""
        if not isinstance(prompt, str):
            if max(prompt) >= self._vocab_size:
                raise refusal.Refusal(
                    f"prompt: the id {max(prompt)} is none of the model's tokens, which are 0 to "
                    f"{self._vocab_size - 1}",
                    param="prompt",
                )
            return prompt
        with _refused("prompt"):
            if add_special_tokens is False:
                return self._reader(prompt, add_special_tokens=False, verbose=False).input_ids
            (ids,) = tokenizing.encode(self._reader, [prompt])
            return ids

    def _check_template(self, chat: protocol.Chat) -> None:
        """Raises: Refusal for what the template would not do, or is not for a client to say."""
        if own := sorted(self._own & chat.template_kwargs.keys()):
            raise refusal.Refusal(
                f"chat_template_kwargs: {', '.join(own)} cannot be given here",
                param="chat_template_kwargs",
            )
        with _refused("messages"):
            try:
                source = self._reader.get_chat_template(None, chat.tools or None)
            except ValueError as error:
                raise chats.ChatError(str(error)) from error
        if chat.tools and chat.tool_choice == "auto" and "tools" not in source:
            raise refusal.Refusal(
                "The model's chat template has no tools; tool_choice can force a call.",
                param="tools",
            )
        effort = chat.template_kwargs.get("reasoning_effort", "none")
        if effort != "none" and "reasoning_effort" not in source:
            raise refusal.Refusal(
                "reasoning_effort: the model's chat template does not read it",
                param="reasoning_effort",
            )

    def _short(self, text: str | list[int], truncate: int | None, param: str) -> str | list[int]:
        """The text, or so much of its end that the tokens to keep are all in it.

        Megabytes take seconds to encode, and all other prompts wait for them. Raises: Refusal if
        the text has more tokens than fit, whichever they are.
        """
        if not isinstance(text, str) or len(text) <= self._most_text:
            return text
        if truncate is None:
            raise refusal.Refusal(
                f"The prompt has {len(text)} characters, which are more than {self._most} tokens, "
                f"within a context of {self._context}.",
                param=param,
                code="context_length_exceeded",
            )
        # Twice as much: the first tokens depend on where the text is cut.
        return text[-2 * self._most_text :]

    def _fitting(self, ids: list[int], truncate: int | None, param: str) -> list[int]:
        if truncate is not None:
            ids = ids[-(self._most if truncate < 0 else truncate) :]
        if not ids:
            raise refusal.Refusal("The prompt has no tokens.", param=param)
        if len(ids) > self._most:
            raise refusal.Refusal(
                f"The prompt has {len(ids)} tokens. A prompt may have {self._most}, within a "
                f"context of {self._context}.",
                param=param,
                code="context_length_exceeded",
            )
        return ids

    def room(
        self, num_prompt: int, asked: int | None, most: int | None, usual: int | None = None
    ) -> int:
        """How many tokens to generate. usual: if none are asked for; None: up to the context.

        Raises: Refusal if more are asked for than there may be.
        """
        left = self._context - num_prompt
        if asked is None:
            return min(left, most or left, usual or left)
        if most is not None and asked > most:
            raise refusal.Refusal(
                f"max_tokens: {asked} is above this server's limit of {most}", param="max_tokens"
            )
        if asked > left:
            raise refusal.Refusal(
                f"The context has {self._context} tokens: {num_prompt} of the prompt leave "
                f"{left}, and max_tokens is {asked}.",
                param="max_tokens",
                code="context_length_exceeded",
            )
        return asked


def _with_content(message: object) -> object:
    """An assistant's message as templates read it.

    OpenAI's clients write one without text as null, and one that refuses as `refusal`.
    """
    if not isinstance(message, dict) or message.get("role") != "assistant":
        return message
    content = message.get("content") or message.get("refusal")
    if isinstance(content, list):
        content = [
            {"type": "text", "text": part.get("refusal")}
            if isinstance(part, dict) and part.get("type") == "refusal"
            else part
            for part in content
        ]
    if not content and (message.get("tool_calls") or message.get("function_call")):
        return message
    return {**message, "content": content or ""}


@contextlib.contextmanager
def _refused(param: str) -> Iterator[None]:
    try:
        yield
    except chats.ChatError as error:
        raise refusal.Refusal(f"{param}: {error}", param=param) from None
    except errors.UserError as error:
        raise refusal.of(error, param) from None
