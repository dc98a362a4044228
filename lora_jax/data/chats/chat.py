"""Chats → token ids and loss masks, in one rendering of the chat template. Imports no jax."""

import contextlib
import json
import pathlib
import typing
from collections.abc import Mapping

import numpy as np

from lora_jax import errors
from lora_jax import tokenizer as tokenizing
from lora_jax.data.chats import colors, forms, template
from lora_jax.data.chats import messages as reading
from lora_jax.data.chats.template import ChatError as ChatError

if typing.TYPE_CHECKING:
    import transformers


class Encoded(typing.NamedTuple):
    """ids int32 [T]; trained bool [T]; loses: the template leaves out what should be trained;
    loses_reasoning: that of the last answer."""

    ids: np.ndarray
    trained: np.ndarray
    loses: bool
    loses_reasoning: bool


def stop_ids(
    tokenizer: "transformers.PreTrainedTokenizerBase", folder: str | pathlib.Path
) -> tuple[int, ...]:
    """The ids at which generation stops: tokenizer.eos_ids, and the token that ends a turn in the
    chat template.

    Raises: UserError if the model in `folder` has no token that ends a text.
    """
    ids = tokenizing.eos_ids(tokenizer, folder)
    turn = None
    if tokenizer.chat_template:
        with contextlib.suppress(ChatError):  # only for some chats
            turn = template.Template(tokenizer).end_of_turn()
    return ids if turn is None or turn in ids else (*ids, turn)


def end_note(tokenizer: "transformers.PreTrainedTokenizerBase") -> str:
    """Why generation does not stop at the end of an answer; "" if it does, or has no template."""
    if not tokenizer.chat_template:
        return ""
    with contextlib.suppress(ChatError):
        how = template.Template(tokenizer)
        if how.end_of_turn() is None:
            end = how.end_of_answer
            writes = f"ends answers with {end!r}, which is not one token of this tokenizer"
            texts = " ".join(f'"{text}"' for text in how.unknown_tokens() if end)
            return (
                f"the chat template {writes if end else 'writes nothing after an answer'}, so "
                "generation does not stop there; use a template that ends answers with "
                f"{tokenizer.eos_token}"
                + (f", or train with --add-special-tokens {texts}" if texts else "")
            )
    return ""


class Encoder:
    """Encodes chats with a tokenizer's chat template."""

    def __init__(self, tokenizer: "transformers.PreTrainedTokenizerBase"):
        self._tokenizer = tokenizer
        self._templates: dict[str, template.Template] = {}

    def encode(
        self,
        messages: list[template.Message],
        fields: Mapping[str, typing.Any],
        prompt: int = 0,
    ) -> Encoded:
        """A chat as apply_chat_template gives it; the assistant's turns are trained.

        A token is trained if a character of it belongs to an answer or to what ends the turn.
        fields: the example; its tools and chat_template_kwargs go to the template. prompt: how many
        messages at the beginning are not trained.
        Raises: ChatError if the chat cannot be rendered or its answers cannot be found in it.
        """
        how = self._template(fields)
        trained = [n >= prompt and reading.is_trained(each) for n, each in enumerate(messages)]
        has_parts = any(isinstance(each.get("content"), list) for each in messages)
        # A template leaves no answer out that is empty.
        num_losable = sum(
            trained[n] and not colors.is_whole(each, n, set()) for n, each in enumerate(messages)
        )
        problem: ChatError | None = None
        best: template.Rendering | None = None
        for form in forms.of(messages, how.source):
            try:
                found = how.rendering(form, trained)
            except ChatError as error:
                problem = problem or error
                continue
            if best is None or len(found.lost) < len(best.lost):
                best = found
            if not best.lost or not (has_parts or len(best.lost) == num_losable):
                break
        # If no answer was found, the template may need the form that it refused. If the answers are
        # calls alone, it has no place for them.
        if problem and (best is None or (
            len(best.lost) == num_losable
            and any(reading.text_of(messages[n]).strip() for n in best.lost)
        )):  # fmt: skip
            raise problem
        assert best is not None
        return self._tokens(best)

    def prompt(
        self,
        messages: list[template.Message],
        fields: Mapping[str, typing.Any],
        *,
        generate: bool = True,
        continues: bool = False,
        add_special_tokens: bool = False,
    ) -> list[int]:
        """The ids of a chat as `encode` has them, for the model to go on with.

        add_special_tokens: with those of the tokenizer beside the template's. See prompt_text.
        """
        text = self.prompt_text(messages, fields, generate=generate, continues=continues)
        return self._tokenizer(text, add_special_tokens=add_special_tokens, verbose=False).input_ids

    def prompt_text(
        self,
        messages: list[template.Message],
        fields: Mapping[str, typing.Any],
        *,
        generate: bool = True,
        continues: bool = False,
    ) -> str:
        """The text of a chat for the model to go on with.

        generate: followed by the start of the assistant's turn. continues: without what ends the
        last message.
        Raises: ChatError if the chat cannot be rendered.
        """
        how = self._template(fields)
        problem: ChatError | None = None
        best: tuple[int, str] | None = None
        for form in forms.of(messages, how.source):
            try:
                text = how.render(form, generate=generate, continues=continues)
            except ChatError as error:
                problem = problem or error
                continue
            try:
                missing = how.left_out(form)
            except ChatError:  # the template changes texts, or reads what is in them
                missing = len(form)
            if best is None or missing < best[0]:
                best = missing, text
            if not missing:
                break
        if best is None:
            raise problem or ChatError("the chat cannot be rendered")
        return best[1]

    def _template(self, fields: Mapping[str, typing.Any]) -> template.Template:
        tools = reading.tools(fields.get("tools"))
        options = reading.parsed(fields.get("chat_template_kwargs"))
        if options is not None and not isinstance(options, Mapping):
            raise ChatError("chat_template_kwargs is not an object")
        key = json.dumps([tools, options], default=str)
        if not self._tokenizer.chat_template:
            raise errors.UserError(
                expected="a tokenizer with a chat template, to render the examples' messages",
                found="none",
                where=str(self._tokenizer.name_or_path),
                do="--chat-template with a Jinja file or the id of the model's chat variant; or "
                "start from that variant; or use prompt and completion",
            )
        if key not in self._templates:
            if len(self._templates) > 256:
                self._templates.clear()
            options = {k: v for k, v in (options or {}).items() if k not in _OWN}
            self._templates[key] = template.Template(self._tokenizer, tools or None, options)
        return self._templates[key]

    def _tokens(self, rendering: template.Rendering) -> Encoded:
        encoded = self._tokenizer(
            rendering.text, add_special_tokens=False, return_offsets_mapping=True, verbose=False
        )
        ids = np.array(encoded.input_ids, np.int32)
        first, end = np.array(encoded["offset_mapping"], np.int64).reshape(-1, 2).T
        trained = np.zeros(len(ids), bool)
        for start, stop in rendering.trained:
            trained |= (first < stop) & (end > start)
        return Encoded(ids, trained, bool(rendering.lost), rendering.loses_reasoning)


# Arguments of apply_chat_template itself, which an example does not decide.
_OWN = ("add_generation_prompt", "tokenize", "return_dict", "tools", "conversation",
        "continue_final_message", "padding", "truncation", "return_tensors")  # fmt: skip
