"""Settings by name: conversion, the demo's defaults, checks, YAML, and resumed runs."""

import dataclasses
import pathlib

import pytest

from lora_jax import assets, errors, training
from lora_jax.lora import config as lora_config
from lora_jax.training import settings
from lora_jax.training.settings import assemble, groups, names

MINE = {"model": "owner/name", "dataset": "mine.jsonl"}


def refused(**given):
    with pytest.raises(errors.UserError) as error:
        settings.build(**given)
    return " ".join(str(error.value).split())


def test_without_model_and_data_the_settings_are_those_of_the_demo():
    found = settings.build(rank=4)
    assert found.model.model == str(assets.FOLDER) and found.lora.rank == 4
    assert found.data.dataset == (str(assets.TRAIN),) and found.data.eval_dataset
    assert found.loop.max_steps == assets.settings()["max_steps"]
    assert found.given == {"rank"}
    assert settings.build(epochs=2).loop.max_steps is None
    assert settings.build(**MINE).loop.max_steps is None


def test_every_name_is_unique_and_frozen():
    parts = [
        part for part in vars(groups.TrainSettings()).values() if dataclasses.is_dataclass(part)
    ]
    names = [field.name for part in parts for field in dataclasses.fields(part)]
    assert len(names) == len(set(names)) == len(groups.FIELDS)
    for part in parts:
        with pytest.raises(dataclasses.FrozenInstanceError):
            part.anything = 1


@pytest.mark.parametrize(
    ("given", "name", "value"),
    [
        ({"targets": "q_proj, k_proj"}, "targets", ["q_proj", "k_proj"]),
        ({"targets": "q_proj k_proj"}, "targets", ["q_proj", "k_proj"]),
        ({"targets": ["q_proj"]}, "targets", ["q_proj"]),
        ({"targets": "all-linear"}, "targets", "all-linear"),
        ({"layers": "0,2-3"}, "layers", [0, 2, 3]),
        ({"layers": [0, 1]}, "layers", [0, 1]),
        ({"lr": "1e-4"}, "lr", 1e-4),  # YAML 1.1 reads 1e-4 as a string
        ({"lr": 1}, "lr", 1),
        ({"rank": "16"}, "rank", 16),
        ({"max_time": "1h30m"}, "max_time", 5400.0),
        ({"weights": [0.75, 0.25], "dataset": ["a", "b"]}, "weights", [3, 1]),
        ({"weights": "3,1", "dataset": ["a", "b"]}, "weights", [3, 1]),
        ({"columns": {"prompt": "q"}}, "columns", {"prompt": "q"}),
        ({"columns": "prompt=q"}, "columns", {"prompt": "q"}),
        ({"rank_pattern": {"down_proj": 4}}, "rank_pattern", {"down_proj": 4}),
        ({"rank_pattern": ["a=b=4"]}, "rank_pattern", {"a=b": 4}),
        ({"modules_to_save": "lm_head,norm"}, "modules_to_save", ["lm_head", "norm"]),
        ({"trainable_token_indices": ["5", "<s>"]}, "trainable_token_indices", [5, "<s>"]),
        ({"trainable_token_indices": {"a": [5]}}, "trainable_token_indices", {"a": [5]}),
        ({"prompt": "one"}, "prompt", ["one"]),
        ({"dataset": pathlib.Path("my.jsonl")}, "dataset", ["my.jsonl"]),
        ({"packing": True}, "packing", True),
    ],
)
def test_values_are_given_as_strings_or_in_their_types(given, name, value):
    assert settings.build(**{**MINE, **given}).flat()[name] == value


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"rnak": 8}, "found: rnak to do: did you mean rank?"),
        ({"rank": "eight"}, "expected: a whole number found: 'eight' where: --rank"),
        ({"rank": 8.5}, "expected: a whole number found: 8.5"),
        ({"rank": True}, "expected: a whole number found: True"),
        ({"packing": "yes"}, "expected: true or false found: 'yes'"),
        ({"quant": "int5"}, "expected: one of none, int8, int4"),
        ({"schedule": "step"}, "expected: one of cosine, linear, constant"),
        ({"lr": float("nan")}, "--lr nan (at least 0)"),
        ({"layers": "3-1"}, "layer numbers such as 0,2 or 16-31"),
        ({"add_tokens": ["<a>", 5]}, "expected: a list of texts found: ['<a>', 5] where: --add"),
        ({"columns": 3}, "expected: a mapping found: 3 where: --columns"),
        ({"trainable_token_indices": {"a": 5.5}}, "a mapping found: {'a': 5.5} where: --trainable"),
        ({"beta": 0.3}, "--beta without --dpo"),
        ({"chat": True}, "--chat without a --prompt"),
        ({"weights": [1, 2]}, "2 in --weights, 1 in --dataset"),
        ({"dataset": []}, "an empty --dataset"),
        ({"beta1": 1, "eps": 0}, "beta1 1 (at least 0, and below 1) eps 0 (above 0)"),
        ({"min_lr_ratio": 2}, "min_lr_ratio 2 (between 0 and 1)"),
        ({"mesh": "model=8", "rank": 0}, "found: 'model=8' where: --mesh"),
        ({"seed": 2**32}, "--seed 4294967296 (at most 4294967295)"),  # JAX would take it as 0
    ],
)
def test_invalid_values_are_refused_with_their_name(given, message):
    assert message in refused(**{**MINE, **given})


