"""Direct preference optimization: chosen answers become more likely than rejected ones."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

CHOSEN, REJECTED = 1, 2  # the examples of a sequence, as attention_mask numbers them
METRICS = ("reward_accuracy", "reward_margin")


def loss(
    policy: Float[Array, "B T"],
    reference: Float[Array, "B T"],
    examples: Int[Array, "B T"],
    beta: float,
) -> tuple[Float[Array, ""], Int[Array, ""], dict[str, Float[Array, ""]]]:
    """(Σ −log σ(β (log π/π₀ (chosen) − log π/π₀ (rejected))), count of pairs, sums of METRICS).

    policy, reference: −log π and −log π₀ of each trained token, 0 elsewhere. examples: the
    attention mask, 1 on the chosen answer with its prompt, 2 on the rejected answer with its own
    copy of the prompt. reward_accuracy counts how often the chosen answer has the greater reward
    β log π/π₀; reward_margin is the difference of the rewards.
    Source: Rafailov et al. 2023, https://arxiv.org/abs/2305.18290, eq. 7.
    """
    reward = beta * (reference - policy)
    sign = jnp.where(examples == CHOSEN, 1, jnp.where(examples == REJECTED, -1, 0))
    margin = (sign * reward).sum(axis=1)
    real = (examples == REJECTED).any(axis=1)  # False for an empty sequence that fills up a batch
    each = jnp.where(real, -jax.nn.log_sigmoid(margin), 0)
    right = (real & (margin > 0)).sum().astype(jnp.float32)
    metrics = dict(zip(METRICS, (right, jnp.where(real, margin, 0).sum()), strict=True))
    return each.sum(), real.sum(), metrics
