"""The training loop: step, log, save, evaluate; it ends at the last step, on a signal, or on non-finite steps."""

import contextlib
import dataclasses
import json
import os
from typing import Any

import jax
import numpy as np
import optax
from jaxtyping import Array
from rich.console import Console

from comi_jax.data.batches import Plan
from comi_jax.data.records import Record
from comi_jax.devices import distributed, sharding
from comi_jax.evaluation import predictions
from comi_jax.evaluation.answerers import ComiAnswerer
from comi_jax.model.architecture import Architecture, Stage, frozen_dtype
from comi_jax.model.batch import Batch
from comi_jax.params import combine, count
from comi_jax.runs import journal, selection, stored_weights
from comi_jax.runs.checkpoints import Checkpoints, Progress
from comi_jax.runs.checksums import CheckpointError
from comi_jax.runs.description import Run
from comi_jax.runs.folder import Folder
from comi_jax.runs.logs import RunLog, SilentLog
from comi_jax.serving.compressor import Comi
from comi_jax.training import optim
from comi_jax.training.meter import Meter, Tally, TooManySkipped, batch_flops, bytes_per_device
from comi_jax.training.signals import Stop
from comi_jax.training.state import TrainState
from comi_jax.training.step import CompiledStep

PEEKED = 4  # batches from which the tokens and FLOP of a step are estimated


@dataclasses.dataclass
class Job:
    """One system to train, with everything read, placed and validated."""

    title: str
    run: Run
    output: Folder
    mesh: jax.sharding.Mesh
    update: optax.GradientTransformation
    state: TrainState
    frozen: dict[str, Array]
    plan: Plan
    batches: Any  # endless iterator of (micro-batches on the host, the same on devices); get_state, set_state, close
    largest: Batch  # of the largest shape that a micro-batch can have
    held_out: list[Record]
    tokenizer: Any
    checkpoints: Checkpoints
    progress: Progress  # of the checkpoint it resumes from, or of step 0
    arch: Architecture  # of ``run`` on the mesh, with a remat policy in place of "auto"

    @property
    def steps(self) -> int:
        return self.run.config.train.steps

    step_fn: CompiledStep = dataclasses.field(init=False)

    def __post_init__(self):
        first_stage = self.run.config.autoencoding_steps
        self.step_fn = CompiledStep(self.arch, self.update, first_stage)

    def stage(self, step: int) -> Stage:
        """What ``step``, counted from 1, trains."""
        return "autoencoding" if step <= self.run.config.autoencoding_steps else "answering"

    @property
    def key(self) -> Array:
        return jax.random.key(self.run.config.train.seed)

    def close(self) -> None:
        """Stop the background threads of data and checkpoints."""
        self.batches.close()
        self.checkpoints.close()


def describe(job: Job, console: Console) -> None:
    """Compile the step for the largest micro-batch and print parameters, tokens, FLOP and memory."""
    largest = (sharding.put_batch(job.largest, job.mesh),) * job.plan.micro_batches
    stages: set[Stage] = {job.stage(step) for step in (job.progress.step + 1, job.steps)}
    working = max(job.step_fn.prepare(job.state, job.frozen, largest, job.key, stage) for stage in stages)
    for line in summary(job, working):
        console.print(f"{job.title}: {line}", highlight=False)


