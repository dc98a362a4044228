"""Rows of one batch with different adapters equal the model with each adapter alone."""

import functools
import pathlib

import cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType

from lora_jax import errors
from lora_jax.checkpoints import loader
from lora_jax.generation import pool as pools
from lora_jax.generation import weights as decode_weights
from lora_jax.lora import adapter as lora_adapter
from lora_jax.lora import config as lora_config
from lora_jax.lora import peft
from lora_jax.lora import site as lora_site
from lora_jax.lora.nnx import bank, sites
from lora_jax.models import cache
from lora_jax.parallel import mesh as sharding
from lora_jax.quant import conversion

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"
SLOTS, RANK = 12, 4
ONE = {"data": 1, "fsdp": 1, "tensor": 1}
KINDS = {
    "lora": {"rank": 4, "alpha": 8},
    "rslora": {"rank": 2, "use_rslora": True, "targets": "all-linear"},
    "patterns": {
        "rank": 3, "targets": ("q_proj", "up_proj", "down_proj"), "layers": (1,),
        "rank_pattern": {r"1\.self_attn\.q_proj": 6, "down_proj": 1},
        "alpha_pattern": {"up_proj": 5},
    },
    "large": {"rank": 9, "targets": ("o_proj", "gate_proj")},  # three slots
    "dora": {"rank": 3, "use_dora": True, "targets": "all-linear"},
    "large_dora": {"rank": 7, "use_dora": True, "targets": ("k_proj", "down_proj"), "layers": (1,)},
}  # fmt: skip


@functools.cache
def base(quantization="none", dtype="float32", mesh=None):
    """A LLaMA with biases on all linear layers."""
    mesh = mesh or sharding.make_mesh(ONE)
    how = {"quantization": quantization, "search": False, "mesh": mesh}
    return nnx.split(loader.load(GOLDEN / "models" / "llama_bias", dtype=dtype, **how))


def fresh(*how):
    return nnx.merge(*base(*how), copy=True)


@functools.cache
def adapter(kind):
    return drawn(lora_config.LoRAConfig(**KINDS[kind]), sorted(KINDS).index(kind))


def drawn(config, seed):
    """Trained on the unquantized base: of DoRA, the magnitudes are not the lengths."""
    found, rng, factors = list(sites.find(fresh())), np.random.default_rng(seed), {}
    for site, configs in zip(found, lora_site.select(found, config), strict=True):
        weights = np.asarray(site.weight[...]).reshape(-1, site.in_features, site.out_features)
        for weight, name, own in zip(weights, site.names, configs, strict=True):
            if own:
                A, B = (
                    rng.normal(0, 0.3, shape).astype(np.float32)
                    for shape in ((site.in_features, own.rank), (own.rank, site.out_features))
                )
                length = np.linalg.norm(weight + own.scaling * A @ B, axis=0)
                magnitude = length * rng.uniform(0.7, 1.4, len(length)).astype(np.float32)
                factors[name] = lora_adapter.Factors(
                    A, B, magnitude if config.use_dora else None, site.kind
                )
    return lora_adapter.Adapter(config, factors)


FEWER = {("nf4",): ("large_dora",), ("int4", "bfloat16"): ("dora",)}


@functools.cache
def banked(*how):
    """(a model with a bank of all KINDS, or of FEWER, its pool)."""
    model = fresh(*how)
    bank.add(model, slots=SLOTS, rank=RANK)
    pool = pools.Pool(model)
    for kind in FEWER.get(how, KINDS):
        pool.load(kind, adapter(kind))
    return model, pool


# All calls have these sizes, so that each model is compiled once.
WEIGHTS = [*({kind: 1} for kind in KINDS), {}, {"lora": 0.5, "dora": 0.5}]
IDS = jnp.asarray(np.random.default_rng(5).integers(3, 60, (len(WEIGHTS), 9)))


@jax.jit
def call(parts, ids, rows, mask=None):
    with bank.mixture(rows):
        return nnx.merge(*parts)(ids, mask)


@jax.jit
def plain(parts, ids):
    return nnx.merge(*parts)(ids)


@functools.cache
def dense(*how):
    model = fresh(*how)
    if how and how[0] != "none":
        conversion.dequantize_model(model)
    return nnx.split(model)


def alone(own, *how):
    """The logits of IDS with W + s · A B for W, and with DoRA columns as long as its magnitude."""
    model = nnx.merge(*dense(*how), copy=True)
    for site in sites.find(model) if own else ():
        weights = np.array(site.weight[...], np.float32)
        for index, name in zip(np.ndindex(*site.lead), site.names, strict=True):
            if factors := own.factors.get(name):
                weights[index] += own.scaling(name) * factors.A @ factors.B
                if factors.magnitude is not None:
                    weights[index] *= factors.magnitude / np.linalg.norm(weights[index], axis=0)
        site.weight.set_value(jnp.asarray(weights, site.weight.dtype))
    return np.asarray(plain(nnx.split(model), IDS))


