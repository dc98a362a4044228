# PYTHON_ARGCOMPLETE_OK
"""Write the report.html of a run: the same as `lora-jax report`."""

from lora_jax.cli import main

if __name__ == "__main__":
    main.run("report")
