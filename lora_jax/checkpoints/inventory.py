"""What a checkpoint contains and what loading it gives: shapes, sizes, and which layers are dense.

Nothing here reads a weight.
"""

import pathlib

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import AbstractMesh, Mesh

from lora_jax.checkpoints import model_folder, storage, tensor_map
from lora_jax.checkpoints.safetensors_files import StoredTensor
from lora_jax.checkpoints.storage.stored_linear import PackedSpec, StoredLinear
from lora_jax.models import config as model_config
from lora_jax.models import llama, names, quantization_config
from lora_jax.parallel import mesh as sharding
from lora_jax.quant import conversion
from lora_jax.quant import linear as quant_linear


def contents(
    folder: pathlib.Path, config: model_config.LlamaConfig
) -> tuple[dict[str, StoredTensor | StoredLinear], dict[str, StoredTensor | StoredLinear]]:
    """{name: tensor} of a model's (linear layers that --quant rounds, all others), by layer.

    config: as model_folder.config returns it. The names are those of a dense model.
    Raises: UserError if loader.load does.
    """
    stored = model_folder.tensors(folder, config)
    slots = tensor_map.slots(tensor_map.abstract_model(config))
    weights = tensor_map.check(stored, slots, config, folder)
    linears, others = {}, {}
    for name in sorted(slots, key=lambda name: slots[name].layer or 0):
        part = linears if tensor_map.is_quantizable(slots[name].path) else others
        part[name] = weights.get(name) or stored[name]
    return linears, others


def skeleton(
    config: model_config.LlamaConfig,
    *,
    dtype: jax.typing.DTypeLike,
    quantization: str,
    mesh: Mesh | AbstractMesh,
) -> llama.LlamaForCausalLM:
    """The model that loader.load returns, as far as config.json says; call it under eval_shape.

    quantization: as quantization_config.choose returns it.
    """
    model = tensor_map.abstract_model(config, dtype, lambda s: jnp.zeros(s.shape, s.dtype))
    linears = [
        (path, node)
        for path, node in nnx.iter_graph(model)
        if isinstance(node, nnx.Linear) and path[-1] != "lm_head"
    ]
    stored = config.quantization
    is_packed = stored is not None and stored.stays_packed
    for path, linear in linears if quantization != "none" else ():
        layers, rows, columns = linear.kernel.shape
        spec: PackedSpec | None = PackedSpec(quantization)
        if is_packed:
            own = _modules(path, layers)
            both = [names.outer(name, config.composite, old=old)
                    for name in own for old in (False, True)]  # fmt: skip
            spec = storage.declared_spec(stored, both, rows)
        if spec is not None:
            multiple = sharding.input_shards(path, mesh)
            if is_packed:
                spec = spec.fitted(rows, multiple)
            packed = jax.tree.map(
                lambda s: jnp.zeros((layers, *s.shape), s.dtype),  # noqa: B023
                spec.shapes(rows, columns, multiple),
            )
            conversion.become(linear, quant_linear.QuantLinear(packed, linear, fmt=spec.fmt))
    sharding.set_partitions(model)
    return model


def loaded_bytes(folder: pathlib.Path | str, *, dtype: str | None, quantization: str | None) -> int:
    """Bytes that the loaded model takes on one device, from config.json alone."""
    config = model_config.load(pathlib.Path(folder))
    fmt = quantization_config.choose(quantization, config.quantization, str(folder))
    one = sharding.mesh_of(sharding.ONE)

    def build():
        model = skeleton(config, dtype=jnp.dtype(dtype or config.dtype), quantization=fmt, mesh=one)
        return nnx.to_pure_dict(nnx.state(model))

    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(jax.eval_shape(build)))


def num_params(config: model_config.LlamaConfig) -> int:
    """The number of parameters, however they are stored."""
    model = tensor_map.abstract_model(config)
    return sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model)))


def dense_linears(model: llama.LlamaForCausalLM) -> tuple[list[str], int]:
    """(paths of the dense linear layers, number of all linear layers), lm_head not counted."""
    layers = model.config.num_hidden_layers
    dense, total = [], 0
    for path, node in nnx.iter_graph(model):
        if isinstance(node, nnx.Linear | quant_linear.QuantLinear) and path[0] != "lm_head":
            total += layers
            if isinstance(node, nnx.Linear):
                dense += _modules(path, layers)
    return dense, total


def dense_note(quant: str, model: llama.LlamaForCausalLM) -> str:
    """Which linear layers of a model loaded as `quant` are dense nevertheless; "" for none."""
    dense, total = ([], 0) if quant == "none" else dense_linears(model)
    if not dense:
        return ""
    names = ", ".join(dict.fromkeys(path.split(".")[-1] for path in dense))
    return (f"{len(dense)} of {total} linear layers are dense, because the checkpoint stores them "
            f"so or their blocks reach across rows: {names}")  # fmt: skip


def _modules(path: tensor_map.Path, layers: int) -> list[str]:
    """The names on disk of a stack's modules."""
    return [".".join(tensor_map.path_on_disk(path, layer)) for layer in range(layers)]
