"""`python -m lora_jax`: the command `lora-jax`."""

from lora_jax.cli import main

main.main()
