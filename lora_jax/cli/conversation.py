"""A chat in the terminal: what is said, who answers, the commands, and Ctrl-C."""

import dataclasses
import re
import signal
import sys
from collections.abc import Iterable
from types import FrameType
from typing import Any

from lora_jax import errors, tokenizer
from lora_jax.data.chats import chat
from lora_jax.generation import config, request

COMMANDS = {  # {its name: what follows it, what it does}
    "adapter": ("NAME", "answer with this adapter; without a name, list them"),
    "base": ("", "answer with the base"),
    "compare": ("", "show the base's answer before the adapter's; again: no longer"),
    "system": ("TEXT", "set the system prompt; without a text, the template's own"),
    "reset": ("", "forget what was said; the system prompt stays"),
    "help": ("", "list the commands"),
    "exit": ("", "end the chat"),
}
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # a terminal would obey these


class Conversation:
    """The messages of a chat, and the requests that answer them.

    base: the name of the base. adapter: the one that answers; None: the base. most: the most tokens
    of an answer; None: as many as the context has room for.
    Raises: UserError if there is no chat template, or it takes no system prompt.
    """

    def __init__(
        self,
        engine: Any,
        base: str,
        sampling: config.Sampling,
        *,
        adapter: str | None = None,
        system: str | None = None,
        most: int | None = None,
    ):
        self.base, self.adapter, self.compares = base, adapter, False
        self.messages: list[dict[str, str]] = []
        self._engine, self._sampling, self._most = engine, sampling, most
        self._encoder = chat.Encoder(engine.reader)
        self._system: list[dict[str, str]] = []
        self._num_asked = 0
        self.use_system(system)

    @property
    def adapters(self) -> tuple[str, ...]:
        """The names of the adapters that can answer."""
        return tuple(self._engine.pool.names()) if self._engine.pool else ()

    @property
    def context(self) -> int:
        return self._engine.context

    def use_system(self, text: str | None) -> None:
        """Sets the system prompt. Raises: UserError if the template takes none."""
        system = [{"role": "system", "content": text}] if text else []
        self._ids([*system, {"role": "user", "content": "Hello"}])
        self._system = system

    def ask(self, text: str) -> list[tuple[str, request.Request]]:
        """(who answers, the request) of each answer; the last one is that of the chat.

        Raises: UserError if the chat is longer than the context.
        """
        ids = self._ids([*self._system, *self.messages, {"role": "user", "content": text}])
        room = self.context - len(ids)
        if room < 1:
            raise errors.UserError(
                expected=f"a chat within the model's context of {self.context} tokens, with room "
                "for an answer",
                found=f"{len(ids)} tokens, with this message",
                do="/reset begins a new chat",
            )
        seed = self._sampling.seed
        sampling = dataclasses.replace(
            self._sampling,
            max_new_tokens=min(self._most or room, room),
            seed=None if seed is None else seed + self._num_asked,
        )
        self._num_asked += 1
        return [
            (name or self.base, self._engine.submit(ids, sampling, adapters=weights))
            for name, weights in [
                *([(None, {})] if self.compares and self.adapter else []),
                (self.adapter, {self.adapter: 1.0} if self.adapter else {}),
            ]
        ]

    def keep(self, text: str, answer: str) -> None:
        """Adds a message and its answer to the chat."""
        self.messages += [
            {"role": "user", "content": text},
            {"role": "assistant", "content": answer},
        ]

    def _ids(self, messages: list[dict[str, str]]) -> list[int]:
        tokenizer.check_text(each["content"] for each in messages)
        try:
            return self._encoder.prompt(messages, {})
        except chat.ChatError as error:
            raise errors.UserError(
                expected="a chat that the model's chat template takes", found=str(error)
            ) from None


