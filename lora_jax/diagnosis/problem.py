"""What a rule finds."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Problem:
    """what: one sentence. do: what mends it. unusable: because of it, JAX cannot compute on a
    device that is there, or not at all."""

    what: str
    do: str
    unusable: bool = False
