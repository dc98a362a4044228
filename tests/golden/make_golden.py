"""Writes the golden files that the test suite compares with: Hugging Face and PEFT, on a CPU.

Made with torch 2.13.0 (CPU), transformers 5.23.0 (5.24.0 for cwm, exaone4, gemma, gemma2, gemma3,
granite, ministral, ministral3, olmo2, olmo3, phi3, seed_oss, smollm3 and composites), peft 0.21.2,
numpy 2.4; nf4.npz holds values computed by bitsandbytes 0.50.2. The test suite itself needs none of
these. Everything is seeded.

    pip install torch==2.13.0 transformers==5.23.0 peft==0.21.2 bitsandbytes==0.50.2 accelerate
    python tests/golden/make_golden.py                        # everything but nf4.npz
    python tests/golden/make_golden.py llama mistral          # only these models
    python tests/golden/make_golden.py --nf4-from FILE.npz    # nf4.npz too
"""

import argparse
import copy
import json
import pathlib
import shutil

import numpy as np
import peft
import safetensors.torch
import torch
import transformers
from peft.optimizers import create_loraplus_optimizer
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
)

HERE = pathlib.Path(__file__).parent
MODELS = HERE / "models"
QUANTISED = HERE / "quantized"
NUM_NEW = 16
MARGIN = 5e-3  # a greedy choice closer than this is not a fair test of float32
VOCAB = 96

SHAPE = dict(
    vocab_size=VOCAB,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=256,
    rms_norm_eps=1e-5,
    bos_token_id=1,
    eos_token_id=2,
)
LLAMA3 = dict(
    rope_type="llama3",
    rope_theta=500.0,
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=32,
)
YARN = dict(rope_type="yarn", rope_theta=100.0, factor=4.0, original_max_position_embeddings=32)
MINISTRAL3 = dict(
    rope_type="yarn",
    rope_theta=100.0,
    factor=8.0,
    original_max_position_embeddings=16,
    mscale=1.0,
    mscale_all_dim=1.0,
    llama_4_scaling_beta=0.5,
)
LONGROPE = dict(
    rope_type="longrope",
    rope_theta=100.0,
    partial_rotary_factor=0.75,
    short_factor=[1.0, 1.1, 1.3],
    long_factor=[1.2, 2.5, 6.0],
)
QWEN2 = dict(model_type="qwen2", rms_norm_eps=1e-6)


QV = ["q_proj", "v_proj"]
FUSED = ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]
ALL_LINEAR = "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj".split()
PLAIN = dict(lr=0.01, wd=0.0, clip=None, sched="constant", warmup=0)
SHORT = dict(settings=PLAIN, masked=True, num_steps=6)
LORAS = dict(
    lora_qv=dict(
        seed=101,
        lora=dict(r=4, lora_alpha=8, target_modules=QV),
        settings=PLAIN,
        masked=False,
    ),
    lora_all_rslora=dict(
        seed=102,
        lora=dict(r=4, lora_alpha=8, target_modules=ALL_LINEAR, use_rslora=True),
        settings=dict(lr=0.005, wd=0.01, clip=1.0, sched="cosine", warmup=3),
        masked=True,
    ),
    lora_plus=SHORT
    | dict(
        seed=106,
        lora=dict(r=4, lora_alpha=8, target_modules=QV),
        settings=PLAIN | dict(lora_plus_ratio=4),
    ),
    lora_dora=SHORT
    | dict(
        seed=107,
        lora=dict(r=4, lora_alpha=8, target_modules=ALL_LINEAR, use_dora=True),
        base="llama_bias",
    ),
    lora_bias=SHORT
    | dict(
        seed=118,
        lora=dict(r=4, lora_alpha=12, target_modules=ALL_LINEAR, lora_bias=True),
        base="llama_bias",
    ),
    # The head is tied to the embedding, but not to its adapter.
    lora_dora_embedding=SHORT
    | dict(
        seed=108,
        lora=dict(
            r=4, lora_alpha=8, target_modules=["embed_tokens", "q_proj"], use_dora=True,
            exclude_modules=["layers.0.self_attn.q_proj"],
        ),
        base="llama_tied_hd16",
    ),
    lora_embedding=SHORT
    | dict(
        seed=109,
        lora=dict(
            r=4, lora_alpha=8, use_rslora=True, exclude_modules=["1.self_attn.v_proj"],
            target_modules=["embed_tokens", "lm_head", "v_proj"],
        ),
    ),
    lora_saved=SHORT
    | dict(
        seed=110,
        lora=dict(
            r=4, lora_alpha=8, target_modules=["q_proj"], layers_pattern=["layers"],
            layers_to_transform=[1, 2],
            modules_to_save=["lm_head", "input_layernorm", "embed_tokens"],
        ),
    ),
    lora_pissa=SHORT
    | dict(
        seed=111,
        lora=dict(
            r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"], init_lora_weights="pissa"
        ),
    ),
    lora_olora=SHORT
    | dict(
        seed=119,
        lora=dict(
            r=4, lora_alpha=6, target_modules=["q_proj", "down_proj"], init_lora_weights="olora"
        ),
    ),
    lora_tokens=SHORT
    | dict(
        seed=115,
        lora=dict(r=4, lora_alpha=8, target_modules=QV, trainable_token_indices=[77, 5, 40, 9]),
        settings=PLAIN | dict(wd=0.1),
        base="llama_tied_hd16",
    ),
    lora_tokens_head=SHORT
    | dict(
        seed=117,
        lora=dict(
            r=4, lora_alpha=8, target_modules=QV,
            trainable_token_indices={"embed_tokens": [77, 5, 40], "lm_head": [9, 8]},
        ),
        settings=PLAIN | dict(lora_plus_ratio=4),
    ),
    # Without padding, of which transformers makes NaN in float64 where a window holds nothing else.
    lora_gemma3=SHORT
    | dict(
        seed=119,
        lora=dict(r=4, lora_alpha=8, target_modules=ALL_LINEAR),
        base="gemma3",
        masked=False,
    ),
    lora_granite=SHORT
    | dict(seed=120, lora=dict(r=4, lora_alpha=8, target_modules=ALL_LINEAR), base="granite"),
    # Its sequences have 24 tokens, with which longrope takes its short factors.
    lora_phi3=SHORT
    | dict(seed=121, lora=dict(r=4, lora_alpha=8, target_modules=FUSED), base="phi3_longrope"),
    lora_gemma2=SHORT
    | dict(
        seed=123,
        lora=dict(r=4, lora_alpha=8, target_modules=ALL_LINEAR),
        base="gemma2",
        masked=False,
    ),
    lora_olmo3=SHORT
    | dict(
        seed=122,
        lora=dict(r=4, lora_alpha=8, target_modules=ALL_LINEAR),
        base="olmo3",
        masked=False,
    ),
)  # fmt: skip
NF4_KEYS = {
    *("W", "packed", "absmax", "code", "blocksize", "dequant"),
    *("nested_absmax", "nested_code", "nested_blocksize", "offset"),
}


