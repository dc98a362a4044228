# PYTHON_ARGCOMPLETE_OK
"""Plan the memory and time of a training job: the same as `lora-jax plan`."""

from lora_jax.cli import main

if __name__ == "__main__":
    main.run("plan")
