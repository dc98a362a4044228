"""What the adapters and the quantization of a Flax Linen model took, and what they left."""

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

from lora_jax.layers import linear_map, places
from lora_jax.lora import config as lora_config
from lora_jax.lora import site as lora_site
from lora_jax.lora import targets
from lora_jax.lora.linen.sites import Site
from lora_jax.lora.linen.tracing import Path

if TYPE_CHECKING:
    from lora_jax.lora.linen import adapted


def name(site: Site) -> str:
    """The name of a site; that of a stack has no number."""
    return places.dotted(site.at) or site.weight


def why_not_adapted(site: Site, config: lora_config.LoRAConfig) -> str:
    """Why `config` leaves the site out."""
    if any(targets.saves(own, config) for own in site.names):
        return "trained whole"
    if config.targets == targets.ALL_LINEAR:
        if site.raw:
            return f"{_raw(site)}; name it in the targets"
        if site.kind != "linear":
            return f"{lora_site.KINDS[site.kind]}, which {targets.ALL_LINEAR} leaves out"
        if not any(targets.matches(own, targets.ALL_LINEAR) for own in site.names):
            return f"lm_head, which {targets.ALL_LINEAR} leaves out"
    if any(targets.matches(own, config.targets) for own in site.names):
        return "excluded"
    return "not among the targets"


def why_not_quantized(site: Site, exclude: Sequence[str]) -> str:
    """Why the site's weight stays dense; "" if it need not."""
    if site.raw:
        return _raw(site)
    if site.kind != "linear":
        return lora_site.KINDS[site.kind]
    if isinstance(site.linear_map, linear_map.Einsum) and site.linear_map.batch:
        return "an einsum with an axis that x and the weight share"
    return "excluded" if targets.matches(name(site), exclude) else ""


def _raw(site: Site) -> str:
    return f"a parameter of {site.cls}, whose call is no product with it alone"


def left(
    sites: Sequence[Site],
    config: lora_config.LoRAConfig | None,
    adapted: Collection[Path],
    packed: Collection[Path] | None,
    exclude: Sequence[str],
) -> dict[str, str]:
    """{name: why} of every weight that is not adapted, or not quantized.

    config, packed: None if there are to be no adapters, or no packed weights.
    """
    found = {}
    for site in sites:
        reasons = []
        if config is not None and site.at not in adapted:
            reasons.append(f"not adapted: {why_not_adapted(site, config)}")
        if packed is not None and site.at not in packed:
            why = why_not_quantized(site, exclude) or "trained whole"
            reasons.append(f"not quantized: {why}")
        if reasons:
            found[name(site)] = "; ".join(reasons)
    return found


def text(adapted: "adapted.Adapted", products: Collection[Path]) -> str:
    """A table with a line for each weight. products: the sites that are only multiplied by."""
    lines = []
    for site in adapted.sites:
        own, found = adapted.layer_configs.get(site.at), []
        if own:
            ranks = sorted({str(layer.rank) for layer in own if layer})
            found.append(f"rank {', '.join(ranks)}")
        if site.at in adapted.packs:
            found.append(adapted.quant)
        if found and site.at not in products:
            found.append("computed as W + scaling · A B")
        if name(site) in adapted.left:
            found.append(adapted.left[name(site)])
        lines.append((name(site), "; ".join(found)))
    width = max((len(own) for own, _ in lines), default=0)
    return "\n".join(f"{own:{width}}  {found}" for own, found in lines)