class NearTie(Exception):
    """Two tokens compete for a place in a greedy generation: take another seed."""


def default_rope(theta=10000.0):
    return dict(rope_type="default", rope_theta=theta)


# name: (the config on top of SHAPE, prompt lengths, a change that must alter the logits visibly:
# so that a reader who ignores the setting fails the test)
TINY = {
    "llama": (dict(num_hidden_layers=3), (5, 16, 40), dict(rope_parameters=default_rope(500.0))),
    "llama3": (
        dict(head_dim=16, rope_parameters=LLAMA3),
        (5, 16, 80),
        dict(rope_parameters=default_rope(500.0)),
    ),
    "llama_linear": (
        dict(rope_parameters=dict(rope_type="linear", rope_theta=10000.0, factor=4.0)),
        (5, 16, 40),
        dict(rope_parameters=default_rope()),
    ),
    "llama_dynamic": (
        dict(
            head_dim=16,
            max_position_embeddings=32,
            rope_parameters=dict(rope_type="dynamic", rope_theta=100.0, factor=2.0),
        ),
        (5, 16, 60),
        dict(rope_parameters=default_rope(100.0)),
    ),
    "llama_yarn": (
        dict(head_dim=16, max_position_embeddings=128, rope_parameters=YARN),
        (5, 16, 100),
        dict(rope_parameters=YARN | dict(attention_factor=1.0)),
    ),
    "llama_yarn_factors": (
        dict(
            head_dim=16,
            max_position_embeddings=128,
            rope_parameters=YARN
            | dict(attention_factor=0.7, beta_fast=4.0, beta_slow=0.5, truncate=False),
        ),
        (5, 16, 60),
        dict(rope_parameters=YARN | dict(attention_factor=0.7, beta_fast=4.0, beta_slow=0.5)),
    ),
    "llama_yarn_mscale": (
        dict(
            head_dim=16,
            max_position_embeddings=128,
            rope_parameters=YARN | dict(mscale=0.7, mscale_all_dim=2.0),
        ),
        (5, 16, 60),
        dict(rope_parameters=YARN),
    ),
    "llama_bias": (
        dict(intermediate_size=44, attention_bias=True, mlp_bias=True),
        (5, 16, 40),
        dict(attention_bias=False),
    ),
    "llama_tied_hd16": (
        dict(head_dim=16, tie_word_embeddings=True),
        (5, 16, 40),
        dict(rms_norm_eps=0.1),
    ),
    "mistral": (
        dict(model_type="mistral", sliding_window=8),
        (5, 16, 40),
        dict(sliding_window=9),
    ),
    "qwen2": (
        QWEN2 | dict(rope_parameters=default_rope(1000000.0)),
        (5, 16, 40),
        dict(rope_parameters=default_rope(10000.0)),
    ),
    "qwen2_window": (
        QWEN2
        | dict(num_hidden_layers=3, use_sliding_window=True, sliding_window=8, max_window_layers=1),
        (5, 16, 40),
        dict(layer_types=["full_attention", "sliding_attention", "full_attention"]),
    ),
    "qwen3": (
        dict(model_type="qwen3", head_dim=16, rms_norm_eps=1e-6, tie_word_embeddings=True),
        (5, 16, 40),
        dict(rms_norm_eps=0.1),
    ),
    "ministral": (
        dict(
            model_type="ministral",
            head_dim=16,
            sliding_window=8,
            layer_types=["full_attention", "sliding_attention"],
        ),
        (5, 16, 40),
        dict(layer_types=["sliding_attention", "full_attention"]),
    ),
    "smollm3": (
        dict(model_type="smollm3", num_hidden_layers=3, no_rope_layer_interval=2, pad_token_id=0),
        (5, 16, 40),
        dict(no_rope_layers=[1, 1, 1]),
    ),
    "granite": (
        dict(
            model_type="granite",
            embedding_multiplier=3.0,
            attention_multiplier=0.2,
            residual_multiplier=0.6,
            logits_scaling=2.0,
        ),
        (5, 16, 40),
        dict(attention_multiplier=0.35),
    ),
    "gemma3": (
        dict(
            model_type="gemma3_text",
            num_hidden_layers=3,
            head_dim=16,
            query_pre_attn_scalar=24,
            sliding_window=8,
            sliding_window_pattern=3,
            rope_parameters=dict(
                full_attention=dict(rope_type="linear", rope_theta=500.0, factor=4.0),
                sliding_attention=default_rope(100.0),
            ),
        ),
        (5, 16, 40),
        dict(
            rope_parameters=dict(
                full_attention=dict(rope_type="linear", rope_theta=500.0, factor=4.0),
                sliding_attention=default_rope(500.0),
            )
        ),
    ),
    "phi3": (
        dict(
            model_type="phi3",
            pad_token_id=0,
            sliding_window=8,
            rope_parameters=default_rope(100.0) | dict(partial_rotary_factor=0.5),
        ),
        (5, 16, 40),
        dict(rope_parameters=default_rope(100.0) | dict(partial_rotary_factor=1.0)),
    ),
    # The second prompt becomes longer than 24 tokens while it is continued.
    "phi3_longrope": (
        dict(
            model_type="phi3",
            pad_token_id=0,
            tie_word_embeddings=True,
            original_max_position_embeddings=24,
            rope_parameters=LONGROPE,
        ),
        (5, 16, 40),
        dict(rope_parameters=LONGROPE | dict(long_factor=[1.2, 2.5, 3.0])),
    ),
    "ministral3": (
        dict(
            model_type="ministral3",
            head_dim=16,
            max_position_embeddings=128,
            rope_parameters=MINISTRAL3,
        ),
        (5, 16, 100),
        dict(rope_parameters=MINISTRAL3 | dict(llama_4_scaling_beta=0.3)),
    ),
    "gemma": (
        dict(model_type="gemma", head_dim=16),
        (5, 16, 40),
        dict(hidden_act="silu"),
    ),
    "seed_oss": (
        dict(model_type="seed_oss", attention_out_bias=False, head_dim=16),
        (5, 16, 40),
        dict(attention_bias=False),
    ),
    "olmo2": (
        dict(model_type="olmo2", rope_parameters=default_rope(500.0)),
        (5, 16, 40),
        dict(rms_norm_eps=0.1),
    ),
    "olmo3": (
        dict(
            model_type="olmo3",
            num_hidden_layers=3,
            head_dim=16,
            max_position_embeddings=128,
            sliding_window=8,
            layer_types=["sliding_attention", "full_attention", "sliding_attention"],
            rope_parameters=dict(full_attention=YARN, sliding_attention=default_rope(500000.0)),
        ),
        (5, 16, 40),
        dict(rope_parameters=dict(full_attention=YARN, sliding_attention=YARN)),
    ),
    # Both caps are low enough to change the logits visibly.
    "gemma2": (
        dict(
            model_type="gemma2",
            num_hidden_layers=3,
            head_dim=16,
            query_pre_attn_scalar=24,
            sliding_window=8,
            attn_logit_softcapping=3.0,
            final_logit_softcapping=20.0,
            rope_parameters=default_rope(100.0),
        ),
        (5, 16, 40),
        dict(attn_logit_softcapping=4.0),
    ),
    "exaone4": (
        dict(
            model_type="exaone4",
            num_hidden_layers=3,
            sliding_window=8,
            sliding_window_pattern=3,
            rope_parameters=default_rope(500.0),
        ),
        (5, 16, 40),
        dict(layer_types=["full_attention", "sliding_attention", "full_attention"]),
    ),
    "cwm": (
        dict(model_type="cwm", head_dim=16, sliding_window=8, rope_parameters=LLAMA3),
        (5, 16, 40),
        dict(layer_types=["sliding_attention", "full_attention"]),
    ),
}