def test_all_problems_are_in_one_error():
    """Of whichever stage: names, types, ranges of a part, and contradictions."""
    message = refused(
        **MINE, rnak=8, lr="fast", quant="int5", dropout=2, alpha=0, max_steps=3, epochs=2,
        batch_size=0, weights=[1, 2], chat=True,
    )  # fmt: skip
    for part in (
        "found: rnak to do: did you mean rank?",
        "found: 'fast' where: --lr",
        "found: 'int5' where: --quant",
        "found: dropout 2",
        "--alpha 0 (at least 1e-06)",
        "--batch-size 0",
        "found: --max-steps and --epochs to do: give one of them",
        "2 in --weights, 1 in --dataset",
        "--chat without a --prompt",
    ):
        assert part in message


def test_a_value_that_cannot_be_read_makes_no_other_problem():
    message = refused(model="owner/name", dataset="d", streaming=True, max_steps="many")
    assert message == "expected: a whole number found: 'many' where: --max-steps"
    assert "without" not in refused(**MINE, chat=True, prompt={})


def test_problems_of_a_file_have_its_name_and_lines(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("model: m\nrank: eight\ndropout: 2\nload_in_4bit: true\nrank: 9\nbeta: 3\n")
    with pytest.raises(errors.UserError) as error:
        settings.load(path)
    message = " ".join(str(error.value).split())
    for part in (
        f"found: rank more than once where: {path}, lines 2 and 5",
        f"found: load_in_4bit where: {path}, line 4 to do: quant: nf4",
        f"found: dropout 2 (at least 0, and below 1) where: {path}, line 3: dropout",
        f"--beta without --dpo where: {path}, line 6: beta",
    ):
        assert part in message


def test_problems_with_one_remedy_are_one_paragraph():
    message = refused(**MINE, lr="fast", alpha="much", rnak=1, learning_rate=2)
    assert "expected: a number found: --lr: 'fast' --alpha: 'much'" in message
    assert "rnak (did you mean rank?) learning_rate (the setting is called lr here)" in message


@pytest.mark.parametrize(
    ("name", "do"),
    [
        ("use_4bit", "quant: int4"),
        ("load_in_8bit", "quant: int8"),
        ("bnb_4bit_quant_type", "quant: nf4"),
        ("lora_r", "the setting is called rank here"),
        ("target_modules", "the setting is called targets here"),
        ("num_train_epochs", "the setting is called epochs here"),
        ("micro_batch_size", "the setting is called batch_size here"),
        ("sample_packing", "the setting is called packing here"),
        ("optim", "the optimizer is AdamW"),
        ("val_set_size", "the setting is called eval_size here"),
        ("evals_per_epoch", "a share of all: 1 /"),
        ("mask_prompt", "prompts are not trained, unless train_on_inputs is true"),
        ("train_on_prompt", "the setting is called train_on_inputs here"),
        ("trust_remote_code", "it does not change what is trained"),
        ("batchsize", "did you mean batch_size?"),
    ],
)
def test_names_of_other_programs_get_a_hint(name, do):
    assert f"found: {name} to do: " in refused(**MINE, **{name: 1})
    assert do in refused(**MINE, **{name: 1})


def test_names_of_layers_may_be_several_values():
    for given in ("q_proj,v_proj", "q_proj v_proj", ["q_proj", "v_proj"], ["q_proj,", "v_proj"]):
        made = settings.build(**MINE, targets=given, modules_to_save=given, exclude=given)
        assert made.lora.targets == made.lora.modules_to_save == made.lora.exclude
        assert made.lora.targets == ("q_proj", "v_proj")
    assert settings.build(**MINE, targets=["all-linear"]).lora.targets == "all-linear"


def test_settings_of_other_programs_that_are_off_are_left_out():
    made = settings.build(**MINE, lora_model_dir=None, wandb_entity=None, report_to="none")
    assert made.run.report_to is None
    assert settings.build(**MINE, max_steps=-1).loop.max_steps is None
    assert "leave it out: it does not change" in refused(**MINE, load_in_8bit=False)
    assert "leave it out: it does not change" in refused(**MINE, val_set_size=0.0)
    assert "prompts are not trained" in refused(**MINE, mask_prompt=False)


def test_names_of_other_programs_are_not_settings_and_lead_to_one():
    assert not set(names._OF_OTHERS) & groups.FIELDS.keys()
    assert set(names._OF_OTHERS.values()) <= groups.FIELDS.keys()
    assert not names._LEFT_OUT & (names._OF_OTHERS.keys() | names._OTHERWISE.keys())


def test_settings_written_by_hand_are_checked():
    made = groups.TrainSettings(
        data=groups.DataSettings(dataset=("mine.jsonl",), dpo=True),
        loop=groups.LoopSettings(batch_size=3),
    )
    assert {"model", "dataset", "dpo", "batch_size"} == made.given
    assert assemble.checked(made) == made
    bad = made.replace(batch_size=0, chat=True, packing=True)
    with pytest.raises(errors.UserError) as error:
        training.run(bad)  # at the call, before anything is loaded
    message = str(error.value)
    for part in ("--batch-size 0", "--chat without a --prompt", "--packing with --dpo"):
        assert part in message
    with pytest.raises(errors.UserError, match=r"(?s)rnak.*did you mean rank\?"):
        made.replace(rnak=8)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"rank": "8", "dropout": None}, "rank '8' (a whole number) dropout None (a number)"),
        ({"rank": 2.5}, "rank 2.5 (a whole number)"),
        ({"rank_pattern": {"q_proj": True}}, "rank True (a whole number)"),
        ({"alpha": "16"}, "alpha '16' (a number)"),
        ({"init_lora_weights": True}, "init_lora_weights True (a text, such as default)"),
    ],
)
def test_a_lora_config_has_numbers(given, message):
    made = object.__new__(lora_config.LoRAConfig)  # the tests check the types of __init__
    vars(made).update(vars(lora_config.LoRAConfig()) | given)
    with pytest.raises(errors.UserError) as error:
        made.__post_init__()
    assert message in " ".join(str(error.value).split())


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"rank": 16, "alpha": 8, "quant": "int4", "max_time": "8h", "lr": 3e-4, "patience": 2,
         "eval_every": 5, "targets": r".*\.[qv]_proj", "rank_pattern": {"q_proj": 4}},
        {"dataset": ["a", "b"], "weights": [3, 1], "columns": {"text": "story"}, "packing": True},
        {"sweep": "rank=4,8", "epochs": 2},
        {"dpo": True, "beta": 0.2, "max_steps": 7},
        {"prompt": ["Ünï: code", "# no comment"], "temperature": 0.5, "chat": True},
    ],
)  # fmt: skip
def test_yaml_keeps_all_settings(given, tmp_path):
    made = settings.build(**{**MINE, **given, "output_dir": str(tmp_path / "run")})
    settings.save(made, tmp_path / "config.yaml")
    again = settings.load(tmp_path / "config.yaml")
    settings.save(again, tmp_path / "again.yaml")
    assert (tmp_path / "again.yaml").read_text() == (tmp_path / "config.yaml").read_text()
    # Settings without effect are not written.
    inert = {"output_dir", "beta", "epochs", "temperature", "max_new_tokens"} - given.keys()
    both = ({n: v for n, v in each.flat().items() if n not in inert} for each in (made, again))
    assert next(both) == next(both)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_yaml_of_other_programs_is_read(encoding, tmp_path):
    """Windows' editors write a byte order mark, and PowerShell UTF-16."""
    path = tmp_path / "config.yaml"
    path.write_bytes("rank: 4\r\nlr: 2e-4\r\nprompt: [Ünï]\r\n".encode(encoding))
    found = settings.load(path).flat()
    assert (found["rank"], found["lr"], found["prompt"]) == (4, 2e-4, ["Ünï"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- rank", "a list"),
        ("rank: [", "while parsing"),
        ("1: 2", "the key 1"),
        ("lr: 2020-13-45", "month must be"),
        ("[" * 5000, "recursion"),
        ("\x00", "special characters"),
    ],
)
def test_a_file_without_a_mapping_is_refused(text, message, tmp_path):
    (tmp_path / "mine.yaml").write_text(text)
    with pytest.raises(errors.UserError, match="a YAML file of `name: value` lines") as error:
        settings.load(tmp_path / "mine.yaml")
    assert message in str(error.value)
    with pytest.raises(errors.UserError, match="No such file") as error:
        settings.load(tmp_path / "none.yaml")
    assert f"to do:    did you mean {tmp_path}/mine.yaml?" in str(error.value)
    with pytest.raises(errors.UserError, match="to do:    check the path"):
        settings.load(tmp_path / "else")


