"""Preferences: their loss, their examples, and a run of train.py on them."""

import json
import shutil

import cli
import datasets
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_step
import tiny_tokenizer
from flax import nnx
from test_run import comparable

from lora_jax import errors, tokenizer
from lora_jax.data import batches, encoding, packing
from lora_jax.lora.nnx import model_state
from lora_jax.optim import adamw
from lora_jax.optim import loss as train_loss
from lora_jax.optim import step as train_step
from lora_jax.parallel import devices
from lora_jax.planning import proposals

BETA = 0.3


def pairs(seed, *lengths):
    """Sequences of two examples of these lengths, trained from their fourth token on."""
    rng = np.random.default_rng(seed)
    rows = [rng.integers(3, test_step.VOCAB, n).astype(np.int32) for n in lengths]
    return packing.pairs([(ids, np.arange(len(ids)) > 2) for ids in rows])


def test_the_step_is_that_of_the_equation():
    """In two micro-batches; the equation takes each example alone, with and without the adapter."""
    graphdef, trained, frozen = model_state.split(test_step.make_model(quantization="int4"))
    before = jax.tree.map_with_path(
        lambda path, a: jnp.zeros_like(a) if path[-1].key == "lora_B" else a, trained
    )
    frozen = frozen._replace(reference=before)
    lines = pairs(0, 9, 12, 7, 5, 14, 6, 10, 11)

    rows = [row for line in lines for row in line]
    alone = train_loss.Batch(**jax.tree.map(jnp.asarray, batches.pad(packing.alone(rows), 16)))

    def log_p(weights):
        """log p of each example, in a sequence of its own."""
        model = nnx.merge(graphdef, weights, frozen.dropout_keys, frozen.base)
        each = jax.nn.log_softmax(model(alone.input_ids, alone.attention_mask))[:, :-1]
        each = jnp.take_along_axis(each, alone.input_ids[:, 1:, None], axis=2)[..., 0]
        return jnp.where(alone.labels[:, 1:] != encoding.IGNORED, each, 0).sum(axis=1)

    def equation(weights):
        rewards = BETA * (log_p(weights) - log_p(before))
        margins = rewards[::2] - rewards[1::2]
        return -jnp.log(jax.nn.sigmoid(margins)).mean(), margins

    both = jax.jit(jax.value_and_grad(equation, has_aux=True))
    (value, rewards), gradient = both(trained)
    assert 0 < (rewards > 0).sum() < len(rewards)

    arrays = {name: a.reshape(2, 2, 32) for name, a in batches.pad(lines, 32).items()}
    batch = jax.tree.map(jnp.asarray, train_loss.Batch(**arrays))
    step = test_step.make_step(graphdef, beta=BETA)
    state = train_step.start(jax.tree.map(jnp.copy, trained), adamw.make(test_step.ADAM, 9))
    _, metrics = step(state, frozen, batch)
    norm = np.sqrt(sum((np.asarray(g) ** 2).sum() for g in jax.tree.leaves(gradient)))
    np.testing.assert_allclose(metrics["loss"], value, rtol=1e-5)
    np.testing.assert_allclose(metrics["grad_norm"], norm, rtol=1e-4)
    np.testing.assert_allclose(metrics["reward_accuracy"], (rewards > 0).mean(), rtol=1e-6)
    np.testing.assert_allclose(metrics["reward_margin"], rewards.mean(), rtol=1e-4)

    filled = train_loss.Batch(
        **batches.pad([*lines, (), ()], 32)
    )  # as the last batch of a set may be
    sums, count = train_step.make_eval_loss(graphdef, BETA)(trained, frozen, filled)
    assert count == len(lines)
    np.testing.assert_allclose(sums["eval_loss"] / count, value, rtol=1e-5)
    np.testing.assert_allclose(sums["eval_reward_margin"], rewards.sum(), rtol=1e-4)


# ------------------------------------------------------------------------- examples


@pytest.fixture(scope="module")
def tok(tmp_path_factory):
    return tokenizer.load(tiny_tokenizer.save(tmp_path_factory.mktemp("tokenizer")))


def encode(tok, *rows, seq_len=64):
    return encoding.encode_pairs(datasets.Dataset.from_list(list(rows)), tok, seq_len, 2)


def test_both_answers_follow_the_prompt(tok):
    row = {"prompt": "ab?", "chosen": " cd", "rejected": " ab ab"}
    encoded = encode(tok, row, row)
    assert len(encoded.rows) == 4 and encoded.origins == ["an example built in memory"] * 4
    for (ids, trained), answer in zip(encoded.rows[:2], (" cd", " ab ab"), strict=True):
        alone = {"prompt": "ab?", "completion": answer}
        ((same, mask),) = encoding.encode(datasets.Dataset.from_list([alone]), tok, 64, 2).rows
        assert ids.tolist() == same.tolist() and trained.tolist() == mask.tolist()


