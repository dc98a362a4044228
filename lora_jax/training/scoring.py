"""Evaluation during a run, held-out loss and exact match, and the continuation of prompts."""

import dataclasses
import time
from typing import Any

from flax import nnx
from jax.sharding import Mesh

from lora_jax import tokenizer
from lora_jax.console import say
from lora_jax.generation import config as generation_config
from lora_jax.generation import engine, limits
from lora_jax.lora.nnx import model_state
from lora_jax.parallel import mesh as sharding
from lora_jax.training import evaluate, monitor, setup
from lora_jax.training.output import run_folder
from lora_jax.training.settings import groups

SLOTS = 64  # the most prompts at a time


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """One evaluation: its metrics, the loss that checkpoints are compared by, and two answers."""

    metrics: run_folder.Metrics = dataclasses.field(default_factory=dict)
    loss: float | None = None
    samples: list[dict[str, str]] = dataclasses.field(default_factory=list)


class Evaluator:
    """Evaluates the adapter on the held-out data; its programs are compiled once."""

    def __init__(self, job: setup.Job, log: monitor.Log, patience: monitor.Patience):
        self._job, self._log, self.patience = job, log, patience
        if job.data.held_out is None:
            return
        self._eval_loss = job.adapters.make_eval_loss()
        if job.data.scored:
            sampling = generation_config.Sampling(max_new_tokens=job.data.longest_answer)
            prompts = [ids.tolist() for ids, _ in job.data.scored]
            self._answer = _Generation(job.base, job.mesh, job.adapters, prompts, sampling)

    def evaluate(self, number: int, trained: Any, *, score: bool) -> Evaluation:
        """Logs the held-out loss after step `number`. score: logs the exact match as well."""
        job = self._job
        if job.data.held_out is None:
            return Evaluation()
        start, answers, scored = time.time(), [], job.data.scored
        means = evaluate.means(
            self._eval_loss, trained, job.adapters.frozen, job.data.held_out,
            job.settings.loop.batch_size, job.mesh,
        )  # fmt: skip
        metrics, loss = {"step": number, **means}, job.adapters.eval_loss(means)
        self.patience.note(loss)
        if (score or self.patience.spent) and scored:
            matches, answers = job.adapters.score(
                self._answer, trained, scored, job.base.tokenizer, number, means
            )
            metrics |= matches
        metrics = self._log.add(metrics)
        say("evaluate", job.adapters.evaluation_text(metrics, len(answers)))
        job.watch.add("evaluate", start)
        return Evaluation(metrics, loss, [answer._asdict() for answer in answers[:2]])


class _Generation:
    """(trained, frozen) → the continuation of each prompt; its programs are compiled once."""

    def __init__(
        self,
        base: setup.Base,
        mesh: Mesh,
        adapters: setup.Adapters,
        prompts: list[list[int]],
        sampling: generation_config.Sampling,
    ):
        self._graphdef, self._prompts, self._sampling = adapters.graphdef, prompts, sampling
        self._engine: engine.Engine | None = None
        self._how = {
            "eos_ids": base.eos_ids,
            "slots": min(SLOTS, sharding.round_up(len(prompts), mesh)),
            "context": limits.context(prompts, sampling.max_new_tokens, base.architecture.context),
            "mesh": mesh,
        }
        self._reader = base.tokenizer

    def __call__(self, trained: Any, frozen: model_state.Frozen) -> list[str]:
        if self._engine is None:
            model = nnx.merge(self._graphdef, trained, frozen.dropout_keys, frozen.base)
            self._engine = engine.Engine(model, self._reader, **self._how)
        else:
            self._engine.use(trained, frozen)
        found = [result.text for result in self._engine.generate(self._prompts, self._sampling)]
        self._engine.release()
        return found


def encoded_prompts(settings: groups.TrainSettings, base: setup.Base) -> list[list[int]]:
    """The token ids of the prompts. Raises: UserError if one is too long."""
    texts = list(settings.prompts.prompt)
    if settings.prompts.chat:
        encoded = [tokenizer.chat_prompt(base.tokenizer, text) for text in texts]
    else:
        encoded = tokenizer.encode(base.tokenizer, texts)
    tokenizer.check_ids(base.tokenizer, encoded, base.num_tokens)
    context = base.architecture.context
    for ids in encoded:
        limits.check_length(len(ids), settings.prompts.sampling.max_new_tokens, context)
    return encoded


def continuations(
    settings: groups.TrainSettings,
    base: setup.Base,
    mesh: Mesh,
    adapters: setup.Adapters,
    prompts: list[list[int]],
    trained: Any,
    frozen: model_state.Frozen,
) -> list[str]:
    """The model's continuation of each prompt."""
    if not prompts:
        return []
    sampling = dataclasses.replace(settings.prompts.sampling, seed=settings.loop.seed)
    return _Generation(base, mesh, adapters, prompts, sampling)(trained, frozen)
