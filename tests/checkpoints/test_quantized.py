"""A quantized copy on disk: the same model as when quantized on loading; complete or absent.

transformers 5.23 with bitsandbytes 0.50.2 loaded what is written as NF4 and FP4: each weight
dequantizes to the same float32 there and here, and the codes and scales are those that bitsandbytes
computes from the dense weights (with double quantization, except for the last bit of the scales'
mean, which torch sums in another order).
"""

import itertools
import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from cli import BASE, ROOT, metrics, refused, run, write_rows
from flax import nnx

from lora_jax import errors
from lora_jax.checkpoints import (
    inventory,
    loader,
    quantize,
    safetensors_files,
    safetensors_writer,
    storage,
    writer,
)
from lora_jax.models import quantization_config
from lora_jax.parallel import mesh as sharding
from lora_jax.quant import formats

MODELS = ROOT / "tests" / "golden" / "models"
NF4 = ROOT / "tests" / "golden" / "quantized" / "stories260K-bnb-nf4"
TINY = MODELS / "llama"


def write(into, fmt, folder=TINY, *, shard=writer.SHARD, **how):
    return list(quantize.write(folder, into, quantize.plan(folder, fmt, **how), shard=shard))


@pytest.mark.parametrize("fmt", formats.FORMATS)
def test_a_matrix_is_read_as_it_was_quantized(tmp_path, fmt):
    """formats.quantize → tensors → a file → find → unpack: the same arrays."""
    weight = np.random.default_rng(0).normal(size=(24, 128)).astype(np.float32)
    tensors = {f"m.{name}": array for name, array in storage.quantize(fmt, weight).items()}
    specs = {f"m.{name}": spec for name, spec in storage.tensor_specs(fmt, 128, 24).items()}
    assert specs.keys() == tensors.keys()
    known = {name: spec for name, spec in specs.items() if spec is not None}
    path = tmp_path / "model.safetensors"
    with safetensors_writer.Writer(path, known, specs.keys() - known.keys()) as file:
        for name, array in tensors.items():
            file.write(name, array)
    native = fmt in quantization_config.NATIVE
    declared = quantization_config.Quantization("lora_jax" if native else "bitsandbytes", fmt)
    found = storage.find(declared, {"m": (128, 24)}, (), safetensors_files.tensors(tmp_path))
    assert not found.problems and found.claimed == tensors.keys()
    mesh = sharding.make_mesh(dict.fromkeys(sharding.AXES, 1))
    recipe = found.weights["m"].recipe
    packed = jax.jit(storage.Unpack(recipe, 1).__call__)(
        storage.read(found.weights["m"], mesh, (None, None))
    )
    expected = formats.quantize(jnp.asarray(weight), fmt, transposed=True)
    assert recipe.packed.fmt == fmt
    for name, array in expected._asdict().items():
        if array is None:
            assert getattr(packed, name) is None
        else:
            np.testing.assert_array_equal(getattr(packed, name), array, err_msg=name)


def test_a_copy_in_shards_loads_as_what_is_quantized_on_loading(tmp_path):
    """Bit for bit, including the tensors that do not change."""
    names = write(tmp_path / "copy", "int8", BASE, shard=10**5)
    assert sorted(names) == sorted(safetensors_files.tensors(BASE))
    files = sorted(path.name for path in (tmp_path / "copy").glob("*.safetensors"))
    assert files[0] == f"model-00001-of-{len(files):05}.safetensors" and 2 < len(files) < 6
    index = json.loads((tmp_path / "copy" / "model.safetensors.index.json").read_text())
    sizes = [tensor.num_bytes for tensor in safetensors_files.tensors(tmp_path / "copy").values()]
    assert index["metadata"]["total_size"] == sum(sizes)
    assert json.loads((tmp_path / "copy" / "config.json").read_text())["quantization_config"] == {
        "quant_method": "lora_jax", "format": "int8", "version": 1,
    }  # fmt: skip
    found, expected = (
        dict(nnx.to_flat_state(nnx.state(model)))
        for model in (
            loader.load(tmp_path / "copy"),
            loader.load(BASE, quantization="int8"),
        )
    )
    assert found.keys() == expected.keys()
    for path, variable in expected.items():
        np.testing.assert_array_equal(found[path][...], variable[...], err_msg=".".join(path))


