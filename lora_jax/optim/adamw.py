"""AdamW for the adapters, with the learning-rate schedules of Hugging Face."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from lora_jax.optim import config as optim_config


def schedule(
    config: optim_config.OptimConfig, num_steps: int, *, peak: jax.Array | None = None
) -> optax.Schedule:
    """Learning rate of a step (from 0): a linear warmup from 0, then the decay until num_steps.

    Equals transformers' get_{cosine,linear,constant}_schedule_with_warmup, so with a warmup the
    first step has lr 0; with min_lr_ratio its get_cosine_with_min_lr_schedule_with_warmup.
    peak: replaces config.lr in a program with several learning rates.
    """
    highest = config.lr if peak is None else peak
    warmup = config.warmup if config.warmup >= 1 else round(config.warmup * num_steps)

    def lr(step):
        progress = jnp.clip((step - warmup) / max(1, num_steps - warmup), 0, 1)
        shape = {
            "cosine": 0.5 * (1 + jnp.cos(jnp.pi * progress)),
            "linear": 1 - progress,
            "constant": 1.0,
        }[config.schedule]
        decay = config.min_lr_ratio + (1 - config.min_lr_ratio) * shape
        return highest * jnp.where(step < warmup, step / max(1, warmup), decay)

    return lr


def make(
    config: optim_config.OptimConfig, num_steps: int, *, peak: jax.Array | None = None
) -> optax.GradientTransformation:
    """Clip by the global norm, then AdamW for each group of `labels`. peak: see `schedule`.

    The learning rate of B and of magnitudes is lora_plus_ratio × that of the rest, as in PEFT. The
    bias of B does not decay, as in Hugging Face's Trainer. The tree may hold frozen arrays: their
    update is zero, they have no moments, and their gradient does not count in the norm.
    """
    lr = schedule(config, num_steps, peak=peak)

    def adamw(ratio: float) -> optax.GradientTransformation:
        return optax.chain(
            optax.scale_by_adam(b1=config.beta1, b2=config.beta2, eps=config.eps),
            _decay(config.weight_decay) if config.weight_decay else optax.identity(),
            optax.scale_by_learning_rate(lambda step: ratio * lr(step)),
        )

    groups = {"A": adamw(1.0), "B": adamw(config.lora_plus_ratio), "frozen": frozen()}
    # Clipping is outside the partition: inside, each group would be clipped by its own norm.
    clip = optax.clip_by_global_norm(config.clip) if config.clip else optax.identity()
    return optax.chain(optax.masked(clip, _trained), optax.partition(groups, labels))


def _decay(rate: float) -> optax.GradientTransformation:
    """optax.add_decayed_weights, but not of the bias of B.

    A mask of optax would change the tree of the state, and so refuse the checkpoints of runs.
    """

    def update(updates, state, params):
        def decayed(path, update, weight):
            return update if "lora_bias" in _names(path) else update + rate * weight

        return jax.tree_util.tree_map_with_path(decayed, updates, params), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def frozen() -> optax.GradientTransformation:
    """Zero updates, also of integers.

    jax.grad (with allow_int) returns a gradient of packed weights that cannot be added to them, and
    optax.set_to_zero would keep it.
    """

    def update(gradient, state, params):
        return jax.tree.map(jnp.zeros_like, params), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def labels(params: Any) -> Any:
    """The group of every leaf, "A", "B" or "frozen", by its name in the tree.

    "B": lora_B, its bias, and magnitudes. "A": everything else that is trained, that is lora_A, the
    factors of embeddings, fully trained modules, and the rows of tokens.
    """
    groups = {"lora_A": "A", "lora_embedding_A": "A", "lora_embedding_B": "A",
              "modules_to_save": "A", "trainable_tokens_delta": "A",
              "lora_B": "B", "lora_bias": "B", "lora_magnitude_vector": "B"}  # fmt: skip

    def label(path, _):
        return next((groups[name] for name in reversed(_names(path)) if name in groups), "frozen")

    return jax.tree_util.tree_map_with_path(label, params)


def _names(path: tuple[Any, ...]) -> list[str]:
    return [str(getattr(part, "key", getattr(part, "name", part))) for part in path]


def _trained(params: Any) -> Any:
    return jax.tree.map(lambda label: label != "frozen", labels(params))
