"""Weights of 8 bits with scales: read as their products, in the dtype of the model.

  P.weight            float8 or int8 [N, K]
  P.weight_scale_inv  [N/128, K/128], or blocks of another size: FP8 as DeepSeek and Qwen publish it
  P.weight_scale      one number, [N, 1], or one for each block: compressed-tensors, FBGEMM
  P.SCB               [N], the largest magnitude of each row: LLM.int8() of bitsandbytes

w = code · scale, or code · SCB/127. Such a checkpoint is a dense one that is stored compactly.
What belongs to the activations, which such programs round too, is left out.
Sources: finegrained_fp8.py of https://github.com/huggingface/transformers,
compressed_tensors/compressors of https://github.com/vllm-project/compressed-tensors, and
int8_vectorwise_dequant of https://github.com/bitsandbytes-foundation/bitsandbytes
"""

from collections.abc import Iterable, Mapping

from lora_jax import errors
from lora_jax.checkpoints import safetensors_files
from lora_jax.checkpoints.safetensors_files import StoredTensor

_CODES = ("F8_E4M3", "F8_E5M2", "I8")
_POWERS_OF_2 = "F8_E8M0"
_SCALES = {"weight_scale_inv": 1, "weight_scale": 1, "SCB": 1 / 127}  # {name: its factor}
_OF_ACTIVATIONS = ("input_scale", "input_scale_ub", "activation_scale", "output_scale",
                   "q_scale", "k_scale", "v_scale")  # fmt: skip


def join(stored: Mapping[str, StoredTensor], dtype: str, where: str) -> dict[str, StoredTensor]:
    """The tensors, with each weight of 8 bits and its scales as one tensor in `dtype`.

    Raises: UserError with every scale that does not belong to its weight.
    """
    joined, left_out, problems = dict(stored), set(), []
    for name, weight in stored.items():
        module = name.removesuffix(".weight")
        own = [f"{module}.{scale}" for scale in _SCALES if f"{module}.{scale}" in stored]
        if module == name or weight.dtype not in _CODES or not own:
            continue
        scale = stored[own[0]]
        if scale.dtype == _POWERS_OF_2:
            scale = scale._replace(dtype="F32", stored_as=scale.dtype)
        if problem := _problem(scale, weight):
            problems.append(f"{scale.name} {problem}")
        if len(own) > 1:
            problems.append(f"{' and '.join(own)} are scales of one weight")
        # Zero points, and bitsandbytes' order of the codes, of which 0 is the usual one.
        for other in (f"{module}.weight_zero_point", f"{module}.weight_format"):
            left_out |= {*own, other}
            if other in stored and stored[other].value().any():
                problems.append(f"{other} is not 0, which is not implemented")
        # One number for all, or for a row, has as many axes as one for a block.
        shape = (*scale.shape, 1, 1)[:2]
        joined[name] = weight._replace(
            dtype={"bfloat16": "BF16"}.get(dtype, "F32"),
            stored_as=weight.dtype,
            scale=scale._replace(shape=shape),
            factor=_SCALES[own[0].rpartition(".")[2]],
        )
    if left_out:
        left_out |= {name for name in stored if name.rpartition(".")[2] in _OF_ACTIVATIONS}
    if problems:
        raise errors.UserError(
            expected="weights of 8 bits with a scale for all, for each row or for each block",
            found=problems,
            where=where,
            do="pass the model before quantization: --quant rounds it while it loads",
        )
    return {name: tensor for name, tensor in joined.items() if name not in left_out}


def note(stored: Iterable[StoredTensor]) -> str:
    """What a user should know of such a checkpoint; "" for any other."""
    found = [tensor for tensor in stored if tensor.scale is not None]
    if not found:
        return ""
    kind = {"I8": "int8"}.get(found[0].stored_as, "float8")
    return (f"{len(found)} weights are stored in {kind} with scales and read as their products; "
            "activations are not rounded")  # fmt: skip


def _problem(scale: StoredTensor, weight: StoredTensor) -> str:
    """What is wrong with a scale; "" for nothing."""
    if scale.dtype not in safetensors_files.FLOATS:
        return f"has dtype {scale.dtype}"
    shape = (*scale.shape, 1, 1)[:2]
    fits = len(weight.shape) == 2 and len(scale.shape) <= 2 and all(
        0 < blocks <= size and -(-size // safetensors_files.block_size(size, blocks)) == blocks
        for size, blocks in zip(weight.shape, shape, strict=True)
    )  # fmt: skip
    if fits:
        return ""
    return f"has shape {list(scale.shape)}, which divides no weight of shape {list(weight.shape)}"