def close(found, expected, tolerance):
    found, expected = np.asarray(found), np.asarray(expected)
    error = np.linalg.norm(found - expected) / np.linalg.norm(expected)
    assert error <= tolerance, error


def rows_of(pool, *weights):
    """Rows of a batch, which hold nothing after."""
    leases = [pool.acquire(own) for own in weights]
    for lease in leases:
        pool.release(lease)
    return np.stack([lease.row for lease in leases])


@pytest.mark.parametrize(
    ("how", "tolerance"),
    [
        (("int4",), 1e-5),
        *cases.long((("none",), 1e-5), (("nf4",), 1e-5), (("int4", "bfloat16"), 0.03)),
    ],
)
def test_each_row_equals_its_adapter_alone(how, tolerance):
    (model, pool), kinds = banked(*how), FEWER.get(how, tuple(KINDS))
    rows = rows_of(pool, *(own if own.keys() <= {*kinds} else {} for own in WEIGHTS))
    if how not in FEWER:
        assert [int((row != 0).sum()) for row in rows] == [1, 1, 2, 3, 1, 2, 0, 2]
    found = np.asarray(call(nnx.split(model), IDS, rows))
    base = alone(None, *how)
    for kind in kinds:
        row = WEIGHTS.index({kind: 1})
        expected = alone(adapter(kind), *how)[row]
        close(found[row], expected, tolerance)
        assert np.linalg.norm(expected - base[row]) > 20 * tolerance * np.linalg.norm(base[row])
    close(found[len(KINDS)], base[len(KINDS)], tolerance)


def test_without_weights_a_bank_changes_nothing():
    model, _ = banked("none")
    np.testing.assert_array_equal(plain(nnx.split(model), IDS), alone(None))


def test_decoding_from_second_forms_of_the_weights_equals_the_forward_pass():
    model, pool = banked("int4")
    rows = rows_of(pool, *WEIGHTS)

    @jax.jit
    def decode(parts, ids, rows):
        model = nnx.merge(*parts)
        arrays = decode_weights.derive(model, "dense", len(rows))
        forms = decode_weights.forms(model, "dense", arrays)
        count, length = ids.shape
        last, whole = jnp.full(count, length - 1), jnp.full(count, length)
        with bank.mixture(rows):
            prompt = cache.Place(jnp.zeros_like(last), last, whole)
            _, kv = model.extend(ids[:, :-1], model.empty_cache(count, length), prompt)
            step = cache.Place(last, jnp.ones_like(last), whole)
            hidden, _ = model.extend(ids[:, -1:], kv, step, forms=forms)
            return model.logits(hidden[:, -1])

    parts = nnx.split(model)
    close(decode(parts, IDS, rows), np.asarray(call(parts, IDS, rows))[:, -1], 1e-5)


def test_a_mixture_equals_the_combined_adapter():
    weights = {"lora": 0.7, "rslora": -0.4, "large": 0.3}
    model, pool = banked("none")
    rows = np.repeat(rows_of(pool, weights), len(IDS), axis=0)
    combined = lora_adapter.combined([(adapter(kind), own) for kind, own in weights.items()])
    close(call(nnx.split(model), IDS, rows), alone(combined), 1e-5)


def test_a_mixture_of_dora_adapters_is_that_of_their_changes():
    """On one layer, y − base is Σ w · (y of each − base)."""
    model, pool = banked("none")
    x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 3, 32)).astype(np.float32))

    graphdef, state = nnx.split(model.model.layers.self_attn.k_proj)

    @jax.jit
    def k_proj(state, weights):
        with bank.mixture(weights):
            return nnx.merge(graphdef, jax.tree.map(lambda a: a[1], state))(x)

    one, two = (own[None] for own in rows_of(pool, {"dora": 1}, {"large_dora": 1}))
    base, first, second, both = (
        np.asarray(k_proj(state, own)) for own in (0 * one, one, two, 0.7 * one + 0.3 * two)
    )
    close(both - base, 0.7 * (first - base) + 0.3 * (second - base), 1e-5)


GOLDENS = {
    "llama": ("lora_qv", "lora_all_rslora", "lora_plus", "lora_pissa", "lora_patterns"),
    "llama_bias": ("lora_dora",),
    "gemma3": ("lora_gemma3",),
    "granite": ("lora_granite",),
    "phi3_longrope": ("lora_phi3",),
    "olmo3": ("lora_olmo3",),
    "gemma2": ("lora_gemma2",),
}


