# PYTHON_ARGCOMPLETE_OK
"""Write a quantized copy of a model, or report its error: the same as `lora-jax quantize`."""

from lora_jax.cli import main

if __name__ == "__main__":
    main.run("quantize")
