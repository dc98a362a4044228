"""What the server counts, as Prometheus' text format has it."""

import bisect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

_BOUNDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
Rows = Sequence[tuple[Mapping[str, str], float]]  # [(labels, value)]
PREFIX = "lora_jax_"


class Sample(NamedTuple):
    """A number, or one for each value of a label, that is known elsewhere."""

    name: str
    about: str
    rows: Rows
    kind: str = "gauge"


class Counter:
    """A number that only grows, for each value of a label if it has one."""

    def __init__(self, name: str, about: str, label: str | None = None):
        self.name, self._about, self._label = PREFIX + name, about, label
        self._values: dict[str | None, float] = {} if label else {None: 0}

    def add(self, amount: float, value: str | None = None) -> None:
        self._values[value] = self._values.get(value, 0) + amount

    def lines(self) -> Iterator[str]:
        rows = [
            ({} if self._label is None else {self._label: str(value)}, number)
            for value, number in self._values.items()
        ]
        return _family(self.name, self._about, "counter", rows)


class Histogram:
    """How many observations, in seconds, are at most as large as each of some bounds."""

    def __init__(self, name: str, about: str):
        self.name, self._about = PREFIX + name, about
        self._counts, self._sum = [0] * (len(_BOUNDS) + 1), 0.0

    def observe(self, value: float, times: int = 1) -> None:
        self._counts[bisect.bisect_left(_BOUNDS, value)] += times
        self._sum += value * times

    def lines(self) -> Iterator[str]:
        yield from _family(self.name, self._about, "histogram", [])
        total = 0
        for bound, count in zip((*_BOUNDS, "+Inf"), self._counts, strict=True):
            total += count
            yield f'{self.name}_bucket{{le="{bound}"}} {total}'
        yield f"{self.name}_sum {self._sum}"
        yield f"{self.name}_count {total}"


class Metrics:
    """The counters and histograms of a server."""

    def __init__(self) -> None:
        self.responses = Counter("http_responses_total", "Responses by HTTP status.", "status")
        self.finished = Counter("choices_total", "Choices by how they ended.", "reason")
        self.prompt_tokens = Counter("prompt_tokens_total", "Tokens of prompts.")
        self.generated_tokens = Counter("generation_tokens_total", "Tokens that were generated.")
        self.first_token = Histogram("time_to_first_token_seconds", "From request to first token.")
        self.between_tokens = Histogram("inter_token_latency_seconds", "From token to token.")
        self.whole = Histogram("e2e_request_latency_seconds", "From request to last token.")

    def text(self, samples: Iterable[Sample]) -> str:
        """All of them, and these samples."""
        lines = [line for each in vars(self).values() for line in each.lines()]
        for sample in samples:
            lines += _family(PREFIX + sample.name, sample.about, sample.kind, sample.rows)
        return "\n".join(lines) + "\n"


def _family(name: str, about: str, kind: str, rows: Rows) -> Iterator[str]:
    yield f"# HELP {name} {about}"
    yield f"# TYPE {name} {kind}"
    for labels, value in rows:
        shown = ",".join(f'{label}="{_escaped(text)}"' for label, text in labels.items())
        yield f"{name}{{{shown}}} {value}" if shown else f"{name} {value}"


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace("\n", "\\n").replace('"', '\\"')