@pytest.mark.parametrize("name", ["llama", *cases.long(*sorted({*GOLDENS} - {"llama"}))])
def test_rows_of_one_batch_equal_pefts_logits(name):
    one = sharding.make_mesh(ONE)
    model = loader.load(GOLDEN / "models" / name, dtype="float32", mesh=one)
    bank.add(model, slots=8, rank=4)
    pool, each = pools.Pool(model), []
    for run in GOLDENS[name]:
        folder = "adapter" if run == "lora_patterns" else "final_adapter"
        pool.load(run, GOLDEN / run / folder)
        with np.load(GOLDEN / run / "eval_logits.npz") as golden:
            each.append({key: golden[key] for key in ("input_ids", "attention_mask", "logits")})
    rows = [pool.acquire({run: 1}).row for run in GOLDENS[name] for _ in each[0]["input_ids"]]
    ids, mask, logits = (np.concatenate([own[key] for own in each]) for key in each[0])
    found = np.asarray(call(nnx.split(model), ids, np.stack(rows), mask))
    np.testing.assert_allclose(found[mask == 1], logits[mask == 1], atol=1e-4, rtol=0)


@pytest.mark.long
def test_a_fused_layer_has_two_adapters_in_one_batch():
    folder, one = GOLDEN / "models/phi3_longrope", sharding.make_mesh(ONE)
    adapters = {name: GOLDEN / f"lora_phi3/{name}_adapter" for name in ("step1", "final")}
    expected = []
    for path in adapters.values():
        model = loader.load(folder, dtype="float32", mesh=one)
        peft.load(model, path)
        expected.append(plain(nnx.split(model), IDS[:1]))
    model = loader.load(folder, dtype="float32", mesh=one)
    bank.add(model, slots=2, rank=4)
    pool = pools.Pool(model)
    for name, path in adapters.items():
        pool.load(name, path)
    rows = np.stack([pool.acquire({name: 1}).row for name in adapters])
    found = call(nnx.split(model), np.repeat(IDS[:1], 2, axis=0), rows)
    close(found, np.concatenate(expected), 1e-5)
    assert np.abs(found[0] - found[1]).max() > 0.1


def test_single_tokens_can_have_a_bank():
    """As A and B, in an embedding and a head."""
    model = loader.load(GOLDEN / "models/llama", dtype="float32", mesh=sharding.make_mesh(ONE))
    bank.add(model, slots=3, rank=2, targets=("embed_tokens", "lm_head", "q_proj", "v_proj"))
    pool = pools.Pool(model)
    pool.load("tokens", GOLDEN / "lora_tokens_head/final_adapter")
    with np.load(GOLDEN / "lora_tokens_head/eval_logits.npz") as golden:
        ids, mask, logits = (golden[key] for key in ("input_ids", "attention_mask", "logits"))
    rows = np.repeat(pool.acquire({"tokens": 1}).row[None], len(ids), axis=0)
    found = np.asarray(call(nnx.split(model), ids, rows, mask))
    np.testing.assert_allclose(found[mask == 1], logits[mask == 1], atol=1e-4, rtol=0)


def test_embeddings_and_heads_can_have_a_bank():
    model = fresh()
    bank.add(model, slots=2, rank=4, targets=("embed_tokens", "lm_head", "q_proj"))
    config = lora_config.LoRAConfig(rank=4, targets=("embed_tokens", "lm_head", "q_proj"))
    own = drawn(config, 0)
    pool = pools.Pool(model)
    pool.load("all", own)
    rows = np.repeat(pool.acquire({"all": 1}).row[None], len(IDS), axis=0)
    close(call(nnx.split(model), IDS, rows), alone(own), 1e-5)


@pytest.mark.parametrize("quantization", [*cases.long("none"), "int4"])
def test_eight_devices_equal_one(quantization):
    mesh = sharding.make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    model, pool = banked(quantization)
    expected = call(nnx.split(model), IDS, rows_of(pool, *WEIGHTS))
    with jax.set_mesh(mesh):
        model, pool = banked(quantization, "float32", mesh)
        attention, mlp = model.model.layers.self_attn, model.model.layers.mlp
        for layer, of_A, of_B in (
            (attention.q_proj, "fsdp", "tensor"), (attention.o_proj, "tensor", "fsdp"),
            (mlp.down_proj, "tensor", "fsdp"),
        ):  # fmt: skip
            assert layer.bank_A[...].sharding.spec[1:] == (of_A, None)
            assert layer.bank_B[...].sharding.spec[1:] == (None, of_B)
        found = call(nnx.split(model), IDS, rows_of(pool, *WEIGHTS))
    close(found, expected, 1e-5)


