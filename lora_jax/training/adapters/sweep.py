"""Several adapters trained at the same time on one base, each with the result of its own run."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from lora_jax import lora
from lora_jax.console import say
from lora_jax.lora import config as lora_config
from lora_jax.lora.nnx import model_state
from lora_jax.optim import step as train_step
from lora_jax.optim import sweep as side_by_side
from lora_jax.parallel import mesh as sharding
from lora_jax.parallel import processes
from lora_jax.training import evaluate
from lora_jax.training.adapters import one_adapter, sweep_table
from lora_jax.training.output import run_folder
from lora_jax.training.settings import convert


def adapters(one: one_adapter.OneAdapter) -> "SweepAdapters":
    """The adapters of the sweep in one.settings, in the base model of `one`."""
    settings, mesh = one.settings, one.mesh
    setting, each = convert.sweep(settings.loop.sweep)
    members = []
    for name, value in each.items():
        own = [dataclasses.replace(part, **{setting: value}) if hasattr(part, setting) else part
               for part in (settings.lora, settings.optim)]  # fmt: skip
        members.append(side_by_side.Member(name, *own))
    injected = _Injected(one.model, settings.lora, settings.loop.seed)
    parts = [
        (one.trained, one.frozen)
        if member.lora == settings.lora
        else sharding.place(injected.state(member.lora), mesh)
        for member in members
    ]
    trained, frozen = sharding.place(side_by_side.join(parts), mesh)
    if settings.beta is not None:
        frozen = frozen._replace(reference=jax.tree.map(jnp.copy, trained))
    say("sweep", f"{len(members)} adapters at the same time, {len(members)} × "
        f"{settings.loop.batch_size} sequences at a time: {', '.join(each)}")  # fmt: skip
    return SweepAdapters(one, members, trained, frozen, injected)


class _Injected:
    """A model whose adapters are replaced when a member has another rank."""

    def __init__(self, model: nnx.Module, config: lora_config.LoRAConfig, seed: int):
        self._model, self._config, self._seed = model, config, seed

    def state(self, config: lora_config.LoRAConfig) -> tuple[Any, model_state.Frozen]:
        """(lora, frozen) of the model with newly initialized adapters for `config`."""
        if config != self._config:
            lora.strip(self._model)
            lora.inject(self._model, config, rngs=nnx.Rngs(self._seed))
            self._config = config
        return model_state.split(self._model)[1:]


class SweepAdapters:
    """The adapters of a sweep, called members. Has the methods of OneAdapter."""

    def __init__(
        self,
        one: one_adapter.OneAdapter,
        members: list[side_by_side.Member],
        trained: Any,
        frozen: model_state.Frozen,
        injected: _Injected,
    ):
        self.one, self.members, self.trained, self.frozen = one, members, trained, frozen
        self.settings, self.model, self.graphdef, self.mesh = (
            one.settings, one.model, one.graphdef, one.mesh
        )  # fmt: skip
        self._injected = injected
        self._lost: dict[str, int] = {}  # {member: the step at which its loss was not finite}

    def begin(self, num_steps: int) -> tuple[train_step.State, Callable]:
        """(the state before step 1, the jitted step)."""
        start = side_by_side.start(self.members, self.trained, num_steps)
        loop = self.settings.loop
        step = side_by_side.make_step(
            self.graphdef, self.members, num_steps,
            seed=loop.seed, remat=loop.remat, beta=self.settings.beta,
        )  # fmt: skip
        return sharding.place(start, self.mesh), step

    def resumed(self, state: train_step.State) -> None:
        """Takes from a checkpoint which members are lost."""
        steps = jax.device_get(state.opt_state.lost).tolist()
        each = zip(self.members, steps, strict=True)
        self._lost = {member.name: step for member, step in each if step}

    def to_log(self, metrics: run_folder.Metrics) -> run_folder.Metrics:
        """The metrics to log: those of members that are not lost."""
        return {name: value for name, value in metrics.items()
                if name.partition("/")[2] not in self._lost}  # fmt: skip

    def loss(self, metrics: run_folder.Metrics) -> float | None:
        """The lowest loss of the members; None if all members are lost."""
        losses = {}
        for name in self._left():
            losses[name] = metrics[f"loss/{name}"]
            if not math.isfinite(losses[name] + metrics[f"grad_norm/{name}"]):
                self._lost[name] = metrics["step"]
                say("lost", f"{name}: NaN or infinity at step {metrics['step']}; it is no longer "
                    "trained, the others continue")  # fmt: skip
        return min((losses[name] for name in self._left()), default=None)

    def _left(self) -> list[str]:
        return [member.name for member in self.members if member.name not in self._lost]

    def make_eval_loss(self) -> Callable:
        """The jitted held-out losses of the members."""
        return side_by_side.make_eval_loss(self.graphdef, self.members, self.settings.beta)

    def _eval_losses(self, means: Mapping[str, float]) -> dict[str, float]:
        return {name: means[f"eval_loss/{name}"] for name in self._left()}

    def eval_loss(self, means: Mapping[str, float]) -> float:
        """The lowest held-out loss of the members; NaN if none is finite."""
        losses = self._eval_losses(means).values()
        return min(filter(math.isfinite, losses), default=math.nan)

    def score(
        self, answer: Callable, trained: Any, prompts: one_adapter.Prompts, reader: Any, step: int,
        means: Mapping[str, float],
    ) -> tuple[run_folder.Metrics, list[evaluate.Answer]]:  # fmt: skip
        """(exact match of each member, the answers of the one with the lowest held-out loss)."""
        answers: dict[str, list[evaluate.Answer]] = {}
        left, losses = self._left(), self._eval_losses(means)
        for index, member in enumerate(self.members):
            if member.name not in left:
                continue
            if step == 0 and answers:  # untrained, all give the same answers
                answers[member.name] = answers[left[0]]
                continue
            alone = side_by_side.one(trained, self.frozen, index)
            answers[member.name] = evaluate.answers(answer(*alone), prompts, reader)
        matches = {f"exact_match/{name}": evaluate.exact_match(found)
                   for name, found in answers.items()}  # fmt: skip
        least = min(left, key=lambda name: (not math.isfinite(losses[name]), losses[name]))
        return matches, answers.get(least, [])

    def evaluation_text(self, metrics: run_folder.Metrics, num_scored: int) -> str:
        """The printed line of an evaluation."""
        losses = self._eval_losses(metrics)
        each = [f"{name} {loss:.4f}" + (
                    f" ({metrics[f'exact_match/{name}']:.1%} exact)"
                    if f"exact_match/{name}" in metrics else "")
                for name, loss in losses.items()]  # fmt: skip
        return f"step {metrics['step']}: held-out loss of " + ", ".join(each)

    def save(
        self, folder: run_folder.RunFolder, trained: Any, base: Any, num_steps: int,
        record: run_folder.Record,
    ) -> one_adapter.Saved:  # fmt: skip
        """Saves the adapter of every member that is not lost; returns the best one."""
        found = processes.broadcast(self._table(folder, num_steps))
        left = {index: member for index, member in enumerate(self.members)
                if member.name not in self._lost}  # fmt: skip
        for index, member in left.items():
            alone, _ = side_by_side.one(trained, self.frozen, index)
            like, _ = self._injected.state(member.lora)
            path = folder.path / member.name / "adapter"
            own = side_by_side.cut(alone, like)
            one_adapter.save_adapter(self.one, folder, path, own, member.lora, base)
        best = sweep_table.best(found) or next(iter(left.values())).name
        record.sweep = {"best": best, "members": found}
        index = next(index for index, member in left.items() if member.name == best)
        arrays = side_by_side.one(trained, self.frozen, index)
        return one_adapter.Saved(folder.path / best / "adapter", *arrays)

    def _table(self, folder: run_folder.RunFolder, num_steps: int) -> sweep_table.Table:
        return sweep_table.table([member.name for member in self.members],
                                 folder.metrics(num_steps))  # fmt: skip

    def table(self, folder: run_folder.RunFolder, num_steps: int) -> list[str]:
        """Lines that compare the members."""
        perplexity = self.settings.beta is None
        return ["", *sweep_table.lines(self._table(folder, num_steps), perplexity=perplexity)]
