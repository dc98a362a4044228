"""The numbers, times and settings of a run as the page shows them."""

import math
from collections.abc import Sequence
from typing import Any

TEXT = 4000  # characters shown of a longer text


def finite(value: Any) -> float | None:
    """`value` if it is a finite number, else None. NaN and infinity are null in metrics.jsonl."""
    is_number = isinstance(value, int | float) and math.isfinite(value)
    return float(value) if is_number else None


def short(value: float, digits: int = 3) -> str:
    """A number such as 0.0121, 11.4k or 5e-4."""
    size = abs(value)
    if size == math.inf:
        return "∞"
    if value and not 1e-3 <= size < 1e15:
        mantissa, _, power = f"{value:.{digits - 1}e}".partition("e")
        return f"{float(mantissa):g}e{int(power)}"
    for unit, power in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if size >= power:
            return f"{value / power:.{digits}g}{unit}"
    return f"{value:.{digits}g}"


def ticks(values: Sequence[float]) -> list[str]:
    """Labels of ticks, with as many digits as it takes to make them differ."""
    for digits in range(3, 17):
        texts = [short(value, digits) for value in values]
        if len(set(texts)) == len(texts):
            break
    return texts


def loss(value: float) -> str:
    """A loss with the digits that the run prints."""
    return f"{value:.4f}"


def duration(seconds: float) -> str:
    """A time such as 43.2 s, 12 min 5 s or 3 h 20 min."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def perplexity(loss: float) -> float:
    """exp(loss)"""
    return math.exp(loss) if loss < 700 else math.inf


def shortened(text: str) -> str:
    """`text` without its middle if it is long."""
    if len(text) <= TEXT:
        return text
    half = TEXT // 2
    return f"{text[:half]}\n… {len(text) - TEXT} characters left out …\n{text[-half:]}"


def setting(value: Any) -> str:
    """A setting as it would be typed; – if it is not set."""
    if value is None or value in ([], {}, ""):
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return ", ".join(map(str, value))
    if isinstance(value, dict):
        return ", ".join(f"{key}={each}" for key, each in value.items())
    return str(value)
