"""A tokenizer's chat template: a chat → its text, and which characters of it the assistant writes.

A chat is rendered twice, the second time with each letter of a message replaced by a character that
stands for this message, its color. The two texts differ only in the messages, so it is known which
message a character belongs to, however the template moves, trims or splits it. What the template
itself writes around a message is compared with what it writes in short chats, to find where the
generation prompt ends and what ends a turn. Imports no jax.
"""

import contextlib
import re
import typing
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from lora_jax.data.chats import colors, template_source, turn_ends

if typing.TYPE_CHECKING:
    import transformers

Message = colors.Message
Span = tuple[int, int]  # the first character, and the one after the last


class ChatError(Exception):
    """What is wrong with one chat."""


class Rendering(typing.NamedTuple):
    """A chat's text, and the spans of it that are trained.

    lost: the numbers of messages that should be trained, but whose text or tool calls the template
    leaves out. loses_reasoning: it leaves out that of the last such message.
    """

    text: str
    trained: list[Span]
    lost: list[int]
    loses_reasoning: bool


class Template:
    """A tokenizer's chat template, for chats with these tools and these options of the template."""

    def __init__(
        self,
        tokenizer: "transformers.PreTrainedTokenizerBase",
        tools: Sequence[object] | None = None,
        options: Mapping[str, object] | None = None,
    ):
        """Raises: ChatError if the tokenizer has no template for such chats."""
        try:
            self.source: str = tokenizer.get_chat_template(None, tools)
        except ValueError as error:  # of several templates none is the default
            raise ChatError(str(error)) from error
        self._tokenizer, self._tools, self._options = tokenizer, tools, options or {}
        self._literals = template_source.literals(self.source)
        self._known_ends: turn_ends.TurnEnds | None = None

    def render(
        self, messages: Sequence[Message], *, generate: bool = False, continues: bool = False
    ) -> str:
        """The text of a chat. generate: followed by the generation prompt. continues: without what
        ends the last message.

        Raises: ChatError if the template refuses the chat.
        """
        try:
            return self._tokenizer.apply_chat_template(
                list(messages),
                tools=self._tools,
                tokenize=False,
                add_generation_prompt=generate,
                continue_final_message=continues,
                **self._options,
            )
        except Exception as error:  # an expression of a template can fail in any way
            raise ChatError(f"the chat template rejects it: {error}") from error

    def rendering(self, messages: Sequence[Message], trained: Sequence[bool]) -> Rendering:
        """A chat's text, in which the messages that are `trained` are found.

        Raises: ChatError if the template refuses the chat, or changes what it is given.
        """
        text = self.render(messages)
        own = self._colors(messages, text)
        for number, span in self._data(messages, text):
            if not span:
                raise ChatError(f"the chat template leaves out the data in message {number + 1}")
            own[span.start : span.stop] = colors.PER_MESSAGE * number
        owners = np.where(own < 0, -1, own // colors.PER_MESSAGE)
        seen = set(np.unique(own).tolist())
        lost = [
            number
            for number, message in enumerate(messages)
            if trained[number] and not colors.is_whole(message, number, seen)
        ]
        spans = [*self._generated(messages, owners, trained)]
        if not spans:
            hidden = [n for n, each in enumerate(trained) if each and n not in owners]
            unseen = {
                n: self._unseen_turn(text, owners, n, len(messages), is_empty=n not in lost)
                for n in hidden
            }
            spans = [*self._turns(text, owners, trained), *filter(None, unseen.values())]
            lost = [n for n in lost if not unseen.get(n)]
        last = max((n for n, each in enumerate(trained) if each), default=None)
        no_reasons = last is not None and colors.lacks_reasoning(messages[last], last, seen)
        return Rendering(text, spans, lost, no_reasons)

    def left_out(self, messages: Sequence[Message]) -> int:
        """How many messages have a text or tool call that is not, or not whole, in the chat's text.

        Raises: ChatError as `rendering`.
        """
        text = self.render(messages)
        seen = set(np.unique(self._colors(messages, text)).tolist())
        return sum(not span for _, span in self._data(messages, text)) + sum(
            not colors.is_data(message) and not colors.is_whole(message, n, seen)
            for n, message in enumerate(messages)
        )

    def end_of_turn(self) -> int | None:
        """The id of the token that ends an answer, such as <|im_end|>; None if it is plain text."""
        ids = self._tokenizer(self.end_of_answer, add_special_tokens=False).input_ids
        return ids[0] if ids and ids[0] in self._tokenizer.added_tokens_decoder else None

    @property
    def end_of_answer(self) -> str:
        """What the template writes after the last answer, without spaces around it."""
        return self._ends().final.strip()

    def unknown_tokens(self) -> list[str]:
        """What is written like a token around answers, such as <|im_end|>, and is none of the
        tokenizer's."""
        text = "".join(self._ends().texts)
        with contextlib.suppress(ChatError):  # of a template for lists of parts
            text = self.render(turn_ends.PROBES) + text
        marks = (*re.findall(r"<\|?\w+\|?>", text), self.end_of_answer)
        known = self._tokenizer.get_vocab()
        return [mark for mark in dict.fromkeys(marks) if mark and mark not in known]

    def _colors(self, messages: Sequence[Message], text: str) -> np.ndarray:
        """The number of each character's color, −1 for what the template writes."""
        if len(messages) > colors.MOST_MESSAGES:
            raise ChatError(f"it has {len(messages)} messages")
        for keep in (colors.NOTHING, self._literals):  # what the template looks for, if it does
            try:
                other = self.render(
                    [colors.painted(each, n, keep) for n, each in enumerate(messages)]
                )
            except ChatError:
                continue
            if (found := colors.of_characters(text, other, messages)) is not None:
                return found
        raise ChatError("the chat template changes the text of the messages")

    def _data(self, messages: Sequence[Message], text: str) -> Iterator[tuple[int, range]]:
        """Yields the number of each message of data, and where it is in the chat's text: where that
        differs from the text without it."""
        for n, message in enumerate(messages):
            if colors.is_data(message):
                less = [*messages[:n], {**message, "content": ""}, *messages[n + 1 :]]
                other = self.render(less)
                first = turn_ends.common(text, other)
                most = min(len(text), len(other)) - first
                last = min(most, turn_ends.common(text[::-1], other[::-1]))
                yield n, range(first, len(text) - last)

    def _generated(
        self, messages: Sequence[Message], owners: np.ndarray, trained: Sequence[bool]
    ) -> Iterator[Span]:
        """Yields what a template itself marks as generated, but not in untrained answers."""
        if not template_source.marks_generation(self.source):
            return
        from transformers.utils import chat_template_utils

        _, (marks,) = chat_template_utils.render_jinja_template(
            [[{k: v for k, v in each.items() if v is not None} for each in messages]],
            tools=self._tools,
            chat_template=self.source,
            return_assistant_tokens_mask=True,
            **{**self._tokenizer.special_tokens_map, **self._options},
        )
        untrained = [
            each["role"] == "assistant" and not is_trained
            for each, is_trained in zip(messages, trained, strict=True)
        ]
        last = -1
        for first, end in marks:
            own = owners[first:end]
            last = int(own[own >= 0][-1]) if (own >= 0).any() else last  # an end on its own
            if last < 0 or not untrained[last]:
                yield first, end

    def _turns(self, text: str, owners: np.ndarray, trained: Sequence[bool]) -> Iterator[Span]:
        """Yields where answers are, from the end of the generation prompt to that of the turn."""
        at = np.flatnonzero(owners >= 0)
        new = np.flatnonzero(np.diff(owners[at], prepend=-1))
        firsts, lasts = at[new], at[np.append(new[1:], len(at)) - 1] if len(at) else at
        for n, (first, last) in enumerate(zip(firsts.tolist(), lasts.tolist(), strict=True)):
            if not trained[owners[first]]:
                continue
            before = int(lasts[n - 1]) + 1 if n else 0
            after = int(firsts[n + 1]) if n + 1 < len(firsts) else len(text)
            start = before + self._ends().start(text[before:first])
            is_last = int(owners[first]) + 1 == len(trained)
            yield start, last + 1 + self._ends().end(text[last + 1 : after], is_last=is_last)

    def _unseen_turn(
        self, text: str, owners: np.ndarray, number: int, total: int, *, is_empty: bool
    ) -> Span | None:
        """The answer of a message without a letter, such as {} or an empty one, if it alone is
        between others. Of an empty one, the end of the turn is trained."""
        others = np.unique(owners[owners >= 0])
        before, after = others[others < number], others[others > number]
        first = int(np.flatnonzero(owners == before[-1])[-1]) + 1 if len(before) else 0
        end = int(np.flatnonzero(owners == after[0])[0]) if len(after) else len(text)
        if {*before[-1:], *after[:1]} != {number - 1, number + 1} & {*range(total)}:
            return None
        ends, between = self._ends(), text[first:end]
        closing = ends.inner if len(after) else ends.final
        start = ends.start(between) if is_empty else self._only_opening(between, bool(len(after)))
        if start is None:
            return None
        size = ends.end(between[start:], is_last=not len(after))
        turn = between[start : start + size]
        if is_empty:
            is_there = bool(closing) and turn.endswith(closing.rstrip() or closing)
        else:
            is_there = bool(turn.removesuffix(closing.strip()).strip())
        return (first + start, first + start + size) if is_there else None

    def _only_opening(self, between: str, is_followed: bool) -> int | None:
        """The end of what opens an answer, if the text between two messages has it once."""
        opening = self._ends().opening
        if not opening or between.count(opening) + is_followed not in (1, 2):
            return None
        start = between.find(opening)
        return None if start < 0 else start + len(opening)

    def _ends(self) -> turn_ends.TurnEnds:
        if self._known_ends is None:
            special = map(str, self._tokenizer.added_tokens_decoder.values())
            self._known_ends = turn_ends.found(self._rendered, tuple(special))
        return self._known_ends

    def _rendered(
        self, messages: Sequence[Message], *, generate: bool = False
    ) -> tuple[str, np.ndarray] | None:
        """(the text, the color of each character without the generation prompt); None if the
        template refuses the chat."""
        try:
            text = self.render(messages, generate=generate)
            return text, self._colors(messages, self.render(messages))
        except ChatError:
            return None
