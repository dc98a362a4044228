"""What was meant by a name that is no setting: a misspelling, or another program's name."""

from lora_jax import errors
from lora_jax.training.settings import groups

_BITS = {
    "int4": "use_4bit load_in_4bit",
    "int8": "use_8bit load_in_8bit",
    "none": "no_4bit",
    "nf4": "bnb_4bit_quant_type",
    "nf4-dq": "bnb_4bit_use_double_quant",
}
# {setting: its names in PEFT, TRL, transformers, Unsloth and axolotl}
_SAME = {
    "model": "base_model model_name model_name_or_path pretrained_model_name_or_path",
    "revision": "model_revision base_model_revision",
    "chat_template": "chat_template_path chat_template_jinja",
    "add_tokens": "tokens new_tokens",
    "add_special_tokens": "special_tokens additional_special_tokens extra_special_tokens",
    "dtype": "torch_dtype model_dtype bnb_4bit_compute_dtype",
    "dataset": "datasets train_file dataset_name dataset_path data_path train_dataset",
    "columns": "dataset_text_field field_messages field_instruction field_output",
    "seq_len": "max_seq_length max_length max_seq_len sequence_len cutoff_len model_max_length",
    "packing": "sample_packing pack_sequences",
    "init_adapter": "adapter lora_model_dir adapter_name_or_path resume_adapter_file",
    "rank": "r lora_r lora_rank",
    "alpha": "lora_alpha",
    "dropout": "lora_dropout",
    "targets": "target_modules lora_target_modules lora_target",
    "exclude": "exclude_modules lora_exclude_modules",
    "layers": "layers_to_transform peft_layers_to_transform",
    "use_dora": "peft_use_dora dora",
    "use_rslora": "peft_use_rslora rslora",
    "modules_to_save": "lora_modules_to_save",
    "init_lora_weights": "peft_init_lora_weights",
    "lora_plus_ratio": "loraplus_lr_ratio",
    "lr": "learning_rate",
    "schedule": "lr_scheduler lr_scheduler_type",
    "warmup": "warmup_steps warmup_ratio",
    "clip": "max_grad_norm",
    "batch_size": "per_device_train_batch_size micro_batch_size train_batch_size",
    "grad_accum": "gradient_accumulation_steps",
    "epochs": "num_epochs num_train_epochs",
    "max_steps": "num_steps train_steps iters",
    "remat": "gradient_checkpointing use_gradient_checkpointing",
    "seed": "random_state data_seed",
    "mesh": "fsdp fsdp_config deepspeed",
    "dpo": "rl",
    "beta": "dpo_beta rl_beta",
    "eval_dataset": "test_datasets eval_file val_set_size validation_split",
    "eval_every": "eval_steps evaluation_strategy eval_strategy evals_per_epoch",
    "patience": "early_stopping_patience",
    "keep_best": "load_best_model_at_end save_best",
    "save_every": "save_steps save_strategy saves_per_epoch",
    "keep_checkpoints": "save_total_limit",
    "log_every": "logging_steps",
    "report_to": "wandb_project use_wandb use_tensorboard",
    "output_dir": "output_path save_path adapter_path",
    "max_new_tokens": "max_tokens max_completion_length",
}
_OF_OTHERS = {theirs: ours for ours, names in _SAME.items() for theirs in names.split()}
_OTHERWISE = {
    **{theirs: f"quant: {fmt}" for fmt, names in _BITS.items() for theirs in names.split()},
    "lora_target_linear": "targets: all-linear",
    "adapter": "leave it out: what is trained is always a LoRA adapter; quant: int4 is QLoRA; one "
    "to train further is init_adapter",
    "bf16": "dtype: bfloat16",
    "fp16": "dtype: bfloat16",
    "optim": "leave it out: the optimizer is AdamW",
    "optimizer": "leave it out: the optimizer is AdamW",
    "resume_from_checkpoint": "lora-jax train --resume --output-dir runs/…",
    "train_on_inputs": "leave it out: prompts are not trained; with `text` all tokens are",
}


def problem(name: str) -> errors.UserError:
    """The error for a name that is no setting, with what to write instead if that is known."""
    do = _OTHERWISE.get(name)
    if do is None and name in _OF_OTHERS:
        do = f"the setting is called {_OF_OTHERS[name]} here"
    return errors.UserError(
        expected="names of settings, as train --help-all lists them",
        found=name,
        do=do or errors.did_you_mean(name, groups.FIELDS),
    )


def meant_by_flag(flag: str, known: list[str]) -> str | None:
    """The same for a flag; `known`: the flags of the command."""
    name = flag.lstrip("-").replace("-", "_")
    if f"--{_OF_OTHERS.get(name, '').replace('_', '-')}" in known:
        return f"{flag} is called --{_OF_OTHERS[name].replace('_', '-')} here"
    if "--quant" in known and _OTHERWISE.get(name, "").startswith("quant: "):
        return f"--quant {_OTHERWISE[name].removeprefix('quant: ')}"
    return errors.did_you_mean(flag, known)