def test_tensors_start_at_multiples_of_their_dtypes_size(tmp_path):
    path = tmp_path / "x.safetensors"
    arrays = {"a": np.arange(3, dtype=np.uint8), "b": np.arange(5, dtype=np.float32),
              "c": np.arange(7, dtype=np.float16)}  # fmt: skip
    specs = {name: safetensors_writer.spec_of(array) for name, array in arrays.items()}
    with safetensors_writer.Writer(path, specs, ["late"]) as file:
        for name, array in (arrays | {"late": np.arange(9, dtype=np.uint8)}).items():
            file.write(name, array)
    for name, array in safetensors.numpy.load_file(path).items():
        np.testing.assert_array_equal(array, arrays.get(name, np.arange(9)))
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    assert header.pop("__metadata__") == {"format": "pt"} and length % 8 == 0
    ends = sorted(entry["data_offsets"] for entry in header.values())
    assert ends[0][0] == 0 and ends[-1][1] == len(data) - 8 - length
    assert all(one[1] == two[0] for one, two in itertools.pairwise(ends))
    for entry in header.values():
        assert entry["data_offsets"][0] % safetensors_files.DTYPES[entry["dtype"]] == 0
    with pytest.raises(ValueError, match="'b'"):
        with safetensors_writer.Writer(path, specs, []) as file:
            file.write("a", arrays["a"])
            file.write("c", arrays["c"])
    with pytest.raises(ValueError, match="expected a as"):
        with safetensors_writer.Writer(path, specs, []) as file:
            file.write("a", arrays["b"])


def test_tokenizer_and_generation_files_are_copied_and_code_is_not(tmp_path):
    folder = pathlib.Path(shutil.copytree(TINY, tmp_path / "model"))
    for name in ("tokenizer.py", "modeling.py", "pytorch_model.bin", "tokenizer.pth", "notes.txt",
                 "tokenizer.json", "generation_config.json"):  # fmt: skip
        (folder / name).write_text("x")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates/tool_use.jinja").write_text("x")
    write(tmp_path / "copy", "int8", folder)
    copied = (path for path in (tmp_path / "copy").rglob("*") if path.is_file())
    assert {str(path.relative_to(tmp_path / "copy")) for path in copied} == {
        *("config.json", "model.safetensors", "tokenizer.json", "generation_config.json"),
        "additional_chat_templates/tool_use.jinja",
    }


def test_an_interrupted_copy_leaves_nothing(tmp_path):
    names = quantize.write(TINY, tmp_path / "copy", quantize.plan(TINY, "int8"))
    for _ in range(10):
        next(names)
    (part,) = tmp_path.iterdir()
    assert part.name.startswith("copy.part-")  # if the process is killed, this stays …
    with pytest.raises(errors.UserError, match=r"no config\.json"):
        loader.load(part)  # … and is not a model
    names.close()
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_leaves_nothing(tmp_path, monkeypatch):
    def full(self, name, array):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(safetensors_writer.Writer, "write", full)
    with pytest.raises(errors.UserError, match="No space left"):
        write(tmp_path / "copy", "int8")
    assert list(tmp_path.iterdir()) == []