def test_numbers_in_yaml_have_base_10(tmp_path):
    """YAML 1.1 reads 010 as 8, and 8:30 as 510."""
    path = tmp_path / "mine.yaml"
    path.write_text("rank: 010\nseed: 1_000\nprompt: [12:30, 1:30.5]\n")
    found = settings.load(path).flat()
    assert (found["rank"], found["seed"], found["prompt"]) == (10, 1000, ["12:30", "1:30.5"])
    path.write_text("max_time: 8:30\nbatch_size: 1:30\n")
    with pytest.raises(errors.UserError, match=r"(?s)a time such as 8h.*a whole number"):
        settings.load(path)


def test_an_empty_file_and_names_with_dashes_are_read(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("")
    assert settings.load(path) == settings.build()
    path.write_text("batch-size: 2\n")
    assert settings.load(path).loop.batch_size == 2


def test_paths_of_the_record_are_those_of_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    (tmp_path / "data/a.jsonl").touch()
    for name in ("data", "data/a.jsonl", "data@test", "data/*.jsonl", "data:config@test",
                 "data/a.jsonl@train[:9]", "data/*.jsonl@train[5%:]"):  # fmt: skip
        assert assemble.absolute({"dataset": [name]}) == {"dataset": [f"{tmp_path}/{name}"]}
    for name in ("owner/name", "owner/name@test", "none/*.jsonl", "x" * 300):
        assert assemble.absolute({"model": name, "rank": 8}) == {"model": name, "rank": 8}
    monkeypatch.setenv("HOME", str(tmp_path))
    assert settings.build(dataset="~/data").data.dataset == (f"{tmp_path}/data",)
    assert settings.build(model="~/data").model.model == str(tmp_path / "data")


def test_the_demo_s_paths_are_not_written(tmp_path):
    path = tmp_path / "config.yaml"
    for given in (
        {"rank": 4},
        {"epochs": 2},
        {"dataset": "d"},
        {"model": "m"},
        {"sweep": "lr=1,2"},
    ):
        made = settings.build(**given)
        settings.save(made, path)
        assert str(assets.FOLDER) not in path.read_text()
        assert settings.load(path) == made
    settings.save(settings.build(model=str(assets.FOLDER)), path)  # as the user wrote it
    assert f"model: {assets.FOLDER}" in path.read_text()
    settings.save(groups.TrainSettings(), path)  # the demo without its settings
    assert settings.load(path).loop.max_steps is None


def test_a_resumed_run_changes_only_the_settings_that_may_change():
    record = settings.build(**MINE, batch_size=4, grad_accum=2).flat()
    same = settings.resumed(
        record, {"batch_size": 2, "grad_accum": 4, "mesh": "data=2"}, "run.json"
    )
    assert same.loop.batch_size == 2 and same.model.mesh == "data=2"
    with pytest.raises(errors.UserError, match="8 sequences a step"):
        settings.resumed(record, {"batch_size": 2}, "run.json")
    with pytest.raises(errors.UserError, match="--rank 4, but the run has 8"):
        settings.resumed(record, {"rank": 4}, "run.json")
    assert settings.resumed({**record, "of_another_version": 1}, {}, "run.json").lora.rank == 8
