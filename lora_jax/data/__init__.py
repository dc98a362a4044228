"""Files and hub data sets → examples → token ids with loss masks → batches. Imports no jax.

May import `hub`, `tokenizer`.
"""

from lora_jax import lazy

_ENCODING = ("Encoded", "encode", "encode_pairs", "prompts")
__getattr__, __all__ = lazy.names(
    __name__,
    {name: f"{__name__}.encoding:{name}" for name in _ENCODING}
    | {name: f"{__name__}.batches:{name}" for name in ("Batches", "Shuffled")}
    | {"arrange": f"{__name__}.packing:arrange", "load": f"{__name__}.sources:load"},
)
