# PYTHON_ARGCOMPLETE_OK
"""Chat with a model and its adapters in the terminal: the same as `lora-jax chat`."""

from lora_jax.cli import main

if __name__ == "__main__":
    main.run("chat")
