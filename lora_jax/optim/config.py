"""The settings of the optimizer. Imports no jax, because `--help` reads these defaults."""

import dataclasses
import math
from collections.abc import Iterator

from lora_jax import errors

SCHEDULES = ("cosine", "linear", "constant")


@dataclasses.dataclass(frozen=True)
class OptimConfig:
    """AdamW on A and B: learning rate, schedule, decay and clipping.

    Args:
      lr: peak learning rate of A; that of B is lora_plus_ratio times this.
      schedule: after the warmup, "cosine" or "linear" decay, or "constant".
      min_lr_ratio: the learning rate at the end of the decay, as a share of the peak.
      warmup: number of warmup steps if ≥ 1, else their share of all steps.
      weight_decay: decoupled decay (AdamW), on A and B.
      clip: largest global norm of the gradient; 0 turns clipping off.
      lora_plus_ratio: lr of B over lr of A (LoRA+, https://arxiv.org/abs/2402.12354).
      beta1, beta2, eps: AdamW's.
    """

    lr: float = 2e-4
    schedule: str = "cosine"
    min_lr_ratio: float = 0.0
    warmup: float = 0.03
    weight_decay: float = 0.0
    clip: float = 1.0
    lora_plus_ratio: float = 1.0
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8

    def __post_init__(self):
        if problems := [*self._problems()]:
            raise errors.UserError(
                expected="valid settings of the optimizer",
                found=problems,
                where="the settings of the optimizer",
            )

    def _problems(self) -> Iterator[str]:
        if self.schedule not in SCHEDULES:
            yield f"schedule {self.schedule!r} (one of {', '.join(SCHEDULES)})"
        if not 0 <= self.min_lr_ratio <= 1:
            yield f"min_lr_ratio {self.min_lr_ratio} (between 0 and 1)"
        for name, beta in (("beta1", self.beta1), ("beta2", self.beta2)):
            if not 0 <= beta < 1:
                yield f"{name} {beta} (at least 0, and below 1)"
        if not 0 < self.eps < math.inf:  # with 0 the first step is 0 / 0, as the gradient of A is 0
            yield f"eps {self.eps} (above 0)"
