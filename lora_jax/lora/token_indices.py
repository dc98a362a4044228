"""The tokens whose embeddings are trained one by one: PEFT's trainable_token_indices.

Imports no jax.
"""

from collections.abc import Mapping

from lora_jax import errors
from lora_jax.lora import config as lora_config
from lora_jax.lora import targets

_DELTA = "token_adapter.trainable_tokens_delta"
DEFAULT = "embed_tokens"  # the module that a list without a name is for


def named(config: lora_config.LoRAConfig, default: str = DEFAULT) -> dict[str, tuple[int, ...]]:
    """{end of a module's path: the ids of its tokens, in the order of the rows in the file}."""
    given = config.trainable_token_indices or {}
    return dict(given) if isinstance(given, Mapping) else {default: given}


def of(path: str, config: lora_config.LoRAConfig) -> tuple[int, ...]:
    """The ids of the tokens that are trained in the module at `path`; () for none."""
    return next((ids for end, ids in named(config).items() if path.endswith(end)), ())


def tensor(path: str) -> str:
    """The name of the rows [tokens, D] in PEFT's file. Not differences: the rows themselves."""
    return f"{path}.{_DELTA}"


def check(layers: Mapping[str, str], config: lora_config.LoRAConfig, where: str) -> None:
    """Raises: UserError if layers with trained tokens are trained in another way, too.

    layers: {path: kind, see targets.Layer} of a layer, or of several that share their weight.
    """
    linear_only = config.targets == targets.ALL_LINEAR
    problems = [f"{path} in targets" for path, kind in layers.items()
                if targets.is_chosen(path, config)
                and not (linear_only and kind != "linear")]  # fmt: skip
    problems += [f"{path} in modules_to_save" for path in layers if targets.saves(path, config)]
    if problems:
        raise errors.UserError(
            expected=f"trainable_token_indices as all that is trained of {' and '.join(layers)}",
            found=problems,
            where=where,
            do="leave one of them out; modules_to_save trains the rows of all tokens",
        )
