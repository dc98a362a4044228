"""The engine and the server against transformers' generation and llama.cpp, on a CPU.

python benchmarks/generation.py MODEL_FOLDER|125m [--hf PYTHON] [--llama PYTHON] [--rounds 5]

PYTHON is one with transformers, or with llama-cpp-python, gguf and torch. All of them stay loaded
in processes of their own and take turns, so that a ratio of medians holds on a machine that others
use. Each turn has new random prompts, which no cache knows. It prints Markdown.
"""

import argparse
import json
import math
import pathlib
import statistics
import subprocess
import sys
import tempfile
from typing import Any, NamedTuple

import end_to_end
import numpy as np

HERE = pathlib.Path(__file__).parent
SLOTS = 8  # for texts of unequal lengths, and with adapters


class Case(NamedTuple):
    """So many prompts of so many tokens; `new` tokens after each, or from `least` to `new`."""

    name: str
    prompts: int
    length: int
    new: int
    slots: int
    least: int | None = None

    def drawn(self, number: int, vocab: int) -> dict[str, Any]:
        """The request to a worker in turn `number`."""
        rng = np.random.default_rng(number)
        ids = rng.integers(3, vocab, (self.prompts, self.length))
        counts = np.full(self.prompts, self.new)
        if self.least:
            low, high = math.log(self.least), math.log(self.new)
            counts = np.exp(rng.uniform(low, high, self.prompts)).round().astype(int)
        return {"prompts": ids.tolist(), "counts": counts.tolist(), "slots": self.slots}


def cases(batches: list[int], new: int, prefill: int) -> list[Case]:
    found = [Case(f"{n} × (64 + {new})", n, 64, new, n) for n in batches]
    unequal = Case(f"{4 * SLOTS} × (64 + {new // 8}…{2 * new}), {SLOTS} at a time",
                   4 * SLOTS, 64, 2 * new, SLOTS, new // 8)  # fmt: skip
    return [*found, unequal, Case(f"first token after {prefill}", 1, prefill, 1, 1)]


class Worker:
    """A process that generates: one of generation_peers.py, or `serve` below."""

    def __init__(self, command: list[str]):
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        if not self._process.stdout.readline():
            sys.exit(f"{' '.join(command)}\n{self._process.stderr.read()[-3000:]}")
        self._process.stderr.close()

    def __call__(self, request: dict[str, Any]) -> dict[str, Any]:
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        return json.loads(line) if line else {"error": "the process has ended"}

    def close(self) -> None:
        self._process.stdin.close()  # at which it ends, and a server that it has started
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:  # a peer's threads keep it alive
            self._process.kill()
            self._process.wait()


class Ours:
    """An engine for each number of slots, with 8 adapters or without."""

    def __init__(self, model: str, how: str, adapters: str = ""):
        from lora_jax import tokenizer
        from lora_jax.checkpoints import loader

        self._model = pathlib.Path(model)
        kind = "float32" if how == "float32" else "bfloat16"
        quant = None if how in ("float32", "bfloat16") else how
        self._load = lambda: loader.load(self._model, dtype=kind, quantization=quant)
        has_text = (self._model / "tokenizer.json").exists()
        self._reader = tokenizer.load(self._model) if has_text else words(self._model)
        self._adapters, self._engines = adapters, {}

    def _engine(self, slots):
        from lora_jax.generation import engine

        if slots not in self._engines:
            model = self._load()
            pool = self._pool(model) if self._adapters else None
            self._engines[slots] = engine.Engine(
                model, self._reader, eos_ids=(), slots=slots, context=1024, pool=pool
            )
        return self._engines[slots]

    def _pool(self, model):
        import bank as bank_benchmark

        from lora_jax.generation import pool as pools
        from lora_jax.lora.nnx import bank

        rank, targets = bank_benchmark.CASES[self._adapters]
        bank.add(model, slots=SLOTS, rank=rank, targets=targets)
        pool = pools.Pool(model)
        for number, own in enumerate(bank_benchmark.adapters(model, rank, targets)):
            pool.load(str(number), own)
        return pool

    def generate(self, prompts, counts, slots):
        from lora_jax.generation import config

        engine = self._engine(slots)
        requests = [
            engine.submit(
                prompt,
                config.Sampling(max_new_tokens=count),
                adapters=str(number % SLOTS) if self._adapters else None,
            )
            for number, (prompt, count) in enumerate(zip(prompts, counts, strict=True))
        ]
        return [request.result().tokens for request in requests]


def words(folder: pathlib.Path):
    """A tokenizer for a model that has none: each id is a word."""
    import tokenizers
    import transformers

    vocab = json.loads((folder / "config.json").read_text())["vocab_size"]
    model = tokenizers.models.WordLevel({f"w{n}": n for n in range(vocab)}, unk_token="w0")
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizers.Tokenizer(model))


