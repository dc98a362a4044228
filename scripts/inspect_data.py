# PYTHON_ARGCOMPLETE_OK
"""Show examples as the model sees them: the same as `lora-jax inspect`."""

from lora_jax.cli import main

if __name__ == "__main__":
    main.run("inspect")
