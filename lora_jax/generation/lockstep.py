"""Several processes with one engine each: process 0 decides, and the others do the same.

What an engine does follows from its requests and the tokens of its steps, which all processes
read. So process 0 sends only what comes from outside, before each turn.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax

from lora_jax.generation import config
from lora_jax.generation import request as requests
from lora_jax.parallel import processes


class Submitted(NamedTuple):
    """A request to process 0. See requests.Request."""

    prompt: Sequence[int]
    sampling: config.Sampling
    adapters: Mapping[str, float]


class News(NamedTuple):
    """New requests, and the numbers of those that were aborted."""

    submitted: Sequence[Submitted]
    aborted: Sequence[int]


class Leader:
    """Process 0's side."""

    def send(self, new: Sequence[requests.Request], aborted: Sequence[int]) -> None:
        """Tells the others what the next turn begins with."""
        each = [[[*own.prompt], dataclasses.asdict(own.sampling), own.adapters] for own in new]
        processes.broadcast({"submitted": each, "aborted": [*aborted]})

    def fail(self, cause: str) -> None:
        """Ends all processes: the others may be in a step that this one did not take.

        If another one has failed as well, its message is reported.
        """
        text = f"The engine has failed: {cause}. Start all processes again."
        processes.end(1, text, sure=False)

    def close(self) -> None:
        """Tells the others that there is no next turn."""
        processes.broadcast(None)


def leader() -> Leader | None:
    """None if there is one process."""
    return Leader() if jax.process_count() > 1 else None


def receive() -> News | None:
    """What process 0 sent; None if it has closed its engine."""
    sent: dict[str, Any] | None = processes.broadcast(None)
    if sent is None:
        return None
    submitted = [
        Submitted(prompt, config.Sampling(**_tuples(sampling)), adapters)
        for prompt, sampling, adapters in sent["submitted"]
    ]
    return News(submitted, sent["aborted"])


def _tuples(values: Mapping[str, Any]) -> dict[str, Any]:
    """Lists, which JSON has in place of tuples, as tuples."""

    def convert(value):
        return tuple(map(convert, value)) if isinstance(value, list) else value

    return {name: convert(value) for name, value in values.items()}
