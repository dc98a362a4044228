"""Trains a real model as published, generates, merges, and compares each with PEFT's in float32.

python benchmarks/real_model.py --model FOLDER --data gsm8k_train.jsonl --peer-python PYTHON

FOLDER: a LLaMA with a chat template, such as SmolLM2-135M-Instruct. The data have the fields
question and answer, and are trained as texts and as chats. PYTHON: of an environment with torch,
transformers and peft. Takes about half an hour on two cores. Prints a table with a row for each
kind of data and base:

  ids            rows whose token ids are transformers' own, up to where they are cut
  loss           the largest difference of a step's loss, trained from the same adapter, which PEFT
                 made, on the same batches. PEFT's base has the values of the quantized one
  adapter        the largest difference of a logit of the base with the trained adapter
  merged         the same for the merged model in float32
  bfloat16       weights of the merged folder, as published, that are not PEFT's merge, rounded
  texts          greedy continuations by the merged model that are PEFT's, token by token
"""

import argparse
import functools
import itertools
import json
import pathlib
import subprocess
import tempfile
from typing import Any, NamedTuple

import jax
import numpy as np

from lora_jax import checkpoints, data, generation, lora, parallel, peft, tokenizer, training
from lora_jax.checkpoints import merge
from lora_jax.data.chats import chat

ROWS, TOKENS, BATCH, PROMPTS, NEW = 200, 256, 2, 3, 32
COLUMNS = ("case", "ids", "first loss", "last loss", "loss", "adapter", "merged", "bfloat16",
           "texts")  # fmt: skip


class Work(NamedTuple):
    """The model as published, in float32, and with the values of its 4-bit copy in float32."""

    model: pathlib.Path
    base: pathlib.Path
    rounded: pathlib.Path
    initial: pathlib.Path
    folder: pathlib.Path
    peer: str