STORIES_PROMPTS = (
    "",
    "Once upon a time",
    "Lily and Ben went to the zoo with their dad. They saw a big lion and",
    "One day, a boy named Tim found a shiny stone in the park. He wanted to show it to his mom, so"
    ' he put it in his bag and ran home. When he got home, his mom said, "What',
)


def tiny_config(changes):
    settings = SHAPE | dict(rope_parameters=default_rope()) | changes
    # The config object keeps (and completes) the dict it is given, which several models share.
    settings["rope_parameters"] = copy.deepcopy(settings["rope_parameters"])
    config = AutoConfig.for_model(settings.pop("model_type", "llama"), **settings)
    config.dtype = torch.float32
    return config


def build(config, state=None):
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").float().eval()
    if state is not None:
        # Not strict: a config without biases reads the weights of one with biases.
        model.load_state_dict(state, strict=False)
    return model


def randomize(model, seed):
    """Weights large enough that a wrong rope, mask, bias or norm shows in the logits."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in sorted(model.named_parameters()):
            if name.endswith("bias"):
                weight.normal_(0, 0.2, generator=generator)
            elif "norm" in name:
                weight.uniform_(0.5, 1.5, generator=generator)
            else:
                weight.normal_(0, 0.5 if "embed" in name else 0.25, generator=generator)


def v4_config(name, config):
    """The same settings in the words of transformers 4: rope_theta, rope_scaling, torch_dtype."""
    old = json.loads(config.to_json_string(use_diff=False))
    rope = old.pop("rope_parameters")
    if name == "gemma3":
        old["rope_local_base_freq"] = rope["sliding_attention"]["rope_theta"]
        old["sliding_window_pattern"] = old.pop("_sliding_window_pattern")
    if name in ("gemma3", "olmo3"):
        rope = rope["full_attention"]
    old["rope_theta"] = rope.pop("rope_theta")
    if name.startswith("phi3"):
        old["partial_rotary_factor"] = rope.pop("partial_rotary_factor")
    old["rope_scaling"] = None if rope["rope_type"] == "default" else rope
    if name == "phi3_longrope":
        factors = {key: rope[key] for key in rope if "_factor" in key}
        old["rope_scaling"] = {"type": "longrope"} | factors
    if name in ("llama_linear", "llama_yarn"):  # the oldest form says `type`
        rope["type"] = rope.pop("rope_type")
    if name == "llama_dynamic":  # transformers 4.45 saved both
        rope["type"] = rope["rope_type"]
    old["torch_dtype"] = old.pop("dtype")
    old["transformers_version"] = "4.46.0"
    if name not in ("ministral", "olmo3"):
        old.pop("layer_types", None)
    if name in ("qwen2", "qwen3"):  # released Qwen files name a window that is switched off
        old["sliding_window"] = 4096
    if old.get("head_dim") == old["hidden_size"] // old["num_attention_heads"]:
        del old["head_dim"]
    if name != "llama3":  # llama3 keeps the boilerplate that a full dump has
        defaults = json.loads(transformers.PretrainedConfig().to_json_string(use_diff=False))
        kept = ("architectures", "bos_token_id", "eos_token_id", "tie_word_embeddings")
        for key in defaults:
            if key in old and key not in (*kept, "transformers_version", "model_type"):
                del old[key]
    return old


@torch.no_grad()
def logits_of(model, ids, mask=None):
    """[B, T, V] float32 of one full forward, as if it were the first one the model ever made."""
    reset_rope(model)
    return plain_logits(model, ids, mask)


@torch.no_grad()
def plain_logits(model, ids, mask=None):
    ids = torch.as_tensor(np.asarray(ids), dtype=torch.long)
    mask = None if mask is None else torch.as_tensor(np.asarray(mask), dtype=torch.long)
    more = {}
    if mask is not None and getattr(model.config, "model_type", "") == "ministral3":
        # Its positions are not relative: those that generate() passes begin after the padding.
        more["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)
    return model(input_ids=ids, attention_mask=mask, use_cache=False, **more).logits.float().numpy()


def reset_rope(model):
    # `dynamic` rope is stateful in transformers: after a long input, a shorter one is still rotated
    # with the frequencies of the long one.
    inner = getattr(model, "base_model", model)
    inner = getattr(inner, "model", inner)
    inner = getattr(inner, "model", inner)
    inner.rotary_emb = type(inner.rotary_emb)(model.config)


@torch.no_grad()
def greedy(model, ids, num_new):
    """(prompt + greedy tokens, smallest top-1/top-2 gap); by full forwards and by the KV cache."""
    full, gaps = list(ids), []
    for _ in range(num_new):
        best = np.sort(row := logits_of(model, [full])[0, -1])
        gaps.append(best[-1] - best[-2])
        full.append(int(row.argmax()))
    reset_rope(model)
    cached, cache, step = list(ids), None, torch.tensor([list(ids)])
    turn = getattr(model.config, "original_max_position_embeddings", None)
    for _ in range(num_new):
        if turn and len(cached) == turn + 1:  # as generate() of Phi-3 does
            cache, step = None, torch.tensor([cached])
        out = model(input_ids=step, past_key_values=cache, use_cache=True)
        cache, token = out.past_key_values, int(out.logits[0, -1].argmax())
        cached.append(token)
        step = torch.tensor([[token]])
    if full != cached:
        raise SystemExit(f"full {full} and cached {cached} generation differ")
    return np.array(full, np.int32), np.float32(min(gaps))


def record(model, prompts, num_new, longest_gen=None, least_margin=MARGIN):
    """{array name: array} for one model: see README.md."""
    arrays = {}
    exact = copy.deepcopy(model).double()
    for i, ids in enumerate(prompts):
        logits = logits_of(model, [ids])[0]
        error = np.abs(logits - logits_of(exact, [ids])[0]).max()
        if error > 1e-4:
            raise SystemExit(f"float32 and float64 differ by {error}")
        arrays[f"prompt{i}_ids"] = np.array(ids, np.int32)
        arrays[f"prompt{i}_logits"] = logits
        if longest_gen is None or len(ids) + num_new <= longest_gen:
            arrays[f"gen{i}_ids"], margin = greedy(model, ids, num_new)
            arrays[f"gen{i}_margin"] = margin
            if margin < least_margin:
                raise NearTie
    seq_len = max(map(len, prompts))
    pad = np.zeros((len(prompts), seq_len), np.int32)
    mask = np.zeros_like(pad)
    for row, ids in enumerate(prompts):
        pad[row, seq_len - len(ids) :] = ids
        mask[row, seq_len - len(ids) :] = 1
    logits = logits_of(model, pad, mask)
    # What stands at a padded position means nothing: 0 keeps the file small.
    arrays |= dict(pad_ids=pad, pad_mask=mask)
    arrays["pad_logits"] = np.where(mask[..., None] == 1, logits, np.float32(0))
    return arrays


def save_npz(path, arrays):
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(path, **arrays)


def save_json(path, content):
    path.write_text(json.dumps(content, indent=1) + "\n")


def make_tiny(name, seed):
    changes, lengths, contrast = TINY[name]
    config = tiny_config(changes)
    model = build(config)
    randomize(model, seed)
    folder = MODELS / name
    shutil.rmtree(folder, ignore_errors=True)
    model.save_pretrained(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)
    old = v4_config(name, config)
    save_json(folder / "config.v4.json", old)

    rng = np.random.default_rng(seed)
    prompts = [rng.integers(3, VOCAB, length).tolist() for length in lengths]
    dynamic = config.rope_parameters.get("rope_type") == "dynamic"
    longest = config.max_position_embeddings if dynamic else None
    arrays = record(model, prompts, NUM_NEW, longest)
    if dynamic and len(prompts[-1]) <= longest:
        raise SystemExit("the long prompt must go beyond max_position_embeddings")

    last = len(prompts) - 1
    expected = arrays[f"prompt{last}_logits"]
    state = model.state_dict()
    from_old = build(type(config).from_dict(dict(old)), state)
    if np.abs(logits_of(from_old, [prompts[last]])[0] - expected).max() != 0:
        raise SystemExit(f"{name}: config.v4.json means another model")
    changed = build(tiny_config(changes | contrast), state)
    effect = np.abs(logits_of(changed, [prompts[last]])[0] - expected).max()
    if effect < 0.05:
        raise SystemExit(f"{name}: {contrast} changes the logits by {effect} only")
    save_npz(HERE / f"{name}.npz", arrays)
    margins = [float(arrays[key]) for key in arrays if key.endswith("margin")]
    print(
        f"{name}: logits std {expected.std():.2f}, effect of the contrast {effect:.2f},"
        f" smallest margin {min(margins):.4f}"
    )


def make_stories():
    folder = MODELS / "stories260K"
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    prompts = [tokenizer(text)["input_ids"] for text in STORIES_PROMPTS]
    arrays = record(model, prompts, 100, least_margin=0)
    for i, text in enumerate(STORIES_PROMPTS):
        arrays[f"prompt{i}_text"] = np.array(text)
    save_npz(HERE / "stories260K.npz", arrays)
    print("stories260K:", [len(ids) for ids in prompts], "tokens")


def load_base(name="llama"):
    return AutoModelForCausalLM.from_pretrained(
        MODELS / name, dtype=torch.float32, attn_implementation="eager"
    ).eval()


def save_adapter(model, folder, **how):
    shutil.rmtree(folder, ignore_errors=True)
    model.save_pretrained(folder, **how)
    (folder / "README.md").unlink(missing_ok=True)
    # PEFT writes its sets in the order of their hashes, which changes from run to run.
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text())
    if not isinstance(config["target_modules"], str):
        config["target_modules"] = sorted(config["target_modules"])
    path.write_text(json.dumps(config, indent=2, sort_keys=True))


def random_batches(seed, num_steps, masked, batch=4, seq_len=24):
    """Tokens that lean on their predecessor, so that there is something to learn."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(3, VOCAB, (num_steps, batch, seq_len))
    for t in range(1, seq_len):
        follow = 3 + (5 * ids[..., t - 1] + 7) % (VOCAB - 3)
        ids[..., t] = np.where(rng.random(ids.shape[:2]) < 0.7, follow, ids[..., t])
    labels, mask = ids.copy(), np.ones_like(ids)
    if masked:  # a prompt without loss, then the answer, then padding on the right
        for row in np.ndindex(num_steps, batch):
            prompt, end = rng.integers(2, 8), rng.integers(10, seq_len + 1)
            labels[row][:prompt] = -100
            labels[row][end:] = -100
            ids[row][end:] = 0
            mask[row][end:] = 0
    return {
        "input_ids": ids.astype(np.int32),
        "labels": labels.astype(np.int32),
        "attention_mask": mask.astype(np.int32),
    }


