"""The training step: what it computes, what it does not change, and that it is reproducible."""

import functools
import pathlib
import re

import cases
import datasets
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny_tokenizer
from flax import nnx

from lora_jax import lora, tokenizer
from lora_jax.checkpoints import loader
from lora_jax.data import batches, encoding, packing
from lora_jax.lora import config as lora_config
from lora_jax.lora.nnx import model_state
from lora_jax.optim import adamw
from lora_jax.optim import config as optim_config
from lora_jax.optim import loss as train_loss
from lora_jax.optim import step as train_step
from lora_jax.parallel import mesh as sharding

LLAMA = pathlib.Path(__file__).parents[1] / "golden" / "models" / "llama"
VOCAB, ROWS, TOKENS, MICRO_BATCHES = 96, 8, 16, 2
ADAM = optim_config.OptimConfig(lr=0.01, warmup=0, schedule="constant", weight_decay=0.1)


TARGETS = ("q_proj", "o_proj", "up_proj", "down_proj")


def make_model(mesh=None, quantization="none", seed=0, base=LLAMA, **settings):
    """A tiny model with adapters whose B is not zero, so that A has a gradient."""
    mesh = mesh or sharding.make_mesh({"data": 1, "fsdp": 1, "tensor": 1})
    how = {"quantization": quantization, "search": False, "mesh": mesh}
    model = loader.load(base, dtype="float32", **how)
    config = lora_config.LoRAConfig(**{"rank": 4, "targets": TARGETS, **settings})
    lora.inject(model, config, rngs=nnx.Rngs(seed))
    rng = np.random.default_rng(seed)
    for path, variable in nnx.to_flat_state(nnx.state(model, lora.LoRAParam)):
        new = jnp.asarray(rng.normal(0, 0.1, variable.shape), jnp.float32)
        variable.set_value(new if path[-1] in ("lora_A", "lora_B") else variable[...] + new)
    if config.dropout:
        model.train()
    return model


@functools.cache
def parts(quantization="none", dropout=0.0):
    return model_state.split(make_model(quantization=quantization, dropout=dropout))


def make_step(graphdef, *, seed=0, remat="none", beta=None):
    return train_step.make_step(
        graphdef, adamw.make(ADAM, 10), adamw.schedule(ADAM, 10), seed=seed, remat=remat, beta=beta
    )


def begin(quantization="none", dropout=0.0):
    """A fresh starting state: a step reuses the memory of its state."""
    _, trained, _ = parts(quantization, dropout)
    return train_step.start(jax.tree.map(jnp.copy, trained), adamw.make(ADAM, 10))


@functools.cache
def compiled(quantization="none", dropout=0.0, seed=0):
    """The step's executable, for batches of make_batch's default shape."""
    graphdef, _, frozen = parts(quantization, dropout)
    step = make_step(graphdef, seed=seed)
    return step.lower(begin(quantization, dropout), frozen, make_batch()).compile()


@functools.cache
def make_batch(index=0, micro_batches=MICRO_BATCHES):
    """Sequences with 2 to 15 trained tokens, right padding, and prompts without loss."""
    rng = np.random.default_rng(index)
    ids = rng.integers(3, VOCAB, (ROWS, TOKENS)).astype(np.int32)
    labels, mask = ids.copy(), np.ones_like(ids)
    for row in range(ROWS):
        prompt, end = rng.integers(1, 2 + row), TOKENS - row // 2
        labels[row, :prompt] = encoding.IGNORED
        labels[row, end:] = encoding.IGNORED
        mask[row, end:] = 0
    with jax.ensure_compile_time_eval():  # the first call may be in a traced function
        return train_loss.Batch(*(jnp.asarray(x.reshape(micro_batches, -1, TOKENS))
                             for x in (ids, labels, mask)))  # fmt: skip


def one_micro_batch():
    return jax.tree.map(lambda x: x[0], make_batch(micro_batches=1))


def numpy_loss(logits, labels):
    """(Σ −log p, count), in float64, token by token."""
    total, count = 0.0, 0
    for row, targets in zip(np.asarray(logits, np.float64), np.asarray(labels), strict=True):
        for position, target in enumerate(targets[1:]):
            if target != -100:
                values = row[position]
                total += np.log(np.exp(values - values.max()).sum()) + values.max()
                total -= values[target]
                count += 1
    return total, count


