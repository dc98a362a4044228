"""What a chat template writes around answers: the generation prompt, and what ends a turn.

Found in chats of a few letters, whose colors say which characters are the messages'.
"""

import re
import typing
from collections.abc import Callable, Sequence

import numpy as np

from lora_jax.data.chats import colors

Message = colors.Message
# A chat, and whether the generation prompt follows it → its text and the color of each character.
Render = Callable[..., tuple[str, np.ndarray] | None]

PROBES = [{"role": "user", "content": "abc"}, {"role": "assistant", "content": "xyz"}]


class TurnEnds(typing.NamedTuple):
    """What a template writes around answers.

    prompt: after a user's message, up to where an answer begins. opening: the part of it that only
    the generation prompt has. final, inner: after the last answer, and after those before it.
    special: the tokenizer's special tokens.
    """

    prompt: str
    opening: str
    final: str
    inner: str
    special: tuple[str, ...]

    @property
    def texts(self) -> tuple[str, ...]:
        """What the template writes."""
        return self.prompt, self.opening, self.final, self.inner

    def start(self, text: str) -> int:
        """Where an answer begins, in the text that is between the message before it and its own."""
        for known in filter(str.strip, (self.opening, self.prompt)):
            # As much of it as is there: a prompt may open a block that a finished answer lacks. But
            # at least its first word.
            word = re.search(r"\w+", known)
            least = word.end() if word else len(known)
            for size in range(len(known), least - 1, -1):
                if (place := text.rfind(known[:size])) >= 0:
                    return place + size
        return len(text)

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
    return TurnEnds(prompt, opening, final, inner, special)


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
