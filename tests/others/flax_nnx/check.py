"""Adapts NNX models of other packages, and writes what was measured to docs/tried-models.md.

The part of that page on Linen models is by ../flax_linen/check.py, and stays.

    pip install -r requirements.txt
    PYTHONPATH=../../.. python check.py

Each model is small and has random weights, in float32. Fails if an adapted model is far from the
merged one, in its output or in the gradients of A and B, if a saved adapter computes something else
when it is loaded, or if anything but A and B is trained.
"""

import functools
import importlib
import os
import pathlib
import tempfile
from importlib import metadata

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"

import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
import qwix
from bijx.nn import nets
from flax import linen as nn
from flax import nnx
from jax.sharding import PartitionSpec as P
from tunix.sft import peft_trainer

from lora_jax import lora, peft, quant

DOCS = pathlib.Path(__file__).resolve().parents[3] / "docs"
IDS = jnp.arange(12).reshape(2, 6) % 7
POSITIONS, MASK = jnp.tile(jnp.arange(6), (2, 1)), jnp.tril(jnp.ones((2, 6, 6), bool))
X = jax.random.normal(jax.random.key(0), (8, 4, 16))
IMAGES = jax.random.normal(jax.random.key(1), (2, 8, 8, 4))
SMALL = dict(num_layers=2, embed_dim=32, hidden_dim=64, num_heads=4, head_dim=8, num_kv_heads=2)
ROPE = dict(vocab_size=7, rope_theta=10_000, norm_eps=1e-5)

# ------------------------------------------------------------------------- models


def tunix(module, name, **settings):
    their = importlib.import_module(f"tunix.models.{module}.model")
    flax.config.update("flax_always_shard_variable", False)  # which importing them sets
    if module == "gemma":
        settings["attention_types"] = (their.AttentionType.GLOBAL,) * 2
    if module == "gemma4":
        kinds = their.AttentionType.LOCAL_SLIDING, their.AttentionType.GLOBAL
        settings["attention_pattern"] = kinds
    if settings.pop("remat", False):
        settings["remat_config"] = their.RematConfig.BLOCK
    return getattr(their, name)(their.ModelConfig(**SMALL, **settings), rngs=nnx.Rngs(0))


class Block(nnx.Module):
    def __init__(self, rngs, mesh_axes=(None, None)):
        up, down = (dict(kernel_metadata={"out_sharding": axes}) if any(mesh_axes) else {}
                    for axes in (mesh_axes, mesh_axes[::-1]))  # fmt: skip
        self.norm = nnx.RMSNorm(16, rngs=rngs)
        self.up = nnx.Linear(16, 32, use_bias=False, rngs=rngs, **up)
        self.down = nnx.Linear(32, 16, use_bias=False, rngs=rngs, **down)

    def __call__(self, x):
        hidden = jnp.tanh(self.up(self.norm(x)))
        return x + self.down(hidden, **self.sharded(x))

    @staticmethod
    def sharded(x):
        on_mesh = jax.sharding.get_abstract_mesh().shape
        return {"out_sharding": jax.typeof(x).sharding.spec} if on_mesh else {}


class Stack(nnx.Module):
    """As MaxText: the layers' parameters have an axis, on which lax.scan slices them."""

    def __init__(self, mesh_axes=(None, None)):
        make = functools.partial(Block, mesh_axes=mesh_axes)
        make = nnx.vmap(make, transform_metadata={nnx.PARTITION_NAME: None})
        self.blocks = nnx.split_rngs(splits=3)(make)(nnx.Rngs(0))

    def __call__(self, x):
        graphdef, params, rest = nnx.split(self.blocks, nnx.Param, ...)

        def step(x, params):
            return nnx.merge(graphdef, params, rest, copy=True)(x), None

        return jax.lax.scan(jax.checkpoint(step), x, params)[0]


def bridged():
    module = nnx.bridge.ToNNX(nn.Sequential([nn.Dense(32), nn.tanh, nn.Dense(4)]), rngs=nnx.Rngs(0))
    return nnx.bridge.lazy_init(module, X)


def recurrent(cell):
    rngs = nnx.Rngs(0)
    return nnx.Sequential(nnx.RNN(cell(16, 32, rngs=rngs)), nnx.Linear(32, 4, rngs=rngs))


def attention():
    return nnx.MultiHeadAttention(4, 16, decode=False, rngs=nnx.Rngs(0))


def convolutions():
    grouped = nnx.Conv(4, 8, (3, 3), feature_group_count=2, rngs=nnx.Rngs(0))
    return nnx.Sequential(grouped, nnx.ConvTranspose(8, 4, (3, 3), strides=2, rngs=nnx.Rngs(1)))