def ask(peer: str, **case: Any) -> Any:
    script = pathlib.Path(__file__).with_name("real_model_peer.py")
    given = json.dumps(case, default=str)
    done = subprocess.run([peer, script, given], stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def merged(folder: pathlib.Path, adapter: pathlib.Path, to: pathlib.Path, quant: str) -> None:
    """Writes the model in `folder` with the adapter merged into it."""
    to.mkdir()
    how = None if quant == "none" else quant
    for _ in merge.write(folder, to, merge.plan(folder, peft.read(adapter), quantization=how)):
        pass


def write_rows(source: pathlib.Path, file: pathlib.Path, kind: str) -> None:
    with source.open() as lines:
        for row in map(json.loads, itertools.islice(lines, ROWS)):
            said = [row["question"], row["answer"]]
            names, roles = ("prompt", "completion"), ("user", "assistant")
            made: dict[str, Any] = dict(zip(names, said, strict=True))
            if kind == "chats":
                turns = zip(roles, said, strict=True)
                made = {"messages": [{"role": role, "content": text} for role, text in turns]}
            else:
                made["prompt"] += "\n"
            with file.open("a") as out:
                out.write(json.dumps(made) + "\n")


def settings(work: Work, rows: pathlib.Path, quant: str, steps: int) -> training.TrainSettings:
    return training.settings.build(
        model=str(work.model), dataset=[str(rows)], quant=quant, dtype="float32",
        init_adapter=str(work.initial), batch_size=BATCH, grad_accum=1, max_steps=steps,
        seq_len=TOKENS, lr=1e-3, exact_match=0, output_dir=str(rows.with_suffix(f".{quant}")),
    )  # fmt: skip


def encoded(work: Work, rows: pathlib.Path) -> list[tuple[np.ndarray, np.ndarray]]:
    reader = tokenizer.load(work.model)
    eos = tokenizer.eos_ids(reader, work.model)[0]
    return data.encode(data.load(str(rows)), reader, TOKENS, eos).rows


def batches(work: Work, rows: pathlib.Path, steps: int) -> dict[str, np.ndarray]:
    """The batches of the run, [step, B, T]."""
    sequences = data.arrange(encoded(work, rows), TOKENS, packing=False, in_pairs=False)
    length = max(len(ids) for ((ids, _),) in sequences)
    shuffled = data.Shuffled(sequences, seed=0)
    found = data.Batches(shuffled, batch_size=BATCH, grad_accum=1, length=length)
    each = [found.batch(step) for step in range(steps)]
    return {name: np.concatenate([batch[name] for batch in each]) for name in each[0]}


def logits_of(model: Any, ids: list[int]) -> np.ndarray:
    return np.asarray(jax.jit(type(model).__call__)(model, np.array([ids], np.int32))[0])


def compare(work: Work, source: pathlib.Path, kind: str, quant: str, steps: int) -> list[Any]:
    """A row of the table."""
    rows = work.folder / f"{kind}.jsonl"
    if not rows.exists():
        write_rows(source, rows, kind)
    how = settings(work, rows, quant, steps)
    metrics = [*training.run(how)]
    trained = pathlib.Path(how.run.output_dir) / "adapter"
    own = [each["loss"] for each in metrics]
    given = {name: work.folder / f"{kind}-{quant}.{name}" for name in ("batches", "logits")}
    given = {name: path.with_name(path.name + ".npz") for name, path in given.items()}
    np.savez(given["batches"], **batches(work, rows, steps))
    folders = {name: work.folder / f"{kind}-{quant}-{name}" for name in ("published", "float32")}
    merged(work.model, trained, folders["published"], quant)
    merged(work.base, trained, folders["float32"], quant)
    examples = encoded(work, rows)
    reader = tokenizer.load(work.model)
    prompts = [ids[: int(np.argmax(mask))].tolist() for ids, mask in examples[-PROMPTS:]]
    stop = list(chat.stop_ids(reader, work.model))
    theirs = ask(
        work.peer, what="losses and outputs", model=work.model, rows=rows,
        base=work.base if quant == "none" else work.rounded, initial=work.initial, trained=trained,
        rates=[each["lr"] for each in metrics], ids=examples[0][0].tolist(), prompts=prompts,
        new=NEW, stop=stop, published=folders["published"], **given,
    )  # fmt: skip
    mesh = parallel.make_mesh({"data": 1, "fsdp": 1, "tensor": 1})
    with jax.set_mesh(mesh):
        load = functools.partial(checkpoints.load, dtype="float32", mesh=mesh)
        adapted = load(work.model, quantization=quant)
        lora.attach(adapted, peft.read(trained))
        model = load(folders["float32"])
        ours = {"adapted": logits_of(adapted, examples[0][0].tolist()),
                "merged": logits_of(model, examples[0][0].tolist())}  # fmt: skip
        engine = generation.Engine(model, reader, eos_ids=stop, slots=PROMPTS)
        greedy = generation.Sampling(max_new_tokens=NEW)
        results = engine.generate(prompts, greedy)
        texts = [[i for i in result.tokens if i not in stop] for result in results]
    found = np.load(given["logits"])
    differ = {name: float(np.abs(ours[name] - found[name]).max()) for name in ours}
    pairs = zip(examples, theirs["ids"], strict=True)
    equal = sum(ids.tolist() == whole[:TOKENS] for (ids, _), whole in pairs)
    peers = ([i for i in ids if i not in stop] for ids in theirs["texts"])
    alike = sum(a == b for a, b in zip(texts, peers, strict=True))
    apart = max(abs(a - b) for a, b in zip(own, theirs["losses"], strict=True))
    return [f"{kind}, {quant}", f"{equal} of {len(examples)}", f"{own[0]:.6f}", f"{own[-1]:.6f}",
            f"{apart:.1e}", f"{differ['adapted']:.1e}", f"{differ['merged']:.1e}",
            theirs["rounded"], f"{alike} of {len(texts)}"]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=pathlib.Path, required=True)
    parser.add_argument("--data", type=pathlib.Path, required=True)
    parser.add_argument("--peer-python", required=True)
    parser.add_argument("--steps", type=int, default=10)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        parts = (folder / part for part in ("base", "rounded", "initial"))
        work = Work(given.model.resolve(), *parts, folder, given.peer_python)
        ask(work.peer, what="begin", model=work.model, base=work.base, adapter=work.initial)
        merged(work.base, work.initial, work.rounded, "int4")  # of no effect: the base in 4 bits
        lines = ["| " + " | ".join(COLUMNS) + " |", "|---" * len(COLUMNS) + "|"]
        for kind, quant in itertools.product(("texts", "chats"), ("none", "int4")):
            row = compare(work, given.data, kind, quant, given.steps)
            lines.append("| " + " | ".join(map(str, row)) + " |")
            print(lines[-1], flush=True)  # the run's own lines are between the rows
    print("", *lines, sep="\n")


if __name__ == "__main__":
    main()
