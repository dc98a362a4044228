"""Adapters merged into their base's folder: other programs load a model with the same outputs."""

import collections
import functools
import json
import pathlib
import shutil
import weakref

import cases
import cli
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx

from lora_jax import assets, errors, lora
from lora_jax.checkpoints import free_space, loader, merge, safetensors_files, writer
from lora_jax.lora import adapter as host
from lora_jax.lora import peft
from lora_jax.parallel import mesh as sharding

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"
MODELS = GOLDEN / "models"
ADAPTERS = {  # adapter whose merged logits PEFT computed: its base
    "lora_all_rslora": "llama",
    "lora_bias": "llama_bias",
    "lora_dora": "llama_bias",
    "lora_dora_embedding": "llama_tied_hd16",
    "lora_embedding": "llama",
    "lora_saved": "llama",
    "lora_pissa": "llama",
    "lora_tokens": "llama_tied_hd16",
    "lora_tokens_head": "llama",
    "lora_gemma3": "gemma3",
    "lora_granite": "granite",
    "lora_phi3": "phi3_longrope",
    "lora_olmo3": "olmo3",
    "lora_gemma2": "gemma2",
}


def write(base, adapter, into, shard=writer.SHARD, **how):
    plan = merge.plan(base, adapter, **how)
    with writer.new_folder(into, 0) as written:
        return list(merge.write(base, written, plan, shard=shard))


def load(folder, **how):
    one = sharding.make_mesh(dict.fromkeys(sharding.AXES, 1))
    return loader.load(folder, dtype="float32", mesh=one, **how)


@functools.partial(jax.jit, static_argnums=0)
def run(graphdef, state, ids, mask):
    return nnx.merge(graphdef, state)(ids, mask)


def logits(model, golden):
    found = run(*nnx.split(model), golden["input_ids"], golden["attention_mask"])
    return np.where(golden["attention_mask"][..., None] == 1, found, 0)


@functools.cache
def golden_logits(name):
    with np.load(GOLDEN / name / "eval_logits.npz") as arrays:
        return dict(arrays)


# Whose weights change as those of others.
LONG = ("lora_all_rslora", "lora_dora", "lora_embedding", "lora_gemma3", "lora_granite",
        "lora_pissa")  # fmt: skip


@pytest.mark.parametrize(
    "name", [*(name for name in ADAPTERS if name not in LONG), *cases.long(*LONG)]
)
def test_a_merged_folder_computes_what_pefts_merged_model_does(name, tmp_path):
    base, golden = MODELS / ADAPTERS[name], golden_logits(name)
    adapter = peft.read(GOLDEN / name / "final_adapter")
    names = write(base, adapter, tmp_path / "merged", shard=30_000)
    config = json.loads((tmp_path / "merged/config.json").read_text())
    # PEFT also changes a head that is tied to an embedding; here the head stays as it was.
    tied = name == "lora_dora_embedding"
    stays_tied = name in ("lora_tokens", "lora_gemma2", "lora_gemma3", "lora_phi3")
    assert config["tie_word_embeddings"] is stays_tied
    assert ("lm_head.weight" in names) is not stays_tied
    expected = golden["logits" if tied else "merged_logits"]
    np.testing.assert_allclose(logits(load(tmp_path / "merged"), golden), expected, atol=1e-4)
    files = sorted(path.name for path in (tmp_path / "merged").glob("*.safetensors"))
    index = json.loads((tmp_path / "merged/model.safetensors.index.json").read_text())
    assert len(files) > 2 and sorted(set(index["weight_map"].values())) == files
    dtypes = {stored.dtype for stored in safetensors_files.tensors(tmp_path / "merged").values()}
    assert dtypes == {"F32"}


@pytest.mark.parametrize("name", ["lora_pissa", "lora_olora"])
def test_an_unconverted_adapter_is_merged_into_the_base_that_it_changes(name, tmp_path):
    base, golden = MODELS / "llama", golden_logits(name)
    adapter = peft.read(GOLDEN / name / "unconverted_adapter")
    write(base, adapter, tmp_path / "merged")
    expected = golden["merged_logits"]
    np.testing.assert_allclose(logits(load(tmp_path / "merged"), golden), expected, atol=1e-4)
    with pytest.raises(errors.UserError, match="the original weights"):
        merge.plan(base, adapter, quantization="int8")


@pytest.mark.long
@pytest.mark.parametrize("fmt", ["int4", "nf4-dq"])
def test_merging_into_a_rounded_base_equals_the_adapter_on_it(fmt, tmp_path):
    adapter = peft.read(GOLDEN / "lora_dora" / "final_adapter")
    base, golden = MODELS / "llama_bias", golden_logits("lora_dora")
    model = load(base, quantization=fmt)
    lora.attach(model, adapter)
    write(base, adapter, tmp_path / "merged", quantization=fmt)
    found = logits(load(tmp_path / "merged"), golden)
    np.testing.assert_allclose(found, logits(model, golden), atol=2e-4)
    assert np.abs(found - golden["merged_logits"]).max() > 0.01  # not the original base


