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

from lora_jax.data import colors, template_source

if typing.TYPE_CHECKING:
    import transformers

Message = colors.Message
Span = tuple[int, int]  # the first character, and the one after the last

_PROBES = [{"role": "user", "content": "abc"}, {"role": "assistant", "content": "xyz"}]


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


class _Ends(typing.NamedTuple):
    """What a template writes around answers.

    prompt: after a user's message, up to where an answer begins. opening: the part of it that only
    the generation prompt has. final, inner: after the last answer, and after those before it.
    """

    prompt: str
    opening: str
    final: str
    inner: str


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
        self._known_ends: _Ends | None = None

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
        owners = np.where(own < 0, -1, own // colors.PER_MESSAGE)
        seen = set(np.unique(own).tolist())
        lost = [
            number
            for number, message in enumerate(messages)
            if trained[number] and not colors.is_whole(message, number, seen)
        ]
        spans = [*self._generated(messages, owners, trained)]
        if not spans:
            unseen = {n: self._unseen_turn(text, owners, n) for n in lost if n not in owners}
            spans = [*self._turns(text, owners, trained), *filter(None, unseen.values())]
            lost = [n for n in lost if not unseen.get(n)]
        last = max((n for n, each in enumerate(trained) if each), default=None)
        no_reasons = last is not None and colors.lacks_reasoning(messages[last], last, seen)
        return Rendering(text, spans, lost, no_reasons)

    def left_out(self, messages: Sequence[Message]) -> int:
        """How many messages have a text or tool call that is not, or not whole, in the chat's text.

        Raises: ChatError as `rendering`.
        """
        seen = set(np.unique(self._colors(messages, self.render(messages))).tolist())
        return sum(not colors.is_whole(message, n, seen) for n, message in enumerate(messages))

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
        text = "".join(self._ends())
        with contextlib.suppress(ChatError):  # of a template for lists of parts
            text = self.render(_PROBES) + text
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
            start = before + self._start(text[before:first])
            is_last = int(owners[first]) + 1 == len(trained)
            yield start, last + 1 + self._end(text[last + 1 : after], is_last=is_last)

    def _unseen_turn(self, text: str, owners: np.ndarray, number: int) -> Span | None:
        """The answer of a message without a letter, such as {}, if it alone is between others."""
        others = np.unique(owners[owners >= 0])
        before, after = others[others < number], others[others > number]
        first = int(np.flatnonzero(owners == before[-1])[-1]) + 1 if len(before) else 0
        end = int(np.flatnonzero(owners == after[0])[0]) if len(after) else len(text)
        alone = {*before[-1:], *after[:1]} == {number - 1, number + 1} & {*others}
        opening = self._ends().opening
        between = text[first:end]
        if not (alone and opening and between.count(opening) + bool(len(after)) in (1, 2)):
            return None
        start = between.find(opening)
        if start < 0:
            return None
        start += len(opening)
        size = self._end(between[start:], is_last=not len(after))
        closing = self._ends().inner if len(after) else self._ends().final
        if not between[start : start + size].removesuffix(closing.strip()).strip():
            return None
        return first + start, first + start + size

    def _start(self, text: str) -> int:
        """Where an answer begins, in the text that is between the message before it and its own."""
        ends = self._ends()
        for known in filter(str.strip, (ends.opening, ends.prompt)):
            # As much of it as is there: a prompt may open a block that a finished answer lacks. But
            # at least its first word.
            word = re.search(r"\w+", known)
            least = word.end() if word else len(known)
            for size in range(len(known), least - 1, -1):
                if (place := text.rfind(known[:size])) >= 0:
                    return place + size
        return len(text)

    def _end(self, text: str, *, is_last: bool) -> int:
        """The length of what ends a turn, in the text from an answer's last letter on."""
        ends = self._ends()
        for known in (ends.final, ends.inner) if is_last else (ends.inner, ends.final):
            shown = known.rstrip() or known
            if shown and (place := text.find(shown)) >= 0:
                return place + len(shown)
        if is_last:
            return len(text)
        return _header(text, ends.opening) or self._special_end(text)

    def _special_end(self, text: str) -> int:
        """The end of the first special token in the text; 0 if there is none."""
        special = map(str, self._tokenizer.added_tokens_decoder.values())
        places = [(text.find(token), -len(token)) for token in special if token in text]
        place, size = min(places, default=(0, 0))
        return place - size

    def _ends(self) -> _Ends:
        if self._known_ends is None:
            self._known_ends = self._probed()
        return self._known_ends

    def _probed(self) -> _Ends:
        """Finds what the template writes around answers, from chats of one to three messages."""

        def after_last(*messages: Message, generate: bool = False) -> str | None:
            try:
                text = self.render(messages, generate=generate)
                owners = self._colors(messages, self.render(messages))
            except ChatError:
                return None
            at = np.flatnonzero(owners >= 0)
            return text[at[-1] + 1 :] if len(at) else None

        user, answer = _PROBES
        if after_last(user) is None:  # the content has to be a list of parts
            user, answer = (
                each | {"content": [{"type": "text", "text": each["content"]}]} for each in _PROBES
            )
        asked = after_last(user) or ""
        prompt = after_last(user, generate=True) or asked
        opening = prompt[_border(prompt, 0, common(asked, prompt)) :]
        if "</think>" in opening:  # an empty block belongs to the answer, as without that prompt
            opening = opening.partition("<think>")[0]
        final = after_last(user, answer) or ""
        inner = self._inner((user, answer, user), final, opening)
        return _Ends(prompt, opening, final, inner)

    def _inner(self, chat: Sequence[Message], final: str, opening: str) -> str:
        """What ends the answer in a chat where a user's message follows it."""
        try:
            text = self.render(chat)
            owners = self._colors(chat, text)
        except ChatError:
            return final
        of_user, of_answer = (np.flatnonzero(owners // colors.PER_MESSAGE == n) for n in (0, 1))
        at = np.flatnonzero(owners // colors.PER_MESSAGE == 2)
        if not (len(of_user) and len(of_answer) and len(at)):
            return final
        head, between = text[: of_user[0]], text[of_answer[-1] + 1 : at[0]]
        if between.startswith(final.rstrip() or final):
            return final
        # It ends before the user's header, which both turns of the user have in front, and where it
        # is no longer as at the end of a chat.
        least = len(between) - common(head[::-1], between[::-1])
        size = _border(between, least, max(least, common(final, between)))
        return between[: size or self._special_end(between) or _header(between, opening)]


def _border(text: str, least: int, most: int) -> int:
    """The largest size up to `most` at which the text's beginning has no open bracket, if there is
    one from `least` on; else `least`. It does not cut <|user|> or [INST] in two."""
    for size in range(most, least - 1, -1):
        if all(text.count(a, 0, size) == text.count(b, 0, size) for a, b in ("<>", "[]")):
            return size
    return least


def _header(text: str, opening: str) -> int:
    """Where the header of the next turn begins: it has the beginning of an assistant's header."""
    sizes = [common(text[n:], opening) for n in range(len(text))]
    return int(np.argmax(sizes)) if max(sizes, default=0) > 1 else 0


def common(a: Sequence[typing.Any], b: Sequence[typing.Any]) -> int:
    """How many elements two texts or lists have in common at their beginning."""
    size = 0
    while size < min(len(a), len(b)) and a[size] == b[size]:
        size += 1
    return size
