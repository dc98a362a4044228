"""Times self-attention and its derivative in every form that the platform runs, beside dense.

python benchmarks/attention.py [--tokens 128,512,2048,8192] [--rounds 7] [--patience 30]

Lines of 4,096 tokens in all, or one line, of 8 heads over 4 of 64 numbers, in bfloat16; each line
is one row, or packed with rows of 150 tokens. Forms take turns, so that noise hits them alike; what
they compute is compared first.
"""

import argparse
import statistics

import jax
import jax.numpy as jnp
import numpy as np
import quiet

from lora_jax.kernels.attention import cudnn, splash, xla
from lora_jax.parallel import mesh as sharding

TOKENS, HEADS, GROUPS, WIDTH, ROW = 4096, 8, 4, 64, 150
LONGEST_DENSE = 8192
FORMS = {
    "cpu": {"blocks": xla.attend},
    "gpu": {"blocks": xla.attend, "cudnn": cudnn.attend},
    "tpu": {"blocks": xla.attend, "splash": splash.attend},
}


def dense(q, k, v, rows):
    slots = jnp.arange(q.shape[1])
    visible = (slots[:, None] >= slots[None])[None] & (rows[:, :, None] == rows[:, None])
    return jax.nn.dot_product_attention(q, k, v, mask=visible[:, None])


def forms(length: int, packed: bool) -> dict:
    """{form: a compiled call to its output and derivative}, all of which give the same."""
    rng, num = np.random.default_rng(0), max(1, TOKENS // length)
    q, k, v, d_out = (
        jnp.asarray(rng.normal(size=(num, length, heads, WIDTH)), jnp.bfloat16)
        for heads in (HEADS, GROUPS, GROUPS, HEADS)
    )
    rows = np.arange(length) // ROW + 1 if packed else np.ones(length)
    rows = jnp.asarray(np.tile(rows, (num, 1)), jnp.int32)
    found = dict(FORMS[jax.default_backend()])
    if length <= LONGEST_DENSE:
        found["dense"] = dense
    compiled, results = {}, []
    for name, form in found.items():

        def both(q, k, v, form=form):
            out, pull_back = jax.vjp(lambda *qkv: form(*qkv, rows), q, k, v)
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
    print("| lines | rows of | form | ms | temporaries |\n|---|---|---|---|---|")
    with jax.set_mesh(sharding.make_mesh(dict.fromkeys(sharding.AXES, 1), jax.devices()[:1])):
        for length in map(int, args.tokens.split(",")):
            for packed in (False, True) if length > ROW else (False,):
                calls = forms(length, packed)
                seconds = {name: [] for name in calls}
                for _ in range(args.rounds):
                    for name, (_, call) in calls.items():
                        seconds[name].append(timer.time(call, 1)["s"])
                for name, (program, _) in calls.items():
                    value = statistics.median(seconds[name]) * 1e3
                    temporaries = program.memory_analysis().temp_size_in_bytes / 2**20
                    lines = f"{max(1, TOKENS // length)} × {length}"
                    cells = lines, ROW if packed else length, name, f"{value:.1f}"
                    print(f"| {' | '.join(map(str, cells))} | {temporaries:.0f} MiB |", flush=True)


if __name__ == "__main__":
    main()