@pytest.mark.long
def test_a_checkpoint_of_bitsandbytes_is_dequantized_for_merging(tmp_path):
    base = GOLDEN / "quantized" / "stories260K-bnb-nf4"
    model = load(base)
    config, rng = lora.LoRAConfig(rank=2), np.random.default_rng(1)
    lora.inject(model, config, rngs=nnx.Rngs(0))
    for name in ("q_proj", "v_proj"):
        B = getattr(model.model.layers.self_attn, name).lora_B
        B.set_value(jnp.asarray(np.float32(0.05 * rng.normal(size=B.shape))))
    write(base, lora.collect(model, config), tmp_path / "merged")
    assert "quantization_config" not in json.loads((tmp_path / "merged/config.json").read_text())
    ids = np.arange(3, 23, dtype=np.int32)[None]
    batch = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    expected = logits(model, batch)
    np.testing.assert_allclose(logits(load(tmp_path / "merged"), batch), expected, atol=1e-4)


@pytest.mark.parametrize(("declared", "stored"), [("float16", "F16"), ("torch.bfloat16", "BF16")])
def test_dequantized_tensors_get_the_dtype_of_config_json(declared, stored, tmp_path):
    """float16, too, although lora_jax computes in bfloat16, which would lose bits."""
    base = shutil.copytree(GOLDEN / "quantized" / "stories260K-bnb-nf4", tmp_path / "base")
    raw = json.loads((base / "config.json").read_text())
    raw.pop("dtype", None)
    (base / "config.json").write_text(json.dumps(raw | {"torch_dtype": declared}))
    adapter = host.Adapter(lora.LoRAConfig(), {})
    specs = {name: spec for part in merge.plan(base, adapter).parts
             for name, spec in part.specs.items()}  # fmt: skip
    assert specs["model.layers.0.mlp.up_proj.weight"].dtype == stored
    assert specs["model.norm.weight"].dtype == "F32"


def test_one_tensor_is_in_memory_at_a_time(monkeypatch, tmp_path):
    alive, value = [], safetensors_files.StoredTensor.value

    def watched(stored):
        assert sum(ref() is not None for ref in alive) <= 1
        array = value(stored)
        alive.append(weakref.ref(array))
        return array

    monkeypatch.setattr(safetensors_files.StoredTensor, "value", watched)
    adapter = peft.read(GOLDEN / "lora_all_rslora" / "final_adapter")
    names = write(MODELS / "llama", adapter, tmp_path / "merged")
    assert len(alive) == len(names) > 20