def workers(model: str, flags: argparse.Namespace, file: str) -> dict[str, Worker]:
    """{name: worker}; the name ends with the format of the weights."""
    own, peers = [sys.executable, __file__, "--worker"], str(HERE / "generation_peers.py")
    served = [sys.executable, str(HERE / "generation_served.py")]
    formats = flags.formats.split(",")
    commands = {f"engine {how}": [*own, model, how] for how in formats}
    commands |= {f"server {how}": [*served, model, how] for how in formats}
    for kind in ("rank 8 on q, v", "rank 16 on all linear layers"):
        commands |= {f"8 adapters, {kind}, {how}": [*own, model, how, kind]
                     for how in formats[:1]}  # fmt: skip
    if flags.hf:
        for kind in ("generate", "generate_batch"):
            commands |= {f"{kind} {how}": [flags.hf, peers, kind, model, how]
                         for how in formats if how in ("float32", "bfloat16")}  # fmt: skip
    if flags.llama:
        commands["llama.cpp Q4_0"] = [flags.llama, peers, "llama.cpp", model, file]
    return {name: Worker(command) for name, command in commands.items()}


def compare(each: dict[str, Worker], case: Case, rounds: int, vocab: int) -> None:
    """Prints the rows of one case."""
    times, tokens, failed = {name: [] for name in each}, {}, {}
    for number in range(-1, rounds):  # the first one warms up
        request = case.drawn(number + 1, vocab)
        for name, worker in each.items():
            if name in failed or ("adapters" in name and case.slots != SLOTS):
                continue
            found = worker(request)
            if "error" in found:
                failed[name] = found["error"]
            elif number >= 0:
                times[name].append(found["seconds"])
                tokens.setdefault(name, []).append(found["tokens"])
            done = sum(request["counts"])
    medians = {name: statistics.median(own) for name, own in times.items() if own}
    first = next(iter(medians))
    for name, median in medians.items():
        base = f"engine {name.rsplit(' ', 1)[1]}"
        base = base if base in medians else "engine int4" if "engine int4" in medians else first
        speed = f"{done / median:.0f}" if case.new > 1 else f"{1000 * median:.0f} ms"
        ratio = f"{median / medians[base]:.2f}"
        same = np.mean([common(a, b) for x, y in zip(tokens[first], tokens[name], strict=True)
                        for a, b in zip(x, y, strict=True)])  # fmt: skip
        same = "" if "adapters" in name else f"{same:.0%}"
        print(f"| {case.name} | {name} | {speed} | {ratio} | {same} |", flush=True)
    for name, why in failed.items():
        print(f"| {case.name} | {name} | {' '.join(why.split())[:90]} | | |", flush=True)


def common(a: list[int], b: list[int]) -> float:
    """The share of tokens before the first that differs."""
    equal = [x == y for x, y in zip(a, b, strict=True)]
    return (equal.index(False) if False in equal else len(equal)) / len(equal)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("models", nargs="+", help="folders, or sizes of end_to_end.py")
    parser.add_argument("--hf", metavar="PYTHON", help="with torch and transformers")
    parser.add_argument("--llama", metavar="PYTHON", help="with llama-cpp-python, gguf and torch")
    parser.add_argument("--formats", default="float32,bfloat16,int4")
    parser.add_argument("--batches", default="1,8,32")
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--prefill", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=5)
    flags = parser.parse_args()
    print("| prompts × (tokens + new ones) | | tokens/s | time ÷ engine's | same tokens |")
    print("|---|---|---|---|---|")
    for model in flags.models:
        with tempfile.TemporaryDirectory() as folder:
            if model in end_to_end.ARCHITECTURES:
                end_to_end.write_model(pathlib.Path(folder), model, "bfloat16")
                model = folder
            config = json.loads((pathlib.Path(model) / "config.json").read_text())
            each = workers(model, flags, f"{folder}/model.gguf")
            for case in cases([*map(int, flags.batches.split(","))], flags.new, flags.prefill):
                compare(each, case, flags.rounds, config["vocab_size"])
            for worker in each.values():
                worker.close()


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        import generation_peers

        generation_peers.serve(Ours(*sys.argv[2:]))
    else:
        main()
