"""Devices, meshes with their sharding rules, and runs of several processes.

May import `diagnosis`, `kernels`, `models`, `quant`.
"""

from lora_jax import lazy

__getattr__, __all__ = lazy.names(
    __name__, {name: f"{__name__}.mesh:{name}" for name in ("make_mesh", "place")}
)