def torch_batch(batches, step):
    return {key: torch.tensor(value[step], dtype=torch.long) for key, value in batches.items()}


def trainable(model):
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def train(model, batches, settings, folder=None):
    """Losses, gradient norms before clipping and learning rates of each step."""
    params = trainable(model)
    how = dict(lr=settings["lr"], betas=(0.9, 0.999), eps=1e-8, weight_decay=settings["wd"])
    if ratio := settings.get("lora_plus_ratio"):
        optimizer = create_loraplus_optimizer(
            model, torch.optim.AdamW, loraplus_lr_ratio=ratio, **how
        )
    else:
        optimizer = torch.optim.AdamW(params.values(), **how)
    num_steps = len(batches["input_ids"])
    if settings["sched"] == "cosine":
        schedule = transformers.get_cosine_schedule_with_warmup(
            optimizer, settings["warmup"], num_steps
        )
    else:
        schedule = transformers.get_constant_schedule(optimizer)
    losses, norms, rates = [], [], []
    for step in range(num_steps):
        loss = model(**torch_batch(batches, step)).loss
        loss.backward()
        limit = settings["clip"] or float("inf")
        norms.append(float(torch.nn.utils.clip_grad_norm_(params.values(), limit)))
        losses.append(loss.item())
        rates.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step == 0 and folder is not None:
            save_adapter(model, folder / "step1_adapter")
    return losses, norms, rates


def adapter_logits(model, batches, prompt):
    """Logits of the first two rows of batch 0, with the adapter attached and merged."""
    ids, mask = batches["input_ids"][0, :2], batches["attention_mask"][0, :2]
    arrays = dict(input_ids=ids, attention_mask=mask, logits=logits_of(model, ids, mask))
    arrays["gen_ids"], arrays["gen_margin"] = greedy(model, prompt, NUM_NEW)
    merged = copy.deepcopy(model).merge_and_unload()
    arrays["merged_logits"] = logits_of(merged, ids, mask)
    for name in ("logits", "merged_logits"):
        arrays[name] = np.where(mask[..., None] == 1, arrays[name], np.float32(0))
    return arrays


