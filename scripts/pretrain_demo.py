"""Rebuilds the included demo: corpus → tokenizer → pretrained tiny LLaMA → task files.

    python scripts/pretrain_demo.py

The result depends only on --seed. Nothing is downloaded. Takes about 15 minutes on two CPU cores.
"""

import argparse
import dataclasses
import functools
import itertools
import json
import pathlib
import sys
import time
import zlib
from collections.abc import Iterator

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import demo_corpus
import jax
import jax.numpy as jnp
import numpy as np
import optax
import safetensors.flax
import tokenizers
from flax import nnx
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from lora_jax.models import config as model_config
from lora_jax.models import llama

FOLDER = pathlib.Path(__file__).resolve().parents[1] / "lora_jax" / "assets" / "demo"
PAD, BOS, EOS = SPECIAL = ("<pad>", "<bos>", "<eos>")
# A word or a digit with the space before it, or one other character. So no token has two digits or
# two punctuation marks. A final s is separate, so that "lamps" has the tokens of "lamp".
PIECES = r" ?\p{L}{3,}?(?=s?(?!\p{L}))| ?\p{L}+| ?\p{N}| ?[^\s\p{L}\p{N}]|\s"
# A user turn is the sentence and a line break, as in train.jsonl; the answer ends with EOS.
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}{{ message['content'] + eos_token }}"
    "{% else %}{{ message['content'] + '\n' }}{% endif %}{% endfor %}"
)
HF_CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "dtype": "bfloat16",
    "vocab_size": 1152,
    "hidden_size": 192,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "hidden_act": "silu",
    "max_position_embeddings": 256,
    "initializer_range": 0.02,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "tie_word_embeddings": True,
    "attention_bias": False,
    "mlp_bias": False,
    "pad_token_id": SPECIAL.index(PAD),
    "bos_token_id": SPECIAL.index(BOS),
    "eos_token_id": SPECIAL.index(EOS),
}
# The settings that training uses for the demo, unless flags override them.
SETTINGS = {
    "batch_size": 16,
    "grad_accum": 1,
    "seq_len": 96,
    "max_steps": 200,
    "lr": 5e-3,
    "schedule": "cosine",
    "warmup": 0.05,
    "remat": "none",
    "exact_match": 256,
    "max_new_tokens": 72,
}
NUM_TRAIN, NUM_EVAL = 4096, 256
NUM_TOKENIZER_DOCUMENTS = 40_000


