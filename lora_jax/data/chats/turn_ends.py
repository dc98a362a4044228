"""What a chat template writes around answers: the generation prompt, and what ends a turn.

Found in chats of a few letters, whose colors say which characters are the messages'.
"""

import bisect
import re
import typing
from collections.abc import Callable, Sequence

import numpy as np

from lora_jax.data.chats import colors

Message = colors.Message
# A chat, and whether the generation prompt follows it → its text and the color of each character.
Render = Callable[..., tuple[str, np.ndarray] | None]

PROBES = [{"role": "user", "content": "abc"}, {"role": "assistant", "content": "xyz"}]

_CALL: Message = {
    "role": "assistant",
    "content": "",
    "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {"a": "x"}}}],
}


class TurnEnds(typing.NamedTuple):
    """What a template writes around answers.

    prompt: after a user's message, up to where an answer begins. opening: the part of it that only
    the generation prompt has. final, inner: after the last answer, and after those before it.
    special: the tokenizer's special tokens. call: in front of a tool call that begins an answer.
    """

    prompt: str
    opening: str
    final: str
    inner: str
    special: tuple[str, ...]
    call: str = ""

    @property
    def texts(self) -> tuple[str, ...]:
        """What the template writes."""
        return self.prompt, self.opening, self.final, self.inner

    def start(self, text: str) -> int:
        """Where an answer begins, in the text that is between the message before it and its own."""
        for known in filter(str.strip, (self.opening, self.prompt)):
            # As much of it as is there: a prompt may open a block that a finished answer lacks. But
            # at least its first word, and no part of a tag: the answer may begin with another.
            word = re.search(r"\w+", known)
            least = word.end() if word else len(known)
            for size in range(len(known), least - 1, -1):
                whole = size == len(known) or _is_closed(known[:size])
                if whole and (place := text.rfind(known[:size])) >= 0:
                    return place + size
        # Without a header: the turn goes on behind the answer of a tool.
        return len(text.removesuffix(self.call))

    def end(self, text: str, *, is_last: bool) -> int:
        """The length of what ends a turn, in the text from an answer's last letter on."""
        for known in (self.final, self.inner) if is_last else (self.inner, self.final):
            shown = known.rstrip() or known
            if shown and (place := text.find(shown)) >= 0:
                return place + len(shown)
        if is_last:
            return len(text)
        return _header(text, self.opening) or _special_end(text, self.special)


def found(render: Render, special: tuple[str, ...]) -> TurnEnds:
    """What the template writes around answers, from chats of one to three messages."""

    def after_last(*messages: Message, generate: bool = False) -> str | None:
        rendered = render(messages, generate=generate)
        if rendered is None:
            return None
        text, owners = rendered
        at = np.flatnonzero(owners >= 0)
        return text[at[-1] + 1 :] if len(at) else None

    user, answer = PROBES
    if after_last(user) is None:  # the content has to be a list of parts
        user, answer = (
            each | {"content": [{"type": "text", "text": each["content"]}]} for each in PROBES
        )
    asked = after_last(user) or ""
    prompt = after_last(user, generate=True) or asked
    opening = prompt[_border(prompt, 0, common(asked, prompt)) :]
    if "</think>" in opening:  # an empty block belongs to the answer, as without that prompt
        opening = opening.partition("<think>")[0]
    final = after_last(user, answer) or ""
    inner = _inner(render((user, answer, user)), final, opening, special)
    ends = TurnEnds(prompt, opening, final, inner, special)
    return ends._replace(call=_before_call(render((user, _CALL)), ends))


def _before_call(rendered: tuple[str, np.ndarray] | None, ends: TurnEnds) -> str:
    """What the template writes in front of a tool call that begins an answer."""
    if rendered is None:
        return ""
    text, owners = rendered
    of_user, of_call = (np.flatnonzero(owners // colors.PER_MESSAGE == n) for n in (0, 1))
    if not (len(of_user) and len(of_call)):
        return ""
    between = text[of_user[-1] + 1 : of_call[0]]
    return between[ends.start(between) :]


def _inner(
    rendered: tuple[str, np.ndarray] | None, final: str, opening: str, special: Sequence[str]
) -> str:
    """What ends the answer in a chat where a user's message follows it."""
    if rendered is None:
        return final
    text, owners = rendered
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
    return between[: size or _special_end(between, special) or _header(between, opening)]


def _special_end(text: str, special: Sequence[str]) -> int:
    """The end of the first special token in the text; 0 if there is none."""
    places = [(text.find(token), -len(token)) for token in special if token in text]
    place, size = min(places, default=(0, 0))
    return place - size


def _border(text: str, least: int, most: int) -> int:
    """The largest size up to `most` at which the text's beginning has no open bracket, if there is
    one from `least` on; else `least`. It does not cut <|user|> or [INST] in two."""
    return next((n for n in range(most, least - 1, -1) if _is_closed(text[:n])), least)


def _is_closed(text: str) -> bool:
    """Whether as many brackets are closed as opened."""
    return all(text.count(a) == text.count(b) for a, b in ("<>", "[]"))


def _header(text: str, opening: str) -> int:
    """Where the header of the next turn begins: it has the beginning of an assistant's header."""
    sizes = [common(text[n:], opening) for n in range(len(text))]
    return int(np.argmax(sizes)) if max(sizes, default=0) > 1 else 0


def common(a: Sequence[typing.Any], b: Sequence[typing.Any]) -> int:
    """How many elements two texts or lists have in common at their beginning."""
    sizes = range(min(len(a), len(b)))
    return bisect.bisect_left(sizes, True, key=lambda n: a[: n + 1] != b[: n + 1])
