"""Direct preference optimisation: the answers that people chose become likelier than the others."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

CHOSEN, REJECTED = 1, 2  # the rows of a line, as attention_mask numbers them
TOLD = ("reward_accuracy", "reward_margin")


def loss(
    policy: Float[Array, "B T"],
    reference: Float[Array, "B T"],
    rows: Int[Array, "B T"],
    beta: float,
) -> tuple[Float[Array, ""], Int[Array, ""], dict[str, Float[Array, ""]]]:
    """(Σ −log σ(β (log π/π₀ (chosen) − log π/π₀ (rejected))), count of pairs, sums to tell).

    policy, reference: −log π and −log π₀ of each trained token, 0 elsewhere; rows: a line's
    attention mask, 1 on the chosen answer with its prompt, 2 on the rejected one with its own.
    Told are reward_accuracy, how often the chosen answer has the greater reward β log π/π₀, and
    reward_margin, by how much.
    Source: Rafailov et al. 2023, https://arxiv.org/abs/2305.18290, eq. 7.
    """
    reward = beta * (reference - policy)
    sign = jnp.where(rows == CHOSEN, 1, jnp.where(rows == REJECTED, -1, 0))
    margin = (sign * reward).sum(axis=1)
    there = (rows == REJECTED).any(axis=1)  # not a line that fills up a batch
    each = jnp.where(there, -jax.nn.log_sigmoid(margin), 0)
    right = (there & (margin > 0)).sum().astype(jnp.float32)
    told = dict(zip(TOLD, (right, jnp.where(there, margin, 0).sum()), strict=True))
    return each.sum(), there.sum(), told