def make_lora(name, seed, lora, settings, masked, base="llama", num_steps=12):
    folder = HERE / name
    batches = random_batches(seed, num_steps=num_steps, masked=masked)
    save_npz(folder / "batches.npz", batches)
    torch.manual_seed(seed)
    config = peft.LoraConfig(task_type="CAUSAL_LM", **lora)
    model = peft.get_peft_model(load_base(base), config).eval()
    model.peft_config["default"].base_model_name_or_path = base
    save_adapter(model, folder / "init_adapter")
    exact = copy.deepcopy(model).double()

    model(**torch_batch(batches, 0)).loss.backward()
    save_npz(folder / "step0_grads.npz", {k: p.grad.numpy() for k, p in trainable(model).items()})
    model.zero_grad()
    losses, norms, rates = train(model, batches, settings, folder)
    losses64, norms64, _ = train(exact, batches, settings)
    # What began as a part of the base is told as a change of the whole base.
    changed_base = lora.get("init_lora_weights") in ("pissa", "olora")
    if changed_base:
        save_adapter(model, folder / "unconverted_adapter")
    how = {"path_initial_model_for_weight_conversion": folder / "init_adapter"}
    save_adapter(model, folder / "final_adapter", **how if changed_base else {})
    save_npz(folder / "eval_logits.npz", adapter_logits(model, batches, [1, 10, 20]))
    with torch.no_grad():
        after = float(model(**torch_batch(batches, 0)).loss)
        after64 = float(exact(**torch_batch(batches, 0)).loss)
    content = dict(
        run=name,
        base=base,
        config=dict(
            lora=lora,
            **settings,
            steps=num_steps,
            betas=[0.9, 0.999],
            eps=1e-8,
            bias_correction=True,
            decoupled_weight_decay=True,
        ),
        loss_fp32=losses,
        loss_fp64=losses64,
        grad_norm_fp32=norms,
        grad_norm_fp64=norms64,
        lr=rates,
        eval_loss_batch0_after=after,
        eval_loss_batch0_after_fp64=after64,
        max_abs_fp32_fp64=max(abs(a - b) for a, b in zip(losses, losses64, strict=True)),
        versions=dict(
            torch=torch.__version__, transformers=transformers.__version__, peft=peft.__version__
        ),
    )
    save_json(folder / "golden.json", content)
    print(
        f"{name}: loss {losses[0]:.3f} -> {losses[-1]:.3f}, batch 0 after: {after:.3f},"
        f" norms {min(norms):.2f}..{max(norms):.2f}, fp64 {content['max_abs_fp32_fp64']:.1e}"
    )


def make_lora_patterns(seed):
    """Unequal ranks and scales, layers left out, B not zero."""
    folder = HERE / "lora_patterns"
    shutil.rmtree(folder, ignore_errors=True)
    batches = random_batches(seed, num_steps=1, masked=True)
    torch.manual_seed(seed)
    config = peft.LoraConfig(
        task_type="CAUSAL_LM",
        r=4,
        lora_alpha=8,
        target_modules=["q_proj", "v_proj", "down_proj"],
        layers_to_transform=[0, 2],
        rank_pattern={r"layers\.2\.self_attn\.q_proj": 6, "down_proj": 2},
        alpha_pattern={"v_proj": 3, r"2\.mlp\.down_proj": 5},
    )
    model = peft.get_peft_model(load_base(), config).eval()
    model.peft_config["default"].base_model_name_or_path = "llama"
    base_logits = logits_of(load_base(), batches["input_ids"][0], batches["attention_mask"][0])
    with torch.no_grad():
        for name, param in trainable(model).items():
            if "lora_B" in name:
                param.normal_(0, 0.1)
    save_adapter(model, folder / "adapter")
    loss = model(**torch_batch(batches, 0)).loss
    loss.backward()
    grads = {name: param.grad.numpy() for name, param in trainable(model).items()}
    save_npz(folder / "grads.npz", grads | {"loss": np.float32(loss.item())})
    save_npz(folder / "batches.npz", batches)
    arrays = adapter_logits(model, batches, [1, 10, 20])
    save_npz(folder / "eval_logits.npz", arrays)
    mask = arrays["attention_mask"][..., None]
    effect = np.abs(arrays["logits"] - base_logits[:2] * mask).max()
    spread = np.abs(arrays["logits"] - arrays["merged_logits"]).max()
    shapes = {name.split("layers.")[1]: tuple(p.shape) for name, p in trainable(model).items()}
    print(f"lora_patterns: effect {effect:.2f}, merged differs by {spread:.1e}, {shapes}")


HEADS = dict(  # what is trained of a tied embedding and head; 99: with a larger vocabulary
    save_head=dict(modules_to_save=["lm_head"]),
    save_both=dict(modules_to_save=["embed_tokens", "lm_head"]),
    target_head=dict(target_modules=["q_proj", "lm_head"]),
    target_both_dora=dict(target_modules=["q_proj", "embed_tokens", "lm_head"], use_dora=True),
    tied_save=dict(modules_to_save=["lm_head"], ensure_weight_tying=True),
    tied_target=dict(target_modules=["q_proj", "embed_tokens"], ensure_weight_tying=True),
    tied_target_head=dict(target_modules=["q_proj", "lm_head"], ensure_weight_tying=True),
    plain_99=dict(),
    save_embed_99=dict(modules_to_save=["embed_tokens"]),
    tokens=dict(trainable_token_indices=[9, 5]),
    tokens_of_head=dict(trainable_token_indices={"lm_head": [9, 5]}),
    tokens_of_each=dict(trainable_token_indices={"embed_tokens": [9, 5], "lm_head": [7]}),
    tokens_99=dict(trainable_token_indices=[97, 5]),
)


def make_tied_heads(seed):
    """Adapters of a tied head and embedding, as PEFT saves them, all of them changed at random."""
    folder, name = HERE / "tied_heads", "llama_tied_hd16"
    shutil.rmtree(folder, ignore_errors=True)
    ids = random_batches(seed, num_steps=1, masked=False)["input_ids"][0, :2, :12]
    arrays = {"input_ids": ids}
    generator = torch.Generator().manual_seed(seed)
    for kind, settings in HEADS.items():
        base, size = load_base(name), 99 if kind.endswith("99") else VOCAB
        base.resize_token_embeddings(size)
        settings = dict(target_modules=["q_proj"], layers_to_transform=[1]) | settings
        if not {"embed_tokens", "lm_head"}.isdisjoint(settings["target_modules"]):
            del settings["layers_to_transform"]  # they have no layer
        config = peft.LoraConfig(task_type="CAUSAL_LM", r=2, lora_alpha=4, **settings)
        model = peft.get_peft_model(base, config).eval()
        with torch.no_grad():
            for param in trainable(model).values():
                param.add_(0.05 * torch.randn(param.shape, generator=generator))
        # Where PEFT looks whether the vocabulary was resized.
        model.peft_config["default"].base_model_name_or_path = str(MODELS / name)
        save_adapter(model, folder / kind)
        path = folder / kind / "adapter_config.json"
        path.write_text(path.read_text().replace(str(MODELS / name), name))
        again = load_base(name)
        again.resize_token_embeddings(size)
        loaded = peft.PeftModel.from_pretrained(again, folder / kind).eval()
        arrays[kind] = logits_of(loaded, ids, np.ones_like(ids))
        print(f"tied_heads/{kind}: {sorted(trainable(model))}")
    save_npz(folder / "logits.npz", arrays)


