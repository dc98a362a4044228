"""What train.py does once its flags are read: load, evaluate, train, save, show."""

import contextlib
import functools
import importlib.metadata
import math
import pathlib
import signal
import textwrap
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

import lora_jax
from lora_jax import console, errors, hub, tokenizer
from lora_jax.checkpoints import fingerprints, inventory, loader, safetensors_files
from lora_jax.console import say
from lora_jax.generation import config as generation_config
from lora_jax.generation import continuation
from lora_jax.generation import weights as decode_weights
from lora_jax.lora import config, peft
from lora_jax.lora.nnx import inject as lora
from lora_jax.lora.nnx import model_state
from lora_jax.models import config as model_config
from lora_jax.optim import adamw
from lora_jax.optim import config as optim_config
from lora_jax.optim import step as train_step
from lora_jax.parallel import devices, processes
from lora_jax.parallel import mesh as sharding
from lora_jax.planning import chips, programs
from lora_jax.planning import memory as planning
from lora_jax.training import evaluate, monitor, prepare, run_folder, stop
from lora_jax.training import settings as training_settings
from lora_jax.training import snapshots as snapshot
from lora_jax.training.report import page


def run(
    settings: dict[str, Any],
    folder: run_folder.RunFolder,
    kind: "type[Job]",
    *,
    resume: bool,
    default_batch: bool,
) -> int:
    """The exit code of a run with all its settings: 0, or what stop.Stop gives when it was stopped.

    default_batch: the batch size was not asked for, and may grow to suit the devices.
    """
    if warning := devices.unused_accelerator():
        say("warning", warning)
    devices.keep_freed_memory()
    devices.keep_compiled()
    training = settings.get("max_steps") != 0
    rows = prepare.read(settings) if training else None  # before a model is downloaded
    base = hub.model_folder(settings["model"], settings.get("revision"))
    architecture = model_config.load(base)
    settings["quant"] = training_settings.resolved_quant(settings, architecture, base)
    loaded = {"dtype": settings.get("dtype"), "quantization": settings["quant"]}
    mesh = sharding.choose(settings.get("mesh"), inventory.loaded_bytes(base, **loaded))
    if training and default_batch:
        settings["batch_size"] = sharding.round_up(settings["batch_size"], mesh)
    if training:
        in_all = settings["batch_size"] * settings["grad_accum"] if resume else None
        sharding.check_batch(settings["batch_size"], mesh, in_all)
    axes = " ".join(f"{axis}={size}" for axis, size in mesh.shape.items())
    say("devices", f"{devices.describe()}, mesh {axes}")
    where = console.quoted(str(folder.path))
    processes.when_lost(f"start all again with --resume --output-dir {where}")
    with jax.set_mesh(mesh):
        job = kind(settings, folder, base, architecture, mesh, rows)
        if job.num_steps == 0:
            job.continue_prompts()
            return 0
        return job.fit(resume=resume)


