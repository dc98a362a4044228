# PYTHON_ARGCOMPLETE_OK
"""Fold an adapter into its base: the same as `lora-jax merge`."""

from lora_jax.cli import main

if __name__ == "__main__":
    main.run("merge")