# What Unsloth writes for the language model of any composite model.
UNSLOTH = (
    r"(?:.*?(?:language|text).*?(?:self_attn|attention|attn|mlp|feed_forward|ffn|dense).*?"
    r"(?:k_proj|v_proj|q_proj|out_proj|fc1|fc2|o_proj|gate_proj|up_proj|down_proj).*?)|"
    r"(?:\bmodel\.layers\.[\d]{1,}\.(?:self_attn|attention|attn|mlp|feed_forward|ffn|dense)\."
    r"(?:(?:k_proj|v_proj|q_proj|out_proj|fc1|fc2|o_proj|gate_proj|up_proj|down_proj)))"
)
SMALL = dict(
    vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2, head_dim=8, max_position_embeddings=128,
)  # fmt: skip
VISION = dict(
    hidden_size=8, intermediate_size=12, num_hidden_layers=1, num_attention_heads=2, image_size=8,
    patch_size=4,
)  # fmt: skip
QWEN_VISION = dict(
    depth=1, hidden_size=8, intermediate_size=12, num_heads=2, patch_size=2, spatial_merge_size=1,
    temporal_patch_size=1,
)  # fmt: skip
# name: (config, its settings, whether its tensors have the names of transformers before 4.52,
# adapters of PEFT)
COMPOSITES = {
    "gemma3": (
        transformers.Gemma3Config,
        dict(
            text_config=SMALL
            | dict(query_pre_attn_scalar=12, sliding_window=4, sliding_window_pattern=2),
            vision_config=VISION | dict(model_type="siglip_vision_model", vision_use_head=False),
            mm_tokens_per_image=4, boi_token_index=37, eoi_token_index=38, image_token_index=39,
        ),
        True,
        dict(
            # q_proj and v_proj are in the vision tower, too.
            names=dict(
                target_modules=["q_proj", "v_proj"],
                rank_pattern={r"^model\.language_model\.layers\.0\..*q_proj": 3},
                modules_to_save=["multi_modal_projector"],
            ),
            unsloth=dict(
                target_modules=UNSLOTH, trainable_token_indices=[9, 5],
                modules_to_save=["input_layernorm"],
            ),
        ),
    ),
    "llava": (
        transformers.LlavaConfig,
        dict(
            text_config=SMALL | dict(model_type="mistral", sliding_window=None),
            vision_config=VISION | dict(model_type="clip_vision_model"),
            image_token_index=39,
        ),
        False,
        dict(
            saved=dict(
                target_modules=r"model\.language_model\.layers\.1\..*(v|up)_proj",
                modules_to_save=["lm_head"],
            ),
        ),
    ),
    "qwen2_5_vl": (
        transformers.Qwen2_5_VLConfig,
        dict(
            text_config=SMALL | dict(
                head_dim=4, bos_token_id=1, eos_token_id=2,
                rope_parameters=default_rope(100.0) | dict(mrope_section=[1, 1, 0]),
            ),
            vision_config=QWEN_VISION | dict(
                out_hidden_size=16, window_size=4, fullatt_block_indexes=[0],
            ),
            image_token_id=39, tie_word_embeddings=True,
        ),
        True,
        # gate_proj is in the vision tower, too.
        dict(names=dict(target_modules=["k_proj", "gate_proj"])),
    ),
    "qwen3_vl": (
        transformers.Qwen3VLConfig,
        dict(
            text_config=SMALL | dict(
                rope_parameters=default_rope(100.0)
                | dict(mrope_section=[2, 1, 1], mrope_interleaved=True),
            ),
            vision_config=QWEN_VISION | dict(
                out_hidden_size=16, num_position_embeddings=16, deepstack_visual_indexes=[0],
            ),
            image_token_id=39,
        ),
        False,
        dict(unsloth=dict(target_modules=UNSLOTH, modules_to_save=["lm_head"])),
    ),
}  # fmt: skip


def flatten(path):
    """config.json as transformers before 4.52 wrote it: what is in text_config is beside it."""
    raw = json.loads(path.read_text())
    text = raw.pop("text_config")
    for key in ("model_type", "dtype", "layer_types", "head_dim"):
        del text[key]
    rope = text.pop("rope_parameters")
    text["rope_theta"] = rope["rope_theta"]
    text["rope_scaling"] = dict(type="mrope", mrope_section=rope["mrope_section"])
    raw["torch_dtype"] = raw.pop("dtype")
    path.write_text(json.dumps(raw | text, indent=2, sort_keys=True) + "\n")


def make_composites(seed):
    """Language models with a vision tower: logits of text, of the base and under adapters."""
    ids = np.random.default_rng(seed).integers(3, 37, (2, 12)).astype(np.int32)
    mask = np.ones_like(ids)
    for name, (kind, settings, old, adapters) in COMPOSITES.items():
        folder = HERE / "composites" / name
        shutil.rmtree(folder, ignore_errors=True)
        base = AutoModelForImageTextToText.from_config(
            kind(**copy.deepcopy(settings)), dtype=torch.float32, attn_implementation="eager"
        ).eval()
        randomize(base, seed)
        base.save_pretrained(folder, save_original_format=old)
        (folder / "generation_config.json").unlink()
        (folder / "preprocessor_config.json").write_text("{}\n")
        arrays = dict(input_ids=ids, logits=plain_logits(base, ids, mask))
        if name == "qwen2_5_vl":
            flatten(folder / "config.json")
            again = AutoModelForImageTextToText.from_pretrained(
                folder, attn_implementation="eager"
            ).eval()
            if not np.array_equal(plain_logits(again, ids, mask), arrays["logits"]):
                raise SystemExit(f"{name}: the flat config.json means another model")
        for adapter, lora in adapters.items():
            generator = torch.Generator().manual_seed(seed)
            config = peft.LoraConfig(task_type="CAUSAL_LM", r=2, lora_alpha=4, **lora)
            model = peft.get_peft_model(copy.deepcopy(base), config).eval()
            with torch.no_grad():
                for param in trainable(model).values():
                    param.add_(0.1 * torch.randn(param.shape, generator=generator))
            model.peft_config["default"].base_model_name_or_path = name
            save_adapter(model, folder / adapter)
            arrays[adapter] = plain_logits(model, ids, mask)
            effect = np.abs(arrays[adapter] - arrays["logits"]).max()
            print(f"composites/{name}/{adapter}: effect {effect:.2f}")
        save_npz(folder / "logits.npz", arrays)


class Mixed(torch.nn.Module):
    """Convolutions over two axes and over one, an embedding, a linear layer, all with biases."""

    def __init__(self):
        super().__init__()
        self.image = torch.nn.Conv2d(3, 6, (3, 2), stride=(2, 1), padding=(1, 0))
        self.text = torch.nn.Embedding(10, 6)
        self.line = torch.nn.Conv1d(6, 5, 3, padding=1)
        self.out = torch.nn.Linear(5, 4)

    def forward(self, image, ids):
        seen = torch.tanh(self.image(image)).mean(dim=2) + self.text(ids).transpose(1, 2)
        return self.out(torch.tanh(self.line(seen)).transpose(1, 2))


