"""The settings of LoRA. Imports no jax, because `--help` reads these defaults."""

import collections
import dataclasses
import numbers
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from lora_jax import errors


@dataclasses.dataclass(frozen=True)
class LoRAConfig:
    """Which layers to adapt, and how: y = base(x) + scale · B(A(dropout(x))), scale = alpha / rank.

    Args:
      rank: the inner dimension R of A [d_in, R] and B [R, d_out].
      alpha: the numerator of the scale. The default does not depend on the rank, so that a
        learning rate found at one rank is a good start at another.
      dropout: probability of dropping an input of A, in training only.
      targets: names (`q_proj`: a path that equals it or ends in `.q_proj`), one regex string
        (full match on the path, e.g. `model.layers.0.self_attn.q_proj`), or "all-linear" (every
        linear layer except lm_head). An embedding is adapted only if a name or regex matches it.
      exclude: what not to adapt, as names or one regex string, like targets.
      layers: indices of the layers to adapt (PEFT: layers_to_transform); None means all.
      layers_pattern: name or names before such an index; None: the first number in the path.
      rank_pattern, alpha_pattern: {regex on the end of the path: value} overrides.
      parts: {regex on the end of the path: proportions} of a layer whose output consists of several
        parts, such as q, k and v. Each positive part gets its own `rank` columns of A; a negative
        part is not adapted. (1, -1, 1) adapts q and v; (4, -1, 1) does so with grouped heads.
      modules_to_save: ends of the paths of modules that are fully trained and saved.
      trainable_token_indices: ids of the tokens whose rows of the input embedding, and of a head
        that is tied to it, are trained and saved; or {end of a module's path: ids}, for an
        embedding or a head of another name. A run also takes tokens by their text.
      ensure_weight_tying: an embedding and a head that are tied are trained as one weight, and stay
        tied. Otherwise a head that is trained gets a weight of its own.
      use_rslora: scale = alpha / √rank (Kalajdzievski 2023, https://arxiv.org/abs/2312.03732).
      lora_bias: B has a bias b, which is trained as well: y = base(x) + scale · (B(A(x)) + b). Only
        layers that have a bias themselves can be merged with it.
      use_dora: train magnitude and direction separately (Liu et al. 2024, https://arxiv.org/abs/2402.09353).
      init_lora_weights: "default" (B = 0), or A B is a part of the weight, and is subtracted from
        the base: "pissa" or "pissa_niter_N": the principal part (Meng et al. 2024,
        https://arxiv.org/abs/2404.02948); "olora": that of its QR decomposition (Büyükakyüz 2024,
        https://arxiv.org/abs/2406.01775).

    Source: Hu et al. 2021, https://arxiv.org/abs/2106.09685, eq. 3; semantics as in PEFT.
    """

    rank: int = 8
    alpha: float = 16
    dropout: float = 0.0
    targets: Sequence[str] | str = ("q_proj", "v_proj")
    exclude: Sequence[str] | str = ()
    layers: Sequence[int] | None = None
    layers_pattern: Sequence[str] | str | None = None
    rank_pattern: dict[str, int] = dataclasses.field(default_factory=dict)
    alpha_pattern: dict[str, float] = dataclasses.field(default_factory=dict)
    parts: dict[str, Sequence[int]] = dataclasses.field(default_factory=dict)
    modules_to_save: Sequence[str] = ()
    trainable_token_indices: Sequence[int | str] | dict[str, Sequence[int | str]] | None = None
    ensure_weight_tying: bool = False
    use_rslora: bool = False
    lora_bias: bool = False
    use_dora: bool = False
    init_lora_weights: str = "default"

    def __post_init__(self):
        for name in ("targets", "exclude", "layers", "layers_pattern", "modules_to_save"):
            if isinstance(getattr(self, name), list):
                object.__setattr__(self, name, tuple(getattr(self, name)))
        object.__setattr__(self, "trainable_token_indices", _tuples(self.trainable_token_indices))
        if problems := [*self._wrong_types()] or [*self._wrong_values()]:
            raise errors.UserError(
                expected="valid LoRA settings",
                found=problems,
                where="the LoRA settings",
            )

    @property
    def _ranks(self) -> tuple[Any, ...]:
        return self.rank, *self.rank_pattern.values()

    @property
    def _alphas(self) -> tuple[Any, ...]:
        return self.alpha, *self.alpha_pattern.values()

    def _wrong_types(self) -> Iterator[str]:
        for rank in self._ranks:
            if not _is_a(numbers.Integral, rank):
                yield f"rank {rank!r} (a whole number)"
        for name, value in (("dropout", self.dropout), *(("alpha", a) for a in self._alphas)):
            if not _is_a(numbers.Real, value):
                yield f"{name} {value!r} (a number)"
        if not isinstance(self.init_lora_weights, str):
            yield f"init_lora_weights {self.init_lora_weights!r} (a text, such as default)"

    def _wrong_values(self) -> Iterator[str]:
        yield from (f"rank {rank} (at least 1)" for rank in self._ranks if rank < 1)
        yield from (f"alpha {alpha} (finite)" for alpha in self._alphas
                    if not abs(alpha) < LARGEST)  # fmt: skip
        if not 0 <= self.dropout < 1:
            yield f"dropout {self.dropout} (at least 0, and below 1)"
        if not self.targets and not self.modules_to_save:
            yield "no targets (at least one)"
        how = self.init_lora_weights
        if not re.fullmatch(INITS, how):
            yield f"init_lora_weights {how} (default, pissa, pissa_niter_N or olora)"
        if how.startswith("pissa") and self.alpha <= 0:
            yield f"alpha {self.alpha} with PiSSA (above 0)"
        if self.lora_bias and (self.use_dora or how != "default"):
            yield "lora_bias with use_dora, PiSSA or OLoRA"
        if "" in self.modules_to_save:
            yield "an empty name in modules_to_save"
        yield from self._invalid_tokens()
        yield from self._invalid_expressions()

    def _invalid_tokens(self) -> Iterator[str]:
        """The token ids that are no ids or are listed twice."""
        tokens = self.trainable_token_indices or ()
        for ids in tokens.values() if isinstance(tokens, dict) else [tokens]:
            wrong = [token for token in ids if isinstance(token, int) and token < 0]
            yield from (f"trainable_token_indices {token} (at least 0)" for token in wrong)
            if not wrong:
                counts = collections.Counter(ids)
                yield from (f"trainable_token_indices {token} {count} times (once)"
                            for token, count in counts.items() if count > 1)  # fmt: skip

    def _invalid_expressions(self) -> Iterator[str]:
        """The settings that must be regular expressions and are not."""
        whole = (text for text in (self.targets, self.exclude) if isinstance(text, str))
        patterns = {**self.rank_pattern, **self.alpha_pattern, **self.parts}
        names = self.layers_pattern or ()
        names = (names,) if isinstance(names, str) else names
        for text in (*whole, *patterns, *self.modules_to_save, *names):
            try:
                re.compile(text)
            except re.error as error:
                yield f"{text!r}: {error}"


def _is_a(kind: type, value: object) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)


def _tuples(tokens: Any) -> Any:
    """The token ids as tuples, by module or not; None if there are none."""
    if isinstance(tokens, Mapping):
        return {end: tuple(ids) for end, ids in tokens.items()} or None
    return tuple(tokens or ()) or None


LARGEST = 1e30  # in float32 the product with A and B must not overflow
INITS = r"default|pissa(_niter_\d+)?|olora"
