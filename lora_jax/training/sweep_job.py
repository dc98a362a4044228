"""What train.py does with --sweep: a job whose adapters are trained side by side."""

import dataclasses
import math
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from lora_jax import lora
from lora_jax.console import say
from lora_jax.lora import config
from lora_jax.lora.nnx import model_state
from lora_jax.optim import config as optim_config
from lora_jax.optim import step as train_step
from lora_jax.optim import sweep
from lora_jax.parallel import mesh as sharding
from lora_jax.parallel import processes
from lora_jax.training import evaluate, loop, members, snapshots


class SweepJob(loop.Job):
    """Its `trained` and `frozen` are those of all members until it has ended, then the best's."""

    def _load_model(self) -> None:
        super()._load_model()
        optim = config.build(optim_config.OptimConfig, self.settings)
        setting, values = members.parse(self.settings["sweep"])
        self.members = []
        for name, value in values.items():
            own = [dataclasses.replace(kind, **{setting: value}) if hasattr(kind, setting) else kind
                   for kind in (self.lora_config, optim)]  # fmt: skip
            self.members.append(sweep.Member(name, *own))
        self.num_adapters = len(self.members)
        self.injected = self.lora_config  # in self.model, with the largest rank
        self.lost: dict[str, int] = {}  # the step at which a member was not finite
        parts = [
            (self.trained, self.frozen)
            if member.lora == self.lora_config
            else sharding.place(self._inject(member.lora), self.mesh)
            for member in self.members
        ]
        self.trained, self.frozen = sharding.place(sweep.join(parts), self.mesh)
        if self.beta is not None:
            self.frozen = self.frozen._replace(reference=jax.tree.map(jnp.copy, self.trained))
        rows = self.settings["batch_size"]
        say("sweep", f"{self.num_adapters} adapters side by side, {self.num_adapters} × {rows} "
            f"rows at a time: {', '.join(values)}")  # fmt: skip

    def _inject(self, lora_config: config.LoRAConfig) -> tuple[Any, model_state.Frozen]:
        """(lora, frozen) of self.model with other adapters, as they begin."""
        if lora_config != self.injected:
            lora.strip(self.model)
            lora.inject(self.model, lora_config, rngs=nnx.Rngs(self.settings["seed"]))
            self.injected = lora_config
        return model_state.split(self.model)[1:]

    def _begin(self) -> tuple[train_step.State, Callable]:
        start = sweep.start(self.members, self.trained, self.num_steps)
        step = sweep.make_step(self.graphdef, self.members, self.num_steps, **self._how())
        return sharding.place(start, self.mesh), step

    def _resume(self, state: train_step.State, snapshots: snapshots.Snapshots, record: dict):
        state = super()._resume(state, snapshots, record)
        steps = jax.device_get(state.opt_state.lost).tolist()
        self.lost = {member.name: step
                     for member, step in zip(self.members, steps, strict=True) if step}  # fmt: skip
        return state

    def _log(self, metrics: dict[str, Any]) -> None:
        """Without the members that are lost."""
        super()._log({name: value for name, value in metrics.items()
                      if name.partition("/")[2] not in self.lost})  # fmt: skip

    def _judge(self, metrics: dict[str, Any], good: int | None) -> float:
        losses = {}
        for name in self._left():
            losses[name] = metrics[f"loss/{name}"]
            if not math.isfinite(losses[name] + metrics[f"grad_norm/{name}"]):
                self.lost[name] = metrics["step"]
                say("lost", f"{name}: NaN or infinity at step {metrics['step']}; it stays as it "
                    "was, and the others go on")  # fmt: skip
        if not self._left():
            raise self._not_finite(metrics["step"], good)
        return min(losses[name] for name in self._left())

    def _left(self) -> list[str]:
        return [member.name for member in self.members if member.name not in self.lost]

    def _make_evaluation(self) -> None:
        super()._make_evaluation()
        if self.data.held_out is not None:
            self.eval_loss = sweep.make_eval_loss(self.graphdef, self.members, self.beta)

    def _evaluate(
        self, number: int, trained: Any, *, score: bool
    ) -> tuple[float | None, list[dict[str, str]]]:
        """Logs every member's scores; (the least held-out loss, two answers of that member)."""
        if self.data.held_out is None:
            return None, []
        start, answers, left = time.time(), {}, self._left()
        rows = self.settings["batch_size"]
        model = trained, self.frozen
        means = evaluate.means(self.eval_loss, *model, self.data.held_out, rows, self.mesh)
        metrics = {"step": number, **means}
        losses = {name: means[f"eval_loss/{name}"] for name in left}
        best = min(left, key=losses.__getitem__)
        for index, member in enumerate(self.members):
            if not (score and self.data.scored) or member.name not in left:
                continue
            if number == 0 and answers:  # nothing is trained yet: all answer alike
                answers[member.name] = answers[left[0]]
            else:
                alone = sweep.one(*model, index)
                how = {"key": jax.random.key(0), "mesh": self.mesh}
                given = self.answer, *alone, self.data.scored, self.tokenizer
                answers[member.name] = evaluate.answers(*given, **how)
            metrics[f"exact_match/{member.name}"] = evaluate.exact_match(answers[member.name])
        self._log(metrics)
        told = [f"{name} {losses[name]:.4f}" + (
                    f" ({metrics[f'exact_match/{name}']:.1%} exact)" if answers else "")
                for name in left]  # fmt: skip
        say("evaluate", f"step {number}: held-out loss of " + ", ".join(told))
        self.seconds["evaluate"] = self.seconds.get("evaluate", 0) + time.time() - start
        return losses[best], [answer._asdict() for answer in answers.get(best, [])[:2]]

    def _table(self) -> dict[str, dict[str, Any]]:
        names = [member.name for member in self.members]
        return members.table(names, self.folder.metrics(self.num_steps))

    def _save_adapters(self, record: dict[str, Any]) -> None:
        """An adapter of every member that is not lost; self is the best's from here on."""
        found = processes.told(self._table())
        left = {index: member for index, member in enumerate(self.members)
                if member.name not in self.lost}  # fmt: skip
        for index, member in left.items():
            trained, _ = sweep.one(self.trained, self.frozen, index)
            like, _ = self._inject(member.lora)
            path = self.folder.path / member.name / "adapter"
            self._save_adapter(path, sweep.cut(trained, like), member.lora)
        best = members.best(found) or next(iter(left.values())).name
        record["sweep"] = {"best": best, "members": found}
        self.adapter = self.folder.path / best / "adapter"
        index = next(index for index, member in left.items() if member.name == best)
        self.trained, self.frozen = sweep.one(self.trained, self.frozen, index)

    def _show(self, samples: dict[str, list[dict[str, str]]], reported: str) -> None:
        print("\n" + "\n".join(members.lines(self._table(), perplexity=self.beta is None)))
        super()._show(samples, reported)