class Loop:
    """The steps of one job. It opens the logs in the job's folder."""

    def __init__(self, job: Job, stop: Stop, console: Console):
        self.job, self.stop, self.console = job, stop, console
        self.settings, self.saved, self.key = job.run.config.train, job.progress.step, job.key
        if distributed.is_first():
            journal.keep_until(job.output.evaluations, self.saved)
        job.checkpoints.best = selection.best_step(job.output, self.settings.best_by)
        log_class = RunLog if distributed.is_first() else SilentLog
        self.log = log_class(job.output, job.title, job.steps, self.saved, console)
        rate = optim.schedule(job.run.config.optimizer, self.settings.steps, job.run.config.autoencoding_steps)
        self.meter = Meter(
            job.run.architecture, self._is_logged, self.settings.max_skipped, rate, self.log.write,
            job.progress.skipped, job.progress.in_a_row, job.stage,
        )  # fmt: skip

    def run(self) -> bool:
        """Train to the last step. False if a signal stopped it before."""
        job, start = self.job, self.job.progress.step
        with self.log, contextlib.closing(job.checkpoints), contextlib.closing(job.batches):
            if self._evaluation_due(start):  # killed during the evaluation
                self._evaluate(start)
            try:
                for step in range(start + 1, job.steps + 1):
                    if self._end_requested(step - 1):
                        return False
                    self._step(step)
            except TooManySkipped as error:
                raise self._give_up(error) from None
        return True

    def _is_logged(self, step: int) -> bool:
        return step % self.settings.log_every == 0 or step == self.job.steps

    def _step(self, step: int) -> None:
        job, settings = self.job, self.settings
        batch, placed = next(job.batches)
        known = job.step_fn.compiled
        job.state, metrics = job.step_fn(job.state, job.frozen, placed, self.key, job.stage(step))
        if job.step_fn.compiled > known:
            self.meter.pause()
        self.meter.add(step, metrics, batch)
        self.log.advance(step)
        every = settings.checkpoint_every
        if step == job.steps or (every and step % every == 0) or self._evaluation_due(step):
            self._save(step, wait=step == job.steps)
        if self._evaluation_due(step):
            self._evaluate(step)

    def _save(self, step: int, wait: bool) -> None:
        """Start writing the checkpoint of ``step``. With ``wait``, which the last checkpoint needs, wait for it, and
        write it once more if it failed."""
        job = self.job
        self.meter.drain()
        self.log.sync()
        position, examples = job.batches.get_state(), job.progress.examples
        progress = Progress(step, position, self.meter.skipped, self.meter.in_a_row, examples)
        job.checkpoints.save(job.state, progress)
        self.saved = step
        if wait and not job.checkpoints.settle():
            job.checkpoints.save(job.state, progress)
            job.checkpoints.settle()

    def _end_requested(self, step: int) -> bool:
        """Whether to stop on a signal; if so, ``step`` is saved. Several processes stop after the same step."""
        if not self.stop.due():
            return False
        if step > self.saved or not self.job.checkpoints.settle():
            self._save(step, wait=True)
        self.console.print(
            f"{self.job.title}: stopped by {self.stop.requested} after step {step} of {self.job.steps}; run the same "
            "command to resume",
            highlight=False,
        )
        return True

    def _give_up(self, error: TooManySkipped) -> CheckpointError:
        """Save the state and the last batch; returns the error about too many non-finite steps."""
        with contextlib.suppress(TooManySkipped):
            self.meter.drain()
        step = int(self.job.state.step)
        self._save(step, wait=True)
        path = self.job.output.bad_batch(error.step)
        rates = np.concatenate([rows.rate for rows in error.batch])
        ids = dataclasses.asdict(*dataclasses.replace(self.job.plan, micro_batches=1).batch(error.step - 1, rates))
        words = {
            name: [self.job.tokenizer.decode(row[:n]) for row, n in zip(ids[name], ids[f"{name}_length"], strict=True)]
            for name in ("query", "answer")
        }
        if distributed.is_first():
            path.parent.mkdir(exist_ok=True)
            arrays: dict[str, Any] = ids | {f"{name}_text": np.array(rows) for name, rows in words.items()}
            np.savez_compressed(path, **arrays)
        return CheckpointError(
            f"{error}: their updates were skipped, and the run stops, saved after step {step}; inspect the last batch, "
            f"{path}, then run the same command to resume after it, or resume with a lower optimizer.learning_rate and "
            "--allow-config-change"
        )

    # --- evaluation during training -----------------------------------------------------------------------------------

    def _evaluation_due(self, step: int) -> bool:
        every = self.settings.eval_every
        if not every or not step or step % every or not self.job.held_out:
            return False
        done = any(row["step"] == step for row in selection.evaluations(self.job.output))
        return not distributed.agreed(np.array(done))

    def _evaluate(self, step: int) -> None:
        """Evaluate the weights after ``step``, whose checkpoint is written first, and update the best checkpoint."""
        job = self.job
        job.checkpoints.settle()
        arch = job.run.architecture
        with self.stop.saved() if job.output.checkpoint(step).is_dir() else contextlib.nullcontext():
            flat = {path: x.astype(frozen_dtype(path, arch)) for path, x in job.state.trained.items()}
            model = Comi(job.run, combine(flat, job.frozen), job.tokenizer, mesh=job.mesh)
            output = job.output.evaluation_at(step)
            answerer = ComiAnswerer(model, stored_weights.weights_of(job.output, step), step=step)
            result = predictions.evaluate(answerer, job.held_out, output, console=self.console)
            if distributed.is_first():
                with job.output.evaluations.open("a", encoding="utf-8") as lines:
                    lines.write(json.dumps({"step": step, **result}) + "\n")
                    lines.flush()
                    os.fsync(lines.fileno())
            distributed.meet(f"{job.title} is evaluated after step {step}")
        if not distributed.is_first():
            return
        shown = (self.settings.best_by, *(name for name in ("em", "f1_max") if name != self.settings.best_by))
        self.log.measured(step, {name: result["metrics"][name]["mean"] for name in shown})
        job.checkpoints.best = selection.best_step(job.output, self.settings.best_by)
        self.meter.pause()