ATTENTION = ("w", "gate_proj", "up_proj", "down_proj")
LM = (IDS, POSITIONS, None, MASK)
BOTH = dict(use_post_attn_norm=True, use_post_ffw_norm=True)
LLAMA = functools.partial(tunix, "llama3", "Llama3", **ROPE)
QWEN2 = functools.partial(tunix, "qwen2", "Qwen2", **ROPE)
QWEN3 = functools.partial(tunix, "qwen3", "Qwen3", **ROPE)
GEMMA = functools.partial(tunix, "gemma", "Gemma", num_embed=7, final_logit_softcap=None, **BOTH)
GEMMA3 = functools.partial(tunix, "gemma3", "Gemma3", num_embed=7, sliding_window_size=4,
                           param_dtype=jnp.float32)  # fmt: skip
GEMMA4 = functools.partial(tunix, "gemma4", "Gemma4", num_embed=7, sliding_window_size=4,
                           global_key_size=8)  # fmt: skip
GEMMA4_EXPERTS = functools.partial(GEMMA4, enable_moe=True, num_experts=4, num_experts_per_tok=2,
                                   expert_dim=16, moe_dense_hidden_dim=32)  # fmt: skip
EXPERTS = functools.partial(QWEN3, num_experts=4, num_experts_per_tok=2)
TIED = (*ATTENTION, "input_embedding")
CASES = [  # name, package, how to make it, its arguments, targets
    ("Llama3", "google-tunix", LLAMA, LM, ATTENTION),
    ("Qwen2, tied head", "google-tunix", lambda: QWEN2(use_tied_embedding=True), LM, TIED),
    ("Qwen3, remat", "google-tunix", lambda: QWEN3(remat=True), LM, ATTENTION),
    ("Qwen3, experts", "google-tunix", EXPERTS, LM, ATTENTION),
    ("Gemma", "google-tunix", GEMMA, LM, ATTENTION),
    ("Gemma3, tied head", "google-tunix", GEMMA3, LM, TIED),
    ("Gemma4, tied head, inputs per layer", "google-tunix",
     lambda: GEMMA4(per_layer_input_dim=8), LM, TIED),
    ("Gemma4, experts", "google-tunix", GEMMA4_EXPERTS, LM, (*TIED, "gating_einsum", "linear")),
    ("MLP", "bijx", lambda: nets.MLP(16, 4, [32, 32], rngs=nnx.Rngs(0)), (X,), "all-linear"),
    ("ConvNet, circular", "bijx", lambda: nets.ConvNet(4, 2, rngs=nnx.Rngs(0)), (IMAGES,), ".*"),
    ("MultiHeadAttention", "flax", attention, (X,), "all-linear"),
    ("RNN of LSTMCell", "flax", lambda: recurrent(nnx.LSTMCell), (X,), "all-linear"),
    ("RNN of GRUCell", "flax", lambda: recurrent(nnx.GRUCell), (X,), "all-linear"),
    ("Conv of 2 groups, ConvTranspose", "flax", convolutions, (IMAGES,), ("0", "1")),
    ("bridge.ToNNX of Linen", "flax", bridged, (X,), "all-linear"),
    ("scanned stack", "flax", Stack, (X,), "all-linear"),
    ("scanned stack, Explicit 2 × 4 mesh", "flax", lambda: Stack((None, "tensor")), (X,),
     "all-linear"),
]  # fmt: skip

# ------------------------------------------------------------------------- measuring


def run(model, args):
    return jax.tree.leaves(nnx.clone(model)(*args))[0]


def far(found, expected):
    """The largest difference, relative to the largest number."""
    found, expected = (np.concatenate([np.ravel(part) for part in jax.tree.leaves(tree)])
                       for tree in (found, expected))  # fmt: skip
    return float(np.abs(found - expected).max() / np.abs(expected).max())


def moved(model, kind, scale=0.05):
    """Adds noise to the variables of that type: some models begin with zeros."""
    noise = np.random.default_rng(0)

    def plus(p):
        own = scale * noise.normal(size=p.shape).astype(p.dtype)
        return p + jax.device_put(own, p.sharding)

    nnx.update(model, jax.tree.map(plus, nnx.state(model, kind)))
    return model


def gradient(model, args, merged):
    graphdef, trained, rest = nnx.split(model, lora.LoRAParam, ...)

    @jax.jit
    @jax.grad
    def of(trained):
        model = nnx.merge(graphdef, trained, rest, copy=True)
        if merged:
            lora.merge(model)
        return jnp.square(jnp.sin(run(model, args))).mean()

    return of(trained)


def by_qwix(make, args):
    """How many weights qwix.apply_lora_to_model adapts."""
    try:
        provider = qwix.LoraProvider(module_path=".*", rank=2, alpha=4.0)
        model = qwix.apply_lora_to_model(make(), provider, *args, rngs=nnx.Rngs(0))
    except Exception as error:
        return type(error).__name__
    return sum(isinstance(node, nnx.LoRAParam) for _, node in nnx.iter_graph(model)) // 2


