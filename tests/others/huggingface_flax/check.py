"""Adapts Hugging Face's Flax models, whose heads are tied by `.apply` inside the model.

    pip install -r requirements.txt
    PYTHONPATH=../../.. python check.py

Prints a line for each model and format: how far the adapted model is from the merged one, in its
output and in the gradients of A and B. Fails if that is far.
"""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import transformers

from lora_jax.lora import config, linen

IDS = jnp.arange(20).reshape(2, 10) % 17
SMALL = dict(vocab_size=97, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
             intermediate_size=64, max_position_embeddings=32)  # fmt: skip
GPT2 = transformers.GPT2Config(vocab_size=97, n_positions=32, n_embd=32, n_layer=2, n_head=4)
BERT, ROBERTA = transformers.BertConfig(**SMALL), transformers.RobertaConfig(**SMALL)
BART = transformers.BartConfig(
    vocab_size=97, d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4,
    decoder_attention_heads=4, encoder_ffn_dim=64, decoder_ffn_dim=64, max_position_embeddings=32,
)  # fmt: skip
GPTJ = transformers.GPTJConfig(
    vocab_size=97, n_positions=32, n_embd=32, n_layer=2, n_head=4, rotary_dim=4
)
BLOOM = transformers.BloomConfig(vocab_size=97, hidden_size=32, n_layer=2, n_head=4)
OPT = transformers.OPTConfig(
    vocab_size=97, hidden_size=32, num_hidden_layers=2, ffn_dim=64, max_position_embeddings=32,
    num_attention_heads=4, word_embed_proj_dim=32,
)  # fmt: skip
ELECTRA = transformers.ElectraConfig(**SMALL, embedding_size=16)
DISTILBERT = transformers.DistilBertConfig(
    vocab_size=97, dim=32, n_layers=2, n_heads=4, hidden_dim=64, max_position_embeddings=32
)
CASES = [
    ("FlaxGPT2LMHeadModel", GPT2, ("c_attn", "c_proj", "c_fc")),
    ("FlaxGPT2LMHeadModel", GPT2, ("c_attn", "wte")),
    ("FlaxBertForMaskedLM", BERT, ("query", "value", "word_embeddings")),
    ("FlaxRobertaForMaskedLM", ROBERTA, ("query", "value")),
    ("FlaxBartForConditionalGeneration", BART, ("q_proj", "v_proj", "shared")),
    ("FlaxGPTJForCausalLM", GPTJ, "all-linear"),
    ("FlaxBloomForCausalLM", BLOOM, ("query_key_value", "word_embeddings")),
    ("FlaxOPTForCausalLM", OPT, ("q_proj", "v_proj", "embed_tokens")),
    ("FlaxElectraForMaskedLM", ELECTRA, ("query", "embeddings_project", "word_embeddings")),
    ("FlaxDistilBertForMaskedLM", DISTILBERT, ("q_lin", "v_lin", "word_embeddings")),
]


def inputs(model) -> dict:
    mask, positions = jnp.ones_like(IDS), jnp.broadcast_to(jnp.arange(10), IDS.shape)
    if model.config.is_encoder_decoder:
        return {"input_ids": IDS, "attention_mask": mask, "decoder_input_ids": IDS,
                "decoder_attention_mask": mask, "position_ids": positions,
                "decoder_position_ids": positions}  # fmt: skip
    given = {"input_ids": IDS, "attention_mask": mask, "position_ids": positions,
             "token_type_ids": jnp.zeros_like(IDS), "head_mask": None}  # fmt: skip
    taken = inspect.signature(type(model.module).__call__).parameters
    return {name: own for name, own in given.items() if name in taken}


def check(name, settings, targets, quant):
    model = getattr(transformers, name)(settings, seed=0, dtype=jnp.float32)
    args, module = inputs(model), model.module
    own = config.LoRAConfig(rank=4, targets=targets)
    adapted = linen.adapt(module, own, quant=quant, **args)
    variables = adapted.init(jax.random.key(0), model.params)
    noise = np.random.default_rng(0)
    trained = jax.tree.map(lambda p: p + 0.05 * noise.normal(size=p.shape).astype("float32"),
                           variables["lora"])  # fmt: skip

    def loss(logits):
        return jnp.square(jnp.sin(logits)).mean(), logits

    def run(lora):
        return loss(adapted.apply({**variables, "lora": lora}, **args).logits)

    def plain(lora):
        params = adapted.merge({**variables, "lora": lora})
        return loss(module.apply({"params": params}, **args).logits)

    (ours, y), (theirs, z) = (jax.jit(jax.grad(f, has_aux=True))(trained) for f in (run, plain))
    before = module.apply({"params": model.params}, **args).logits
    differ = jax.tree.map(lambda a, b: float(abs(a - b).max()), ours, theirs)
    far = max(jax.tree.leaves(differ))
    effect, error = float(abs(y - before).max()), float(abs(y - z).max())
    through = [line.split()[0] for line in str(adapted).splitlines() if "computed as" in line]
    print(f"{name:34} {quant:5} {len(adapted.layer_configs):2} weights, effect {effect:.2f}, "
          f"from merged {error:.1e}, gradients {far:.1e}; through the weight: "
          f"{', '.join(through) or '-'}")  # fmt: skip
    assert error < 1e-3 < effect and far < 1e-4


for case in CASES:
    for quant in ("none", "int4"):
        check(*case, quant)
