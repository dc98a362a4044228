"""Writes tiny models as compressed-tensors and mlx-lm store them: quantized/ct-…, quantized/mlx-….

Made with torch 2.13.0 (CPU), transformers 5.24.0, compressed-tensors 0.20.1, mlx 0.32.4 (CPU) and
mlx-lm 0.32.2. Weights are random and seeded.

    pip install torch==2.13.0 transformers==5.24.0 accelerate compressed-tensors==0.20.1
    pip install mlx mlx-cpu mlx-lm
    python tests/golden/make_compressed.py
"""

import pathlib
import shutil

import mlx.core as mx
import numpy as np
import torch
import transformers
from compressed_tensors.compressors import ModelCompressor, unpack_from_int32
from compressed_tensors.quantization import (
    QuantizationArgs,
    QuantizationConfig,
    QuantizationScheme,
    apply_quantization_config,
    disable_quantization,
)
from compressed_tensors.quantization.utils import calculate_qparams
from mlx_lm import utils
from mlx_lm.models import llama
from safetensors.torch import load_file

HERE = pathlib.Path(__file__).parent / "quantized"
IDS = np.arange(1, 25)[None]
SHAPE = dict(
    vocab_size=96, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64, rms_norm_eps=1e-5,
)  # fmt: skip
WEIGHTS = {
    "ct-w4a16": dict(num_bits=4, type="int", symmetric=False, strategy="group", group_size=32),
    "ct-w8a16": dict(num_bits=8, type="int", symmetric=False, strategy="group", group_size=32),
    "ct-fp8": dict(num_bits=8, type="float", symmetric=True, strategy="block",
                   block_structure=[16, 32]),
}  # fmt: skip


def save_logits(name, logits):
    np.savez_compressed(HERE / f"{name}.npz", input_ids=IDS, logits=np.asarray(logits, np.float32))


def extremes(weight, args):
    """The least and the largest weight of each group or block."""
    rows, columns = weight.shape
    if args.strategy == "group":
        parts = weight.reshape(rows, -1, args.group_size)
        return parts.amin(-1), parts.amax(-1)
    height, width = args.block_structure
    parts = weight.reshape(rows // height, height, columns // width, width)
    return parts.amin((1, 3)), parts.amax((1, 3))


def compressed_tensors(name):
    args, folder = QuantizationArgs(**WEIGHTS[name]), HERE / name
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**SHAPE, dtype="bfloat16")
    model = transformers.LlamaForCausalLM(config).to(torch.bfloat16)
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    declared = QuantizationConfig(config_groups={"group_0": scheme}, ignore=["lm_head"])
    apply_quantization_config(model, declared)
    for module in model.modules():
        if getattr(module, "quantization_scheme", None) is not None:
            scale, zero = calculate_qparams(*extremes(module.weight.data.float(), args), args)
            module.weight_scale.data = scale.to(module.weight_scale.dtype)
            if getattr(module, "weight_zero_point", None) is not None:
                module.weight_zero_point.data = zero.to(module.weight_zero_point.dtype)
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    model.save_pretrained(folder)
    compressor.update_config(str(folder))
    save_logits(name, reference(folder)(torch.tensor(IDS)).logits.detach())


def reference(folder):
    """The dense model in float32, with what the library's own code unpacks."""
    stored = load_file(folder / "model.safetensors")
    if "model.layers.0.mlp.up_proj.weight_packed" not in stored:
        how = transformers.CompressedTensorsConfig(run_compressed=False)
        load = transformers.AutoModelForCausalLM.from_pretrained
        model = load(folder, dtype=torch.float32, quantization_config=how)
        return model.apply(disable_quantization)
    dense = {}
    for name, tensor in stored.items():
        weight = name.removesuffix("_packed")
        if weight != name:
            bits = WEIGHTS[folder.name]["num_bits"]
            shape = torch.Size(stored[f"{weight}_shape"].tolist())
            codes = unpack_from_int32(tensor, bits, shape)
            scale = stored[f"{weight}_scale"].float()
            zero = unpack_from_int32(
                stored[f"{weight}_zero_point"], bits, scale.shape, packed_dim=0
            )
            scale, zero = (x.repeat_interleave(32, 1) for x in (scale, zero.float()))
            dense[weight] = (codes.float() - zero) * scale
        elif name.endswith(("embed_tokens.weight", "lm_head.weight", "norm.weight")):
            dense[name] = tensor.float()
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SHAPE)).float()
    model.load_state_dict(dense)
    return model


def mlx(name):
    mx.random.seed(0)
    config = {"model_type": "llama", "tie_word_embeddings": True, "rope_theta": 10000.0, **SHAPE,
              "torch_dtype": "bfloat16", "architectures": ["LlamaForCausalLM"]}  # fmt: skip
    model = llama.Model(llama.ModelArgs.from_dict(config))
    model.set_dtype(mx.bfloat16)
    model, config = utils.quantize_model(model, config, 32, 4)
    utils.save_model(HERE / name, model)
    utils.save_config(config, HERE / name / "config.json")
    model.set_dtype(mx.float32)
    save_logits(name, np.array(model(mx.array(IDS))))


for name in (*WEIGHTS, "mlx-4bit"):
    shutil.rmtree(HERE / name, ignore_errors=True)
    (HERE / name).mkdir()
    mlx(name) if name == "mlx-4bit" else compressed_tensors(name)
