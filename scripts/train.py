# PYTHON_ARGCOMPLETE_OK
"""Fine-tune a LLaMA with LoRA on a quantized base: the same as `lora-jax train`."""

from lora_jax.cli import main

if __name__ == "__main__":
    main.run("train")