class Terminal:
    """Reads messages and commands from the terminal or a pipe, and prints the answers.

    At a terminal, Ctrl-C stops an answer; at the prompt, twice, it ends the chat. From a pipe, each
    line is a message, and nothing is printed but the answers.
    """

    def __init__(self, conversation: Conversation, *, is_terminal: bool):
        self._chat, self._is_terminal = conversation, is_terminal
        self._running: list[request.Request] = []
        self._before: Any = None  # the handler of Ctrl-C

    def run(self) -> None:
        """Chats until the input ends. Raises: UserError, if there is no terminal to tell it."""
        if not self._is_terminal:
            while (line := self._line()) is not None and self._turn(line):
                pass
            return
        self._before = signal.signal(signal.SIGINT, self._interrupted)
        try:
            self._until_the_end()
        finally:
            signal.signal(signal.SIGINT, self._before)

    def _until_the_end(self) -> None:
        was_pressed = False
        while True:
            try:
                line = self._line()
                was_pressed = False
                if line is None or not self._turn(line):
                    return
            except KeyboardInterrupt:
                if was_pressed:
                    print()
                    return
                was_pressed = True
                print("\n(Ctrl-C again, Ctrl-D or /exit ends the chat)")
            except errors.UserError as error:
                print(f"error:{error}", file=sys.stderr)

    def _interrupted(self, number: int, frame: FrameType | None) -> None:
        """Handles Ctrl-C: stops the answers, or what else is done; the second one ends all."""
        if not self._running:
            raise KeyboardInterrupt
        if all(each.aborted.is_set() for each in self._running):
            self._before(number, frame)
        for each in self._running:
            each.abort()

    def _line(self) -> str | None:
        """The next line; None at the end."""
        try:
            return input("> " if self._is_terminal else "")
        except EOFError:
            self._note("")
            return None
        except UnicodeDecodeError as error:
            raise errors.UserError(expected="text in UTF-8", found=str(error)) from None

    def _turn(self, line: str) -> bool:
        """Answers a message or carries out a command; False if it ends the chat."""
        text = line.strip()
        if text.startswith("/") and not text.startswith("//"):
            word, _, rest = text[1:].partition(" ")
            return self._command(word, rest.strip())
        if text:
            self._answer(text.removeprefix("/") if text.startswith("//") else text)
        return True

    def _answer(self, text: str) -> None:
        self._running = []
        asked = self._chat.ask(text)
        self._running = [each for _, each in asked]
        answer = ""
        try:
            for name, pieces in asked:
                if len(asked) > 1:
                    print(f"[{name}]")
                answer, reason = self._stream(pieces)
                if reason == "length":
                    self._say_why_it_ends(pieces)
        finally:
            self._running = []
        if answer:
            self._chat.keep(text, answer)

    def _stream(self, pieces: Iterable[request.Piece]) -> tuple[str, str | None]:
        """Prints an answer as it comes. Returns it, and why it ended."""
        answer, reason = "", None
        for piece in pieces:
            answer += piece.text
            reason = piece.finish_reason
            shown = _CONTROL.sub("\ufffd", piece.text) if self._is_terminal else piece.text
            print(shown, end="", flush=True)
            if reason == "error":
                raise RuntimeError(piece.error)
        print(flush=True)
        if reason == "abort":
            self._note("(stopped)")
        return answer, reason

    def _say_why_it_ends(self, asked: request.Request) -> None:
        most = asked.sampling.max_new_tokens
        if len(asked.prompt) + most >= self._chat.context:
            self._note(f"(cut: the context of {self._chat.context} tokens is full; /reset begins a "
                       "new chat)")  # fmt: skip
        else:
            self._note(f"(cut after --max-new-tokens {most})")

    def _command(self, word: str, rest: str) -> bool:
        """Carries out a command; False if it ends the chat."""
        chat = self._chat
        if word not in COMMANDS:
            raise errors.UserError(
                expected=f"one of {', '.join(f'/{name}' for name in COMMANDS)}",
                found=f"/{word}",
                do=errors.did_you_mean(word, COMMANDS) or "// begins a message with a /",
            )
        if rest and not COMMANDS[word][0]:
            raise errors.UserError(expected=f"/{word} alone", found=f"/{word} {rest}")
        if word == "adapter" and rest:
            if rest not in chat.adapters:
                raise errors.UserError(
                    expected=f"one of {', '.join(chat.adapters)}"
                    if chat.adapters
                    else "an adapter that is loaded, and none is",
                    found=rest,
                    do=errors.did_you_mean(rest, chat.adapters) or "/adapter lists them",
                )
            chat.adapter = rest
        elif word == "base":
            chat.adapter = None
        elif word == "compare":
            if not chat.adapter:
                raise errors.UserError(
                    expected="an adapter to compare with the base", found="the base answers",
                    do="/adapter NAME",
                )  # fmt: skip
            chat.compares = not chat.compares
        elif word == "system":
            chat.use_system(rest)
        elif word == "reset":
            chat.messages = []
        said = {
            "adapter": f"(adapters: {', '.join(chat.adapters) or 'none'}; "
            f"{chat.adapter or chat.base} answers)",
            "base": f"({chat.base} answers)",
            "compare": f"({chat.base} and {chat.adapter} answer)"
            if chat.compares
            else f"({chat.adapter or chat.base} answers)",
            "system": "(system prompt set)" if rest else "(the template's own system prompt)",
            "reset": "(a new chat)",
            "help": "\n".join(
                f"  {f'/{name} {more}':<15} {text}" for name, (more, text) in COMMANDS.items()
            ),
        }
        if word in said:
            self._note(said[word])
        return word != "exit"

    def _note(self, text: str) -> None:
        """Says what is no answer; from a pipe, on the error output."""
        if self._is_terminal:
            print(text, flush=True)
        elif text:
            print(text, file=sys.stderr)
