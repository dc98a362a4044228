"""A request on its way through the slots, and a step that was dispatched for several."""

import concurrent.futures
import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from lora_jax.generation import grammar as grammars
from lora_jax.generation import lookup
from lora_jax.generation import output as outputs
from lora_jax.generation import pool as pools
from lora_jax.generation import request as requests
from lora_jax.generation import sampling as samplers
from lora_jax.generation import slots as slot_choice


@dataclasses.dataclass
class Work:
    """A request that waits or is being served.

    mask: what the grammar allows next, on the way from masks.Masks. is_slow: whether that took long
    the last time. text: what is computed before the steps; the prompt, or later the output so far
    too. filled: how many of its tokens are in the cache. sent: for how many tokens a step was
    dispatched. overtaken: how many later requests were served first.
    """

    request: requests.Request
    output: outputs.Output
    matcher: grammars.Matcher | None = None
    mask: concurrent.futures.Future[np.ndarray] | None = None
    is_slow: bool = False
    slot: slot_choice.Slot | None = None
    lease: pools.Lease | None = None
    text: tuple[int, ...] = ()
    filled: int = 0
    sent: int = 0
    overtaken: int = 0
    done: bool = False

    def __post_init__(self):
        self.text = tuple(self.request.prompt)

    @functools.cached_property
    def lookup(self) -> lookup.Lookup:
        """Of the prompt and the output so far."""
        return lookup.Lookup((*self.request.prompt, *self.output.tokens))

    @property
    def unfilled(self) -> int:
        """How many tokens of the text are still to be computed; the last is left to a step."""
        return len(self.text) - 1 - self.filled

    @property
    def prompt_logprobs(self) -> int | None:
        """Sampling.prompt_logprobs while the prompt is computed for the first time."""
        again = len(self.text) > len(self.request.prompt)
        return None if again else self.request.sampling.prompt_logprobs

    @property
    def length(self) -> int:
        """Of the sequence when the steps that were dispatched are done."""
        return len(self.request.prompt) + self.sent

    @property
    def left(self) -> int:
        """How many tokens may still be generated."""
        return self.request.sampling.max_new_tokens - self.sent

    def note_filled(self, count: int) -> None:
        """Notes that the next tokens of the text are in the cache."""
        self.slot.tokens += self.text[self.filled : self.filled + count]
        self.filled += count

    def begin_again(self) -> None:
        """Has the prompt and the output so far computed from the first token on."""
        self.text = (*self.request.prompt, *self.output.tokens)
        self.filled, self.slot.tokens = 0, []


@dataclasses.dataclass(frozen=True)
class Step:
    """A step that was dispatched: its tokens [B, T], how many of them count [B], and log p.

    counts: None if each slot has one token; tokens are [B] then.
    """

    works: Sequence[Work]
    tokens: jax.Array
    counts: jax.Array | None
    logprobs: samplers.Logprobs | None


def step(
    works: Sequence[Work], tokens: jax.Array, counts: jax.Array | None, found: samplers.Logprobs
) -> Step:
    """The step, whose results are on their way to the host.

    Without counts, each request is noted to get a token; else the host reads how many count.
    """
    if counts is None:
        for work in works:
            work.sent += 1
    wanted = any(work.request.sampling.logprobs is not None for work in works)
    dispatched = Step([*works], tokens, counts, found if wanted else None)
    jax.tree.map(lambda array: array.copy_to_host_async(), (tokens, counts, dispatched.logprobs))
    return dispatched


def logprob(token: int, found: samplers.Logprobs, at: Any, top: int) -> requests.Logprob:
    """Of one token at an index of the arrays, with the `top` most likely ones."""
    pairs = zip(found.ids[at][:top].tolist(), found.values[at][:top].tolist(), strict=True)
    return requests.Logprob(token, float(found.chosen[at]), tuple(pairs))
