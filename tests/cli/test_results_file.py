"""`generate --output-file`: its lines, and how a run that was stopped goes on."""

import json
import pathlib

import pytest

from lora_jax import errors
from lora_jax.cli import results_file

BEGUN = [{"index": n, "prompt": f"é{n}", "settings": f"d{n}"} for n in range(3)]
FOUND = {"text": "a\nb\u2028", "finish_reason": "stop", "num_tokens": 2}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "new/results.jsonl"


def write(path, begun=BEGUN):
    with results_file.ResultsFile(path) as file:
        for each in begun[file.resume(begun) :]:
            file.add(each, FOUND)
    return path.read_bytes()


def resumed(path, begun=BEGUN):
    with results_file.ResultsFile(path) as file:
        return file.resume(begun)


def test_a_file_that_ends_anywhere_is_completed(path):
    whole = write(path)
    rows = [json.loads(line) for line in whole.decode().removesuffix("\n").split("\n")]
    assert rows == [{**each, **FOUND} for each in BEGUN]
    assert [*rows[0]] == ["index", "prompt", "text", "finish_reason", "num_tokens", "settings"]
    for end in range(len(whole) + 1):
        path.write_bytes(whole[:end])
        assert resumed(path) == whole[:end].count(b"\n")
        assert write(path) == whole


@pytest.mark.parametrize(
    ("content", "found"),
    [
        ('{"prompt": "mine"}\n', "not prompt 0"),
        ('{"prompt": "mine"}', "no such run"),
        ("a text of mine\n", "not prompt 0"),
        ("\n", "not prompt 0"),
        ('{"index": 0, "prompt": "é0", "settings": "other"}\n', "another model"),
        ('{"index": 0, "prompt": "other", "settings": "d0"}\n', "not prompt 0"),
    ],
)
def test_another_file_is_refused_and_stays_as_it_is(path, content, found):
    path.parent.mkdir()
    path.write_text(content)
    with pytest.raises(errors.UserError, match=found):
        resumed(path)
    assert path.read_text() == content


def test_fewer_prompts_are_refused_and_more_are_added(path):
    whole = write(path)
    with pytest.raises(errors.UserError, match="more lines than the 2 prompts"):
        resumed(path, BEGUN[:2])
    assert path.read_bytes() == whole
    assert resumed(path, [*BEGUN, {**BEGUN[0], "index": 3}]) == 3


def test_a_second_process_is_refused(path):
    with (
        results_file.ResultsFile(path),
        pytest.raises(errors.UserError, match="another run is writing"),
    ):
        results_file.ResultsFile(path)
    assert resumed(path) == 0


def test_a_full_disk_and_a_folder_are_errors(tmp_path):
    with pytest.raises(errors.UserError, match="No space left"):
        with results_file.ResultsFile(pathlib.Path("/dev/full")) as file:
            file.add(BEGUN[0], FOUND)
    with pytest.raises(errors.UserError, match="Is a directory"):
        results_file.ResultsFile(tmp_path)


def test_the_digests_change_with_what_they_are_of(tmp_path):
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    for folder, name in ((base, "config"), (adapter, "adapter_config")):
        folder.mkdir()
        (folder / f"{name}.json").write_text("{}")
        (folder / f"{name}.safetensors").write_bytes(bytes(10_000_000))
    found = results_file.digest_of_base(base), results_file.digest_of_adapter(adapter)
    (base / "README.md").write_text("a")
    assert found == (results_file.digest_of_base(base), results_file.digest_of_adapter(adapter))
    (base / "config.safetensors").write_bytes(b"\1" * 10_000_000)
    (adapter / "adapter_config.safetensors").write_bytes(bytes(9_999_999) + b"\1")
    assert found[0] != results_file.digest_of_base(base)
    assert found[1] != results_file.digest_of_adapter(adapter)
