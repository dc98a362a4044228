"""LoRA in Flax NNX models. What users call is in `lora_jax.lora`."""