def measured(name, package, make, args, targets):
    make = functools.partial(lambda make: moved(make(), nnx.Param), make)
    model, packed = make(), make()
    plain = run(model, args)
    kinds = {type(node) for _, node in nnx.iter_graph(model)}
    settings = lora.LoRAConfig(rank=2, targets=targets)
    taken = lora.inject(model, settings, rngs=nnx.Rngs(1))
    assert far(run(model, args), plain) < 1e-5, name
    moved(model, lora.LoRAParam)
    y = run(model, args)
    with tempfile.TemporaryDirectory() as folder:
        peft.save(folder, model, settings)
        loaded = make()
        peft.load(loaded, folder)
        assert far(run(loaded, args), y) < 1e-5, name
    gradients = far(gradient(model, args, False), gradient(model, args, True))
    lora.merge(model)
    merged = far(run(model, args), y)
    assert merged < 1e-5 and gradients < 1e-4 and far(y, plain) > 1e-3, (name, merged, gradients)
    int4 = "–"
    if kinds & {nnx.Linear, nnx.LinearGeneral}:
        quant.quantize_model(packed, "int4")
        int4 = f"{far(run(packed, args), plain):.3f}"
    row = [name, f"{package} {metadata.version(package)}", len(taken), len(taken.left),
           by_qwix(make, args), f"{merged:.0e}", f"{gradients:.0e}", int4]  # fmt: skip
    return "| " + " | ".join(map(str, row)) + " |"


def trained_by_tunix():
    """What Tunix's trainer changes in an adapted model of Tunix's."""
    model = moved(LLAMA(), nnx.Param)
    quant.quantize_model(model, "int4")
    lora.inject(model, lora.LoRAConfig(rank=2, targets=ATTENTION), rngs=nnx.Rngs(1))
    variables = dict(nnx.to_flat_state(nnx.state(model)))
    before = {path: np.array(variable[...]) for path, variable in variables.items()}
    ours = {path for path, variable in variables.items() if isinstance(variable, lora.LoRAParam)}

    ones = jnp.ones_like(IDS)
    losses = [float(peft_trainer._default_loss_fn(model, IDS, ones, POSITIONS, MASK))]
    settings = peft_trainer.TrainingConfig(eval_every_n_steps=100, max_steps=10)
    trainer = peft_trainer.PeftTrainer(model, optax.adam(1e-2), settings)
    given = {"input_tokens": IDS, "input_mask": ones, "positions": POSITIONS,
             "attention_mask": MASK}  # fmt: skip
    trainer = trainer.with_gen_model_input_fn(lambda batch: given)
    trainer.train([peft_trainer.TrainingInput(input_tokens=IDS, input_mask=ones)] * 10)
    losses.append(float(peft_trainer._default_loss_fn(model, IDS, ones, POSITIONS, MASK)))

    after = dict(nnx.to_flat_state(nnx.state(model)))
    changed = {path for path in before if (np.array(after[path][...]) != before[path]).any()}
    assert changed == ours and losses[1] < losses[0]
    return (
        f"Ten steps of Tunix's `PeftTrainer` on Tunix's Llama3 in int4 change {len(changed)} "
        f"arrays, the A and B of {len(ours) // 2} weights, and none of the other "
        f"{len(before) - len(ours)}. The loss goes from {losses[0]:.3f} to {losses[1]:.3f}."
    )


def main():
    rows = []
    for case in CASES:
        if "mesh" in case[0]:
            explicit = (jax.sharding.AxisType.Explicit,) * 2
            mesh = jax.make_mesh((2, 4), ("data", "tensor"), axis_types=explicit)
            with jax.set_mesh(mesh):
                given = (jax.device_put(X, jax.NamedSharding(mesh, P("data"))),)
                rows.append(measured(*case[:3], given, case[4]))
        else:
            rows.append(measured(*case))
        print(rows[-1], flush=True)
    trained = trained_by_tunix()
    print(trained)
    text = HEAD.format(jax=jax.__version__, flax=flax.__version__, qwix=metadata.version("qwix"))
    page = DOCS / "tried-models.md"
    _, mark, linen = page.read_text().partition("\n## Linen models\n")
    page.write_text(text + "\n".join(rows) + "\n\n" + trained + "\n" + mark + linen)


HEAD = """# Tried models

[tests/others/flax_nnx/check.py](../tests/others/flax_nnx/check.py) wrote this table, on CPUs with
jax {jax} and Flax {flax}. The models are small, have random weights, and compute in float32. For
each of them the adapted model is compared with the merged one, in its output and in the gradients
of A and B, and the model in int4 with the dense one. A difference is the largest one, divided by
the largest number. Every adapter computed the same after it was saved and loaded.

"taken" counts pairs of A and B: one for each layer of a stack, and one for each expert. "left" are
the other weights of two axes or more. "qwix" is how many weights of the whole model
`qwix.apply_lora_to_model` {qwix} adapts, with stacks and experts counted once, or the error that it
raises.

| model | package | taken | left | qwix | from merged | gradients | int4 from dense |
|---|---|---|---|---|---|---|---|
"""

if __name__ == "__main__":
    main()
