"""The parts of a new folder for a composite model: its language model, and all else as it was."""

import pathlib
from collections.abc import Callable, Sequence

from lora_jax import errors
from lora_jax.checkpoints import model_folder, safetensors_writer, writer
from lora_jax.models import config as model_config

_DENSE = ("F64", "F32", "F16", "BF16", "I64", "BOOL")  # I64: the numbers of positions


def parts(
    folder: pathlib.Path, config: model_config.LlamaConfig, own: Sequence[writer.Part]
) -> list[writer.Part]:
    """`own`, whose tensors have the names of a LLaMA, with the names in `folder`.

    Those of a composite model are followed by its other tensors, unchanged.
    Raises: UserError if one of these is quantized, which the new config.json would not say.
    """
    if not config.composite:
        return [*own]
    stored = model_folder.tensors(folder, config)
    others = model_folder.beside(folder, config)
    if quantized := [name for name, tensor in others.items() if tensor.dtype not in _DENSE]:
        raise errors.UserError(
            expected=f"a {config.composite} of which only the language model is quantized",
            found=quantized,
            where=str(folder),
            do="pass the model before quantization",
        )
    name_of = model_folder.names_in_folder(stored, config.composite)
    copied = (writer.Part(name, {name: safetensors_writer.TensorSpec(tensor.dtype, tensor.shape)},
                          lambda name=name, tensor=tensor: {name: tensor.value()})
              for name, tensor in others.items())  # fmt: skip
    return [*(_renamed(part, name_of) for part in own), *copied]


def _renamed(part: writer.Part, name_of: Callable[[str], str]) -> writer.Part:
    return writer.Part(
        name_of(part.name),
        {name_of(name): spec for name, spec in part.specs.items()},
        lambda: {name_of(name): array for name, array in part.make().items()},
        [name_of(name) for name in part.late],
    )
