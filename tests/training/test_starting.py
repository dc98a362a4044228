"""Runs that train an adapter further, in place of a new one."""

import dataclasses
import json
import shutil

import cli
import numpy as np
import pytest

from lora_jax import errors
from lora_jax.lora import adapter as lora_adapter
from lora_jax.lora import config as lora_config
from lora_jax.lora import peft
from lora_jax.models import config as model_config
from lora_jax.parallel import mesh as sharding
from lora_jax.training import setup, single_tokens, starting
from lora_jax.training.settings import assemble, groups

CONFIG = lora_config.LoRAConfig(
    rank=2, alpha=3, dropout=0.2, targets=("q_proj", "down_proj"), use_rslora=True,
    rank_pattern={"down_proj": 1},
)  # fmt: skip


def saved(folder, base=str(cli.BASE), config=CONFIG):
    """An adapter whose B is not 0."""
    rng = np.random.default_rng(0)

    def random(*shape):
        return rng.normal(size=shape, scale=0.1).astype(np.float32)

    factors = {}
    for layer in range(5):
        at = f"model.layers.{layer}"
        factors[f"{at}.self_attn.q_proj"] = lora_adapter.Factors(random(64, 2), random(2, 64))
        factors[f"{at}.mlp.down_proj"] = lora_adapter.Factors(random(172, 1), random(1, 64))
    peft.write(folder, lora_adapter.Adapter(config, factors, base_model=base))
    return folder


def test_an_adapter_brings_its_new_tokens(tmp_path):
    """A run with it, and the plan of it, have the larger vocabulary."""
    config = dataclasses.replace(CONFIG, trainable_token_indices=(5, 512, 513))
    own = peft.read(saved(tmp_path, config=config))
    rows = np.zeros((3, 64), np.float32)
    own.saved["model.embed_tokens.token_adapter.trainable_tokens_delta"] = rows
    peft.write(tmp_path, own)
    architecture = model_config.load(cli.BASE)
    start = starting.Start(tmp_path, peft.read(tmp_path))
    base = setup.base(cli.BASE, architecture, groups.ModelSettings(), start)
    assert base.num_tokens == base.architecture.vocab_size == 514 and not base.new_tokens
    more = groups.ModelSettings(add_tokens=("<a>", "<b>"), add_special_tokens=("<c>",))
    base = setup.base(cli.BASE, architecture, more, None)
    assert base.new_tokens == (512, 513, 514)
    single_tokens.check_mesh(base, sharding.ONE)
    with pytest.raises(errors.UserError, match=r"515 tokens, 3 of them new(?s:.*)add 1 more"):
        single_tokens.check_mesh(base, sharding.ONE | {"tensor": 4})


def test_a_run_continues_with_the_adapter_its_settings_and_its_base(tmp_path):
    """The base is the one that the adapter names."""
    start, folder = saved(tmp_path / "start"), tmp_path / "run"
    (start / "chat_template.jinja").write_text("{{ messages[0].content }}")
    rows = cli.write_rows(tmp_path / "train.jsonl", 8)
    ended = cli.run("train", "--init-adapter", start, "--dataset", rows, "--seq-len", 32,
                    "--warmup", 0, "--batch-size", 8, "--grad-accum", 1, "--max-steps", 2,
                    "--save-every", 1, "--output-dir", folder)  # fmt: skip
    assert ended.code == 0 and "from the adapter" in ended.out, ended
    before, after = peft.read(start), peft.read(folder / "adapter")
    assert dataclasses.replace(after.config, alpha_pattern={}) == dataclasses.replace(
        before.config, targets=after.config.targets, alpha_pattern={}
    )
    assert after.base_model == str(cli.BASE)
    for path, own in before.factors.items():
        assert after.scaling(path) == pytest.approx(before.scaling(path))
        moved = np.abs(after.factors[path].B - own.B).max()
        assert 0 < moved < 1e-3  # two steps of the learning rate
    assert (folder / "adapter/chat_template.jinja").exists()
    record = json.loads((folder / "run.json").read_text())
    assert record["settings"]["init_adapter"] == str(start) and record["settings"]["dropout"] == 0.2

    weights = (folder / "adapter/adapter_model.safetensors").read_bytes()
    shutil.rmtree(folder / "checkpoints/2")
    again = cli.run("train", "--resume", "--output-dir", folder)
    assert again.code == 0 and "from step 1 of 2" in again.out, again
    assert (folder / "adapter/adapter_model.safetensors").read_bytes() == weights
    shutil.rmtree(start)
    assert "--init-adapter NEW_PATH" in cli.refused("train", "--resume", "--output-dir", folder)
    saved(start, config=dataclasses.replace(CONFIG, rank_pattern={"down_proj": 1}))
    assert starting.Start(start, peft.read(start)).digest() == record["data"]["adapter"]
    again = dataclasses.replace(CONFIG, alpha=4)  # the same arrays, scaled otherwise
    saved(start, config=again)
    assert "another adapter" in cli.refused("train", "--resume", "--output-dir", folder)
    broken = peft.read(start)
    broken.factors["model.layers.0.self_attn.q_proj"].A[0, 0] += 1
    peft.write(start, broken)
    told = cli.refused("train", "--resume", "--output-dir", folder)
    assert "another adapter" in told and "--init-adapter, now" in told


@pytest.mark.long
def test_dpo_prefers_relative_to_the_adapter(tmp_path):
    """Its reference is the model with the adapter, so the first loss is that of a coin."""
    rows = tmp_path / "pairs.jsonl"
    pair = {"prompt": "Tom", "chosen": " has a cat.", "rejected": " ran."}
    rows.write_text((json.dumps(pair) + "\n") * 8)
    ended = cli.run("train", "--init-adapter", saved(tmp_path / "start"), "--dataset", rows,
                    "--dpo", "--seq-len", 32, "--batch-size", 8, "--grad-accum", 1,
                    "--max-steps", 1, "--dropout", 0, "--output-dir", tmp_path / "run")  # fmt: skip
    assert ended.code == 0, ended
    assert cli.metrics(tmp_path / "run")[0]["loss"] == pytest.approx(np.log(2))
    assert peft.read(tmp_path / "run/adapter").config.dropout == 0


def test_settings_that_the_adapter_has_are_refused(tmp_path):
    start = saved(tmp_path / "start")
    told = cli.refused("train", "--init-adapter", start, "--rank", 4, "--targets", "q_proj")
    assert "--rank with --init-adapter" in told and "--targets with --init-adapter" in told
    assert "--sweep rank" in cli.refused("train", "--init-adapter", start, "--sweep", "rank=2,4")
    with pytest.raises(errors.UserError, match="quant: int4 is QLoRA"):
        assemble.build(adapter="qlora", model="m", dataset=["d"])
    nameless = saved(tmp_path / "nameless", base=None)
    settings = assemble.build(init_adapter=str(nameless), dataset=[str(cli.BASE / "config.json")])
    with pytest.raises(errors.UserError, match="--model"):
        starting.find(settings, resuming=False)
