"""Files and hub data sets → examples → token ids with loss masks → batches. Imports no jax.

May import `hub`, `tokenizer`.
"""

from lora_jax import lazy

__getattr__, __all__ = lazy.names(
    __name__,
    {
        name: f"{__name__}.encoding:{name}"
        for name in ("Encoded", "encode", "encode_pairs", "prompts")
    }
    | {"load": f"{__name__}.sources:load"},
)