def test_a_value_that_is_not_finite_is_named(tmp_path):
    folder = pathlib.Path(shutil.copytree(TINY, tmp_path / "model"))
    tensors = safetensors.numpy.load_file(folder / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    tensors[name][3, 4] = np.nan
    safetensors.numpy.save_file(tensors, folder / "model.safetensors")
    with pytest.raises(errors.UserError, match=f"1 of 1536 values in {name} is NaN"):
        write(tmp_path / "copy", "int8", folder)
    assert not (tmp_path / "copy").exists()


def test_what_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    flags = ("quantize", "--model", BASE, "--output-dir")
    assert "a new or an empty folder" in refused(*flags, tmp_path / "full")
    message = refused(*flags, tmp_path / "x", "--quant", "int4", "--quant", "nf4")
    assert "found: int4, nf4" in message
    message = refused("quantize", "--model", NF4, "--output-dir", tmp_path / "x")
    assert "found: nf4 (bitsandbytes)" in message
    assert "nf4 (bitsandbytes)" in refused("quantize", "--model", NF4, "--report")
    message = refused("quantize", "--model", MODELS, "--output-dir", tmp_path / "x")
    assert "no config.json" in message
    assert [path.name for path in tmp_path.iterdir()] == ["full"]


# The scripts, from the dense model to a run on its copy


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    folder = tmp_path_factory.mktemp("copies") / "nf4"
    ended = run("quantize", "--model", BASE, "--quant", "nf4", "--output-dir", folder)
    assert ended.code == 0 and f"train.py --model {folder}" in ended.out, ended
    assert "5 linear layers will be dense" in ended.out
    return folder


def test_nf4_is_written_as_bitsandbytes_writes_it(copy):
    """All tensors, quant_state's JSON and blocks across rows included."""
    found, expected = (
        safetensors.numpy.load_file(folder / "model.safetensors") for folder in (copy, NF4)
    )
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert found[name].dtype == array.dtype
        np.testing.assert_array_equal(found[name], array, err_msg=name)


@pytest.fixture(scope="module")
def trained(copy, tmp_path_factory):
    """(folder, flags, how it ended) of a short run on the copy, without --quant."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    rows = write_rows(folder.parent / "rows.jsonl", 16)
    flags = ("--model", copy, "--dataset", rows, "--rank", 2, "--max-steps", 2, "--seq-len", 32,
             "--batch-size", 8, "--grad-accum", 1)  # fmt: skip
    return folder, flags, run("train", *flags, "--output-dir", folder)


def test_a_run_reports_and_records_what_the_base_is(trained):
    folder, _, ended = trained
    assert ended.code == 0, ended
    text = " ".join(ended.out.split())
    assert "260 k parameters" in text and "loaded (quant nf4)" in text
    assert "5 of 35 linear layers are dense" in text and "down_proj" in text
    assert "generate.py --quant nf4 --dtype float32" in text
    assert json.loads((folder / "run.json").read_text())["settings"]["quant"] == "nf4"
    assert [row["step"] for row in metrics(folder) if "loss" in row] == [1, 2]


def test_a_run_on_a_quantized_base_is_resumed(trained):
    folder, _, _ = trained
    ended = run("train", "--resume", "--output-dir", folder)
    assert ended.code == 0, ended
    assert "--quant int4, but the run has nf4" in refused(
        "train", "--resume", "--output-dir", folder, "--use-4bit"
    )


@pytest.mark.parametrize("script", ["train", "generate", "plan"])
def test_a_quantized_checkpoint_in_another_format_is_refused(trained, script, tmp_path):
    flags = {
        "train": (*trained[1], "--output-dir", tmp_path / "run"),
        "generate": ("--model", NF4, "--prompt", "x"),
        "plan": ("--model", NF4, "--no-compile", "--target", "cpu:1"),
    }[script]
    message = refused(script, *flags, "--quant", "fp4")
    assert "expected: --quant nf4, the checkpoint's format, or none" in message
    assert not (tmp_path / "run").exists()


def test_a_plan_knows_the_format_from_config_json_alone(tmp_path):
    shutil.copy(NF4 / "config.json", tmp_path)
    ended = run("plan", "--model", tmp_path, "--no-compile", "--target", "cpu:1", "--json")
    found = json.loads(ended.out)
    assert found["job"]["quant"] == "nf4"
    resident = found["memory"]["resident"]
    parts = ("packed words", "scales", "linear layers", "embedding, head, norms, biases")
    loaded = inventory.loaded_bytes(NF4, dtype=None, quantization=None)
    indices = 2 * 5 * 4  # of the layers, in the adapters
    assert sum(resident[part] for part in parts) == loaded + indices
    assert resident["linear layers"] == 4 * 5 * 64 * 172  # down_proj
