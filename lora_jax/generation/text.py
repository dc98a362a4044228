"""Token ids → text as they come, and the strings at which text stops. Imports no jax."""

import codecs
import json
import re
from collections.abc import Iterable, Sequence
from typing import Any

from lora_jax import tokenizer

_REPLACEMENT = "\ufffd"
_BYTE_TOKEN = re.compile("<0x([0-9A-Fa-f]{2})>")
# Longer runs of byte tokens are emitted before they end: a reader should not wait for ever.
_LONGEST_RUN = 64


class Detokenizer:
    """The text that token ids add after a prompt, piece by piece.

    The pieces together equal tokenizer.continuation of all ids. A piece is never retracted, so it
    lacks what later tokens may change:

    - a character whose last byte has not come;
    - in tokenizers with byte fallback, a run of byte tokens. Their decoder writes U+FFFD for each
      byte of a run if one is not valid UTF-8. A run that has become invalid is emitted at once, and
      so is one of more than 64 bytes. Only the latter can differ from the whole decode: if it
      becomes invalid later, its first characters stay.

    Special tokens that are skipped, and ids that the tokenizer does not have, add nothing. The cost
    of a token does not grow with the text. reader: a fast tokenizer of transformers.
    """

    def __init__(
        self,
        reader: Any,
        prompt: Sequence[int],
        *,
        skip_special_tokens: bool = True,
    ):
        self._backend = reader.backend_tokenizer
        tokens = self._backend.get_added_tokens_decoder() if skip_special_tokens else {}
        self._skipped = {id for id, token in tokens.items() if token.special}
        kinds = _decoders(self._backend)
        backwards = ((id, token) for id in reversed(prompt) if (token := self._token(id)))
        self._stream: _Bytes | _Texts
        if "ByteLevel" in kinds:
            self._stream = _Bytes(backwards)
        else:
            self._stream = _Texts(self._backend, "ByteFallback" in kinds, backwards)

    def push(self, id: int) -> str:
        """The text that is certain with this token and was not before."""
        token = self._token(id)
        return self._stream.push(id, token) if token else ""

    @property
    def held(self) -> str:
        """Complete characters that `finish` would return now, but later tokens may change.

        A stop string that ends in them can be acted on: then there are no later tokens.
        """
        return self._stream.held()

    def finish(self) -> str:
        """The rest, when no more tokens come: U+FFFD for what is not a character."""
        return self._stream.finish()

    def _token(self, id: int) -> str | None:
        return None if id in self._skipped else self._backend.id_to_token(id)


class _Bytes:
    """Tokens of byte-level BPE, which are bytes. backwards: the prompt's tokens from its end."""

    def __init__(self, backwards: Iterable[tuple[int, str]]):
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        tail = b""
        for _, token in backwards:
            tail = _unmapped(token) + tail
            if len(tail) >= 4:  # no character has more
                break
        self._utf8.decode(tail)
        # What the prompt's text has of a character that the prompt ends within.
        self._cut = self._utf8.getstate()[0].decode(errors="replace")

    def push(self, id: int, token: str) -> str:
        return self._decode(_unmapped(token))

    def held(self) -> str:
        return ""

    def finish(self) -> str:
        return self._decode(b"", final=True)

    def _decode(self, data: bytes, final: bool = False) -> str:
        text = self._utf8.decode(data, final)
        if text:
            text, self._cut = text.removeprefix(self._cut), ""
        return text


class _Texts:
    """Tokens that are texts, or bytes in runs if the tokenizer has a byte fallback."""

    def __init__(
        self,
        backend: Any,
        byte_fallback: bool,
        backwards: Iterable[tuple[int, str]],
    ):
        self._backend = backend
        self._byte_fallback = byte_fallback
        self._last: list[int] = []  # the token before the run, if any
        self._run: list[int] = []  # byte tokens whose text is not certain
        for id, token in backwards:
            if not self._is_byte(token):
                self._last = [id]
                break
            self._run.append(id)
        self._run.reverse()
        # The part of the run's text that the prompt's text has.
        self._shown, state = self._run_text()
        self._broken = state == "broken"

    def push(self, id: int, token: str) -> str:
        if not self._is_byte(token):
            rest = self.finish()
            # Decoders treat the first token of all differently, so it is decoded after another.
            text = self._decode([*self._last, id])[len(self._decode(self._last)) :]
            self._last = [id]
            return rest + text
        if self._broken:
            return _REPLACEMENT
        self._run.append(id)
        text, state = self._run_text()
        if state == "broken":
            self._broken = True
            return tokenizer.added(self._shown, text)
        if state == "valid" and len(self._run) > _LONGEST_RUN:
            return self.finish()
        return ""

    def held(self) -> str:
        text, state = self._run_text()
        return tokenizer.added(self._shown, text) if state == "valid" else ""

    def finish(self) -> str:
        """Ends the run. Returns what is not emitted of its text."""
        if not self._run:
            return ""
        text = "" if self._broken else tokenizer.added(self._shown, self._run_text()[0])
        self._last = self._run[-1:]
        self._run, self._shown, self._broken = [], "", False
        return text

    def _is_byte(self, token: str) -> bool:
        return self._byte_fallback and _BYTE_TOKEN.fullmatch(token) is not None

    def _run_text(self) -> tuple[str, str]:
        """The text of the run if it ended here; whether it is valid, incomplete or broken."""
        data = b"".join(_byte(self._backend.id_to_token(id)) for id in self._run)
        try:
            text = data.decode()
        except UnicodeDecodeError as error:
            end = error.reason == "unexpected end of data"
            return _REPLACEMENT * len(data), "incomplete" if end else "broken"
        return (text if self._last else self._decode(self._run)), "valid"

    def _decode(self, ids: list[int]) -> str:
        return self._backend.decode(ids, skip_special_tokens=False)


