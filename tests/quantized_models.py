"""Writes small checkpoints in the 4-bit formats of other programs, with numpy alone.

Codes and zero points are random: the tests are about reading them, not about finding good ones.
"""

import json
import pathlib

import numpy as np
import safetensors.numpy

CONFIG = dict(
    model_type="llama",
    vocab_size=96,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=4,
    max_position_embeddings=64,
    tie_word_embeddings=True,
    dtype="float16",
)
LINEARS = {  # {name in a layer: (K, N)}
    **{f"self_attn.{name}_proj": (64, 64) for name in "qkvo"},
    "mlp.gate_proj": (64, 128),
    "mlp.up_proj": (64, 128),
    "mlp.down_proj": (128, 64),
}
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


_DTYPES = {"float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2", "float8_e8m0fnu": "F8_E8M0",
           "bfloat16": "BF16", "float16": "F16", "float32": "F32", "int8": "I8", "int32": "I32",
           "uint8": "U8"}  # fmt: skip


def bytes_of(tensors: dict[str, np.ndarray], dtype: str | None = None) -> bytes:
    """A safetensors file, also with float8, which safetensors' writer for numpy does not know.

    dtype: the name to give to that of all tensors, instead of their own.
    """
    entries, data = {}, b""
    for name, tensor in tensors.items():
        raw = tensor.tobytes()
        entries[name] = {"dtype": dtype or _DTYPES[tensor.dtype.name], "shape": list(tensor.shape),
                         "data_offsets": [len(data), len(data) + len(raw)]}  # fmt: skip
        data += raw
    header = json.dumps(entries).encode()
    return len(header).to_bytes(8, "little") + header + data


def draw(rows, columns, group, *, symmetric, act_order, rng, bits=4):
    """(codes [K, N], zeros [groups, N], scales [groups, N], group of each row [K])"""
    groups = -(-rows // group)
    codes = rng.integers(0, 2**bits, (rows, columns)).astype(np.uint32)
    zeros = rng.integers(1, 2**bits, (groups, columns)).astype(np.uint32)
    if symmetric:
        zeros[:] = 2 ** (bits - 1)
    scales = (rng.normal(0, 0.02, (groups, columns))).astype(np.float16)
    index = np.arange(rows, dtype=np.int32) // group
    return codes, zeros, scales, rng.permutation(index) if act_order else index


def dense(codes, zeros, scales, index):
    """w[k, n] = (code − zero of its group) · scale of its group, in float32"""
    steps = codes.astype(np.int32) - zeros[index].astype(np.int32)
    return steps.astype(np.float32) * scales[index].astype(np.float32)


def biased(codes, scales, biases, index):
    """w[k, n] = code · scale of its group + bias of its group, in float32"""
    scales, biases = (each[index].astype(np.float32) for each in (scales, biases))
    return codes.astype(np.float32) * scales + biases


def along_rows(codes):
    """int32 [K/8, N]: nibble i of word j is row 8j + i."""
    words = np.zeros((len(codes) // 8, codes.shape[1]), np.uint32)
    for row, values in enumerate(codes):
        words[row // 8] |= values << np.uint32(4 * (row % 8))
    return words.view(np.int32)


def along_columns(codes, order=range(8)):
    """int32 [K, N/8]: nibble i of word j is column 8j + order[i]."""
    words = np.zeros((len(codes), codes.shape[1] // 8), np.uint32)
    for word in range(words.shape[1]):
        for nibble, column in enumerate(order):
            words[:, word] |= codes[:, 8 * word + column] << np.uint32(4 * nibble)
    return words.view(np.int32)


def in_bytes(codes):
    """int32 [N, K/4]: byte i of word j is column 4j + i."""
    return np.ascontiguousarray(codes.astype(np.uint8)).view(np.int32)


def write(
    folder: pathlib.Path,
    method: str,
    *,
    group: int = 32,
    symmetric: bool = False,
    act_order: bool = False,
    version: int = 1,
    bits: int = 4,
    **settings,
) -> dict[str, np.ndarray]:
    """A checkpoint of `method` in `folder`; {module: its dense weight [K, N]}.

    bits: 8 for compressed-tensors alone.
    """
    rng = np.random.default_rng(0)
    width = CONFIG["hidden_size"]
    tensors = {
        "model.embed_tokens.weight": rng.normal(0, 1, (CONFIG["vocab_size"], width)),
        "model.norm.weight": np.ones(width),
    }
    weights = {}
    for layer in range(CONFIG["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        for name in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{prefix}{name}.weight"] = np.ones(width)
        for name, (rows, columns) in LINEARS.items():
            size = rows if group == -1 else group
            how = {"symmetric": symmetric, "act_order": act_order, "rng": rng, "bits": bits}
            codes, zeros, scales, index = drawn = draw(rows, columns, size, **how)
            weights[prefix + name] = dense(*drawn)
            if method == "mlx":
                biases = rng.normal(0, 0.1, scales.shape).astype(np.float16)
                weights[prefix + name] = biased(codes, scales, biases, index)
                parts = {
                    "weight": np.ascontiguousarray(along_rows(codes).T.view(np.uint32)),
                    "biases": np.ascontiguousarray(biases.T),
                    "scales": np.ascontiguousarray(scales.T),
                }
            elif method == "compressed-tensors":
                words = along_rows(codes).T if bits == 4 else in_bytes(codes.T)
                parts = {
                    "weight_packed": np.ascontiguousarray(words),
                    "weight_scale": np.ascontiguousarray(scales.T),
                    "weight_shape": np.array([columns, rows]),
                }
                if not symmetric:
                    words = along_columns(zeros) if bits == 4 else in_bytes(zeros)
                    parts["weight_zero_point"] = np.ascontiguousarray(words.T)
                if act_order:
                    parts["weight_g_idx"] = index
            elif method == "gptq":
                parts = {
                    "qweight": along_rows(codes),
                    "qzeros": along_columns(zeros - (version == 1)),
                    "g_idx": index,
                }
            else:
                parts = {
                    "qweight": along_columns(codes, AWQ_ORDER),
                    "qzeros": along_columns(zeros, AWQ_ORDER),
                }
            tensors |= {f"{prefix}{name}.{part}": array for part, array in parts.items()}
            if method in ("gptq", "awq"):
                tensors[f"{prefix}{name}.scales"] = scales
    tensors = {
        name: array.astype(np.float16) if array.dtype == np.float64 else array
        for name, array in tensors.items()
    }
    if method == "gptq":
        declared = {"desc_act": act_order, "sym": symmetric}
        declared |= {"checkpoint_format": "gptq_v2"} if version == 2 else {}
    elif method == "compressed-tensors":
        scheme = {"num_bits": bits, "type": "int", "symmetric": symmetric, "group_size": group,
                  "strategy": "channel" if group == -1 else "group",
                  "actorder": "group" if act_order else None}  # fmt: skip
        groups = {"group_0": {"targets": ["Linear"], "weights": scheme}}
        declared = {"format": "pack-quantized", "config_groups": groups, "ignore": ["lm_head"]}
    else:
        declared = {"version": "gemm", "zero_point": True}
    declared = {"quant_method": method, "bits": 4, "group_size": group, **declared, **settings}
    if method == "mlx":
        declared = {"bits": 4, "group_size": group, "mode": "affine"}
    folder.mkdir(exist_ok=True)
    safetensors.numpy.save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(CONFIG | {"quantization_config": declared}))
    return weights