def assert_equal_trees(one, two):
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(two), strict=True):
        np.testing.assert_array_equal(a, b)


def distance(one, two):
    """The largest difference of two trees, relative to the second's largest entry."""
    pairs = zip(jax.tree.leaves(one), jax.tree.leaves(two), strict=True)
    largest = max(float(jnp.abs(b).max()) for b in jax.tree.leaves(two))
    return max(float(np.abs(np.asarray(a) - np.asarray(b)).max()) for a, b in pairs) / largest


def saved(tree):
    """A copy on the host: the step reuses the memory of its state."""
    return jax.tree.map(np.array, tree)


@pytest.fixture(scope="module")
def three_steps():
    """[(state, metrics)] after steps 1 to 3 of one run, on the host."""
    _, _, frozen = parts()
    run = train_step.steps(compiled(), begin(), frozen, make_batch, 3)
    return [(saved(state), metrics) for state, metrics in run]


@pytest.mark.device
def test_loss_is_over_the_labels_that_are_not_ignored():
    graphdef, trained, frozen = parts()
    batch = one_micro_batch()
    merged = nnx.merge(graphdef, trained, frozen.dropout_keys, frozen.base)
    graphdef, state = nnx.split(merged)

    @jax.jit
    def both(state, batch):
        model = nnx.merge(graphdef, state)
        found = train_loss.objective(None)(train_loss.losses(model, batch), None, batch)
        return found, model(batch.input_ids, batch.attention_mask)

    (total, count, _), logits = both(state, batch)
    expected, expected_count = numpy_loss(logits, batch.labels)
    assert int(count) == expected_count == int((batch.labels[:, 1:] != -100).sum())
    assert 0 < expected_count < ROWS * (TOKENS - 1)
    assert abs(float(total) - expected) < 1e-5 * expected

    # Ignored labels and tokens under the padding do not matter; trained tokens do.
    ids = jnp.where(batch.attention_mask == 1, batch.input_ids, 5)
    (same, *_), _ = both(state, batch._replace(input_ids=ids))
    assert abs(float(same - total)) < 1e-5 * expected
    last = batch.labels.at[0, TOKENS - 1].set(encoding.IGNORED)
    (less, fewer, _), _ = both(state, batch._replace(labels=last))
    assert int(fewer) == expected_count - 1 and float(less) < float(total)


def test_metrics(three_steps):
    batch = make_batch(0)
    metrics = three_steps[0][1]
    assert metrics.keys() == {"step", "loss", "grad_norm", "lr", "num_tokens", "waited"}
    assert metrics["num_tokens"] == int(batch.attention_mask.sum())
    assert metrics["step"] == 1 and metrics["lr"] == pytest.approx(0.01)
    assert metrics["grad_norm"] > 0
    assert all(isinstance(value, int | float) for value in metrics.values())
    assert [m["step"] for _, m in three_steps] == [1, 2, 3]


def test_batches_come_in_order_and_their_errors_pass_through():
    seen = []

    def batch_at(number):
        if number == 4:
            raise ValueError("row 17")
        return number

    def step(state, frozen, batch):
        seen.append(batch)
        return state, {}

    state = train_step.State(None, None, jnp.asarray(1))
    with pytest.raises(ValueError, match="row 17"):
        for _ in train_step.steps(step, state, model_state.Frozen(None, None), batch_at, 9):
            pass
    assert seen == [1, 2, 3]


@pytest.mark.long  # as whole runs do
@pytest.mark.device
@pytest.mark.parametrize("quantization", ["none", "int4"])
def test_training_lowers_the_loss(quantization):
    _, _, frozen = parts(quantization)
    step, state = compiled(quantization), begin(quantization)
    run = train_step.steps(step, state, frozen, lambda _: make_batch(), 8)
    losses = [metrics["loss"] for _, metrics in run]
    assert losses[-1] < 0.8 * losses[0]