def token_bytes(reader: Any, id: int) -> bytes:
    """The bytes of one token, which may be a part of a character; b"" if there is no such token.

    Those of all tokens of a text, joined, are the text in UTF-8, except for the space that
    SentencePiece adds in front. Special tokens give their names.
    """
    token = reader.backend_tokenizer.id_to_token(id) or ""
    kinds = _decoders(reader.backend_tokenizer)
    if "ByteLevel" in kinds:
        return _unmapped(token)
    if "ByteFallback" in kinds and _BYTE_TOKEN.fullmatch(token):
        return _byte(token)
    if kinds & {"Replace", "Metaspace"}:
        token = token.replace("▁", " ")
    return token.encode()


class StopStrings:
    """Cuts text at the first stop string in it, however the text is divided into pieces.

    The first is the one that ends first; of several that end there, the longest. `push` withholds
    only the longest end of the text that may be the beginning of a stop string.

    include: the stop string stays in the text.
    """

    def __init__(self, stops: Sequence[str], *, include: bool = False):
        self._stops = tuple(stops)
        self._include = include
        self._withheld = ""
        self._ended = False

    def push(self, text: str, held: str = "") -> tuple[str, str | None]:
        """The text to emit, and the stop string if there is one: what follows it is dropped.

        held: Detokenizer.held, which follows `text` if the output ends here. It is searched, and
        emitted only if a stop string ends in it; otherwise it comes again later.
        """
        if self._ended:
            return "", None
        text = self._withheld + text
        if found := self._find(text + held):
            end, stop = found
            self._ended, self._withheld = True, ""
            return (text + held)[: end if self._include else end - len(stop)], stop
        keep = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._withheld = text[len(text) - keep :]
        return text[: len(text) - keep], None

    def finish(self) -> str:
        """What is withheld, when no more text comes."""
        text, self._withheld = self._withheld, ""
        return text

    def _find(self, text: str) -> tuple[int, str] | None:
        places = [(text.find(stop), stop) for stop in self._stops]
        ends = [(start + len(stop), stop) for start, stop in places if start >= 0]
        return min(ends, key=lambda found: (found[0], -len(found[1])), default=None)


def _overlap(text: str, stop: str) -> int:
    """The length of the longest end of `text` that `stop` begins with, without being all of it."""
    start = max(0, len(text) - len(stop) + 1)
    while (start := text.find(stop[0], start)) >= 0:
        if stop.startswith(text[start:]):
            return len(text) - start
        start += 1
    return 0


def _decoders(backend: Any) -> set[str]:
    """The types of the steps that a tokenizer decodes with."""
    if backend.decoder is None:
        return set()

    def types(config: dict) -> Iterable[str]:
        yield config["type"]
        for each in config.get("decoders", ()):
            yield from types(each)

    return set(types(json.loads(backend.decoder.__getstate__())))


def _byte(token: str) -> bytes:
    """<0x0A> → a newline."""
    return bytes([int(token[3:5], 16)])


def _byte_characters() -> dict[str, int]:
    """The characters that byte-level BPE writes bytes as: printable Latin-1, then from U+0100."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {
        chr(0x100 + i): byte for i, byte in enumerate(others)
    }


_BYTES = _byte_characters()


def _unmapped(token: str) -> bytes:
    """The bytes of a token of byte-level BPE; an added token may have other characters."""
    try:
        return bytes(_BYTES[character] for character in token)
    except KeyError:
        return token.encode()