def make_lora_mixed(seed):
    """Layers that no LLaMA has, with plain LoRA and with DoRA; B not zero."""
    folder = HERE / "lora_mixed"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    torch.manual_seed(seed)
    base = Mixed()
    inputs = dict(image=torch.randn(2, 3, 8, 7), ids=torch.randint(0, 10, (2, 6)))
    arrays = {name: array.numpy() for name, array in inputs.items()}
    arrays |= {f"base.{name}": array.numpy() for name, array in base.state_dict().items()}
    for name, use_dora in (("plain", False), ("dora", True)):
        config = peft.LoraConfig(
            r=2, lora_alpha=3, target_modules=["image", "text", "line", "out"], use_dora=use_dora
        )
        model = peft.get_peft_model(copy.deepcopy(base), config).eval()
        with torch.no_grad():
            for parameter in trainable(model).values():
                parameter.add_(0.3 * torch.randn(parameter.shape))
        save_adapter(model, folder / name)
        with torch.no_grad():
            arrays[name] = model(**inputs).numpy()
            arrays[f"{name}_merged"] = model.merge_and_unload()(**inputs).numpy()
        print(f"lora_mixed {name}: {np.abs(arrays[name] - arrays[f'{name}_merged']).max():.1e}")
    save_npz(folder / "golden.npz", arrays)