class Job:
    """A model with its adapter, its data, and what is done with them."""

    def __init__(
        self,
        settings: dict[str, Any],
        folder: run_folder.RunFolder,
        base: pathlib.Path,
        architecture: model_config.LlamaConfig,
        mesh: jax.sharding.Mesh,
        rows: prepare.Rows | None,
    ):
        self.settings, self.folder, self.base, self.mesh = settings, folder, base, mesh
        self.adapter = folder.adapter  # the one to generate with
        self.num_adapters = 1  # trained side by side, each on rows of its own
        self.begun = time.monotonic()
        self.beta = settings["beta"] if settings.get("dpo") else None
        self.seconds: dict[str, float] = {}
        self.num_steps = 0
        self.architecture = architecture
        self.context = architecture.max_position_embeddings
        settings["dtype"] = settings.get("dtype") or architecture.dtype
        self.tokenizer = tokenizer.load(self.base)
        self.eos_ids = tokenizer.eos_ids(self.tokenizer, self.base)
        self.lora_config = config.build(config.LoRAConfig, settings)
        if rows is not None:
            self.data = prepare.Data(settings, rows, self.tokenizer, self.eos_ids[0], self.context)
            self.num_steps = self.data.num_steps
            if settings["remat"] == "auto":
                self._choose_remat()
        self._check_prompts()
        self._load_model()

    def _choose_remat(self) -> None:
        job, target = self._to_plan()
        limit = devices.memory_bytes(jax.local_devices()[0])
        # Hosts may tell unequal memories.
        limit = processes.told(limit)
        longest = job.of_length(self.data.batches.length)
        chosen, needs = planning.choose_remat(longest, dict(self.mesh.shape), target.chip, limit)
        self.settings["remat"] = chosen
        if needs:
            say("remat", console.remat(chosen, needs, limit))

    def _check_prompts(self) -> None:
        self.sampling = generation_config.Sampling(
            self.settings["max_new_tokens"], self.settings["temperature"]
        )
        texts = self.settings.get("prompt") or []
        if self.settings.get("chat"):
            texts = [tokenizer.chat_prompt(self.tokenizer, text) for text in texts]
        self.prompts = tokenizer.encode(self.tokenizer, texts) if texts else []
        for ids in self.prompts:
            continuation.check_length(len(ids), self.sampling, self.context)

    def _load_model(self) -> None:
        start, settings = time.time(), self.settings
        self.held = devices.held_bytes()
        stored = safetensors_files.tensors(self.base).values()
        principal = None
        if settings["quant"] != "none" and self.lora_config.init_lora_weights != "default":
            principal = lora.Principal(self.lora_config)
        self.model = loader.load(
            self.base,
            dtype=settings["dtype"],
            quantization=settings["quant"],
            search=not settings.get("quant_fast"),
            mesh=self.mesh,
            residual=None if principal is None else principal.take,
        )
        rngs = nnx.Rngs(settings["seed"])
        lora.inject(self.model, self.lora_config, rngs=rngs, principal=principal)
        self.graphdef, *state = model_state.split(self.model)
        self.trained, self.frozen = sharding.place(state, self.mesh)
        if self.beta is not None:  # a step takes over the memory of what it trains
            self.frozen = self.frozen._replace(reference=jax.tree.map(jnp.copy, self.trained))
        total = inventory.num_params(self.architecture)
        trainable = lora.num_params(self.model)
        before = sum(tensor.num_bytes for tensor in stored)
        after = sum(array.nbytes for array in jax.tree.leaves(self.frozen.base))
        say("model", f"{console.count(total)} parameters, {console.count(trainable)} trainable "
            f"({trainable / (total + trainable):.2%}): "
            f"{console.near(settings['model'])}")  # fmt: skip
        say("base", f"{console.size(before)} on disk, {console.size(after)} loaded "
            f"(quant {settings['quant']})")  # fmt: skip
        if note := inventory.dense_note(settings["quant"], self.model):
            say("base", note)
        self.seconds["load"] = time.time() - start

    def fit(self, *, resume: bool) -> int:
        """Trains from the start or the newest checkpoint; the exit code, of stop.Stop if it was."""
        settings = self.settings
        state, step = self._begin()
        # The checkpoints kept, the one being written, and the adapter.
        keep, best = settings["keep_checkpoints"], bool(settings.get("keep_best"))
        self.folder.check_space((keep + best + 2) * sum(a.nbytes for a in jax.tree.leaves(state)))
        record = self._record()
        if not resume:  # before there is a file in it that a new run would be refused for
            record["status"] = "running"
            self.folder.write_run(record)
        snapshots = snapshot.Snapshots(self.folder.checkpoints, keep, keep_best=best)
        with contextlib.ExitStack() as ending:
            ending.enter_context(self._failure_told(record))
            ending.enter_context(snapshots)
            self.compilations = ending.enter_context(monitor.Compilations())
            if resume:
                state = self._resume(state, snapshots, record)
            self.data.keep(self.folder.streams, write=processes.leads())
            first = int(state.step)
            self.folder.cut_back(first or -1)
            self.dashboard = None
            if settings.get("report_to") and processes.leads():
                how = settings["report_to"], self.folder.path, settings, first
                self.dashboard = ending.enter_context(contextlib.closing(monitor.Dashboard(*how)))
            self.patience = monitor.Patience(settings.get("patience"))
            for told in self.folder.metrics(first):
                if "eval_loss" in told:
                    self.patience.note(told["eval_loss"])
            record["status"] = "running"
            self.folder.write_run(record)
            self._make_evaluation()
            if first == 0:
                signal.signal(signal.SIGINT, signal.default_int_handler)  # there is a folder now
                try:
                    _, answers = self._evaluate(0, state.lora, score=True)
                    record["samples"] = {"before": answers}
                except KeyboardInterrupt:
                    processes.end(130, "stopped")
                    self._tell_stopped(0)
                    return 130
                self.folder.write_run(record)
            with stop.Stop() as stopper:
                state = self._train(step, state, snapshots, record, stopper)
                snapshots.wait()
                self.trained, done = self._chosen(state, snapshots, record), int(state.step)
                self._save_adapters(record)
                finished = done == self.num_steps or self.patience.spent
                record |= {
                    "status": "finished" if finished else f"stopped at step {done}",
                    "seconds": {name: round(value, 2) for name, value in self.seconds.items()},
                    "compile_seconds": round(
                        self.compilations.seconds + record.get("compile_seconds", 0), 2
                    ),
                    "peak_bytes": max(devices.peak_bytes(), record.get("peak_bytes", 0)),
                }
                self.folder.write_run(record)
        told = self._report()
        if not finished:
            say("report", told)
            self._tell_stopped(done)
            return stopper.code
        self._show(record["samples"], told)
        self.continue_prompts()
        return 0

    def _begin(self) -> tuple[train_step.State, Callable]:
        """(the state before step 1, the step)."""
        settings = config.build(optim_config.OptimConfig, self.settings)
        optimizer = adamw.make(settings, self.num_steps)
        schedule = adamw.schedule(settings, self.num_steps)
        step = train_step.make_step(self.graphdef, optimizer, schedule, **self._how())
        return sharding.place(train_step.start(self.trained, optimizer), self.mesh), step

    def _how(self) -> dict[str, Any]:
        """What makes a step, besides what is trained and how fast."""
        names = "seed", "remat"
        return {name: self.settings[name] for name in names} | {"beta": self.beta}

    def _train(
        self,
        step: Callable,
        state: train_step.State,
        snapshots: snapshot.Snapshots,
        record: dict[str, Any],
        stopper: stop.Stop,
    ) -> train_step.State:
        """The state after the last step, or after the one at which it was asked to stop."""
        every = self.settings.get("eval_every") or self.num_steps
        start = clock = time.time()
        until = 0 if self.patience.spent else self.num_steps  # resumed, it may have been already
        steps = train_step.steps(step, state, self.frozen, self._batch, until)
        log_every, spikes = self.settings.get("log_every"), monitor.Spikes()
        profile = monitor.Profile(self.settings.get("profile"), int(state.step))
        utilisation = monitor.Utilisation(*self._to_plan())
        with console.Progress(int(state.step), self.num_steps, log_every) as progress:
            for state, metrics in steps:
                took, number = time.time() - clock, metrics["step"]
                metrics["tokens_per_second"] = round(metrics.pop("num_tokens") / took, 1)
                metrics["data_wait"] = round(metrics.pop("waited") / took, 4)
                shape = self.data.batches.shape(number - 1)
                share = utilisation.share(shape[-1], took)
                known = {"mfu": share, "peak_bytes": devices.device_peak_bytes()}
                metrics |= {name: value for name, value in known.items() if value is not None}
                self._log(metrics)
                current = self._judge(metrics, snapshots.latest())
                if told := self.compilations.done(number, step, shape):
                    say("warning", told)
                progress.show(number, metrics | {"loss": current})
                if told := spikes.note(current):
                    say("spike", f"step {number}: {told}")
                last, loss = number == self.num_steps, None
                if last or number % every == 0:
                    loss, answers = self._evaluate(number, state.lora, score=last)
                    if self.patience.spent and not last:
                        say("patience", f"no better held-out loss in {self.patience.limit} "
                            "evaluations: ending here")  # fmt: skip
                    last = last or self.patience.spent
                    if last:  # before its checkpoint: a run resumed there has these to show
                        record["samples"]["after"] = answers
                        self.folder.write_run(record)
                # Once: what ends the loop must have been saved.
                late = time.monotonic() - self.begun > (self.settings.get("max_time") or math.inf)
                stopping = processes.anyone(stopper.asked or late)
                if told := profile.done(number, last or stopping):
                    say("profile", told)
                due = number % self.settings["save_every"] == 0
                due |= loss is not None and bool(self.settings.get("keep_best"))
                if last or stopping or due:
                    snapshots.save(state, loss)
                if stopping or last:
                    break
                clock = time.time()
        self.seconds["train"] = self.seconds.get("train", 0) + time.time() - start
        return state

    def _judge(self, metrics: dict[str, Any], good: int | None) -> float:
        """The loss of a step. Raises: UserError where it, or the gradient, is not finite.

        good: the newest checkpoint's step.
        """
        if not math.isfinite(metrics["loss"] + metrics["grad_norm"]):
            raise self._not_finite(metrics["step"], good)
        return metrics["loss"]

    def _log(self, metrics: dict[str, Any]) -> None:
        self.folder.log(metrics)
        if self.dashboard:
            self.dashboard.log(metrics)

    def continue_prompts(self) -> None:
        """Prints what the model makes of each --prompt."""
        if not self.prompts:
            return
        continue_ = self._generation(self.sampling)
        texts = continuation.continuations(
            continue_,
            self.trained,
            self.frozen,
            self.prompts,
            self.tokenizer,
            key=jax.random.key(self.settings["seed"]),
            mesh=self.mesh,
        )
        for prompt, text in zip(self.settings["prompt"], texts, strict=True):
            print(f"\n{prompt}{text}")

    def _generation(self, sampling: generation_config.Sampling) -> Callable:
        form = decode_weights.choose(self.model, self.mesh)
        return continuation.make(self.graphdef, sampling, self.eos_ids, form=form)

    def _batch(self, index: int) -> train_step.Batch:
        where, shape = sharding.batch(self.mesh), self.data.batches.shape(index)
        # Only the rows of this process's devices are made.
        rows = functools.cache(lambda *bounds: self.data.batches.batch(index, slice(*bounds)))

        def array(name):
            return jax.make_array_from_callback(
                shape, where, lambda at: rows(at[1].start, at[1].stop)[name]
            )

        return train_step.Batch(*map(array, train_step.Batch._fields))

    def _resume(self, state: train_step.State, snapshots: snapshot.Snapshots, record: dict):
        """The newest readable checkpoint's state, or `state` when there is none yet."""
        before = self.folder.read_run()
        version = before.get("versions", {}).get("lora-jax")
        changed = [
            f"another {part} of the {name}"
            if part in before.get(name, {})
            else f"no {part} of the {name}: another version of lora-jax ({version}) wrote it"
            for name in ("base", "data")
            for part, value in record[name].items()
            if before.get(name, {}).get(part, "") != value
        ]
        if changed:
            raise errors.UserError(
                expected="the base model and the data that the run was started with",
                found=changed,
                where=str(self.folder.path / "run.json"),
                do="put them back, or start a new run",
            )
        if before.get("status", "").startswith("failed"):
            say("resume", f"the run ended before with: {before['status']}")
        if processes.told(snapshots.latest()) is None:
            say("resume", "no finished checkpoint: starting over")
            return state
        record["samples"] = before.get("samples", {})
        for name, earlier in before.get("seconds", {}).items():  # all parts of the run add up
            self.seconds[name] = self.seconds.get(name, 0) + earlier
        record |= {name: before.get(name, 0) for name in ("compile_seconds", "peak_bytes")}
        state, damaged = snapshots.restore(state)
        _tell_damaged(damaged)
        snapshots.drop(damaged)  # they would count as the newest, and their steps come again
        say("resume", f"from step {int(state.step)} of {self.num_steps}")
        return state

    def _chosen(self, state: train_step.State, snapshots: snapshot.Snapshots, record: dict) -> Any:
        """A and B for the adapter: with --keep-best those of the best step, else the last ones."""
        if not snapshots.losses:
            return state.lora
        try:
            state, damaged = snapshots.best(state)
        except errors.UserError as error:
            say("best", f"the adapter is of the last step, for none is readable: {error.found}")
            return state.lora
        _tell_damaged(damaged)
        snapshots.drop(damaged)  # else they would be kept as the best ones
        step = int(state.step)
        record["best"] = {"step": step, "eval_loss": snapshots.losses[step]}
        say("best", f"step {step}, held-out loss {snapshots.losses[step]:.4f}: "
            "the adapter is of this step")  # fmt: skip
        return state.lora

    @contextlib.contextmanager
    def _failure_told(self, record: dict[str, Any]) -> Iterator[None]:
        """Has run.json say what ended the run, once it is this run's."""
        try:
            yield
        except Exception as error:
            told = error if isinstance(error, errors.UserError) else devices.explain(error)
            text = told.found if told else f"{type(error).__name__}: {error}"
            if record["status"] == "running":
                record["status"] = f"failed: {textwrap.shorten(text, 200, placeholder=' …')}"
                with contextlib.suppress(OSError):  # such as a full disk: that is the error to tell
                    self.folder.write_run(record)
                    self._report()
            raise

    def _record(self) -> dict[str, Any]:
        packages = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "transformers", "numpy")
        return {
            "status": "starting",
            "settings": self.settings,
            "num_steps": self.num_steps,
            "versions": {
                "lora-jax": lora_jax.__version__,
                **{name: importlib.metadata.version(name) for name in packages},
            },
            "device": devices.describe(),
            "mesh": dict(self.mesh.shape),
            "memory": {"planned_bytes": self._planned_bytes(), "bytes_before": self.held},
            "base": {"id": self.settings["model"], **fingerprints.fingerprint(self.base)},
            "data": self.data.fingerprints,
            "samples": {},
        }

    def _planned_bytes(self) -> int:
        """Of a train step: of all this process's devices on a CPU, which is what `peak_bytes`
        measures there, else of one."""
        job, target = self._to_plan()
        planned = planning.memory(job, dict(self.mesh.shape), target.chip).total
        return planned * (len(self.mesh.local_devices) if target.platform == "cpu" else 1)

    def _to_plan(self) -> tuple[programs.Job, chips.Target]:
        first = self.mesh.devices.flat[0]
        rows = self.settings["batch_size"] * self.num_adapters
        asked = self.settings | {"batch_size": rows}
        return (programs.job_of(asked, self.architecture),
                chips.of_kind(first.platform, first.device_kind, self.mesh.size))  # fmt: skip

    def _make_evaluation(self) -> None:
        if self.data.held_out is None:
            return
        self.eval_loss = train_step.make_eval_loss(self.graphdef, self.beta)
        if self.data.scored:
            sampling = generation_config.Sampling(max_new_tokens=self.data.longest_answer)
            self.answer = self._generation(sampling)

    def _evaluate(
        self, number: int, trained: Any, *, score: bool
    ) -> tuple[float | None, list[dict[str, str]]]:
        """Logs the held-out loss, and with `score` the exact match; (loss, two answers to show)."""
        if self.data.held_out is None:
            return None, []
        start, answers = time.time(), []
        rows = self.settings["batch_size"]
        model = trained, self.frozen
        means = evaluate.means(self.eval_loss, *model, self.data.held_out, rows, self.mesh)
        metrics, loss = {"step": number, **means}, means["eval_loss"]
        self.patience.note(loss)
        if (score or self.patience.spent) and self.data.scored:
            how = {"key": jax.random.key(0), "mesh": self.mesh}
            answers = evaluate.answers(self.answer, *model, self.data.scored, self.tokenizer, **how)
            metrics["exact_match"] = evaluate.exact_match(answers)
        self._log(metrics)
        console.evaluation(metrics, len(answers))
        self.seconds["evaluate"] = self.seconds.get("evaluate", 0) + time.time() - start
        return loss, [answer._asdict() for answer in answers[:2]]

    def _save_adapters(self, record: dict[str, Any]) -> None:
        self._save_adapter(self.adapter, self.trained, self.lora_config)

    def _save_adapter(
        self, path: pathlib.Path, trained: Any, lora_config: config.LoRAConfig
    ) -> None:
        nnx.update(self.model, sharding.gather(trained))
        if not processes.leads():
            return
        local = pathlib.Path(self.settings["model"]).is_dir()
        peft.save(
            path,
            self.model,
            lora_config,
            base_model=str(self.base.absolute()) if local else self.settings["model"],
            revision=self.settings.get("revision"),
        )

    def _report(self) -> str:
        """Writes report.html; what to say of it. The adapter is worth a run without one."""
        if not processes.leads():
            return ""
        try:
            return str(page.write(self.folder.path))
        except errors.UserError as error:
            return f"not written: {error.found}; scripts/report.py makes it later"

    def _not_finite(self, number: int, good: int | None) -> errors.UserError:
        return errors.UserError(
            expected="a finite loss and gradient",
            found=f"NaN or infinity at step {number}",
            where=str(self.folder.path / "metrics.jsonl"),
            do="start a new run with a lower --lr, a longer --warmup, or --dtype float32; "
            + (f"the checkpoint of step {good} is good" if good else "no checkpoint was due yet"),
        )

    def _tell_stopped(self, done: int) -> None:
        where = console.quoted(str(self.folder.path))
        print(f"\nstopped after step {done} of {self.num_steps}; to go on:\n"
              f"  {console.command('train.py')} --resume --output-dir {where}")  # fmt: skip

    def _show(self, samples: dict[str, list[dict[str, str]]], reported: str) -> None:
        console.side_by_side(samples.get("before", []), samples.get("after", []))
        say("adapter", str(self.adapter))
        say("run", f"{self.folder.path}/run.json, metrics.jsonl, checkpoints/")
        say("report", reported)
        example = self.settings.get("prompt") or [
            answer["prompt"] for answer in samples.get("after", [])
        ]
        same = f"--quant {self.settings['quant']} --dtype {self.settings['dtype']}"
        same += " --quant-fast" if self.settings.get("quant_fast") else ""
        same += " --chat" if self.settings.get("chat") else ""
        print(f"\nto generate with it:\n  {console.command('generate.py')} {same} \\\n"
              f"    --adapter {console.quoted(str(self.adapter))} \\\n"
              f"    --prompt {console.quoted(example[0] if example else '…')}")  # fmt: skip


def _tell_damaged(damaged: dict[int, str]) -> None:
    for step, what in damaged.items():
        say("resume", f"the checkpoint of step {step} is damaged and left out: {what}")
