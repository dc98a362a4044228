"""The settings of a training run: typed, frozen, and checked when built. Imports no jax."""

from lora_jax.training.settings import assemble, files, groups, resume

TrainSettings = groups.TrainSettings
ModelSettings = groups.ModelSettings
DataSettings = groups.DataSettings
LoopSettings = groups.LoopSettings
EvalSettings = groups.EvalSettings
RunSettings = groups.RunSettings
PromptSettings = groups.PromptSettings
build, load, save = assemble.build, files.load, files.save
resumed = resume.resumed