def test_a_model_whose_padding_is_its_eos_learns_to_stop(tmp_path):
    """Padding is recognized by length, not by token id: the EOS that ends an answer is trained."""
    tok = tokenizer.load(tiny_tokenizer.save(tmp_path, pad_token="</s>"))
    assert tok.pad_token_id == tok.eos_token_id == tiny_tokenizer.EOS
    texts = [{"prompt": "ab" * (n % 3), "completion": "cd" * n + "."} for n in range(ROWS)]
    encoded = encoding.encode(datasets.Dataset.from_list(texts), tok, TOKENS, tiny_tokenizer.EOS)
    # Renumbered to as few ids as the model has, in the same order.
    known = np.unique(np.concatenate([ids for ids, _ in encoded.rows]))
    eos = int(np.searchsorted(known, tiny_tokenizer.EOS))
    rows = [(np.searchsorted(known, ids), trained) for ids, trained in encoded.rows]
    arrays = batches.pad(packing.alone(rows), TOKENS)
    batch = train_loss.Batch(*(jnp.asarray(arrays[name].reshape(MICRO_BATCHES, -1, TOKENS))
                          for name in train_loss.Batch._fields))  # fmt: skip
    assert (batch.labels == eos).sum() == ROWS and not batch.attention_mask[0, 0, -1]
    # Only the ends of answers are trained, so that the loss is −log p(EOS) there.
    ends = batch._replace(labels=jnp.where(batch.labels == eos, eos, encoding.IGNORED))

    _, _, frozen = parts()
    _, before = compiled()(begin(), frozen, ends)
    *_, (state, _) = train_step.steps(compiled(), begin(), frozen, lambda _: batch, 40)
    _, after = compiled()(state, frozen, ends)
    assert jnp.exp(-before["loss"]) < 0.01 and jnp.exp(-after["loss"]) > 0.5


@pytest.mark.long
def test_accumulated_gradient_is_that_of_one_big_batch():
    """Even if micro-batches have different numbers of trained tokens: a mean of means would not."""
    graphdef, _, frozen = parts()
    whole, split = make_batch(micro_batches=1), make_batch()
    counts = (np.asarray(split.labels)[:, :, 1:] != encoding.IGNORED).sum(axis=(1, 2))
    assert len(set(counts)) == MICRO_BATCHES
    one, metrics_one = make_step(graphdef)(begin(), frozen, whole)
    many, metrics_many = compiled()(begin(), frozen, split)
    # After one step Adam's moments are the gradient and its square, times a constant.
    assert distance(many.opt_state, one.opt_state) < 1e-6
    for name in ("loss", "grad_norm", "num_tokens"):
        np.testing.assert_allclose(metrics_many[name], metrics_one[name], rtol=1e-6)


def test_the_gradient_is_of_the_mean_over_all_trained_tokens(three_steps):
    graphdef, trained, frozen = parts()

    @jax.jit
    @jax.value_and_grad
    def mean(trained):
        model = nnx.merge(graphdef, trained, frozen.dropout_keys, frozen.base)
        batch = one_micro_batch()
        found = train_loss.objective(None)(train_loss.losses(model, batch), None, batch)
        return found.loss / found.count

    value, gradient = mean(trained)
    assert three_steps[0][1]["loss"] == pytest.approx(float(value), rel=1e-6)
    norm = float(optax.tree.norm(gradient))
    assert three_steps[0][1]["grad_norm"] == pytest.approx(norm, rel=1e-5)


def test_a_loss_that_is_not_finite_changes_only_the_step_count():
    _, _, frozen = parts()
    step, before, state = compiled(), saved(begin()), begin()
    nothing = make_batch()._replace(labels=jnp.full_like(make_batch().labels, encoding.IGNORED))
    state, metrics = step(state, frozen, nothing)  # 0 / 0
    assert np.isnan(metrics["loss"])
    assert int(state.step) == 1
    assert_equal_trees(state.lora, before.lora)
    assert_equal_trees(state.opt_state, before.opt_state)
    # The same for a weight that is not finite; a good batch after it trains as usual.
    broken = jax.tree.map(lambda x: x.at[0].set(jnp.nan) if x.ndim == 2 else x, frozen.base)
    state, metrics = step(state, frozen._replace(base=broken), make_batch())
    assert not np.isfinite(metrics["loss"]) and int(state.step) == 2
    assert_equal_trees(state.lora, before.lora)
    state, metrics = step(state, frozen, make_batch())
    assert np.isfinite(metrics["loss"]) and distance(state.lora, before.lora) > 1e-3


