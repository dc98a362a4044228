"""One adapter in training: its state, its step, its scores, and how it is saved."""

import math
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from flax import nnx
from jax.sharding import Mesh

from lora_jax import hub, tokenizer
from lora_jax.lora import config as lora_config
from lora_jax.lora import peft
from lora_jax.lora.nnx import model_state
from lora_jax.models import llama
from lora_jax.optim import adamw
from lora_jax.optim import step as train_step
from lora_jax.parallel import mesh as sharding
from lora_jax.parallel import processes
from lora_jax.training import evaluate
from lora_jax.training.output import run_folder
from lora_jax.training.settings import groups

Prompts = Sequence[tuple[np.ndarray, str]]  # (token ids, expected text)


class Saved(NamedTuple):
    """The folder of a saved adapter, and its arrays, to generate with."""

    path: pathlib.Path
    trained: Any
    frozen: model_state.Frozen


class OneAdapter(NamedTuple):
    """One adapter in its base model. trained, frozen: see model_state.split."""

    settings: groups.TrainSettings
    model: llama.LlamaForCausalLM
    graphdef: nnx.GraphDef
    trained: Any
    frozen: model_state.Frozen
    mesh: Mesh

    def begin(self, num_steps: int) -> tuple[train_step.State, Callable]:
        """(the state before step 1, the jitted step)."""
        optimizer = adamw.make(self.settings.optim, num_steps)
        schedule = adamw.schedule(self.settings.optim, num_steps)
        loop = self.settings.loop
        step = train_step.make_step(
            self.graphdef, optimizer, schedule,
            seed=loop.seed, remat=loop.remat, beta=self.settings.beta,
        )  # fmt: skip
        return sharding.place(train_step.start(self.trained, optimizer), self.mesh), step

    def resumed(self, state: train_step.State) -> None:
        """Takes from a checkpoint what this object keeps itself: nothing."""

    def to_log(self, metrics: run_folder.Metrics) -> run_folder.Metrics:
        """The metrics to log: all of them."""
        return metrics

    def loss(self, metrics: run_folder.Metrics) -> float | None:
        """The loss of a step; None if the loss or the gradient is not finite."""
        finite = math.isfinite(metrics["loss"] + metrics["grad_norm"])
        return metrics["loss"] if finite else None

    def make_eval_loss(self) -> Callable:
        """The jitted held-out loss, see train_step.make_eval_loss."""
        return train_step.make_eval_loss(self.graphdef, self.settings.beta)

    def eval_loss(self, means: Mapping[str, float]) -> float:
        """The held-out loss by which checkpoints are compared."""
        return means["eval_loss"]

    def score(
        self, answer: Callable, trained: Any, prompts: Prompts, reader: Any, step: int,
        means: Mapping[str, float],
    ) -> tuple[run_folder.Metrics, list[evaluate.Answer]]:  # fmt: skip
        """(exact match, the answers). The answers are decoded greedily with `answer`."""
        found = evaluate.answers(answer(trained, self.frozen), prompts, reader)
        return {"exact_match": evaluate.exact_match(found)}, found

    def evaluation_text(self, metrics: run_folder.Metrics, num_scored: int) -> str:
        """The printed line of an evaluation."""
        text = f"step {metrics['step']}: held-out loss {metrics['eval_loss']:.4f}"
        if "eval_reward_accuracy" in metrics:
            text += f", {metrics['eval_reward_accuracy']:.1%} of pairs preferred as chosen"
        if "exact_match" in metrics:
            right = round(metrics["exact_match"] * num_scored)
            text += f", exact match {metrics['exact_match']:.1%} ({right} of {num_scored})"
        return text

    def save(
        self, folder: run_folder.RunFolder, trained: Any, base: pathlib.Path, num_steps: int,
        record: run_folder.Record,
    ) -> Saved:  # fmt: skip
        """Saves the adapter in PEFT's format. base: the folder of the base model."""
        save_adapter(self, folder, folder.adapter, trained, self.settings.lora, base)
        return Saved(folder.adapter, trained, self.frozen)

    def table(self, folder: run_folder.RunFolder, num_steps: int) -> list[str]:
        """Lines that compare the adapters of the run: none, for one adapter."""
        return []


def save_adapter(
    adapter: OneAdapter,
    folder: run_folder.RunFolder,
    path: pathlib.Path,
    trained: Any,
    config: lora_config.LoRAConfig,
    base: pathlib.Path,
) -> None:
    """Writes `trained` as a PEFT folder, with what of the tokenizer is not the base's.

    All processes must call this; process 0 writes.
    """
    nnx.update(adapter.model, sharding.gather(trained))
    if not processes.leads():
        return
    model = adapter.settings.model
    local = pathlib.Path(model.model).is_dir()
    peft.save(
        path,
        adapter.model,
        config,
        base_model=str(base.absolute()) if local else model.model,
        revision=model.revision,
    )
    if begun := adapter.settings.loop.init_adapter:
        tokenizer.copy(hub.adapter_folder(begun), path)
    if model.chat_template or model.add_tokens or model.add_special_tokens:
        tokenizer.copy(folder.path, path)
