"""An engine that says what a test tells it to, in a thread of its own as the real one."""

import contextlib
import queue
import threading
from typing import NamedTuple

from lora_jax import errors
from lora_jax.generation import request


class Stats(NamedTuple):
    waiting: int
    running: int
    slots: int
    cached_tokens: int


class Pool:
    """Adapters by name, as generation.pool's."""

    def __init__(self, *names):
        self.loaded = dict.fromkeys(names)

    def names(self):
        return tuple(self.loaded)

    def load(self, name, folder, *, replace=False):
        if not (folder / "adapter_config.json").is_file():
            raise errors.UserError(expected="adapter_config.json", found="none", where=str(folder))
        self.loaded[name] = folder

    def unload(self, name):
        del self.loaded[name]


class Engine:
    """script(request) yields the pieces of a request, in the engine's thread.

    One request runs at a time, so a script that waits for `gate` lets the others wait.
    """

    def __init__(self, reader, script, *, context=64, slots=2, adapters=()):
        self.reader, self.context, self.pool = reader, context, Pool(*adapters)
        self.vocab_size, self.failure = len(reader), None
        self.asked, self.compiled, self.gate = [], [], threading.Event()
        self.expected = self.unexpected = 0
        self._script, self._slots = script, slots
        self._waiting = queue.SimpleQueue()
        self._thread = None

    def compile_grammar(self, grammar):
        if "wrong" in grammar:
            raise errors.UserError(expected="a grammar", found="a wrong one", where="grammar")
        self.compiled.append((grammar, threading.current_thread()))

    @contextlib.contextmanager
    def expecting(self):
        self.expected += 1
        try:
            yield
        finally:
            self.expected -= 1

    def submit(self, prompt, sampling, *, adapters=None, listener=None):
        if any(each >= len(self.reader) for each in prompt):
            raise errors.UserError(expected="ids of the vocabulary", found=str(max(prompt)))
        self.unexpected += not self.expected
        made = request.Request(tuple(prompt), sampling, adapters or {}, listener=listener)
        self.asked.append(made)
        self._waiting.put(made)
        return made

    def start(self):
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def close(self):
        self.gate.set()
        self._waiting.put(None)
        self._thread.join(10)

    def stats(self):
        return Stats(self._waiting.qsize(), 0, self._slots, 0)

    def _run(self):
        while (asked := self._waiting.get()) is not None:
            for piece in self._script(asked):
                if asked.aborted.is_set():
                    piece = request.Piece(finish_reason="abort")
                asked.emit(piece)
                if piece.finish_reason:
                    break


def saying(*texts, finish="stop"):
    """A script that says these pieces, each one token: its number among the output."""

    def script(asked):
        wants = asked.sampling.logprobs
        if asked.sampling.prompt_logprobs is not None:
            asked.prompt_logprobs += [entry(each, asked.sampling.prompt_logprobs)
                                      for each in asked.prompt[1:]]  # fmt: skip
        num = min(len(texts), asked.sampling.max_new_tokens)
        for number, text in enumerate(texts[:num]):
            token = asked.prompt[-1] + number
            end = number == num - 1
            yield request.Piece(
                text,
                (token,),
                () if wants is None else (entry(token, wants),),
                (finish if num == len(texts) else "length") if end else None,
            )

    return script


def entry(token, top):
    """The token is the most likely one, those after it are less and less."""
    ranked = tuple((token + rank, -0.5 - rank) for rank in range(top))
    return request.Logprob(token, -0.5, ranked)
