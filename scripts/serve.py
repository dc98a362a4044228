# PYTHON_ARGCOMPLETE_OK
"""Continue prompts with a model and its adapter: the same as `lora-jax serve`."""

from lora_jax.cli import main

if __name__ == "__main__":
    main.run("serve")
