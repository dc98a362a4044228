"""Times self-attention and its derivative, in each of the platform's implementations and dense.

python benchmarks/attention.py [--tokens 128,512,2048,8192] [--rounds 7] [--patience 30]

Sequences of 4,096 tokens in total, or a single sequence, with 8 heads over 4 of width 64, in
bfloat16. Each sequence is one example, or packed with examples of 150 tokens. Implementations take
turns, so that noise affects all of them; their results are compared first.
"""

import argparse
import statistics

import jax
import jax.numpy as jnp
import numpy as np
import quiet

from lora_jax.kernels.attention import cudnn, splash, xla
from lora_jax.parallel import mesh as sharding

TOKENS, HEADS, GROUPS, WIDTH, EXAMPLE = 4096, 8, 4, 64, 150
LONGEST_DENSE = 8192
FORMS = {
    "cpu": {"blocks": xla.attend},
    "gpu": {"blocks": xla.attend, "cudnn": cudnn.attend},
    "tpu": {"blocks": xla.attend, "splash": splash.attend},
}


def dense(q, k, v, examples):
    slots = jnp.arange(q.shape[1])
    visible = (slots[:, None] >= slots[None])[None] & (examples[:, :, None] == examples[:, None])
    return jax.nn.dot_product_attention(q, k, v, mask=visible[:, None])


def forms(length: int, packed: bool) -> dict:
    """{name: (program, a call that runs it)} for output and derivative, with equal results."""
    rng, num = np.random.default_rng(0), max(1, TOKENS // length)
    q, k, v, d_out = (
        jnp.asarray(rng.normal(size=(num, length, heads, WIDTH)), jnp.bfloat16)
        for heads in (HEADS, GROUPS, GROUPS, HEADS)
    )
    examples = np.arange(length) // EXAMPLE + 1 if packed else np.ones(length)
    examples = jnp.asarray(np.tile(examples, (num, 1)), jnp.int32)
    found = dict(FORMS[jax.default_backend()])
    if length <= LONGEST_DENSE:
        found["dense"] = dense
    compiled, results = {}, []
    for name, form in found.items():

        def both(q, k, v, form=form):
            out, pull_back = jax.vjp(lambda *qkv: form(*qkv, examples), q, k, v)
            return out, *pull_back(d_out)

        program = jax.jit(both).lower(q, k, v).compile()
        results.append([np.asarray(a, np.float32) for a in program(q, k, v)])
        compiled[name] = program, lambda program=program: jax.block_until_ready(program(q, k, v))
    for result in results[1:]:
        for a, b in zip(result, results[0], strict=True):
            assert np.linalg.norm(a - b) < 0.02 * np.linalg.norm(b)
    return compiled


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", default="128,512,2048,8192")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--patience", type=float, default=30, help="seconds to wait for quiet")
    args = parser.parse_args()
    timer = quiet.Timer(args.patience)
    print("| sequences | examples of | form | ms | temporaries |\n|---|---|---|---|---|")
    with jax.set_mesh(sharding.make_mesh(dict.fromkeys(sharding.AXES, 1), jax.devices()[:1])):
        for length in map(int, args.tokens.split(",")):
            for packed in (False, True) if length > EXAMPLE else (False,):
                calls = forms(length, packed)
                seconds = {name: [] for name in calls}
                for _ in range(args.rounds):
                    for name, (_, call) in calls.items():
                        seconds[name].append(timer.time(call, 1)["s"])
                for name, (program, _) in calls.items():
                    value = statistics.median(seconds[name]) * 1e3
                    temporaries = program.memory_analysis().temp_size_in_bytes / 2**20
                    sequences = f"{max(1, TOKENS // length)} × {length}"
                    cells = sequences, EXAMPLE if packed else length, name, f"{value:.1f}"
                    print(f"| {' | '.join(map(str, cells))} | {temporaries:.0f} MiB |", flush=True)


if __name__ == "__main__":
    main()
