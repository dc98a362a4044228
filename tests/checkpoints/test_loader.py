"""Loading a checkpoint: all faults are named, weights are quantized on the way, memory is small."""

import functools
import json
import os
import pathlib
import shutil
import subprocess
import sys

import cases
import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors
import safetensors.numpy
from flax import nnx

from lora_jax import errors
from lora_jax.checkpoints import loader, safetensors_files
from lora_jax.lora.nnx import sites
from lora_jax.parallel import mesh as sharding
from lora_jax.quant import formats
from lora_jax.quant import linear as quant_linear

MODELS = pathlib.Path(__file__).parents[1] / "golden" / "models"


def one_device():
    return sharding.make_mesh({"data": 1, "fsdp": 1, "tensor": 1})


@functools.cache
def load(name, quantization="none", dtype="float32"):
    return loader.load(MODELS / name, dtype=dtype, quantization=quantization, mesh=one_device())


def tensors_of(name):
    return safetensors.numpy.load_file(MODELS / name / "model.safetensors")


@pytest.fixture
def folder(tmp_path):
    """A copy of a good checkpoint, to be damaged."""
    return pathlib.Path(shutil.copytree(MODELS / "llama", tmp_path / "model"))


def write_shards(folder, tensors, num_shards=3):
    """Replaces model.safetensors by shards and their index, as save_pretrained writes them."""
    (folder / "model.safetensors").unlink(missing_ok=True)
    weight_map = {
        name: f"model-{1 + i % num_shards:05}-of-{num_shards:05}.safetensors"
        for i, name in enumerate(sorted(tensors))
    }
    for file in set(weight_map.values()):
        part = {name: tensors[name] for name in tensors if weight_map[name] == file}
        safetensors.numpy.save_file(part, folder / file, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return sorted(set(weight_map.values()))


def assert_same_model(one, two):
    a, b = (jax.tree_util.tree_leaves_with_path(nnx.to_pure_dict(nnx.state(m))) for m in (one, two))
    assert [path for path, _ in a] == [path for path, _ in b]
    for (path, x), (_, y) in zip(a, b, strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(x, y, err_msg=jax.tree_util.keystr(path))


@pytest.mark.parametrize("name", ["llama_bias", "qwen3"])
def test_every_tensor_is_in_its_slot(name):
    """Layer i of a stacked kernel is the transposed weight of layer i; the rest is as on disk."""
    flat = dict(nnx.to_flat_state(nnx.state(load(name))))
    tensors, seen = tensors_of(name), 0
    for path, variable in flat.items():
        leaf = {"kernel": "weight", "embedding": "weight"}.get(path[-1], path[-1])
        layers = range(variable.shape[0]) if path[1] == "layers" else [None]
        for layer in layers:
            middle = (str(layer), *path[2:-1]) if layer is not None else path[2:-1]
            name_on_disk = ".".join((*path[:2], *middle, leaf) if path[0] == "model"
                                    else (*path[:-1], leaf))  # fmt: skip
            found = np.asarray(variable[...] if layer is None else variable[layer])
            expected = tensors[name_on_disk]
            np.testing.assert_array_equal(found.T if path[-1] == "kernel" else found, expected)
            seen += 1
    assert seen == len(tensors)
    has_bias = any(path[-1] == "bias" for path in flat)
    assert has_bias == (name == "llama_bias")


def test_shards_load_like_one_file(folder):
    write_shards(folder, tensors_of("llama"))
    model = loader.load(folder, dtype="float32", mesh=one_device())
    assert_same_model(model, load("llama"))


@pytest.mark.parametrize(
    ("stored", "asked", "expected"),
    [
        (ml_dtypes.bfloat16, None, "bfloat16"),
        (ml_dtypes.bfloat16, "float32", "float32"),
        (np.float32, "bfloat16", "bfloat16"),
        (np.float16, None, "bfloat16"),  # float16's range is too small to train in
    ],
)
def test_the_dtype_is_the_configs_unless_another_is_asked_for(folder, stored, asked, expected):
    tensors = {name: tensor.astype(stored) for name, tensor in tensors_of("llama").items()}
    safetensors.numpy.save_file(tensors, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    config["dtype"] = np.dtype(stored).name
    (folder / "config.json").write_text(json.dumps(config))
    model = loader.load(folder, dtype=asked, mesh=one_device())
    assert {str(x.dtype) for x in jax.tree.leaves(nnx.state(model))} == {expected}
    embedding = np.asarray(model.model.embed_tokens.embedding[...], np.float32)
    as_stored = tensors["model.embed_tokens.weight"].astype(expected).astype(np.float32)
    np.testing.assert_array_equal(embedding, as_stored)


@pytest.mark.parametrize(
    "name, fmt",
    [("llama_tied_hd16", "int4"), *cases.long(("llama_bias", "int8"), ("llama_bias", "nf4"))],
)
def test_loading_quantized_equals_quantizing_after_loading(name, fmt):
    """Linear layers are packed, lm_head, embeddings, norms and biases stay as they are."""
    model, dense = load(name, fmt), load(name)
    pairs = {".".join(map(str, s.path)): (s.module, d.module)
             for s, d in zip(sites.find(model), sites.find(dense), strict=True)
             if s.kind == "linear"}  # fmt: skip
    assert len(pairs) == 7 + (name == "llama_bias")
    quantize = jax.jit(jax.vmap(functools.partial(formats.quantize, fmt=fmt)))
    for path, (layer, linear) in pairs.items():
        if path == "lm_head":
            assert isinstance(layer, nnx.Linear)
            np.testing.assert_array_equal(layer.kernel[...], linear.kernel[...])
            continue
        assert isinstance(layer, quant_linear.QuantLinear) and layer.fmt == fmt
        packed = quantize(linear.kernel[...])
        np.testing.assert_array_equal(layer.packed.q, packed.q)
        for found, expected in zip(layer.packed[1:], packed[1:], strict=True):
            if expected is not None:  # compiled separately: the last bit of a float may differ
                np.testing.assert_allclose(found, expected, rtol=1e-6)
        if linear.bias is None:
            assert layer.bias is None
        else:
            assert np.asarray(linear.bias).any()
            np.testing.assert_array_equal(layer.bias[...], linear.bias[...])
    np.testing.assert_array_equal(
        model.model.embed_tokens.embedding[...], dense.model.embed_tokens.embedding[...]
    )
    np.testing.assert_array_equal(
        model.model.layers.input_layernorm.weight[...],
        dense.model.layers.input_layernorm.weight[...],
    )


@pytest.mark.long
def test_loading_without_the_search_rounds_differently():
    fast = loader.load(MODELS / "llama_bias", quantization="int4", search=False,
                           mesh=one_device())  # fmt: skip
    layer, dense = fast.model.layers.mlp.up_proj, load("llama_bias").model.layers.mlp.up_proj
    quantize = functools.partial(formats.quantize, fmt="int4", search=False)
    expected = jax.jit(jax.vmap(quantize))(dense.kernel[...])
    np.testing.assert_array_equal(layer.packed.q, expected.q)
    assert (layer.packed.q != load("llama_bias", "int4").model.layers.mlp.up_proj.packed.q).any()


@pytest.mark.long
def test_a_mesh_holds_the_same_model():
    """Sharded and quantized at once: the same words, cut where the rules say."""
    mesh = sharding.make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    model = loader.load(MODELS / "llama", dtype="float32", quantization="int4", mesh=mesh)
    alone = load("llama", "int4")
    q = model.model.layers.self_attn.q_proj.q[...]
    assert q.sharding.spec == jax.P(None, "fsdp", "tensor")
    words = alone.model.layers.self_attn.q_proj.q.shape[1]
    weight, expected = (
        np.asarray(m.model.layers.self_attn.q_proj.q[...])[:, :words] for m in (model, alone)
    )
    np.testing.assert_array_equal(weight, expected)
    embedding = model.model.embed_tokens.embedding[...]
    assert not embedding.sharding.is_fully_replicated
    np.testing.assert_array_equal(embedding, alone.model.embed_tokens.embedding[...])


def test_only_the_parts_that_devices_hold_are_read_each_once(monkeypatch):
    (name, stored), *_ = (
        item for item in safetensors_files.tensors(MODELS / "llama").items() if "q_proj" in item[0]
    )
    whole, asked = tensors_of("llama")[name], []

    class Reader:
        def __init__(self, *_):
            self.opened = opened(*_)

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.opened.__exit__(*_)

        def get_slice(self, name):
            part = self.opened.__enter__().get_slice(name)

            class Slice:
                def __getitem__(self, index):
                    asked.append(part[index].shape)
                    return part[index]

            return Slice()

    opened = safetensors.safe_open
    monkeypatch.setattr(safetensors, "safe_open", Reader)
    mesh = sharding.make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    where = sharding.of(("layers", "self_attn", "q_proj", "kernel"), 3, mesh)
    array = loader._Source(None, stored).read(where, True)
    np.testing.assert_array_equal(array, whole)
    rows, columns = whole.shape
    assert asked == [(rows // 2, columns // 2)] * 4


def test_tensors_that_do_not_fit_are_all_listed(folder):
    tensors = tensors_of("llama")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    del tensors["lm_head.weight"]
    tensors["model.layers.3.mlp.up_proj.weight"] = np.zeros((48, 32), np.float32)
    tensors["model.layers.0.self_attn.q_proj.bias"] = np.ones(32, np.float32)
    tensors["model.layers.0.mlp.down_proj.weight"] = np.zeros((48, 32), np.float32)
    tensors["model.norm.weight"] = np.zeros(32, np.int8)
    safetensors.numpy.save_file(tensors, folder / "model.safetensors")
    with pytest.raises(errors.UserError) as raised:
        loader.load(folder, mesh=one_device())
    message = str(raised.value)
    for problem in (
        "model.layers.1.mlp.up_proj.weight is missing",
        "lm_head.weight is missing",
        "model.layers.3.mlp.up_proj.weight is unexpected",
        "model.layers.0.self_attn.q_proj.bias is unexpected",
        "model.layers.0.mlp.down_proj.weight has shape [48, 32], expected [32, 48]",
        "model.norm.weight has dtype I8",
        str(folder),
    ):
        assert problem in message


def test_extra_tensors_of_older_files_are_ignored(folder):
    """The rotary frequencies as buffers, and lm_head beside tied embeddings."""
    tensors = tensors_of("llama_tied_hd16")
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.zeros(8, np.float32)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    safetensors.numpy.save_file(tensors, folder / "model.safetensors")
    shutil.copy(MODELS / "llama_tied_hd16" / "config.json", folder)
    model = loader.load(folder, dtype="float32", mesh=one_device())
    assert_same_model(model, load("llama_tied_hd16"))


def test_truncated_files_are_all_named(folder):
    files = write_shards(folder, tensors_of("llama"))
    for file in files[:2]:
        path = folder / file
        path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(errors.UserError, match="truncated") as raised:
        loader.load(folder, mesh=one_device())
    assert all((file in str(raised.value)) == (file in files[:2]) for file in files)


def test_missing_shards_are_all_named(folder):
    files = write_shards(folder, tensors_of("llama"))
    for file in files[1:]:
        (folder / file).unlink()
    with pytest.raises(errors.UserError, match="every shard") as raised:
        loader.load(folder, mesh=one_device())
    assert all((file in str(raised.value)) == (file in files[1:]) for file in files)


@pytest.mark.parametrize("name", ["model.safetensors", "model.safetensors.index.json"])
def test_lfs_pointers_are_refused(folder, name):
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 99\n"
    (folder / "model.safetensors").unlink()
    (folder / name).write_text(pointer)
    with pytest.raises(errors.UserError, match=f"(?s)git-lfs pointer.*{name}.*git lfs pull"):
        loader.load(folder, mesh=one_device())


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pth"])
def test_pickles_are_refused_unopened(folder, name):
    (folder / "model.safetensors").unlink()
    (folder / name).write_bytes(b"cos\nsystem\n(S'exit 1'\ntR.")
    with pytest.raises(errors.UserError, match=f"(?s){name}.*pickle.*safetensors"):
        loader.load(folder, mesh=one_device())


def test_a_folder_without_weights_is_named(folder):
    (folder / "model.safetensors").unlink()
    with pytest.raises(errors.UserError, match="no weights") as raised:
        loader.load(folder, mesh=one_device())
    assert str(folder) in str(raised.value)
    (folder / "model-q4_0.gguf").write_bytes(b"GGUF")
    with pytest.raises(errors.UserError, match=r"(?s)only model-q4_0\.gguf.*gguf_file="):
        loader.load(folder, mesh=one_device())
    (folder / "adapter_model.safetensors").write_bytes(b"")  # beside a config.json
    with pytest.raises(errors.UserError, match=r"(?s)an adapter.*without its base.*--init-adapter"):
        loader.load(folder, mesh=one_device())


def test_an_adapter_passed_as_a_model_is_named():
    with pytest.raises(errors.UserError, match="--adapter"):
        loader.load(MODELS.parent / "lora_qv" / "final_adapter", mesh=one_device())


BIG = dict(
    model_type="llama",
    vocab_size=32000,
    hidden_size=1024,
    intermediate_size=2816,
    num_hidden_layers=6,
    num_attention_heads=16,
    num_key_value_heads=16,
    max_position_embeddings=512,
    tie_word_embeddings=True,
    dtype="bfloat16",
)

# Prints: bytes over the baseline at the peak, bytes of the loaded model.
MEASURE = """
import sys, jax, jax.numpy as jnp
from flax import nnx
from lora_jax import checkpoints
jax.block_until_ready(jnp.ones(8) + 1)
def memory(name):  # not getrusage: its peak includes the parent process
    return next(1024 * int(l.split()[1]) for l in open("/proc/self/status") if l.startswith(name))
base = memory("VmRSS:")
model = checkpoints.load(sys.argv[1], quantization=sys.argv[2])
print(memory("VmHWM:") - base, sum(x.nbytes for x in jax.tree.leaves(nnx.state(model))))
"""


def write_big(folder):
    """A checkpoint of 220 MB, bfloat16; its values repeat, so that writing it takes no time."""
    hidden, ffn = BIG["hidden_size"], BIG["intermediate_size"]
    shapes = {
        "model.embed_tokens.weight": (BIG["vocab_size"], hidden),
        "model.norm.weight": (hidden,),
    }
    for layer in range(BIG["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        for name in "qkvo":
            shapes[f"{prefix}self_attn.{name}_proj.weight"] = (hidden, hidden)
        for name, shape in (
            ("gate", (ffn, hidden)),
            ("up", (ffn, hidden)),
            ("down", (hidden, ffn)),
        ):
            shapes[f"{prefix}mlp.{name}_proj.weight"] = shape
        for name in ("input", "post_attention"):
            shapes[f"{prefix}{name}_layernorm.weight"] = (hidden,)
    header, end = {}, 0
    for name, shape in shapes.items():
        start, end = end, end + 2 * int(np.prod(shape))
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    values = np.random.default_rng(0).normal(0, 0.02, 2**20).astype(ml_dtypes.bfloat16).tobytes()
    with open(folder / "model.safetensors", "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for start in range(0, end, len(values)):
            file.write(values[: end - start])
    (folder / "config.json").write_text(json.dumps(BIG))
    return end, max(2 * int(np.prod(shape)) for shape in shapes.values())


@pytest.mark.long
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_host_memory_stays_near_the_packed_model(tmp_path):
    """Peak over the baseline ≤ the packed model + 3 × the largest float tensor."""
    total, largest = write_big(tmp_path)
    assert total > 200e6
    environment = dict(os.environ, JAX_PLATFORMS="cpu", XLA_FLAGS="")
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(tmp_path), "int4"],
        env=environment,
        cwd=pathlib.Path(__file__).parents[2],
        capture_output=True,
        text=True,
    )
    (tmp_path / "model.safetensors").unlink()
    assert done.returncode == 0, done.stderr
    peak, packed = map(int, done.stdout.split())
    assert packed < 0.55 * total
    assert peak <= packed + 3 * largest, f"{peak / 1e6:.0f} MB, model {packed / 1e6:.0f} MB"


@pytest.mark.parametrize("text", ["{}", "[]", '{"weight_map": {"a": 1}}', "{", "[" * 100_000])
def test_a_malformed_index_is_named(folder, text):
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(text)
    with pytest.raises(errors.UserError, match="weight_map"):
        safetensors_files.tensors(folder)


def test_dimensions_that_the_mesh_does_not_divide_are_all_listed():
    mesh = sharding.make_mesh({"data": 1, "fsdp": 1, "tensor": 8})  # ffn 172, 4 kv-heads of 8
    with pytest.raises(errors.UserError) as error:
        loader.load(MODELS / "stories260K", mesh=mesh)
    for name in ("gate_proj", "up_proj", "down_proj"):
        assert f"model.layers.mlp.{name}.kernel: 172 over tensor=8" in str(error.value)
    assert "q_proj" not in str(error.value)