def make_bnb(name, double):
    """stories260K as transformers saves it through bitsandbytes in NF4, and its logits."""
    folder = QUANTISED / name
    config = transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=double,
        bnb_4bit_compute_dtype=torch.float32,
    )
    model = AutoModelForCausalLM.from_pretrained(
        MODELS / "stories260K", dtype=torch.float32, quantization_config=config
    )
    model.save_pretrained(folder)
    for file in ("NOTICE", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        shutil.copy(MODELS / "stories260K" / file, folder)
    with np.load(HERE / "qlora_nf4" / "batches.npz") as arrays:
        ids = arrays["input_ids"][0, :2].astype(np.int32)
    logits = logits_of(dequantized(name), ids, np.ones_like(ids))
    positions = np.arange(3, ids.shape[1], 4)  # enough of them
    arrays = {"input_ids": ids, "positions": positions, "logits": logits[:, positions]}
    save_npz(QUANTISED / f"{name}.npz", arrays)
    print(f"{name}: {len(model.state_dict())} tensors, logits std {logits.std():.2f}")


def dequantized(name):
    """The model with dense weights, decoded by bitsandbytes' code in plain torch.

    Its library for CPUs is wrong where blocks reach from one row into the next (down_proj here).
    """
    from bitsandbytes import functional

    state = safetensors.torch.load_file(QUANTISED / name / "model.safetensors")
    dense = {}
    for key, weight in state.items():
        if f"{key}.absmax" in state:
            parts = {k.removeprefix(f"{key}."): v for k, v in state.items() if f"{key}." in k}
            quantized = functional.QuantState.from_dict(parts, torch.device("cpu"))
            absmax = quantized.absmax
            if quantized.nested:
                nested = quantized.state2
                block = torch.arange(len(absmax)) // nested.blocksize
                absmax = nested.code[absmax.long()] * nested.absmax[block] + quantized.offset
            weight = torch.ops.bitsandbytes.dequantize_4bit.default._op_dk(
                torch._C.DispatchKey.CompositeExplicitAutograd,
                *(weight, absmax, quantized.blocksize, "nf4", quantized.shape, torch.float32),
            )
            dense[key] = weight
        elif not any(key.startswith(f"{other}.") for other in state):
            dense[key] = weight
    config = AutoConfig.from_pretrained(MODELS / "stories260K")
    return build(config, dense | {"lm_head.weight": dense["model.embed_tokens.weight"]})


def make_qlora():
    """PEFT's losses on the NF4 base: its weights are frozen, so dense ones of their values do."""
    folder = HERE / "qlora_nf4"
    with np.load(folder / "batches.npz") as arrays:
        ids = arrays["input_ids"]
    batches = {"input_ids": ids, "labels": ids, "attention_mask": np.ones_like(ids)}
    settings = dict(lr=0.001, wd=0.0, clip=None, sched="constant", warmup=0)
    base = dequantized("stories260K-bnb-nf4")
    model = peft.PeftModel.from_pretrained(base, folder / "init_adapter", is_trainable=True)
    losses, _, _ = train(model.eval(), batches, settings)
    save_json(folder / "golden.json", dict(config=settings, losses=losses))
    print(f"qlora_nf4: loss {losses[0]:.3f} -> {losses[-1]:.3f}")


def make_nf4(source):
    """A few small matrices as bitsandbytes 0.50.2 quantized them; `source` holds many more."""
    kinds = ("nf4", "nf4_dq", "fp4", "fp4_dq")
    cases = [f"{name}_{kind}" for name in ("bf16", "zeros_block", "ragged") for kind in kinds]
    kept = {}
    with np.load(source, allow_pickle=False) as arrays:
        for case in [*cases, "gauss_bs128_nf4_dq"]:
            names = (f"{case}_{key}" for key in NF4_KEYS)
            kept |= {name: arrays[name] for name in names if name in arrays}
            if case.startswith("gauss") or case.endswith("dq"):
                del kept[f"{case}_W"]  # the same as without, or not to be quantized again
    save_npz(HERE / "nf4.npz", kept)


def make_nf4_dq(seed):
    """A matrix in NF4 with double quantization, one block of scales and a third."""
    from bitsandbytes import functional

    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(48, 448, generator=generator).to(torch.float16)
    packed, state = functional.quantize_4bit(weight, quant_type="nf4")
    # As quantize_4bit(compress_statistics=True), but for the kernel: bitsandbytes' library for CPUs
    # rounds to a grid of 2 / 65535 first, and now and then misses the nearest code. Its kernel in
    # plain torch takes the same as the one for GPUs.
    offset = state.absmax.mean()
    nested, nested_absmax = torch.ops.bitsandbytes.quantize_blockwise.default._op_dk(
        torch._C.DispatchKey.CompositeExplicitAutograd,
        state.absmax - offset,
        functional.create_dynamic_map(),
        256,
    )
    table = functional.create_dynamic_map()
    absmax = table[nested.long()] * nested_absmax.repeat_interleave(256)[: len(nested)] + offset
    arrays = dict(
        W=weight,
        packed=packed,
        absmax=nested,
        nested_absmax=nested_absmax,
        offset=offset,
        map=table,
        dequantized_absmax=absmax,
    )
    save_npz(HERE / "nf4_dq.npz", {name: array.numpy() for name, array in arrays.items()})


SAMPLING = (  # settings of transformers' GenerationConfig, and ours of its processors' arguments
    dict(),
    dict(temperature=0.7),
    dict(temperature=1.6, top_k=5),
    dict(top_k=1),
    dict(top_k=500),
    dict(top_p=0.9),
    dict(temperature=0.5, top_p=0.3),
    dict(top_p=1e-4),
    dict(min_p=0.1),
    dict(temperature=2.5, min_p=0.6),
    dict(temperature=1.3, top_k=20, top_p=0.8, min_p=0.2),
    dict(repetition_penalty=1.4),
    dict(repetition_penalty=0.6, temperature=0.8, top_p=0.95),
    dict(presence_penalty=0.9),
    dict(frequency_penalty=0.45, temperature=1.2, top_k=30),
    dict(presence_penalty=-0.5, frequency_penalty=-0.25, repetition_penalty=1.2, top_p=0.7),
    dict(bias=6.0),
    dict(bias=-8.0, repetition_penalty=1.3, top_k=9),
    dict(min_tokens=9),
    dict(min_tokens=8, top_k=10),
    dict(grammar=True),
    dict(grammar=True, min_tokens=20, bias=3.0, repetition_penalty=1.2, presence_penalty=0.4,
         frequency_penalty=0.2, temperature=0.9, top_k=25, top_p=0.9, min_p=0.05),
    dict(top_k=10, ties=True),
    dict(temperature=1.7, min_p=0.5, ties=True),
)  # fmt: skip


class OutputPenalties(transformers.LogitsProcessor):
    """vLLM's presence and frequency penalties, of which transformers has none."""

    def __init__(self, start, presence, frequency):
        self.start, self.presence, self.frequency = start, presence, frequency

    def __call__(self, input_ids, scores):
        counts = torch.zeros_like(scores)
        output = input_ids[:, self.start :]
        counts.scatter_add_(1, output, torch.ones_like(output, dtype=scores.dtype))
        return scores - self.frequency * counts - self.presence * (counts > 0)


def make_sampling(seed):
    """transformers' own list of processors for each settings, before and after its warpers."""
    vocab, num_prompt, num_output, stops = 200, 12, 8, (3, 17, 150)
    model = build(tiny_config({}))
    rng = np.random.default_rng(seed)
    rows = []
    for settings in SAMPLING:
        settings = dict(settings)
        logits = rng.normal(0, 3, vocab).astype(np.float32)
        if settings.pop("ties", False):
            logits = np.round(logits)
        logits[list(stops)] = logits.max() + np.array([1, -2, 0.5], np.float32)
        # So that penalties meet likely tokens, repeated ones, and tokens of both prompt and output.
        likely = np.argsort(-logits)[:40]
        prompt = rng.choice(np.concatenate([likely, np.arange(vocab)]), num_prompt)
        output = rng.choice(np.concatenate([likely[:6], prompt[:3]]), num_output)
        allowed = np.ones(vocab, bool)
        if settings.pop("grammar", False):
            allowed = rng.random(vocab) < 0.4
        biased = rng.choice(likely, 5, replace=False)
        bias = settings.pop("bias", 0.0)
        penalties = [settings.pop(f"{name}_penalty", 0.0) for name in ("presence", "frequency")]
        min_tokens = settings.pop("min_tokens", 0)
        generation = transformers.GenerationConfig(
            do_sample=True,
            num_beams=1,
            min_new_tokens=min_tokens or None,
            eos_token_id=list(stops),
            sequence_bias=[[[int(token)], bias] for token in biased] if bias else None,
            **{"top_k": 0} | settings,
        )
        generation._eos_token_tensor = torch.tensor(stops)
        ids = torch.tensor(np.concatenate([prompt, output]))[None]
        found = []
        for do_sample in (False, True):
            generation.do_sample = do_sample
            processors = model._get_logits_processor(
                generation,
                input_ids_seq_length=num_prompt,
                prefix_allowed_tokens_fn=lambda *_, allowed=allowed: np.flatnonzero(
                    allowed
                ).tolist(),
                logits_processor=[OutputPenalties(num_prompt, *penalties)],
            )
            found.append(processors(ids, torch.tensor(logits)[None])[0].numpy())
        dense_bias = np.zeros(vocab, np.float32)
        dense_bias[biased] = bias
        row = dict(
            logits=logits, prompt=prompt, output=output, bias=dense_bias, allowed=allowed,
            stops=np.array(stops), min_tokens=min_tokens,
            presence_penalty=penalties[0], frequency_penalty=penalties[1],
            repetition_penalty=settings.get("repetition_penalty", 1.0),
            **{name: settings.get(name, default) for name, default in
               (("temperature", 1.0), ("top_k", 0), ("top_p", 1.0), ("min_p", 0.0))},
            edited=found[0], scores=found[1],
        )  # fmt: skip
        rows.append(row)
    save_npz(
        HERE / "sampling.npz", {name: np.stack([row[name] for row in rows]) for name in rows[0]}
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="only these models (default: everything)")
    parser.add_argument("--nf4-from", metavar="FILE", help="npz of bitsandbytes' values")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    for seed, name in enumerate(TINY, start=1):
        if not arguments.names or name in arguments.names:
            for attempt in range(seed, seed + 1000, 100):
                try:
                    make_tiny(name, attempt)
                    break
                except NearTie:
                    continue
            else:
                raise SystemExit(f"{name}: no seed without a near tie")
    # 100 greedy tokens of a real model come closer to a tie than that; its margins are stored.
    if not arguments.names or "stories260K" in arguments.names:
        make_stories()
    for name, settings in LORAS.items():
        if not arguments.names or name in arguments.names:
            make_lora(name, **settings)
    for name, make, seed in (("lora_patterns", make_lora_patterns, 103),
                             ("lora_mixed", make_lora_mixed, 112),
                             ("tied_heads", make_tied_heads, 113),
                             ("composites", make_composites, 121),
                             ("sampling", make_sampling, 114)):  # fmt: skip
        if not arguments.names or name in arguments.names:
            make(seed)
    if not arguments.names:
        all_linears = "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj".split()
        make_lora(
            "lora_qv",
            seed=101,
            lora=dict(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"]),
            settings=dict(lr=0.01, wd=0.0, clip=None, sched="constant", warmup=0),
            masked=False,
        )
        make_lora(
            "lora_all_rslora",
            seed=102,
            lora=dict(r=4, lora_alpha=8, target_modules=all_linears, use_rslora=True),
            settings=dict(lr=0.005, wd=0.01, clip=1.0, sched="cosine", warmup=3),
            masked=True,
        )
        make_lora_patterns(seed=103)
    for name, double in (("stories260K-bnb-nf4", False), ("stories260K-bnb-nf4-dq", True)):
        if not arguments.names or name in arguments.names:
            make_bnb(name, double)
    if not arguments.names or "qlora_nf4" in arguments.names:
        make_qlora()
    if not arguments.names or "nf4_dq" in arguments.names:
        make_nf4_dq(seed=105)
    if arguments.nf4_from:
        make_nf4(arguments.nf4_from)


if __name__ == "__main__":
    main()
