"""Prints a table of the bytes of weights, adapter and optimizer state, from shapes alone.

python benchmarks/memory.py
"""

import architectures
import jax
from flax import nnx

from lora_jax import lora, quant
from lora_jax.lora import config
from lora_jax.lora.nnx import model_state
from lora_jax.models import config as model_config
from lora_jax.models import llama
from lora_jax.optim import adamw
from lora_jax.optim import config as optim_config
from lora_jax.quant import conversion


def architecture(vocab, hidden, ffn, layers, heads, kv_heads, tied) -> model_config.LlamaConfig:
    return model_config.from_dict(
        {
            "model_type": "llama",
            "vocab_size": vocab,
            "hidden_size": hidden,
            "intermediate_size": ffn,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": kv_heads,
            "tie_word_embeddings": tied,
        }
    )


def num_bytes(tree) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def measure(name: str, fmt: str) -> tuple[int, int, int]:
    """Bytes of the base, of A and B, and of the optimizer state."""

    def build():
        model = llama.LlamaForCausalLM(
            architecture(*architectures.MODELS[name]), dtype="bfloat16", rngs=nnx.Rngs(0)
        )
        if fmt != "none":
            conversion.quantize_model(model, fmt)
        lora.inject(model, config.LoRAConfig(), rngs=nnx.Rngs(0))
        _, trained, frozen = model_state.split(model)
        return trained, frozen.base, adamw.make(optim_config.OptimConfig(), 1).init(trained)

    trained, base, moments = jax.eval_shape(build)
    return num_bytes(base), num_bytes(trained), num_bytes(moments)


def main() -> None:
    print("| model | " + " | ".join(quant.QUANTS) + " | A, B | their moments |")
    print("|---|" + "---|" * (len(quant.QUANTS) + 2))
    for name in architectures.MODELS:
        measured = [measure(name, fmt) for fmt in quant.QUANTS]
        base = [f"{m[0] / 1e9:.2f} GB" for m in measured]
        rest = [f"{part / 1e6:.1f} MB" for part in measured[0][1:]]
        print(f"| {name} | " + " | ".join(base + rest) + " |")


if __name__ == "__main__":
    main()