# ------------------------------------------------------------------------- the script


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with an adapter of stories260K that has an effect."""
    folder = tmp_path_factory.mktemp("made") / "adapter"
    model = load(cli.BASE)
    config = lora.LoRAConfig(rank=2, targets=("q_proj", "down_proj"))
    lora.inject(model, config, rngs=nnx.Rngs(0))
    B = model.model.layers.mlp.down_proj.lora_B
    noise = np.random.default_rng(1).normal(size=B.shape)
    B.set_value(jnp.asarray(np.float32(0.2 * noise)))
    peft.save(folder, model, config, base_model=str(cli.BASE))
    return folder


@pytest.fixture
def adapter(made, tmp_path):
    return shutil.copytree(made, tmp_path / "adapter")


def test_the_script_merges_compares_and_leaves_a_model_to_generate_with(adapter, tmp_path):
    into = tmp_path / "merged"
    ended = cli.run("merge", "--adapter", adapter, "--output-dir", into, "--prompt", "Tom has a")
    assert ended.code == 0 and ended.err == "", ended
    out = " ".join(ended.out.split())
    assert "adapter 10 layers; changed most: model.layers." in out
    assert "100.0% of" in out and "KL" in out and "(at most 0.01)" in out
    names = {path.name for path in into.iterdir()}
    assert {"config.json", "generation_config.json", "tokenizer.json"} < names
    flags = ("--prompt", "Once upon a time", "--max-new-tokens", 12)
    plain = cli.run("generate", "--model", cli.BASE, *flags).out
    with_adapter = cli.run("generate", "--adapter", adapter, *flags).out
    assert cli.run("generate", "--model", into, *flags).out == with_adapter != plain


def test_a_merge_with_other_predictions_leaves_nothing(adapter, tmp_path, monkeypatch):
    merged = merge._merged
    monkeypatch.setattr(merge, "_merged", lambda name, source, own, scaling, *of:
                        merged(name, source, own, 2 * scaling, *of))  # fmt: skip
    message = cli.refused("merge", "--adapter", adapter, "--output-dir", tmp_path / "merged")
    assert "within 0.01 nats per token" in message
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_merged_weights_of_nan_leave_nothing(adapter, tmp_path, monkeypatch):
    merged = merge._merged

    def broken(name, *of):
        return {name: np.full_like(array, np.nan) for name, array in merged(name, *of).items()}

    monkeypatch.setattr(merge, "_merged", broken)
    flags = ("--adapter", adapter, "--output-dir", tmp_path / "merged", "--max-kl", "inf")
    assert "expected: finite weights" in cli.refused("merge", *flags)
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_an_adapter_with_which_the_base_predicts_nan_leaves_nothing(adapter, tmp_path):
    file = adapter / "adapter_model.safetensors"
    tensors = safetensors.numpy.load_file(file)
    large = {name: array * 1e30 for name, array in tensors.items()}
    safetensors.numpy.save_file(large, file)
    message = cli.refused("merge", "--adapter", adapter, "--output-dir", tmp_path / "merged")
    assert "finite predictions of the base with the adapter" in message
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_a_merged_weight_beyond_its_dtype_is_named(tmp_path):
    base = shutil.copytree(MODELS / "llama", tmp_path / "base")
    tensors = safetensors.numpy.load_file(base / "model.safetensors")
    halves = {name: array.astype(np.float16) for name, array in tensors.items()}
    safetensors.numpy.save_file(halves, base / "model.safetensors")
    name = "model.layers.1.self_attn.v_proj"
    n, k = tensors[f"{name}.weight"].shape
    ones = host.Factors(np.full((k, 1), 300, np.float32), np.full((1, n), 300, np.float32))
    adapter = host.Adapter(lora.LoRAConfig(rank=1, alpha=1), {name: ones})
    found = rf"float16 can hold(.|\n)*NaN or infinity in {name}.weight, with values of up to 9e\+04"
    with pytest.raises(errors.UserError, match=found):
        write(base, adapter, tmp_path / "merged")
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


def test_ctrl_c_leaves_nothing(adapter, tmp_path, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(merge, "_merged", interrupted)
    ended = cli.run("merge", "--adapter", adapter, "--output-dir", tmp_path / "merged")
    assert ended.code == 130 and "Traceback" not in ended.err
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_what_cannot_be_merged_is_reported_at_once(adapter, tmp_path):
    assert "no --adapter no --output-dir" in cli.refused("merge")
    message = cli.refused("merge", "--adapter", adapter, "--output-dir", adapter)
    assert "a folder that holds files" in message
    flags = ("--adapter", adapter, "--output-dir", tmp_path / "merged")
    message = cli.refused("merge", *flags, "--model", assets.FOLDER)
    assert "down_proj.lora_A has shape" in message
    assert f"where: {adapter}" in message
    assert "--quant-fast with --quant none" in cli.refused("merge", *flags, "--quant-fast")
    assert "found: -1" in cli.refused("merge", *flags, "--max-kl", -1)


def test_a_full_disk_is_reported_in_whole_mebibytes(monkeypatch, tmp_path):
    usage = collections.namedtuple("Usage", "total used free")(2**40, 2**40, 100)
    monkeypatch.setattr(free_space.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(errors.UserError, match=r"(?s)at least 1 MiB free.*0 MiB free"):
        with writer.new_folder(tmp_path / "into", 101):
            pass
    assert not any(tmp_path.iterdir())


def test_transformers_loads_what_was_merged(tmp_path):
    """If torch is installed: the same logits as the model in JAX with its adapter."""
    torch = pytest.importorskip("torch", reason="compares with torch: pip install torch")
    transformers = pytest.importorskip("transformers")
    for name in ("lora_dora_embedding", "lora_saved", "lora_dora"):
        golden, into = golden_logits(name), tmp_path / name
        adapter = peft.read(GOLDEN / name / "final_adapter")
        write(MODELS / ADAPTERS[name], adapter, into, shard=30_000)
        model = transformers.AutoModelForCausalLM.from_pretrained(into).eval()
        ids, mask = (torch.tensor(golden[key], dtype=torch.long)
                     for key in ("input_ids", "attention_mask"))  # fmt: skip
        with torch.no_grad():
            found = model(ids, attention_mask=mask).logits.numpy()
        real = golden["attention_mask"] == 1
        np.testing.assert_allclose(found[real], golden["logits"][real], atol=1e-4)


def test_safetensors_reads_the_files(tmp_path):
    adapter = peft.read(GOLDEN / "lora_all_rslora" / "final_adapter")
    write(MODELS / "llama", adapter, tmp_path / "merged")
    before, after = (safetensors.numpy.load_file(folder / "model.safetensors")
                     for folder in (MODELS / "llama", tmp_path / "merged"))  # fmt: skip
    assert before.keys() == after.keys()
    same = {name for name in before if np.array_equal(before[name], after[name])}
    changed = {f"{path}.weight" for path in adapter.factors}
    assert same == before.keys() - changed and len(changed) == 21
