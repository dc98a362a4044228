# PYTHON_ARGCOMPLETE_OK
"""Say what is wrong with an installation, and check its kernels: the same as `lora-jax doctor`."""

from lora_jax.cli import main

if __name__ == "__main__":
    main.run("doctor")
