"""Attention through tokamax, where the extra `gpu-kernels` is installed."""

import functools
import re

import jax
import jax.numpy as jnp
import pytest
from test_kernels import PACKED, attend_and_check

from lora_jax import errors
from lora_jax.kernels.attention import tokamax_gpu
from lora_jax.planning import chips

tokamax = pytest.importorskip("tokamax")
from tokamax._src import gpu_utils  # noqa: E402
from tokamax._src.ops.attention import base, pallas_mosaic_gpu  # noqa: E402


@pytest.fixture(autouse=True)
def _implicit_ranks():
    with jax.numpy_rank_promotion("allow"):
        yield


@pytest.mark.filterwarnings("ignore:core.Jaxpr is missing a DebugInfo:DeprecationWarning")
@pytest.mark.parametrize(("window", "groups"), [(None, 2), (50, 1)])
def test_its_masks_mean_what_is_asked_for(window, groups, monkeypatch):
    """In its own XLA implementation: its kernels need a GPU."""
    reference = base.DotProductAttention(vjp=base.DotProductAttentionVjp())
    monkeypatch.setattr(pallas_mosaic_gpu, "PallasMosaicGpuFlashAttention", lambda: reference)
    attend = functools.partial(tokamax_gpu.attend, examples=jnp.asarray(PACKED), window=window)
    attend_and_check(attend, dtype="float32", groups=groups, window=window)


@pytest.mark.aot
@pytest.mark.parametrize("window", [None, 1000])
def test_it_compiles_for_hopper_without_a_mask(window, monkeypatch):
    """Three kernels: forward, the derivative of q, that of k and v. No array is [T, T]."""
    try:
        devices = chips.devices("gpu:h100")
    except errors.UserError as error:
        pytest.skip(str(error))
    monkeypatch.setattr(gpu_utils, "_compute_capability", lambda device=None: 9.0)
    mesh = jax.sharding.Mesh(devices, "x")
    where = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    array = functools.partial(jax.ShapeDtypeStruct, sharding=where)
    q, k = (array((2, 1536, heads, 128), jnp.bfloat16) for heads in (8, 2))

    def both(q, k, v, examples, d_out):
        attend = functools.partial(tokamax_gpu.attend, examples=examples, window=window)
        out, pull_back = jax.vjp(attend, q, k, v)
        return out, *pull_back(d_out)

    with tokamax.config.cross_compile(True), jax.set_mesh(mesh):
        compiled = jax.jit(both).lower(q, k, k, array((2, 1536), jnp.int32), q).compile()
    text = compiled.as_text()
    assert len(re.findall(r'custom_call_target="mosaic_gpu', text)) == 3
    assert not re.search(r"\[[\d,]*1536,1536[\d,]*\]", text)
