"""Choose where adapters and packed weights go in a Flax Linen model."""

from typing import Any

from flax import linen as nn

from lora_jax import errors
from lora_jax.lora import config as lora_config
from lora_jax.lora import site as lora_site
from lora_jax.lora import targets, token_indices
from lora_jax.lora.linen import adapted, summary, tracing
from lora_jax.lora.linen import saved as linen_saved
from lora_jax.lora.linen import sites as linen_sites
from lora_jax.lora.linen.tracing import Path
from lora_jax.quant import formats


def adapt(
    module: nn.Module,
    config: lora_config.LoRAConfig | None,
    *args: Any,
    quant: str = "none",
    exclude: tuple[str, ...] = ("lm_head",),
    strict: bool = True,
    **kwargs: Any,
) -> adapted.Adapted:
    """`module` with adapters on the weights that `config` targets, on a base in the format `quant`.

    args, kwargs: of a call of the module, `method` included; arrays or their shapes, nothing is
    computed. If no one call uses all layers: a linen.Call for each of several.
    config: None for a quantized base alone. Targets are names of layers, or of parameters of
    modules that are no layers; "all-linear" takes layers only.
    exclude: names of layers that are not quantized.
    strict: settings that match nothing are an error; files of other programs have such settings.
    Raises: UserError if a target matches nothing, with the names that exist, or matches something
    that cannot be adapted; if there is nothing to quantize; for trainable_token_indices.
    """
    if config is not None and config.trainable_token_indices:
        raise errors.UserError(
            expected="settings that Linen models have",
            found=f"trainable_token_indices of {', '.join(token_indices.named(config))}",
            where=type(module).__name__,
            do="modules_to_save trains the whole embedding; or write the model in Flax NNX",
        )
    if quant != "none":
        formats.codes(quant)  # raises if unknown
    examples = tracing.calls_of(args, kwargs)
    sites, others, variables = linen_sites.survey(module, examples)
    chosen: dict[Path, lora_site.LayerConfigs] = {}
    saved: tuple[Path, ...] = ()
    if config is not None:
        raw = [site for site in sites if site.raw and config.targets == targets.ALL_LINEAR]
        open_ = [site for site in sites if site not in raw]
        others |= {name: site.layer._replace(kind="parameter") for site in raw
                   for name in site.names}  # fmt: skip
        found = lora_site.select(open_, config, others, strict=strict)
        chosen = {site.at: own for site, own in zip(open_, found, strict=True) if any(own)}
        saved = linen_saved.choose(variables["params"], config.modules_to_save)
    packs: set[Path] = set()
    if quant != "none":
        packs = {site.at for site in sites if not summary.why_not_quantized(site, exclude)
                 and not any(site.key[: len(path)] == path for path in saved)}  # fmt: skip
        if not packs:
            raise errors.UserError(
                expected=f"linear layers to quantize to {quant}",
                found=[f"{summary.name(site)}: {summary.why_not_quantized(site, exclude)}"
                       for site in sites] or "none",
                where=type(module).__name__,
            )  # fmt: skip
    left = summary.left(sites, config, chosen, packs if quant != "none" else None, exclude)
    return adapted.Adapted(
        module, config, quant, sites, chosen, frozenset(packs), saved, left, variables, examples
    )