@pytest.mark.parametrize("dropout", [*cases.long(0.0), 0.3])
def test_runs_repeat_and_resume_bit_for_bit(dropout):
    _, _, frozen = parts(dropout=dropout)
    step = compiled(dropout=dropout)

    def run(state, num_steps=4):
        done = train_step.steps(step, state, frozen, make_batch, num_steps)
        return [(saved(state), metrics) for state, metrics in done if metrics.pop("waited") >= 0]

    first, again = run(begin(dropout=dropout)), run(begin(dropout=dropout))
    assert [m for _, m in first] == [m for _, m in again]
    assert_equal_trees(first[-1][0], again[-1][0])
    resumed = run(jax.tree.map(jnp.asarray, first[1][0]))
    assert [m for _, m in resumed] == [m for _, m in first[2:]]
    assert_equal_trees(resumed[-1][0], first[-1][0])
    assert run(jax.tree.map(jnp.asarray, first[-1][0])) == []


def test_dropout_changes_with_step_micro_batch_and_seed():
    _, _, frozen = parts(dropout=0.3)
    batch = make_batch()
    exchanged = jax.tree.map(lambda x: x[::-1], batch)  # the same sum if the masks were the same

    def loss_at(number, batch, seed=0):
        state = begin(dropout=0.3)._replace(step=jnp.asarray(number, jnp.int32))
        return compiled(dropout=0.3, seed=seed)(state, frozen, batch)[1]["loss"].item()

    losses = [
        loss_at(0, batch), loss_at(1, batch), loss_at(0, exchanged), loss_at(0, batch, seed=1)
    ]  # fmt: skip
    assert loss_at(0, batch) == losses[0]
    assert min(abs(a - b) for i, a in enumerate(losses) for b in losses[:i]) > 1e-4


def test_evaluation_has_no_dropout():
    graphdef, trained, frozen = parts(dropout=0.3)
    plain = parts()
    batch = one_micro_batch()
    total, count = train_step.make_eval_loss(graphdef)(trained, frozen, batch)
    expected, expected_count = train_step.make_eval_loss(plain[0])(trained, plain[2], batch)
    assert count == expected_count
    np.testing.assert_allclose(total["eval_loss"], expected["eval_loss"], rtol=1e-6)


@pytest.mark.parametrize("remat", [*cases.long("full"), "dots"])
def test_remat_does_not_change_the_gradient(remat):
    """Nor the dropout masks: the recomputation drops the same inputs."""
    graphdef, _, frozen = parts(dropout=0.3)
    step = make_step(graphdef, remat=remat)
    found, _ = step(begin(dropout=0.3), frozen, make_batch())
    expected, _ = compiled(dropout=0.3)(begin(dropout=0.3), frozen, make_batch())
    assert distance(found.opt_state, expected.opt_state) < 1e-5


@pytest.mark.long
def test_dots_recomputes_fewer_products_than_full():
    def count(remat):
        step = make_step(parts("int4")[0], remat=remat)
        text = step.lower(begin("int4"), parts("int4")[2], make_batch()).as_text()
        return text.count("stablehlo.dot_general")

    assert count("none") < count("dots") < count("full")


def packed_and_dense_shapes(base):
    """The HLO types of every quantized matrix's packed words, and of the matrix as floats."""
    layers = base["model"]["layers"]
    for block, modules in (("self_attn", "qkvo"), ("mlp", ("gate", "up", "down"))):
        for name in modules:
            module = layers[block][f"{name}_proj"]
            module = module.get("base", module)
            words, columns = module["q"].shape[1:]
            yield f"u32[3,{words},{columns}]", f"f32[3,{words * 8},{columns}]"