@jax.jit
def call_a(parts, x, rows):
    with bank.mixture(rows):
        return nnx.merge(*parts).a(x)


def test_explicit_meshes_equal_one_device():
    mesh = jax.make_mesh((2, 4), ("data", "tensor"), axis_types=(AxisType.Explicit,) * 2)
    where = jax.sharding.NamedSharding(mesh, jax.P("data", "tensor"))
    x = jnp.asarray(np.random.default_rng(0).normal(size=(4, 3, 16)).astype(np.float32))
    config = lora_config.LoRAConfig(rank=2, targets=("a",), use_dora=True)
    rng = np.random.default_rng(1)
    A, B, magnitude = (rng.normal(size=own).astype(np.float32) for own in ((16, 2), (2, 32), 32))
    own = lora_adapter.Adapter(config, {"a": lora_adapter.Factors(A, B, magnitude)})
    kernel = nnx.Linear(16, 32, rngs=nnx.Rngs(0)).kernel[...]

    def output(kernel, x):
        model = nnx.Dict(a=nnx.eval_shape(lambda: nnx.Linear(16, 32, rngs=nnx.Rngs(0))))
        model.a.kernel.set_value(kernel)
        model.a.bias.set_value(jnp.arange(32.0))
        bank.add(model, slots=3, rank=2, targets=("a",))
        pool = pools.Pool(model)
        pool.load("own", own)
        row = pool.acquire({"own": 0.5}).row
        return call_a(nnx.split(model), x, np.stack([row, 0 * row, row, row]))

    expected = output(kernel, x)
    with jax.set_mesh(mesh):
        rows = jax.sharding.NamedSharding(mesh, jax.P("data"))
        found = output(jax.device_put(kernel, where), jax.device_put(x, rows))
    assert found.sharding.spec == jax.P("data", None, "tensor")
    close(found, expected, 1e-6)


def test_what_cannot_have_a_bank_is_refused_by_name():
    model = nnx.Dict(
        conv=nnx.Conv(3, 4, (3,), rngs=nnx.Rngs(0)), linear=nnx.Linear(4, 4, rngs=nnx.Rngs(0))
    )
    with pytest.raises(errors.UserError, match="conv is a Conv"):
        bank.add(model, slots=2, rank=4, targets=("conv", "linear"))
    own = nnx.Linear(4, 4, promote_dtype=lambda arrays, **_: arrays, rngs=nnx.Rngs(0))
    with pytest.raises(errors.UserError, match="own multiplies by functions of its own"):
        bank.add(nnx.Dict(own=own), slots=2, rank=4, targets=("own",))
    with pytest.raises(errors.UserError, match="q_proj"):
        bank.add(model, slots=2, rank=4, targets=("q_proj",))
    with pytest.raises(errors.UserError, match="0 slots"):
        bank.add(model, slots=0, rank=4, targets=("linear",))
    assert type(model.linear) is nnx.Linear
    bank.add(model, slots=2, rank=4, targets=("linear",))
    with pytest.raises(errors.UserError, match="linear has one"):
        bank.add(model, slots=2, rank=4, targets=("linear",))
    with pytest.raises(ValueError, match=r"expected weights \(5, 2\).*found \(4, 2\)"):
        with bank.mixture(np.zeros((4, 2))):
            model.linear(jnp.ones((5, 4)))


def test_numbers_that_overflow_stay_in_their_row():
    model = nnx.Dict(a=nnx.Linear(4, 4, rngs=nnx.Rngs(0)))
    bank.add(model, slots=2, rank=1, targets=("a",))
    model.a.bank_A[...] = jnp.full((4, 2), jnp.asarray([3e38, 1.0]))
    model.a.bank_B[...] = jnp.ones((2, 4))
    x = jnp.full((2, 4), 10.0)
    with bank.mixture(np.asarray([[1, 0], [0, 1]])):
        found = model.a(x)
    assert not np.isfinite(found[0]).any()
    np.testing.assert_allclose(found[1], model.a(x)[1] + 40, rtol=1e-6)


def test_adapters_in_folders_have_the_same_rows(tmp_path):
    """`peft.write` and back, by the path and with a home folder's sign."""
    peft.write(tmp_path / "own", adapter("patterns"))
    _, pool = banked("none")
    pool.load("again", tmp_path / "own")
    assert pool.digest("again") == pool.digest("patterns")
    pool.unload("again")
