"""Measures training and greedy decoding of a 125M LLaMA, each case in its own process.

python benchmarks/end_to_end.py [--quants none,int4] [--dtype bfloat16] [--patience 60]
python benchmarks/end_to_end.py --peer FOLDER --peer-python PYTHON

The model has random weights, written to and loaded from a safetensors file. `clean` counts the
timings that quiet.py found undisturbed. With --peer, peft_train.py and gen_bench.py in that folder
take turns with the same cases here, on the batches that they find in $PEERS_WORK. Linux only.
"""

import argparse
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile

import decoding
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import quiet
import safetensors.numpy
from flax import nnx

from lora_jax import lora
from lora_jax.checkpoints import loader
from lora_jax.generation import weights as decode_weights
from lora_jax.lora import config
from lora_jax.lora.nnx import model_state
from lora_jax.models import config as model_config
from lora_jax.models import llama
from lora_jax.optim import adamw
from lora_jax.optim import config as optim_config
from lora_jax.optim import loss as train_loss
from lora_jax.optim import step as train_step
from lora_jax.parallel import devices
from lora_jax.parallel import mesh as sharding

ARCHITECTURES = {  # hidden, ffn, layers, heads, kv heads, vocab
    "125m": (768, 2048, 12, 12, 4, 32000),
    "tiny": (32, 64, 2, 4, 2, 128),
}
WORK = {"125m": (4, 256, 128, 128), "tiny": (2, 16, 8, 4)}  # sequences, tokens; prompt, new ones
PEER_QUANT = {"none": None, "int4": "nf4", "nf4": "nf4", "nf4-dq": "nf4dq"}
PEER_BATCHES = (1, 8)
COLUMNS = ("case", "tokens/s", "min s", "clean", "own CPU s", "ideal share", "compile s",
           "first s", "… warm cache", "peak RSS MB", "temp MB", "copy MB")  # fmt: skip
PEER_COLUMNS = ("peer tokens/s", "ours / peer", "peer first s", "peer RSS MB")


def linears(size: str) -> dict[str, tuple[int, int]]:
    """{name: (d_in, d_out)} of one layer's linear layers."""
    hidden, ffn, _, heads, kv_heads, _ = ARCHITECTURES[size]
    kv = hidden // heads * kv_heads
    attention = {"q_proj": hidden, "k_proj": kv, "v_proj": kv, "o_proj": hidden}
    shapes = {f"self_attn.{name}": (hidden, width) for name, width in attention.items()}
    shapes |= {f"mlp.{name}": (hidden, ffn) for name in ("gate_proj", "up_proj")}
    return shapes | {"mlp.down_proj": (ffn, hidden)}


