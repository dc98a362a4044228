"""Whether a disk has room for what will be written to it. Imports no jax."""

import pathlib
import shutil

from lora_jax import errors


def check(folder: pathlib.Path, num_bytes: int, what: str) -> None:
    """Raises: UserError if fewer bytes are free where `folder` is. what: what needs them."""
    free = shutil.disk_usage(folder).free
    if free < num_bytes:
        raise errors.UserError(
            expected=f"at least {-(-num_bytes >> 20)} MiB free for {what}",
            found=f"{free >> 20} MiB free",
            where=str(folder),
            do="free some space, or choose an --output-dir on another disk",
        )
