"""The settings of sampling. Imports no jax, because `--help` reads these defaults."""

import dataclasses

from lora_jax import errors

DEFAULT_CONTEXT = 8192  # tokens of a served request or a chat, if the model allows so many
MOST_LOGPROBS = 20
_LEAST, _MOST = 2.0**-126, (2 - 2.0**-23) * 2.0**127  # of float32, without subnormal numbers
MOST_STOP_IDS = 32  # of one request, when they must be excluded until min_tokens


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How to choose the next tokens of one request, and when to stop.

    At temperature 0, decoding is greedy and ignores the filters. The order is that of transformers:
    logit_bias, penalties, min_tokens, grammar, temperature, top_k, top_p, min_p.

    Args:
      max_new_tokens: the most tokens to generate; EOS stops earlier.
      temperature: divides the logits.
      top_k: keep the k most likely tokens; 0 keeps all.
      top_p: keep the most likely tokens whose probabilities sum to p; 1 keeps all.
      min_p: keep tokens at least min_p times as likely as the most likely one; 0 keeps all.
      repetition_penalty: divides the positive logits of tokens in the prompt or the output so far,
        and multiplies their negative ones; 1 changes nothing.
      presence_penalty: subtracted once from the logit of each token in the output so far.
      frequency_penalty: subtracted as often as the token is in the output so far.
      logit_bias: (token id, added to its logit) pairs.
      seed: the same seed gives the same tokens, whatever else is generated at the time; None: the
        engine draws one.
      stop: strings that end the text; they are not part of it.
      stop_token_ids: ids that end the text, beside those of the model.
      min_tokens: no stop token before so many tokens.
      ignore_eos: the model's own stop tokens do not stop.
      logprobs: return the log-probability of each token and of so many most likely ones; None: no.
      prompt_logprobs: the same of the prompt's tokens.
      grammar: a grammar as generation.grammar makes it, which the text must follow.
      include_stop: stop strings and the text of stop tokens are part of the text.
      skip_special_tokens: special tokens are not part of the text.
    """

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    min_tokens: int = 0
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    grammar: str | None = None
    include_stop: bool = False
    skip_special_tokens: bool = True

    def __post_init__(self):
        wrong = [
            f"{name} {getattr(self, name)}"
            for name, fits in (
                ("max_new_tokens", self.max_new_tokens >= 1),
                ("temperature", 0 <= self.temperature <= _MOST),
                ("top_k", self.top_k >= 0),
                ("top_p", 0 < self.top_p <= 1),
                ("min_p", 0 <= self.min_p <= 1),
                ("repetition_penalty", _LEAST <= self.repetition_penalty <= _MOST),
                ("presence_penalty", abs(self.presence_penalty) <= _MOST),
                ("frequency_penalty", abs(self.frequency_penalty) <= _MOST),
                ("stop", all(self.stop)),
                ("min_tokens", self.min_tokens >= 0),
                ("logprobs", 0 <= (self.logprobs or 0) <= MOST_LOGPROBS),
                ("prompt_logprobs", 0 <= (self.prompt_logprobs or 0) <= MOST_LOGPROBS),
            )
            if not fits
        ]
        if wrong:
            raise errors.UserError(
                expected="max_new_tokens ≥ 1, temperature ≥ 0, top_k ≥ 0, 0 < top_p ≤ 1, "
                "0 ≤ min_p ≤ 1, repetition_penalty > 0, all finite in float32, "
                f"no empty stop string, min_tokens ≥ 0, at most {MOST_LOGPROBS} logprobs",
                found=wrong,
                where="the sampling settings",
            )

    @property
    def is_plain_greedy(self) -> bool:
        """Whether each token is the most likely one, whatever came before, and nothing else."""
        penalties = self.repetition_penalty, self.presence_penalty, self.frequency_penalty
        others = self.logit_bias or self.min_tokens or self.grammar
        plain = penalties == (1, 0, 0) and not others
        return plain and not self.temperature and self.logprobs is None
