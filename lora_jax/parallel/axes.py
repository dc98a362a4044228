"""The axes of a mesh as they are written in --mesh. Imports no jax."""

import re

from lora_jax import errors

NAMES = ("data", "fsdp", "tensor")


def sizes(text: str) -> dict[str, int]:
    """{"data": -1, "fsdp": 8} from "data=-1,fsdp=8". Raises: UserError if it is no such text."""
    found: dict[str, int] = {}
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\w+)\s*=\s*(-1|[1-9]\d*)\s*", part)
        if not match or match[1] not in NAMES or match[1] in found:
            raise errors.UserError(
                expected="a mesh such as data=-1,fsdp=8,tensor=1",
                found=repr(text),
                where="--mesh",
            )
        found[match[1]] = int(match[2])
    return found
