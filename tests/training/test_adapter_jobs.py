"""All kinds of adapters by the flags of train: trained, resumed, planned, used and merged."""

import json
import shutil

import cli
import numpy as np
import pytest
from test_run import checkpoints, comparable

from lora_jax.lora import peft

FLAGS = (
    *("--model", cli.BASE, "--quant", "int4", "--batch-size", 8, "--grad-accum", 1),
    *(
        "--max-steps",
        4,
        "--save-every",
        2,
        "--lr",
        0.01,
        "--rank",
        2,
        "--seq-len",
        112,
        "--packing",
    ),
)
KIND = (
    *("--targets", "q_proj,down_proj,embed_tokens", "--exclude", "4.self_attn.q_proj"),
    *("--rank-pattern", "down_proj=1", "--alpha-pattern", "down_proj=3", "--use-dora"),
    *("--init-lora-weights", "pissa_niter_4", "--modules-to-save", "model.norm"),
    *("--lora-plus-ratio", 4, "--dropout", 0.1),
)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("kinds")
    rows = cli.write_rows(folder / "train.jsonl", 40)
    ended = cli.run("train", *FLAGS, *KIND, "--dataset", rows, "--output-dir", folder / "run")
    assert ended.code == 0 and ended.err == "", ended
    assert "8 sequences of 112 tokens, 9" in ended.out, ended.out  # at least 90 % filled
    return folder / "run"


@pytest.mark.long
def test_all_kinds_together_train_and_are_saved(whole):
    rows = [row["loss"] for row in cli.metrics(whole) if "loss" in row]
    assert rows[-1] < 0.9 * rows[0]
    checks = json.loads((whole / "run.json").read_text())["checks"]
    assert checks == {"trained_layers": 11, "without_gradient": [], "changed_base": []}
    adapter = peft.read(whole / "adapter")
    # PiSSA is saved as a change of the original weights, which has twice the rank.
    shapes = {path: own.A.shape for path, own in adapter.factors.items()}
    assert shapes["model.layers.0.self_attn.q_proj"] == (64, 4)
    assert shapes["model.layers.4.mlp.down_proj"] == (172, 2)
    assert shapes["model.embed_tokens"] == (512, 2) and len(shapes) == 4 + 5 + 1
    assert adapter.scaling("model.layers.4.mlp.down_proj") == 3
    assert adapter.scaling("model.layers.0.self_attn.q_proj") == 8
    assert all(own.magnitude is not None for own in adapter.factors.values())
    assert set(adapter.saved) == {"model.norm.weight", "model.embed_tokens.base_layer.weight"}


@pytest.mark.long
def test_a_resumed_run_gives_identical_bytes(whole, tmp_path):
    folder = shutil.copytree(whole, tmp_path / "run")
    shutil.rmtree(folder / "checkpoints/4")
    run = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps(run | {"status": "running"}))
    ended = cli.run("train", "--resume", "--output-dir", folder)
    assert ended.code == 0 and "from step 2 of 4" in ended.out, ended
    assert comparable(folder) == comparable(whole) and checkpoints(folder) == [2, 4]


@pytest.mark.long
def test_the_adapter_generates_and_the_merged_model_writes_the_same(whole, tmp_path):
    flags = ("--prompt", "Tom has", "--max-new-tokens", 8)
    adapter = ("--adapter", whole / "adapter")
    with_adapter = cli.run("generate", *adapter, *flags)
    assert with_adapter.code == 0, with_adapter
    ended = cli.run("merge", *adapter, "--output-dir", tmp_path / "merged")
    assert ended.code == 0 and "10 layers" in ended.out, ended
    merged = cli.run("generate", "--model", tmp_path / "merged", *flags)
    assert merged.out == with_adapter.out


@pytest.mark.long
def test_the_plan_counts_the_adapter():
    plain, planned = (
        json.loads(cli.run("plan", *FLAGS, *kind, "--no-compile", "--json").out)
        for kind in (KIND[:2], KIND)
    )
    assert planned["memory"]["total"] > plain["memory"]["total"]
    assert np.isfinite(planned["memory"]["total"])
