"""Adapts Linen models of other packages, and writes what was measured to docs/tried-models.md.

    pip install -r requirements.txt
    PYTHONPATH=../../..:CHECKOUTS python check.py [part of a name …]

CHECKOUTS: see requirements.txt. Each model is small and has random weights, in float32. Fails if an
adapted model is far from the merged one, in its output or in the gradients of A and B, if fresh
adapters change the output, or if a saved adapter computes something else when it is loaded. With
names, only those models are tried, and nothing is written.
"""

import importlib
import pathlib
import re
import sys
import tempfile
from importlib import metadata

import flax
import jax
import jax.numpy as jnp
import numpy as np
from flax import core, nnx

from lora_jax import linen, lora, peft

PAGE = pathlib.Path(__file__).resolve().parents[3] / "docs" / "tried-models.md"
IDS, MASK = jnp.arange(1, 13).reshape(2, 6), jnp.tril(jnp.ones((2, 6, 6), bool))
TOKENS = jax.random.normal(jax.random.key(0), (2, 6, 16))
IMAGES = jax.random.normal(jax.random.key(1), (2, 16, 16, 3))
SMALL = dict(vocab_size=17, output_vocab_size=17, emb_dim=16, num_heads=2, num_layers=2,
             qkv_dim=16, mlp_dim=32, max_len=16)  # fmt: skip
VIT = dict(patch_size=(4, 4), width=16, depth=2, mlp_dim=32, num_heads=2, head_zeroinit=False)

# ------------------------------------------------------------------------- models


def gemma(generation, **more):
    folder = {3: "gemma.gm.nn", 4: "gemma.gm.nn.gemma4"}[generation]
    their, config, modules = (importlib.import_module(f"{folder}.{name}")
                              for name in ("_transformer", "_config", "_modules"))  # fmt: skip
    kinds = modules.AttentionType
    sizes = dict(
        num_embed=17, embed_dim=16, hidden_dim=32, num_heads=4, head_dim=8, num_kv_heads=2,
        final_logit_softcap=30.0, use_post_attn_norm=True, use_post_ffw_norm=True,
        attention_types=(kinds.LOCAL_SLIDING, kinds.GLOBAL), sliding_window_size=4,
    )  # fmt: skip
    if generation == 4:
        sizes |= dict(num_global_kv_heads=1, global_key_size=8, global_rope_proportion=0.25,
                      local_rope_proportion=1.0)  # fmt: skip
    sizes = config.TransformerConfig(**sizes, **more)
    return their.Transformer(config=sizes, dtype=jnp.float32, tokens=""), (IDS,), {}


def paligemma():
    from big_vision.models.ppp import gemma
    from big_vision.models.proj.paligemma import paligemma
    from ml_collections import ConfigDict

    sizes = dict(width=16, depth=2, mlp_dim=32, num_heads=4, num_kv_heads=1, head_dim=8,
                 norm_eps=1e-6, vocab_size=17)  # fmt: skip
    gemma.get_config = lambda variant: ConfigDict({**sizes, "variant": variant})
    image = ConfigDict({**VIT, "pool_type": "none", "scan": True})
    model = paligemma.Model(img=image, llm=ConfigDict({"variant": "small", "scan": True}))
    return model, (IMAGES, IDS, jnp.ones_like(IDS)), {}


def example(name, cls, *args, settings=None, **kwargs):
    """A model of Flax's examples."""

    def make():
        their = importlib.import_module(f"{name}.models")
        if settings is None:
            own = their.TransformerConfig(
                **{key: size for key, size in SMALL.items()
                   if key in their.TransformerConfig.__dataclass_fields__},
                **{"deterministic": True} if name != "nlp_seq" else {},
            )  # fmt: skip
            return getattr(their, cls)(own), args, kwargs
        return getattr(their, cls)(**settings), args, kwargs

    return make


def theirs(module, cls, settings, *args, **kwargs):
    return lambda: (getattr(importlib.import_module(module), cls)(**settings), args, kwargs)


def diffusion(module, cls, **more):
    sizes = dict(patch_size=4, emb_features=16, num_layers=2, num_heads=2,
                 dtype=jnp.float32, force_fp32_for_softmax=True)  # fmt: skip
    text = jax.random.normal(jax.random.key(2), (2, 5, 12))
    times = jnp.array([0.3, 0.7])
    return theirs(f"flaxdiff.models.{module}", cls, {**sizes, **more}, IMAGES, times, text)


