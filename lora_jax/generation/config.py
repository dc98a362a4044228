"""The settings of sampling. Imports no jax, because `--help` reads these defaults."""

import dataclasses

from lora_jax import errors


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How to choose the next token. At temperature 0, decoding is greedy and ignores the filters.

    Args:
      max_new_tokens: the most tokens to generate; EOS stops earlier.
      temperature: divides the logits.
      top_k: keep the k most likely tokens; 0 keeps all.
      top_p: keep the most likely tokens whose probabilities sum to p; 1 keeps all.
      min_p: keep tokens at least min_p times as likely as the most likely one; 0 keeps all.
    """

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0

    def __post_init__(self):
        wrong = [
            f"{name} {getattr(self, name)}"
            for name, fits in (
                ("max_new_tokens", self.max_new_tokens >= 1),
                ("temperature", self.temperature >= 0),
                ("top_k", self.top_k >= 0),
                ("top_p", 0 < self.top_p <= 1),
                ("min_p", 0 <= self.min_p <= 1),
            )
            if not fits
        ]
        if wrong:
            raise errors.UserError(
                expected="max_new_tokens ≥ 1, temperature ≥ 0, top_k ≥ 0, "
                "0 < top_p ≤ 1, 0 ≤ min_p ≤ 1",
                found=wrong,
                where="the sampling settings",
            )