def train_tokenizer(documents: list[str]) -> tokenizers.Tokenizer:
    """Byte-level BPE of the corpus, with separate digits and punctuation marks, and BOS first."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(PIECES), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=HF_CONFIG["vocab_size"],
        special_tokens=list(SPECIAL),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, SPECIAL.index(BOS))]
    )
    return tokenizer


def blocks(
    tokenizer: tokenizers.Tokenizer, seed: int, batch_size: int, seq_len: int
) -> Iterator[np.ndarray]:
    """Yields batches int32 [batch_size, seq_len] of concatenated documents, without end."""
    documents = demo_corpus.corpus(seed)
    need, stream = batch_size * seq_len, np.zeros(0, np.int32)
    while True:
        while len(stream) < need:
            encoded = tokenizer.encode_batch(list(itertools.islice(documents, 1000)))
            ids = [i for one in encoded for i in (*one.ids, SPECIAL.index(EOS))]
            stream = np.concatenate([stream, np.array(ids, np.int32)])
        yield stream[:need].reshape(batch_size, seq_len)
        stream = stream[need:]


def write_json(path: pathlib.Path, value: dict) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def pretrain(
    batches: Iterator[np.ndarray], num_steps: int, lr: float, seed: int
) -> llama.LlamaForCausalLM:
    """A LLaMA trained in float32, with Muon for matrices [L, in, out] and AdamW for the rest."""
    config = model_config.from_dict(HF_CONFIG)
    model = llama.LlamaForCausalLM(config, rngs=nnx.Rngs(seed))
    graphdef, state = nnx.split(model)
    params = _initialized(nnx.to_pure_dict(state), jax.random.key(seed))
    schedule = optax.warmup_cosine_decay_schedule(
        0, lr, min(50, num_steps // 4), num_steps, 0.02 * lr
    )
    dims = optax.contrib.MuonDimensionNumbers(reduction_axis=1, output_axis=2)
    optimizer = optax.contrib.muon(
        schedule,
        adam_learning_rate=lambda step: 0.2 * schedule(step),
        adam_b2=0.98,
        weight_decay=0.01,
        muon_weight_dimension_numbers=lambda tree: jax.tree.map(
            lambda x: dims if x.ndim == 3 else None, tree
        ),
    )

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params, moments, ids):
        def loss(params):
            logits = nnx.merge(graphdef, params)(ids[:, :-1])
            return optax.softmax_cross_entropy_with_integer_labels(logits, ids[:, 1:]).mean()

        value, gradient = jax.value_and_grad(loss)(params)
        updates, moments = optimizer.update(gradient, moments, params)
        return optax.apply_updates(params, updates), moments, value

    moments, losses, start = optimizer.init(params), [], time.perf_counter()
    for number, ids in enumerate(itertools.islice(batches, num_steps), start=1):
        params, moments, value = step(params, moments, ids)
        losses.append(value)
        if number % 50 == 0 or number == num_steps:
            recent = float(jnp.stack(losses[-50:]).mean())
            seconds = time.perf_counter() - start
            print(f"step {number}/{num_steps}  loss {recent:.4f}  {seconds:.0f} s", flush=True)
    return nnx.merge(graphdef, params)


def _initialized(params: dict, key: jax.Array) -> dict:
    """Matrices ~ N(0, 1/d_in); those that write to the residual stream start near zero."""

    def draw(path, x):
        if x.ndim != 3:
            return x
        name = path[-2].key
        std = 1e-3 if name in ("o_proj", "down_proj") else x.shape[1] ** -0.5
        seed = zlib.crc32(jax.tree_util.keystr(path).encode())
        return std * jax.random.normal(jax.random.fold_in(key, seed), x.shape, x.dtype)

    return jax.tree_util.tree_map_with_path(draw, params)


def hf_tensors(model: llama.LlamaForCausalLM) -> dict[str, jax.Array]:
    """The weights in bfloat16 with the names of Hugging Face, matrices as [out, in]."""
    found = {}
    flat, _ = jax.tree_util.tree_flatten_with_path(nnx.to_pure_dict(nnx.state(model)))
    for path, x in flat:
        *modules, leaf = [entry.key for entry in path]
        x = x.astype(jnp.bfloat16)
        if "layers" not in modules:
            found[".".join((*modules, "weight"))] = x
            continue
        for i in range(x.shape[0]):
            name = ".".join((*modules, "weight")).replace(".layers.", f".layers.{i}.")
            found[name] = x[i].T if leaf == "kernel" else x[i]
    return found


def write_task(folder: pathlib.Path, seed: int) -> None:
    """Writes train.jsonl and eval.jsonl, and the settings to train with."""
    for name, num, held_out in (("train", NUM_TRAIN, False), ("eval", NUM_EVAL, True)):
        rows = demo_corpus.rows(seed, num, held_out)
        lines = [json.dumps(dataclasses.asdict(row)) + "\n" for row in rows]
        (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    write_json(folder / "settings.json", SETTINGS)


def write_tokenizer(folder: pathlib.Path, tokenizer: tokenizers.Tokenizer) -> None:
    tokenizer.save(str(folder / "tokenizer.json"))
    write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": BOS,
            "eos_token": EOS,
            "pad_token": PAD,
            "add_bos_token": True,
            "add_eos_token": False,
            "clean_up_tokenization_spaces": False,
            "model_max_length": HF_CONFIG["max_position_embeddings"],
            "chat_template": CHAT_TEMPLATE,
        },
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=pathlib.Path, default=FOLDER, help="folder to write")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=2600, help="optimizer steps")
    parser.add_argument("--batch-size", type=int, default=32, help="blocks per step")
    parser.add_argument("--seq-len", type=int, default=96, help="tokens per block")
    parser.add_argument("--lr", type=float, default=0.02, help="peak learning rate of Muon")
    parser.add_argument(
        "--task-only", action="store_true", help="write only the task files and settings"
    )
    args = parser.parse_args()

    start = time.perf_counter()
    args.output.mkdir(parents=True, exist_ok=True)
    write_task(args.output, args.seed)
    if args.task_only:
        return
    documents = demo_corpus.corpus(args.seed)
    tokenizer = train_tokenizer(list(itertools.islice(documents, NUM_TOKENIZER_DOCUMENTS)))
    batches = blocks(tokenizer, args.seed, args.batch_size, args.seq_len)
    model = pretrain(batches, args.steps, args.lr, args.seed)
    write_tokenizer(args.output, tokenizer)
    tensors = hf_tensors(model)
    safetensors.flax.save_file(
        tensors, args.output / "model.safetensors", metadata={"format": "pt"}
    )
    write_json(args.output / "config.json", HF_CONFIG)
    ids = {name: HF_CONFIG[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    write_json(args.output / "generation_config.json", {**ids, "do_sample": False})
    num_params = sum(x.size for x in tensors.values())
    seconds = time.perf_counter() - start
    print(f"wrote {args.output}: {num_params:,} parameters, {seconds:.0f} s in total")


if __name__ == "__main__":
    main()
