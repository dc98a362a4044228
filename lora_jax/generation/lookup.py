"""Guesses at the next tokens from repetitions in a text, for speculative decoding. No jax."""

from collections.abc import Iterable, Sequence

_LONGEST, _SHORTEST = 4, 2  # tokens that must be equal


class Lookup:
    """What followed the last tokens of a text when they were in it before.

    Source: Saxena 2023, prompt lookup decoding, https://github.com/apoorvumang/prompt-lookup-decoding.
    """

    def __init__(self, tokens: Iterable[int]):
        self._tokens: list[int] = []
        self._after: dict[tuple[int, ...], int] = {}  # where the text goes on after these tokens
        self.extend(tokens)

    def extend(self, tokens: Iterable[int]) -> None:
        """Adds tokens to the text."""
        for token in tokens:
            # What ends before this token, so that the end of the text does not find itself.
            for ending in self._endings():
                self._after[ending] = len(self._tokens)
            self._tokens.append(token)

    def draft(self, most: int) -> Sequence[int]:
        """At most so many tokens that may come next; often none."""
        for ending in self._endings():
            if ending in self._after:
                start = self._after[ending]
                return self._tokens[start : start + most]
        return []

    def _endings(self) -> Iterable[tuple[int, ...]]:
        """The last tokens, the most first."""
        most = min(_LONGEST, len(self._tokens))
        return (tuple(self._tokens[-count:]) for count in range(most, _SHORTEST - 1, -1))
