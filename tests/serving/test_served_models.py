"""Names of models and adapters, and adapters that come and go."""

import pytest


@pytest.fixture
def folder(tmp_path):
    """Adapters below it: good, a link to one outside, one with a linked file."""
    allowed, outside = tmp_path / "allowed", tmp_path / "outside"
    for each in (allowed / "good", allowed / "bad", allowed / "linked", outside):
        each.mkdir(parents=True)
    for each in (allowed / "good", outside):
        (each / "adapter_config.json").write_text("{}")
    (allowed / "link").symlink_to(outside)
    (allowed / "loop").symlink_to("loop")
    (allowed / "linked" / "adapter_config.json").symlink_to(outside / "adapter_config.json")
    return allowed


@pytest.fixture
def runtime(serve, folder):
    return serve(adapters=("first",), adapters_dir=folder, allow_runtime_lora=True)


def load(client, name="new", path="good", **more):
    return client.post("/v1/load_lora_adapter", lora_name=name, lora_path=path, **more)


def unload(client, name):
    return client.post("/v1/unload_lora_adapter", lora_name=name)


def names(client):
    return [each["id"] for each in client.get("/v1/models").json["data"]]


def test_the_models_are_listed(serve):
    client = serve(adapters=("a/b", "c"))
    listed = client.get("/v1/models").json
    assert listed["object"] == "list"
    base, first, _ = listed["data"]
    assert base["id"] == "base" and base["root"] == "models/base" and base["parent"] is None
    assert base["object"] == "model" and base["max_model_len"] == 64
    assert first["id"] == "a/b" and first["parent"] == "base"
    assert client.get("/v1/models/a/b").json == first
    assert client.get("/v1/models/models/base").json == base
    missing = client.get("/v1/models/nope")
    assert missing.status == 404 and missing.error["code"] == "model_not_found"


@pytest.mark.parametrize(
    ("fields", "weights", "answers_as"),
    [
        ({}, {}, "base"),
        ({"model": ""}, {}, "base"),
        ({"model": "base"}, {}, "base"),
        ({"model": "models/base"}, {}, "models/base"),
        ({"model": "a"}, {"a": 1.0}, "a"),
        ({"adapters": {"a": 0.7, "b": -0.3}}, {"a": 0.7, "b": -0.3}, "base"),
        ({"model": "base", "adapters": {"a": 1, "b": 0}}, {"a": 1.0}, "base"),
    ],
)
def test_model_and_adapters_choose_weights(serve, fields, weights, answers_as):
    client = serve(adapters=("a", "b"))
    body = client.chat(**fields).json
    assert client.engine.asked[-1].adapters == weights and body["model"] == answers_as


@pytest.mark.parametrize(
    ("fields", "status", "param"),
    [
        ({"model": "c"}, 404, "model"),
        ({"adapters": {"c": 1}}, 400, "adapters"),
        ({"model": "a", "adapters": {"b": 1}}, 400, "adapters"),
    ],
)
def test_names_that_are_not_there(serve, fields, status, param):
    client = serve(adapters=("a", "b"))
    for answer in (client.chat(**fields), client.complete(**fields)):
        assert answer.status == status and answer.error["param"] == param
    assert not client.engine.asked


def test_an_adapter_is_loaded_replaced_and_unloaded(runtime, folder):
    answer = load(runtime)
    assert answer.status == 200
    assert answer.body == b"Success: LoRA adapter 'new' added successfully."
    assert names(runtime) == ["base", "first", "new"]
    assert runtime.engine.pool.loaded["new"] == folder / "good"
    assert runtime.chat(model="new").status == 200
    again = load(runtime)
    assert again.status == 400 and "load_inplace" in again.error["message"]
    assert load(runtime, load_inplace=True).status == 200
    assert load(runtime, "whole", str(folder / "good")).status == 200
    assert unload(runtime, "new").status == 200
    assert runtime.chat(model="new").status == 404 == unload(runtime, "new").status


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("../outside", 403),
        ("good/../../outside", 403),
        ("/etc", 403),
        ("link", 403),
        ("linked", 403),
        ("nothing", 404),
        ("loop", 404),
        ("good/adapter_config.json", 404),
        ("a" * 5000, 404),
        ("good\0", 404),
        ("bad", 400),  # whatever the pool says
        ("", 400),
        (5, 400),
    ],
)
def test_only_adapters_below_the_folder_are_read(runtime, path, status):
    answer = load(runtime, path=path)
    assert answer.status == status and answer.error["param"] == "lora_path"
    assert names(runtime) == ["base", "first"]


@pytest.mark.parametrize("name", ["base", "models/base", "", None, 5, "a\nb", " ", "x" * 300])
def test_names_that_an_adapter_cannot_have(runtime, name):
    answer = load(runtime, name=name)
    assert answer.status == 400 and answer.error["param"] == "lora_name"


def test_adapters_stay_unless_the_server_allows_it(serve):
    client = serve(adapters=("first",))
    for answer in (load(client), unload(client, "first")):
        assert answer.status == 403 and "--allow-runtime-lora" in answer.error["message"]
    assert names(client) == ["base", "first"]
