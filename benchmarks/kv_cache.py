"""What a KV cache in int8 costs: KL divergence of the predictions from those of a float cache.

    python benchmarks/kv_cache.py [--model FOLDER] [--text FILE]

Each token of the text is predicted from a cache that was filled in chunks of 32 tokens, once in
the model's dtype and once in int8. Nothing is timed.
"""

import argparse
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from lora_jax import assets, tokenizer
from lora_jax.checkpoints import loader
from lora_jax.models import cache
from lora_jax.training import evaluate

CHUNK = 32


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--model", type=pathlib.Path, default=assets.FOLDER)
    parser.add_argument("--text", type=pathlib.Path, default=pathlib.Path("README.md"))
    parser.add_argument("--tokens", type=int, default=1024)
    options = parser.parse_args()
    model = loader.load(options.model, dtype="float32")
    reader = tokenizer.load(options.model)
    ids = tokenizer.encode(reader, [options.text.read_text()])[0]
    count = min(options.tokens, len(ids), model.config.context) // CHUNK * CHUNK
    exact, rounded = (predictions(model, ids[:count], kind) for kind in (None, "int8"))
    same, kl = evaluate.agreement([exact], [rounded])
    nll = [-each[np.arange(count - 1), ids[1:count]].mean() for each in (exact[:-1], rounded[:-1])]
    print(f"{count} tokens: KL {kl:.2e} nats, the same most likely token at {same:.2%}, "
          f"loss {nll[0]:.4f} and {nll[1]:.4f}")  # fmt: skip


def predictions(model, ids: list[int], kv_dtype: str | None) -> np.ndarray:
    """log p [T, V] of the token after each."""
    graphdef, state = nnx.split(model)

    @jax.jit
    def extend(state, kv, chunk, start):
        model = nnx.merge(graphdef, state)
        place = cache.Place(start, jnp.full(1, CHUNK), start + CHUNK)
        hidden, kv = model.extend(chunk, kv, place)
        return jax.nn.log_softmax(model.logits(hidden)[0]), kv

    kv, found = model.empty_cache(1, len(ids), kv_dtype), []
    for start in range(0, len(ids), CHUNK):
        chunk = np.array([ids[start : start + CHUNK]], np.int32)
        logits, kv = extend(state, kv, chunk, np.array([start], np.int32))
        found.append(np.asarray(logits))
    return np.concatenate(found)


if __name__ == "__main__":
    main()
