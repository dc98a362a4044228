"""What was meant by a name that is no setting: a misspelling, or another program's name."""

from lora_jax import errors
from lora_jax.training.settings import groups

_BITS = {
    "int4": "use_4bit",
    "int8": "use_8bit load_in_8bit",
    "none": "no_4bit",
    "nf4": "load_in_4bit bnb_4bit_quant_type",
    "nf4-dq": "bnb_4bit_use_double_quant",
    "nf4, or int8 for 8 bits": "quantization_bit",
}
# {setting: its names in PEFT, TRL, Unsloth, axolotl, LLaMA-Factory, mlx-lm and others}
_SAME = {
    "model": "base_model model_name model_name_or_path pretrained_model_name_or_path",
    "revision": "model_revision base_model_revision",
    "chat_template": "chat_template_path chat_template_jinja template",
    "add_tokens": "tokens new_tokens",
    "add_special_tokens": "special_tokens additional_special_tokens extra_special_tokens",
    "dtype": "torch_dtype model_dtype bnb_4bit_compute_dtype",
    "dataset": "data datasets train_file dataset_name dataset_path data_path train_dataset "
    "pretraining_dataset",
    "weights": "interleave_probs",
    "columns": "dataset_text_field field_messages field_instruction field_output prompt_feature "
    "completion_feature",
    "seq_len": "max_seq_length max_length max_seq_len sequence_len cutoff_len model_max_length",
    "train_on_inputs": "train_on_input train_on_prompt",
    "packing": "sample_packing pack_sequences neat_packing",
    "init_adapter": "lora_model_dir adapter_name_or_path resume_adapter_file",
    "rank": "r lora_r lora_rank",
    "alpha": "lora_alpha",
    "dropout": "lora_dropout",
    "targets": "target_modules lora_target_modules lora_target",
    "exclude": "exclude_modules lora_exclude_modules",
    "layers": "layers_to_transform peft_layers_to_transform",
    "use_dora": "peft_use_dora dora",
    "use_rslora": "peft_use_rslora rslora",
    "modules_to_save": "lora_modules_to_save additional_target",
    "init_lora_weights": "peft_init_lora_weights",
    "lora_plus_ratio": "loraplus_lr_ratio",
    "lr": "learning_rate",
    "schedule": "lr_scheduler lr_scheduler_type lr_schedule",
    "warmup": "warmup_steps warmup_ratio",
    "min_lr_ratio": "cosine_min_lr_ratio min_lr_rate",
    "clip": "max_grad_norm clip_grad_norm",
    "beta1": "adam_beta1",
    "beta2": "adam_beta2",
    "eps": "adam_epsilon",
    "batch_size": "per_device_train_batch_size micro_batch_size train_batch_size",
    "grad_accum": "gradient_accumulation_steps grad_accumulation_steps",
    "epochs": "num_epochs num_train_epochs",
    "max_steps": "num_steps train_steps iters max_steps_per_epoch",
    "remat": "gradient_checkpointing use_gradient_checkpointing grad_checkpoint "
    "enable_activation_checkpointing",
    "seed": "random_state data_seed",
    "mesh": "fsdp fsdp_config deepspeed",
    "beta": "dpo_beta rl_beta pref_beta",
    "eval_dataset": "test_datasets eval_file",
    "eval_size": "val_set_size val_size validation_split test_size test_split_size",
    "eval_every": "eval_steps steps_per_eval",
    "patience": "early_stopping_patience",
    "keep_best": "load_best_model_at_end save_best",
    "save_every": "save_steps",
    "keep_checkpoints": "save_total_limit",
    "log_every": "logging_steps steps_per_report log_every_n_steps",
    "report_to": "wandb_project use_wandb use_tensorboard",
    "output_dir": "output_path save_path adapter_path",
    "max_new_tokens": "max_tokens max_completion_length",
}
_OF_OTHERS = {theirs: ours for ours, names in _SAME.items() for theirs in names.split()}
_OF_PROMPTS = (
    *("mask_prompt", "assistant_only_loss", "completion_only_loss"),
    *("roles_to_train", "train_on_responses_only"),
)
_OTHERWISE = {
    **{theirs: f"quant: {fmt}" for fmt, names in _BITS.items() for theirs in names.split()},
    **dict.fromkeys(
        ("evaluation_strategy", "eval_strategy", "evals_per_epoch"),
        "eval_every: a number of steps, or a share of all: 1 / (epochs × evaluations in each)",
    ),
    **dict.fromkeys(
        ("save_strategy", "saves_per_epoch"),
        "save_every: a number of steps, or a share of all steps",
    ),
    **dict.fromkeys(("rl", "stage"), "dpo: true for preferences; otherwise leave it out"),
    "num_layers": "layers: the numbers of the last ones, such as 16-31",
    "lora_parameters": "rank, alpha (scale × rank), dropout and targets (keys)",
    "fine_tune_type": "leave it out; for dora: use_dora: true",
    "lora_target_linear": "targets: all-linear",
    "adapter": "leave it out: what is trained is always a LoRA adapter; quant: int4 is QLoRA; one "
    "to train further is init_adapter",
    **dict.fromkeys(("bf16", "fp16"), "dtype: bfloat16"),
    **dict.fromkeys(("optim", "optimizer"), "leave it out: the optimizer is AdamW"),
    "resume_from_checkpoint": "lora-jax train --resume --output-dir runs/…",
    **dict.fromkeys(
        ("dataset_mixer", "dataset_mixture", "dataset_splits"),
        "dataset: [owner/name:config@split, …]; weights are shares of the sequences",
    ),
    **dict.fromkeys(
        _OF_PROMPTS, "leave it out: prompts are not trained, unless train_on_inputs is true"
    ),
    "lr_scheduler_kwargs": "min_lr_ratio, for min_lr_rate",
    "max_samples": "dataset: a folder or hub id with @train[:1000] behind it",
    **dict.fromkeys(
        "label_smoothing_factor mask_history max_prompt_length neftune_noise_alpha".split(),
        "not implemented",
    ),
}
# Names of others that do not change what is trained.
_LEFT_OUT = frozenset(
    "attn_implementation dataloader_num_workers dataset_num_proc dataset_prepared_path ddp_timeout "
    "do_eval do_train eval_batch_size eval_sample_packing finetuning_type flash_attention "
    "gradient_checkpointing_kwargs hub_model_id hub_strategy log_level logging_strategy "
    "lora_mlp_kernel lora_o_kernel lora_qkv_kernel model_type overwrite_cache "
    "overwrite_output_dir pad_to_sequence_len per_device_eval_batch_size plot_loss plugins "
    "preprocessing_num_workers push_to_hub quantization_method remove_unused_columns "
    "save_only_model strict test test_batches tf32 tokenizer_type train trust_remote_code "
    "use_peft val_batches wandb_entity wandb_log_model wandb_name wandb_watch".split()
)


def is_empty(name: str, value: object) -> bool:
    """Whether a name is another program's, without a value, as in axolotl's examples."""
    return value is None and (name in _OF_OTHERS or name in _OTHERWISE or name in _LEFT_OUT)


def problem(name: str, value: object = None) -> errors.UserError:
    """The error for a name that is no setting, with what to write instead if that is known."""
    is_off = value is False and (name in _OF_OTHERS or name in _OTHERWISE)
    is_off |= value == 0 and _OF_OTHERS.get(name) == "eval_size"
    if name in _LEFT_OUT or (is_off and name not in _OF_PROMPTS):
        return errors.UserError(
            expected="settings that train has",
            found=name,
            do="leave it out: it does not change what is trained here",
        )
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