def autoencoder():
    from kauldron.modules import vit

    sizes = dict(num_heads=2, hidden_size=16, num_layers=2, patch_size=4, mlp_size=32)
    return vit.VitAutoEncoder(encoder=vit.VitEncoder.from_spec(**sizes)), (IMAGES,), {}


def scenic_vit():
    from ml_collections import ConfigDict
    from scenic.projects.baselines import vit

    sizes = dict(num_classes=5, mlp_dim=32, num_layers=2, num_heads=2, hidden_size=16)
    return vit.ViT(**sizes, patches=ConfigDict({"size": (4, 4)})), (IMAGES,), {"train": False}


class InNNX(nnx.Module):
    def __init__(self, rngs):
        self.blocks = nnx.List([nnx.Linear(16, 16, rngs=rngs)])
        self.heads = nnx.LinearGeneral(16, (2, 4), rngs=rngs)

    def __call__(self, x):
        return self.heads(jnp.tanh(self.blocks[0](x)))


ALL, ONE_HOT = "all-linear", jax.nn.one_hot(IDS, 17)
PARTS = ("q_einsum", "kv_einsum", "attn_vec_einsum", "gating_einsum", "linear", "input_embedding")
LSTM = dict(embedding_size=16, hidden_size=8, vocab_size=17, output_size=2, dropout_rate=0.0,
            word_dropout_rate=0.0, deterministic=True)  # fmt: skip
EXPERTS = dict(enable_moe=True, num_experts=4, expert_dim=16, top_k_experts=2,
               moe_dense_hidden_dim=32)  # fmt: skip
CASES = [  # name, package, how to make it and its arguments, targets
    ("Gemma3", "gemma", lambda: gemma(3), ALL),
    ("Gemma3, embedding and all einsums by name", "gemma", lambda: gemma(3), PARTS),
    ("Gemma4, inputs per layer", "gemma", lambda: gemma(4, per_layer_input_dim=8), ALL),
    ("Gemma4, experts", "gemma", lambda: gemma(4, **EXPERTS), ALL),
    ("VitAutoEncoder", "kauldron", autoencoder, ALL),
    ("UViT", "flaxdiff", diffusion("simple_vit", "UViT"), ALL),
    ("SimpleDiT", "flaxdiff", diffusion("simple_dit", "SimpleDiT"), ALL),
    ("SimpleMMDiT", "flaxdiff", diffusion("simple_mmdit", "SimpleMMDiT"), ALL),
    ("ViT, scan and remat", "big_vision",
     theirs("big_vision.models.vit", "_Model",
            {**VIT, "num_classes": 5, "pool_type": "map", "scan": True}, IMAGES), ALL),
    ("MlpMixer", "big_vision",
     theirs("big_vision.models.mlp_mixer", "MlpMixer",
            dict(num_classes=5, patch_size=(4, 4), num_blocks=2, hidden_dim=16, tokens_mlp_dim=8,
                 channels_mlp_dim=32), IMAGES), ALL),
    ("PaliGemma, scan and remat", "big_vision", paligemma, (*PARTS, "query", "value")),
    ("ViT", "scenic", scenic_vit, ALL),
    ("lm1b", "flax examples", example("lm1b", "TransformerLM", IDS), ALL),
    ("wmt", "flax examples", example("wmt", "Transformer", IDS, IDS), ALL),
    ("nlp_seq", "flax examples", example("nlp_seq", "Transformer", inputs=IDS, train=False), ALL),
    ("seq2seq", "flax examples",
     example("seq2seq", "Seq2seq", ONE_HOT, ONE_HOT, rngs={"lstm": jax.random.key(3)},
             settings=dict(teacher_force=True, hidden_size=8, vocab_size=17)), ALL),
    ("sst2", "flax examples",
     example("sst2", "TextClassifier", IDS, jnp.array([6, 4]), settings=LSTM),
     ("hf", "if", "keys", "output_layer", "embedding")),
    ("ppo", "flax examples",
     example("ppo", "ActorCritic", jnp.tile(IMAGES[..., :1], (1, 6, 6, 4))[:, :84, :84],
             settings=dict(num_outputs=4)), ".*"),
    ("bridge.ToLinen of NNX", "flax", lambda: (nnx.bridge.to_linen(InNNX), (TOKENS,), {}), ALL),
]  # fmt: skip

# ------------------------------------------------------------------------- measuring


def floats(tree):
    return [leaf for leaf in jax.tree.leaves(tree)
            if hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jnp.floating)]  # fmt: skip