def test_messages_are_joined(tok):
    tok.chat_template = "{% for m in messages %}[{{ m.role }}]{{ m.content }}</s>{% endfor %}" \
        "{% if add_generation_prompt %}[assistant]{% endif %}"  # fmt: skip
    row = {
        "prompt": [{"role": "user", "content": "ab"}],
        "chosen": [{"role": "assistant", "content": "cd"}],
        "rejected": [{"role": "assistant", "content": "ab"}],
    }
    encoded = encode(tok, row)
    texts = [tok.decode(ids[trained]) for ids, trained in encoded.rows]
    assert texts == ["cd</s>", "ab</s>"]


def test_a_pair_is_skipped_whole(tok):
    short = {"prompt": "ab", "chosen": "cd", "rejected": "ab"}
    long = {"prompt": "ab cd " * 20, "chosen": "x", "rejected": "y"}
    encoded = encode(tok, long, short, seq_len=16)
    assert (len(encoded.rows), encoded.num_skipped, encoded.num_cut) == (2, 1, 2)
    with pytest.raises(errors.UserError, match="a token to train on"):
        encode(tok, long, seq_len=16)


def test_examples_that_are_no_preferences_are_refused(tok):
    mixed = {"prompt": "a", "chosen": "b"}
    with pytest.raises(errors.UserError, match=r"(?s)prompt, chosen, rejected.*prompt, chosen"):
        encode(tok, mixed, mixed)
    row = {"prompt": "a", "chosen": "b", "rejected": "c"}
    with pytest.raises(errors.UserError, match="--dpo"):
        encoding.encode(datasets.Dataset.from_list([row]), tok, 64, 2)


# ------------------------------------------------------------------------- runs


@pytest.mark.long
def test_a_run_prefers_what_was_chosen(tmp_path, monkeypatch):
    rows = tmp_path / "train.jsonl"
    rows.write_text("".join(
        json.dumps({"question": f"Tom has {n} cats.", "good": " He likes them.",
                    "bad": f" He has {n} dogs."}) + "\n" for n in range(24)))  # fmt: skip
    folder = tmp_path / "run"
    needs = {"none": 9_870_000_000, "dots": 1_230_000_000}
    with monkeypatch.context() as patch:  # a device that reports its memory
        patch.setattr(proposals, "choose_remat", lambda *_: ("dots", needs))
        patch.setattr(devices, "memory_bytes", lambda _: 2_000_000_000)
        ended = cli.run(
            "train", "--model", cli.BASE, "--quant", "int4", "--dataset", rows, "--dpo",
            "--columns", "prompt=question,chosen=good,rejected=bad", "--max-steps", 4,
            "--batch-size", 8, "--grad-accum", 2, "--lr", 0.02, "--eval-every", 2,
            "--save-every", 2, "--dtype", "bfloat16", "--group-by-length", "--output-dir", folder,
        )  # fmt: skip
    assert "\nremat     dots: 1.23 GB of 2 GB planned; none 9.87 GB\n" in ended.out
    assert "sequences of 48 tokens, each length compiled once" in " ".join(ended.out.split())
    assert ended.code == 0 and ended.err == "" and "warning" not in ended.out, ended
    metrics = cli.metrics(folder)
    steps, evaluations = ([row for row in metrics if name in row] for name in ("loss", "eval_loss"))
    assert steps[0]["loss"] == pytest.approx(np.log(2)) and steps[0]["reward_margin"] == 0
    assert steps[-1]["loss"] < 0.3 and steps[-1]["reward_accuracy"] == 1
    assert evaluations[0]["eval_loss"] == pytest.approx(np.log(2))
    assert evaluations[-1]["eval_loss"] < 0.3 and evaluations[-1]["eval_reward_accuracy"] == 1
    assert "100.0% of pairs preferred as chosen" in " ".join(ended.out.split())

    again = shutil.copytree(folder, tmp_path / "again")
    shutil.rmtree(again / "checkpoints/4")
    resumed = cli.run("train", "--resume", "--output-dir", again, "--remat", "auto")
    assert resumed.code == 0 and "from step 2 of 4" in resumed.out, resumed
    for run in (folder, again):  # although auto would be full here
        assert json.loads((run / "run.json").read_text())["settings"]["remat"] == "dots"
    assert comparable(again) == comparable(folder)


def test_flags_that_make_no_sense_with_it_are_refused(tmp_path):
    rows = cli.write_rows(tmp_path / "train.jsonl", 4)
    flags = ("--model", cli.BASE, "--dataset", rows)
    assert "--beta without --dpo" in cli.refused("train", *flags, "--beta", 0.2)
    told = cli.refused("train", *flags, "--dpo", "--packing")
    assert "--packing with --dpo" in told
    assert "prompt, chosen, rejected" in cli.refused("train", *flags, "--dpo", "--output-dir",
                                                      tmp_path / "run")  # fmt: skip
    assert "--dpo without --dataset" in cli.refused("train", "--dpo")