def summary(job: Job, working: int) -> list[str]:
    """Parameters, tokens and FLOP per step, and memory per device, as sentences. ``working`` is the temporary memory
    of a step in bytes."""
    run, config = job.run, job.run.config
    parts: dict[str, int] = {}
    for path, leaf in {**job.state.trained, **job.frozen}.items():
        parts[path.split("/")[0]] = parts.get(path.split("/")[0], 0) + leaf.size
    by_part = ", ".join(f"{part} {size:,}" for part, size in parts.items() if part != "mig")
    position = job.batches.get_state()
    batches = [next(job.batches)[0] for _ in range(PEEKED)]
    job.batches.set_state(position)
    tokens = np.mean([Tally.of(batch).tokens for batch in batches])
    stage = job.stage(job.progress.step + 1)
    operations = np.mean([batch_flops(run.architecture, batch, stage) for batch in batches])
    rows, (padding, sizes) = job.largest, job.plan.forecast()
    first = config.autoencoding_steps
    held = {
        "frozen weights": bytes_per_device(job.frozen),
        "trained weights": bytes_per_device(job.state.trained),
        "optimizer": bytes_per_device(job.state.optimizer),
        "gradients": bytes_per_device(job.state.trained),
        "step": working,
    }
    memory = ", ".join(f"{name} {_gigabytes(size)}" for name, size in held.items())
    return [
        f"{sum(parts.values()):,} parameters ({by_part}), {count(job.state.trained):,} trained on "
        f"{jax.device_count()} {jax.default_backend()} device(s)",
        f"{config.train.steps} steps of {config.train.batch_size} examples, "
        f"{f'{first} of them autoencoding, ' if first else ''}rates "
        f"{', '.join(map(str, config.compression.rates))}, rows up to {rows.context.shape[1]} + {rows.query.shape[1]} "
        f"+ {rows.answer.shape[1]} tokens (context + query + answer); about {tokens:,.0f} tokens and {operations:.3g} "
        "FLOP per step",
        f"{job.plan.micro_batches} micro-batch(es) per step, in {len(sizes)} shapes, {padding:.1%} padding",
        f"memory per device: about {_gigabytes(sum(held.values()))} ({memory})",
    ]


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"
