"""Runs from Python and from a config.yaml leave the same folder as the command."""

import itertools
import json

import cli
import pytest
from test_run import checkpoints

from lora_jax import errors, peft, tokenizer, training
from lora_jax.models import config as model_config
from lora_jax.training import setup, single_tokens

SAME = ("adapter/adapter_model.safetensors", "adapter/adapter_config.json")


def given(folder):
    data = cli.write_rows(folder / "rows.jsonl", 40)
    held_out = cli.write_rows(folder / "held.jsonl", 4, first=100)
    return {
        "model": str(cli.BASE), "dataset": str(data), "eval_dataset": str(held_out),
        "max_steps": 5, "batch_size": 8, "grad_accum": 1, "seq_len": 32, "eval_every": 0.4,
        "save_every": 2, "rank": 4, "quant": "int4", "trainable_token_indices": "<s>",
    }  # fmt: skip


def flags(settings):
    return [part for name, value in settings.items()
            for part in (f"--{name.replace('_', '-')}", value)]  # fmt: skip


def numbers(folder):
    """metrics.jsonl without times, which differ between runs."""
    timed = ("tokens_per_second", "data_wait", "mfu", "peak_bytes")
    return [{k: v for k, v in line.items() if k not in timed} for line in cli.metrics(folder)]


@pytest.fixture(scope="module")
def command(tmp_path_factory):
    """(settings, the folder of a run of the command)."""
    folder = tmp_path_factory.mktemp("command")
    settings = given(folder)
    assert cli.run("train", *flags(settings), "--output-dir", folder / "run").code == 0
    return settings, folder / "run"


def test_a_run_from_python_gives_the_files_of_the_command(command, tmp_path):
    settings, run = command
    made = training.settings.build(**settings, output_dir=str(tmp_path / "run"))
    with cli.kept_programs():
        yielded = list(training.run(made))
    assert numbers(tmp_path / "run") == numbers(run)
    assert [line["step"] for line in yielded] == [line["step"] for line in numbers(run)]
    assert [line["step"] for line in yielded if "eval_loss" in line] == [0, 2, 4, 5]
    assert all((tmp_path / "run" / name).read_bytes() == (run / name).read_bytes() for name in SAME)
    files = {path.name for path in run.iterdir()}
    assert files == {path.name for path in (tmp_path / "run").iterdir()}
    assert {"run.json", "config.yaml", "metrics.jsonl", "report.html"} <= files
    assert peft.config(run / "adapter").trainable_token_indices == (1,)


def test_the_config_of_a_run_repeats_it_and_flags_override_it(command, tmp_path):
    _, run = command
    again = cli.run("train", "--config", run / "config.yaml", "--save-every", 4,
                    "--output-dir", tmp_path / "again")  # fmt: skip
    assert again.code == 0 and numbers(tmp_path / "again") == numbers(run)
    assert all(
        (tmp_path / "again" / name).read_bytes() == (run / name).read_bytes() for name in SAME
    )
    written = [json.loads((folder / "run.json").read_text())["settings"]["save_every"]
               for folder in (run, tmp_path / "again")]  # fmt: skip
    assert written == [2, 4] and checkpoints(tmp_path / "again") == [4, 5]


@pytest.mark.long
def test_stopping_the_iteration_saves_and_resume_continues_exactly(command, tmp_path):
    settings, run = command
    folder = tmp_path / "run"
    with cli.kept_programs():
        steps = training.run(training.settings.build(**settings, output_dir=str(folder)))
        for metrics in itertools.takewhile(lambda line: line["step"] < 3, steps):
            assert metrics["step"] < 3
        steps.close()
    assert json.loads((folder / "run.json").read_text())["status"] == "stopped at step 3"
    assert not (folder / "adapter").exists()
    with cli.kept_programs():  # closed before step 1: there is nothing to save
        steps = training.run(training.settings.build(**settings, output_dir=str(tmp_path / "new")))
        assert next(steps)["step"] == 0
        steps.close()
    assert json.loads((tmp_path / "new/run.json").read_text())["status"] == "stopped at step 0"
    with cli.kept_programs():
        for _ in training.resume(str(folder)):
            pass
    assert numbers(folder) == numbers(run)
    assert all((folder / name).read_bytes() == (run / name).read_bytes() for name in SAME)
    assert json.loads((folder / "run.json").read_text())["status"] == "finished"


def test_default_targets_are_layers_that_the_model_has():
    fused = model_config.load(cli.BASE.parent / "phi3")
    plain = model_config.load(cli.BASE)
    for given, architecture, expected in (
        ({}, plain, ("q_proj", "v_proj")),
        ({}, fused, ("qkv_proj",)),
        ({"targets": "o_proj"}, fused, ("o_proj",)),
        ({"targets": "q_proj,v_proj"}, fused, ("q_proj", "v_proj")),  # which is an error later
    ):
        made = training.settings.build(model=str(cli.BASE), dataset="x", **given)
        assert setup.with_targets(made, architecture).lora.targets == expected


def test_texts_that_are_no_tokens_are_refused():
    made = training.settings.build(model=str(cli.BASE), dataset="x", trainable_token_indices="<t>")
    with pytest.raises(errors.UserError, match="found:    <t>"):
        single_tokens.with_ids(made, tokenizer.load(cli.BASE))
