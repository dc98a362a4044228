"""`python -m lora_jax`: the command `lora-jax`."""

import sys

from lora_jax.cli import main

if __name__ == "__main__":
    verb = sys.argv.pop(1)
    main.run(verb)
