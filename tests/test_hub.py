"""Names → folders, against a hub on 127.0.0.1 (no network)."""

import pathlib
import shutil
import subprocess
import sys

import cases
import hub_server
import pytest

from lora_jax import errors, hub

ID = "huggyllama/llama-7b"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return hub_server.llama_7b(tmp_path_factory.mktemp("hub") / "llama-7b")


def download(server, home, name, revision=None, function="model_folder", **environment):
    """model_folder(name, revision) in a process that knows only this hub: (folder, message).

    function: another of the same arguments.
    """
    # huggingface_hub reads HF_ENDPOINT and HF_HOME when it is imported: hence another process.
    script = (
        "import sys; from lora_jax import errors, hub\n"
        f"try: print(hub.{function}(sys.argv[1], sys.argv[2] or None))\n"
        "except errors.UserError as error: sys.exit(str(error))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, name, revision or ""],
        env={**server.environment(home), **environment},
        cwd=pathlib.Path(__file__).parents[1],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert "Traceback" not in done.stderr, done.stderr
    return (pathlib.Path(done.stdout.strip()) if done.stdout else None), done.stderr


def test_an_id_downloads_safetensors_and_tokenizer_and_no_pickle(model, tmp_path):
    with hub_server.serve({ID: model}) as server:
        folder, _ = download(server, tmp_path, ID)
        wanted = {
            "additional_chat_templates/tool_use.jinja",
            "config.json",
            "generation_config.json",
            "model-00001-of-00002.safetensors",
            "model-00002-of-00002.safetensors",
            "model.safetensors.index.json",
            "special_tokens_map.json",
            "tokenizer.json",
            "tokenizer_config.json",
        }
        assert set(server.requested("GET")) == wanted
        # The pickles, original/ and tokenizer/ are not even requested.
        assert set(server.requested("HEAD")) <= wanted
        files = (path for path in folder.rglob("*") if path.is_file())
        assert {str(path.relative_to(folder)) for path in files} == wanted
        for name in wanted:
            assert (folder / name).read_bytes() == (model / name).read_bytes()
        assert hub.commit(folder) == hub_server.COMMIT

        server.requests.clear()
        again, _ = download(server, tmp_path, ID)
        assert again == folder
        assert server.requested("GET") == []
    # Without the hub, the cache serves.
    offline, _ = download(server, tmp_path, ID, HF_HUB_OFFLINE="1")
    assert offline == folder


def test_an_adapter_s_id_downloads_pefts_files_or_mlx_lms(tmp_path):
    for file in ("adapter_model.safetensors", "adapters.safetensors"):
        source = tmp_path / f"of_{file}"
        source.mkdir()
        for name in ("adapter_config.json", file, "adapter_model.bin", "README.md"):
            (source / name).write_text(name)
        with hub_server.serve({"owner/adapter": source}) as server:
            home = tmp_path / f"home_{file}"
            folder, _ = download(server, home, "owner/adapter", function="adapter_folder")
            assert {path.name for path in folder.iterdir()} == {"adapter_config.json", file}
            _, message = download(server, home, "owner/none", function="adapter_folder")
            assert "the adapter owner/none" in message


def test_planning_downloads_config_json_alone(model, tmp_path):
    with hub_server.serve({ID: model}) as server:
        folder, _ = download(server, tmp_path, ID, function="config_folder")
        assert server.requested("GET") == ["config.json"]
        assert (folder / "config.json").read_bytes() == (model / "config.json").read_bytes()
        _, message = download(server, tmp_path, "no/such", function="config_folder")
        assert "no such repository" in message


def test_inspecting_data_downloads_no_weights(model, tmp_path):
    with hub_server.serve({ID: model}) as server:
        folder, _ = download(server, tmp_path, ID, function="tokenizer_folder")
        asked = server.requested("GET")
    assert {"config.json", "tokenizer_config.json"} <= set(asked)
    assert not any(name.endswith((".safetensors", ".bin", ".py")) for name in asked)
    assert (folder / "config.json").read_bytes() == (model / "config.json").read_bytes()


@pytest.mark.long
def test_a_commit_can_be_requested(model, tmp_path):
    with hub_server.serve({ID: model}) as server:
        folder, _ = download(server, tmp_path, ID, revision=hub_server.COMMIT)
    assert hub.commit(folder) == hub_server.COMMIT


def test_a_repository_with_pickles_only_is_refused(model, tmp_path):
    pickles = tmp_path / "pickles"
    shutil.copytree(model, pickles, ignore=shutil.ignore_patterns("*.safetensors"))
    with hub_server.serve({"old/pickles": pickles}) as server:
        folder, message = download(server, tmp_path / "home", "old/pickles")
        assert not any(name.endswith((".bin", ".pth")) for name in server.requested("GET"))
    assert folder is None
    assert "pytorch_model-00001-of-00002.bin" in message
    assert "safetensors" in message
    _, message = download(server, tmp_path / "home", "old/pickles", HF_HUB_OFFLINE="1")
    assert "HF_HUB_OFFLINE" in message


@pytest.mark.parametrize(
    ("name", "revision", "expected"),
    [
        ("meta/gated", None, ["gated", "licence", "hf auth login", "HF_TOKEN", "/meta/gated"]),
        *cases.long(
            ("nobody/nothing", None, ["no such repository", "nobody/nothing", "HF_TOKEN"]),
            (ID, "v9", ["no such revision", "v9"]),
            ("not an id", None, ["owner/name"]),
        ),
    ],
)
def test_refusals_say_what_to_do(model, tmp_path, name, revision, expected):
    with hub_server.serve({ID: model}, gated=("meta/gated",)) as server:
        folder, message = download(server, tmp_path, name, revision)
    assert folder is None
    for words in expected:
        assert words in message
    assert "to do:" in message


def test_an_unreachable_hub(tmp_path):
    with hub_server.serve({}) as server:
        pass  # its port is closed again
    _, message = download(server, tmp_path, ID)
    assert "cannot be reached" in message
    assert "HF_ENDPOINT" in message
    _, message = download(server, tmp_path, ID, HF_HUB_OFFLINE="1")
    assert "HF_HUB_OFFLINE" in message


def test_a_full_disk_is_named():
    with pytest.raises(errors.UserError, match=r"no space left[\s\S]*HF_HOME"):
        with hub.readable_errors(ID, None, kind="model"):
            raise RuntimeError("download failed") from OSError(28, "No space left on device")


def test_an_unknown_error_is_not_disguised():
    with pytest.raises(ZeroDivisionError), hub.readable_errors(ID, None, kind="model"):
        raise ZeroDivisionError


def test_a_local_folder_is_used_as_it_is(model, monkeypatch):
    assert hub.model_folder(str(model)) == model
    assert hub.commit(model) is None
    monkeypatch.chdir(model.parent)
    assert hub.model_folder("llama-7b") == pathlib.Path("llama-7b")


def test_a_path_that_is_missing_never_goes_to_the_hub(model, monkeypatch):
    monkeypatch.chdir(model.parent)
    (model.parent / "runs").mkdir(exist_ok=True)
    for name in ("/no/such", "./no", "~/no-such-folder", "a/b/c", "runs/x", "x.safetensors"):
        with pytest.raises(errors.UserError, match="no such folder"):
            hub.model_folder(name)
    with pytest.raises(errors.UserError, match="a file"):
        hub.model_folder("llama-7b/config.json")
    with pytest.raises(errors.UserError, match=r"(?s)with adapter_config.*OUTPUT_DIR/adapter"):
        hub.adapter_folder("runs/x/adapter")
    with pytest.raises(errors.UserError, match=r"(?s)/gone, the base that mine names.*--model"):
        hub.model_folder("/gone", named_by=pathlib.Path("mine"))


def test_lfs_pointers_are_refused(model, tmp_path):
    pointer = tmp_path / "model.safetensors"
    pointer.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with pytest.raises(errors.UserError, match="git lfs pull"):
        hub.refuse_lfs_pointer(pointer)
    hub.refuse_lfs_pointer(model / "model-00001-of-00002.safetensors")
