"""Times the sampler of one compiled program, by what its rows ask for.

python benchmarks/sampling.py [--vocab 128256] [--rows 1,8,64] [--rounds 7] [--patience 30]

The first line is the argmax that greedy decoding needs at least, the last a sort of the logits.
"""

import argparse
import statistics

import jax
import jax.numpy as jnp
import quiet

from lora_jax.generation import sampling

CASES = {
    "greedy": {},
    "log-probabilities": {"logprobs": True},
    "repetition_penalty": {"repetition_penalty": 1.2},
    "temperature": {"temperature": 1},
    "temperature, min_p": {"temperature": 1, "min_p": 0.05},
    "temperature, top_k 50": {"temperature": 1, "top_k": 50},
    "temperature, top_p 0.9": {"temperature": 1, "top_p": 0.9},
    "temperature, top_k 50, top_p 0.9": {"temperature": 1, "top_k": 50, "top_p": 0.9},
}


def calls(num: int, vocab: int) -> dict:
    """{name: call}. The calls of the sampler share a program, which updates its rows in place."""
    logits = 3 * jax.random.normal(jax.random.key(0), (num, vocab))
    length, live = jnp.ones(num, jnp.int32), jnp.ones(num, bool)
    allowed = jnp.full((num, -(-vocab // 32)), 2**32 - 1, jnp.uint32)
    step = jax.jit(sampling.sample, donate_argnums=1)

    def make(settings):
        rows = sampling.empty(num, vocab)
        for name, value in settings.items():
            rows = rows._replace(**{name: jnp.full_like(getattr(rows, name), value)})

        def call():
            nonlocal rows
            tokens, _, rows = step(logits, rows, length, live, allowed)
            jax.block_until_ready((tokens, rows))

        return call

    def simple(function):
        function = jax.jit(function)
        return lambda: jax.block_until_ready(function(logits))

    return (
        {"argmax": simple(lambda x: jnp.argmax(x, axis=1))}
        | {name: make(settings) for name, settings in CASES.items()}
        | {"sort": simple(lambda x: jnp.sort(x, axis=1))}
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--vocab", type=int, default=128_256)
    parser.add_argument("--rows", default="1,8,64")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--patience", type=float, default=30, help="seconds to wait for quiet")
    args = parser.parse_args()
    timer = quiet.Timer(args.patience)
    print("| rows | asked for | ms |\n|---|---|---|")
    for num in map(int, args.rows.split(",")):
        timed = calls(num, args.vocab)
        seconds = {name: [] for name in timed}
        for call in timed.values():
            call()  # compiles
        for _ in range(args.rounds):
            for name, call in timed.items():
                seconds[name].append(timer.time(call, 1)["s"])
        for name, values in seconds.items():
            print(f"| {num} | {name} | {statistics.median(values) * 1e3:.2f} |", flush=True)


if __name__ == "__main__":
    main()