def far(found, expected):
    """The largest difference, relative to the largest number."""
    found, expected = (np.concatenate([np.ravel(leaf) for leaf in floats(tree)])
                       for tree in (found, expected))  # fmt: skip
    return float(np.abs(found - expected).max() / np.abs(expected).max())


def moved(tree, scale=0.05):
    """The arrays plus noise: some models begin with zeros."""
    noise = np.random.default_rng(0)

    def plus(p):
        return p + jnp.asarray(scale * noise.normal(size=p.shape), p.dtype)

    return jax.tree.map(plus, tree)


def measured(name, package, make, targets):
    module, args, kwargs = make()
    rngs, settings = kwargs.pop("rngs", None), lora.LoRAConfig(rank=2, targets=targets)
    keys = {"params": jax.random.key(0), **(rngs or {})}
    given = core.unfreeze(jax.jit(lambda: module.init(keys, *args, **kwargs))())
    given["params"] = moved(given["params"])

    def run(adapted, variables):
        return floats(adapted.apply(variables, *args, rngs=rngs, **kwargs))

    def plain(params):
        return floats(module.apply({**given, "params": params}, *args, rngs=rngs, **kwargs))

    def compared(quant):
        """(adapted, variables, how far output and gradients are from the merged function's,
        output, how far fresh adapters are from the dense base)"""
        adapted = linen.adapt(module, settings, *args, quant=quant, **kwargs)
        variables = adapted.init(jax.random.key(1), given)
        trained = moved(variables["lora"])

        def loss(forward):
            def of(trained):
                y = forward(trained)
                return sum(jnp.square(jnp.sin(leaf)).mean() for leaf in y), y

            return jax.grad(of, has_aux=True)

        @jax.jit
        def all_of(trained, variables):
            with_lora = lambda own: {**variables, "lora": own}  # noqa: E731
            return (
                loss(lambda own: run(adapted, with_lora(own)))(trained),
                loss(lambda own: plain(adapted.merge(with_lora(own))))(trained),
                run(adapted, variables),
                plain(given["params"]),
            )

        ours, merged, fresh, dense = all_of(trained, variables)
        errors = far(ours[1], merged[1]), far(ours[0], merged[0])
        assert errors[0] < 1e-5 and errors[1] < 1e-4, (name, quant, errors)
        assert quant != "none" or far(fresh, dense) < 1e-5, name
        return adapted, {**variables, "lora": trained}, errors, ours[1], far(fresh, dense)

    adapted, variables, (merged, gradients), y, _ = compared("none")
    with tempfile.TemporaryDirectory() as folder:
        peft.write(folder, adapted.collect(variables))
        adapter = peft.read(folder)
        loaded = linen.adapt(module, adapter.config, *args, strict=False, **kwargs)
        again = jax.jit(lambda given: run(loaded, given))(loaded.attach(given, adapter))
        assert far(again, y) < 1e-5, name
    int4 = compared("int4")[-1]
    whole = sum("computed as" in line for line in str(adapted).splitlines())
    version = f" {metadata.version(package)}" if package in VERSIONED else ""
    row = [name, package + version, len(adapted.layer_configs), whole, len(adapted.left),
           f"{merged:.0e}", f"{gradients:.0e}", f"{int4:.3f}"]  # fmt: skip
    return "| " + " | ".join(map(str, row)) + " |"


def main(names):
    rows = []
    for case in CASES:
        if not names or any(name in case[0] for name in names):
            rows.append(measured(*case))
            print(rows[-1], flush=True)
    if not names:
        head = HEAD.format(jax=jax.__version__, flax=flax.__version__)
        before = re.split(r"\n## Linen models\n", PAGE.read_text())[0]
        PAGE.write_text(before.rstrip() + "\n" + head + "\n".join(rows) + "\n")


VERSIONED = ("gemma", "kauldron", "flaxdiff", "flax")
HEAD = """
## Linen models

[tests/others/flax_linen/check.py](../tests/others/flax_linen/check.py) wrote this table in the same
way, with jax {jax} and Flax {flax}. big_vision, scenic and the examples of Flax are checkouts.

"taken" counts weights; a stack of scanned layers is one. "whole" are those among them that take
part as W + s · A B, because the model does not only multiply by them.

| model | package | taken | whole | left | from merged | gradients | int4 from dense |
|---|---|---|---|---|---|---|---|
"""

if __name__ == "__main__":
    main(sys.argv[1:])
