# PYTHON_ARGCOMPLETE_OK
"""Serve a model and its adapters over HTTP: the same as `lora-jax serve`."""

from lora_jax.cli import main

if __name__ == "__main__":
    main.run("serve")