@pytest.mark.long
@pytest.mark.parametrize("dropout", [*cases.long(0.0), 0.5])
def test_a_trained_head_computes_logits_in_chunks(dropout, monkeypatch):
    """Five of sixteen tokens at a time; each chunk has its own dropout mask."""
    graphdef, trained, frozen = model_state.split(make_model(targets=("lm_head",), dropout=dropout))
    batch = one_micro_batch()

    def found(trained):
        model = nnx.merge(graphdef, trained, frozen.dropout_keys, frozen.base)
        return train_loss.losses(model, batch)

    def value_and_gradient(size):
        monkeypatch.setattr(train_loss, "HEAD_CHUNK", size)
        return jax.jit(jax.value_and_grad(lambda t: found(t).sum())).lower(trained).compile()

    chunks = value_and_gradient(5)
    if dropout:
        monkeypatch.setattr(lora, "reseed_by", lambda keys, _: keys)  # one mask for all chunks
        assert chunks(trained)[0] != value_and_gradient(5)(trained)[0]
        return
    whole, all_logits = value_and_gradient(TOKENS), f"f32[{ROWS},{TOKENS},{VOCAB}]"
    assert all_logits in whole.as_text() and all_logits not in chunks.as_text()
    assert distance(chunks(trained), whole(trained)) < 1e-5


def test_the_base_gets_no_gradient_no_moments_and_no_copy():
    _, _, frozen = parts("int4")
    state = begin("int4")
    num_lora = sum(x.size for x in jax.tree.leaves(state.lora))
    moments = sum(x.nbytes for x in jax.tree.leaves(state.opt_state) if x.ndim)
    assert moments == 2 * 4 * num_lora  # AdamW's two float32 for each entry of A and B

    # The step returns the state and four numbers.
    executable = compiled("int4")
    new_state, metrics = executable(begin("int4"), frozen, make_batch())
    shapes = [[(x.shape, x.dtype) for x in jax.tree.leaves(tree)] for tree in (new_state, state)]
    assert shapes[0] == shapes[1] and len(metrics) == 4

    # The compiled program never holds all layers of a matrix as floats: not as a weight, not saved
    # for the backward pass of the scan over layers, not as a gradient.
    hlo = executable.as_text()
    for packed, dense in packed_and_dense_shapes(frozen.base):
        assert packed in hlo
        assert dense not in hlo


def test_a_dense_base_gets_no_gradient():
    """No product in the compiled step has the shape of a weight's gradient."""
    graphdef, trained, frozen = parts()

    def products(executable):
        found = re.findall(r"= f32\[([\d,]+)\]\S* (?:dot|custom-call)\(", executable.as_text())
        return {tuple(map(int, shape.split(","))) for shape in found}

    def loss(trained, base):
        model = nnx.merge(graphdef, trained, frozen.dropout_keys, base)
        return model(one_micro_batch().input_ids).sum()

    weights = {(48, 32), (32, 48), (32, 32), (96, 32), (32, 96)}
    of_base = jax.jit(jax.grad(loss, argnums=1)).lower(trained, frozen.base).compile()
    assert weights & products(of_base)  # so the search would find them
    assert not weights & products(compiled())


def test_on_a_mesh_arrays_are_sharded_by_the_rules():
    """test_mesh.py tests what the step then computes and communicates."""
    mesh = sharding.make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    with jax.set_mesh(mesh):
        _, *parts = model_state.split(make_model(mesh, "int4"))
        trained, frozen = sharding.place(parts, mesh)
        state = train_step.start(trained, adamw.make(ADAM, 10))

    layers = frozen.base["model"]["layers"]
    for module, (axis_in, axis_out) in {
        "q_proj": ("fsdp", "tensor"),
        "o_proj": ("tensor", "fsdp"),
    }.items():
        for leaf in ("q", "scale"):
            array = layers["self_attn"][module][leaf]
            assert array.sharding.spec == jax.P(None, axis_in, axis_out)
            assert array.addressable_shards[0].data.size * 4 == array.size
    q_proj, o_proj = (state.lora["model"]["layers"]["self_attn"][n] for n in ("q_proj", "o_proj"))
    assert q_proj["lora_B"].sharding.spec == jax.P(None, None, "tensor")
    assert o_proj["lora_A"].sharding.spec == jax.P(None, "tensor", None)
    assert q_proj["lora_A"].sharding.is_fully_replicated
    moments = [x for x in jax.tree.leaves(state.opt_state) if x.shape == q_proj["lora_B"].shape]
    assert any(not x.sharding.is_fully_replicated for x in moments)
    batch = jax.device_put(make_batch(), sharding.batch(mesh))
    assert batch.input_ids.addressable_shards[0].data.shape == (2, ROWS // 8, TOKENS)
