"""The engine: prompts in, their continuations out, many at a time, with sampling.

May import `checkpoints`, `lora`, `parallel` and below.
"""

from lora_jax import lazy

__getattr__, __all__ = lazy.names(
    __name__,
    {
        "Engine": f"{__name__}.engine:Engine",
        "Pool": f"{__name__}.pool:Pool",
        "Request": f"{__name__}.request:Request",
        "Piece": f"{__name__}.request:Piece",
        "Result": f"{__name__}.request:Result",
        "Sampling": f"{__name__}.config:Sampling",
    },
)