def write_model(folder: pathlib.Path, size: str, dtype: str) -> None:
    """A Hugging Face folder of a LLaMA with normal(0.02) weights."""
    hidden, ffn, layers, heads, kv_heads, vocab = ARCHITECTURES[size]
    settings = {
        **{"model_type": "llama", "architectures": ["LlamaForCausalLM"], "dtype": dtype},
        **{"hidden_size": hidden, "intermediate_size": ffn, "num_hidden_layers": layers},
        **{"num_attention_heads": heads, "num_key_value_heads": kv_heads, "vocab_size": vocab},
        **{"max_position_embeddings": 2048, "rms_norm_eps": 1e-5, "rope_theta": 10000.0},
        **{"tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2},
    }
    (folder / "config.json").write_text(json.dumps(settings))
    shapes = {"model.embed_tokens": (vocab, hidden), "lm_head": (vocab, hidden)}
    norms = ["model.norm"]
    for i in range(layers):
        layer = f"model.layers.{i}."
        shapes |= {layer + name: shape[::-1] for name, shape in linears(size).items()}
        norms += [layer + "input_layernorm", layer + "post_attention_layernorm"]
    rng, kind = np.random.default_rng(0), np.dtype(getattr(ml_dtypes, dtype, dtype))
    tensors = {f"{name}.weight": np.ones(hidden, kind) for name in norms}
    for name, shape in shapes.items():
        tensors[f"{name}.weight"] = (0.02 * rng.standard_normal(shape, np.float32)).astype(kind)
    safetensors.numpy.save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def load(case: dict, mesh) -> llama.LlamaForCausalLM:
    """The model with adapters."""
    devices.keep_freed_memory()
    how = {"dtype": case["dtype"], "quantization": case["quant"], "mesh": mesh}
    model = loader.load(case["model"], **how)
    lora.inject(model, config.LoRAConfig(), rngs=nnx.Rngs(0))
    return model


def run_train(case: dict, mesh) -> dict:
    graphdef, *state = model_state.split(load(case, mesh))
    trained, frozen = sharding.place(state, mesh)
    rows, length, *_ = WORK[case["size"]]
    settings, num_steps = optim_config.OptimConfig(), case["steps"] + 2
    # The same number of steps in every case, so that cached programs can be used again.
    optimizer, schedule = adamw.make(settings, 100), adamw.schedule(settings, 100)
    state = sharding.place(train_step.start(trained, optimizer), mesh)
    step = train_step.make_step(graphdef, optimizer, schedule, seed=0, remat=case["remat"])

    def batch_at(index):
        ids = token_ids(case, (1, rows, length), index)
        return jax.device_put(train_loss.Batch(ids, ids, np.ones_like(ids)), sharding.batch(mesh))

    compiled, result = decoding.compile_timed(step, state, frozen, batch_at(0))
    steps = train_step.steps(compiled, state, frozen, batch_at, num_steps)
    next(steps)
    result["first_s"] = since_start()
    if case["steps"]:
        next(steps)
        timer = quiet.Timer(case["patience"])
        result |= timer.time(lambda: next(steps), case["steps"])
        result |= {"tok_s": rows * length / result["s"], "rss_mb": peak_rss()}
        result["ideal"] = base_dots(case, rows * length, timer) / result["s"]
    return result


def run_decode(case: dict, mesh) -> dict:
    """tok_s: of the engine's steps after the prompts."""
    model = load(case, mesh)
    form, (_, _, prompt, new) = decode_weights.choose(model, mesh), WORK[case["size"]]
    graphdef, weights = decoding.split(model)
    steps = decoding.Steps(graphdef, weights, form, slots=case["batch"], prompt=prompt, room=new)
    steps.run(1)
    result = steps.compiling | {"first_s": since_start()}
    result |= quiet.Timer(case["patience"]).time(lambda: steps.run(new), case["reps"])
    result |= {"tok_s": case["batch"] * new / result["s"], "rss_mb": peak_rss()}
    copy = {"copy_mb": decode_weights.num_bytes(model, form) / 2**20} if form else {}
    return result | copy


def base_dots(case: dict, tokens: int, timer: quiet.Timer) -> float:
    """Seconds of only the products x·W and dy·Wᵀ of every linear layer, accumulated in float32."""
    hidden, _, layers, _, _, vocab = ARCHITECTURES[case["size"]]
    seconds = 0.0
    for shape, count in [*((s, layers) for s in linears(case["size"]).values()),
                         ((hidden, vocab), 1)]:  # fmt: skip
        for axis in (0, 1):

            @jax.jit
            def dot(x, w, axis=axis):
                dims = (((1,), (axis,)), ((), ()))
                return jax.lax.dot_general(x, w, dims, preferred_element_type=jnp.float32)

            operands = (
                jnp.ones((tokens, shape[axis]), case["dtype"]),
                jnp.ones(shape, case["dtype"]),
            )
            jax.block_until_ready(dot(*operands))

            def call(dot=dot, operands=operands):
                jax.block_until_ready([dot(*operands) for _ in range(4)])

            seconds += count * timer.time(call, 5)["s"] / 4
    return seconds


def token_ids(case: dict, shape: tuple[int, ...], seed: int) -> np.ndarray:
    vocab = ARCHITECTURES[case["size"]][-1]
    return np.random.default_rng(seed).integers(3, vocab, shape, np.int32)


def since_start() -> float:
    """Seconds since the start of this process."""
    fields = pathlib.Path("/proc/self/stat").read_text().rsplit(")", 1)[1].split()
    up = float(pathlib.Path("/proc/uptime").read_text().split()[0])
    return up - int(fields[19]) / os.sysconf("SC_CLK_TCK")


def peak_rss() -> float:
    """Peak MB. Not ru_maxrss, which includes the parent's memory when it started this process."""
    status = pathlib.Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


def spawn(command: list[str], **environment: str) -> dict:
    environment = {**os.environ, **environment}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(command)}\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def ours(case: dict, cache: str) -> dict:
    command = [sys.executable, __file__, "--case", json.dumps(case)]
    keep_all = {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    return spawn(command, JAX_COMPILATION_CACHE_DIR=cache, **keep_all)


def peer(case: dict, args: argparse.Namespace) -> dict | None:
    """The result of the peer's script in the matching case; None if there is none."""
    if case["quant"] not in PEER_QUANT or case["batch"] not in (0, *PEER_BATCHES):
        return None
    script = "gen_bench.py" if case["batch"] else "peft_train.py"
    command = [args.peer_python, f"{args.peer}/{script}", "--model", case["model"]]
    if PEER_QUANT[case["quant"]]:
        command += ["--quant", PEER_QUANT[case["quant"]]]
    if case["batch"]:
        found = spawn([*command, "--adapter", "attached", "--batches", str(case["batch"])])
        speed, first = found[f"b{case['batch']}"]["decode_tok_s"], found["s_to_first_token"]
    else:
        found = spawn([*command, "--steps", str(case["steps"])], GATE=str(case["patience"]))
        speed, first = found["tok_s"], found["s_to_first_step"]
    return {"tok_s": speed, "rss_mb": found["peak_rss_mb"], "first_s": first}


def row(name: str, rounds: list[dict], warm: dict, peers: list[dict]) -> str:
    def median(key: str, digits: int, results: list[dict] = rounds) -> str:
        values = [result[key] for result in results if key in result]
        return f"{statistics.median(values):.{digits}f}" if values else ""

    clean = f"{sum(r['clean'] for r in rounds)}/{sum(r['of'] for r in rounds)}"
    cells = [name, median("tok_s", 0), f"{min(r['min_s'] for r in rounds):.3f}", clean]
    cells += [median("cpu_s", 2), median("ideal", 2), median("compile_s", 1)]
    cells += [median("first_s", 1), median("first_s", 1, [warm]), median("rss_mb", 0)]
    cells += [median("temp_mb", 0), median("copy_mb", 0)]
    if peers:
        ratio = float(cells[1]) / float(median("tok_s", 1, peers))
        cells += [median("tok_s", 0, peers), f"{ratio:.2f}", median("first_s", 1, peers)]
        cells += [median("rss_mb", 0, peers)]
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=ARCHITECTURES, default="125m")
    parser.add_argument("--model", help="a folder of that size (default: random weights)")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--quants", default="none,int8,int4,nf4")
    parser.add_argument("--batches", default="0,1,8,32", help="of decoding; 0: training")
    parser.add_argument("--remat", default="full", choices=model_config.REMAT)
    parser.add_argument("--steps", type=int, default=10, help="timed steps, after two others")
    parser.add_argument("--reps", type=int, default=3, help="timed runs of decoding")
    parser.add_argument("--rounds", type=int, default=1, help="processes per case")
    parser.add_argument("--patience", type=float, default=30,
                        help="seconds that a process may wait for a quiet machine")  # fmt: skip
    parser.add_argument("--peer", help="folder with peft_train.py and gen_bench.py")
    parser.add_argument("--peer-python", default=sys.executable)
    parser.add_argument("--case", type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.case:
        mesh = sharding.make_mesh(sharding.parse("data=-1", jax.device_count()))
        with jax.set_mesh(mesh):
            print(json.dumps((run_decode if args.case["batch"] else run_train)(args.case, mesh)))
        return
    columns = COLUMNS + (PEER_COLUMNS if args.peer else ())
    print("| " + " | ".join(columns) + " |\n|" + "---|" * len(columns))
    same = {name: getattr(args, name) for name in
            ("size", "model", "dtype", "remat", "steps", "reps", "patience")}  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        if not args.model:
            write_model(pathlib.Path(folder), args.size, args.dtype)
            same["model"] = folder
        for batch in map(int, args.batches.split(",")):
            for quant in args.quants.split(","):
                case = {**same, "batch": batch, "quant": quant}
                rounds, peers = [], []
                with tempfile.TemporaryDirectory() as cache:
                    for number in range(args.rounds):
                        rounds.append(ours(case, f"{cache}/{number}"))  # empty: it compiles
                        found = peer(case, args) if args.peer else None
                        peers += [found] if found else []
                    warm = {} if batch else ours({**case, "steps": 0}, f"{cache}/0")
                name = f"decode {quant} × {batch}" if batch else f"train {quant}"
                print(row(name, rounds, warm, peers), flush=True)


if __name__ == "__main__":
    main()
