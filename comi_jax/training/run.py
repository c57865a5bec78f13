"""One training run: validate, read the data, train every system, evaluate them all.

The same command resumes it. The update is in ``step``, the loop in ``loop``.
"""

import contextlib
import dataclasses
import functools
import tempfile
from pathlib import Path

import jax
import numpy as np
from rich.console import Console

from comi_jax.config import Config
from comi_jax.data.batches import Plan, Shapes, collate, training_batches
from comi_jax.data.encode import check_positions
from comi_jax.data.records import Record
from comi_jax.devices import distributed, sharding
from comi_jax.errors import ConfigError
from comi_jax.evaluation import predictions, tables
from comi_jax.evaluation.answerers import ComiAnswerer
from comi_jax.model import flops
from comi_jax.runs import lock
from comi_jax.runs.checkpoints import Checkpoints, Progress
from comi_jax.runs.checksums import CheckpointError
from comi_jax.runs.description import Run, check_folder, open_run, read_run
from comi_jax.runs.examples import Examples
from comi_jax.runs.folder import Folder
from comi_jax.runs.selection import existing
from comi_jax.runs.stored_weights import restore_frozen, save_frozen, weights_of
from comi_jax.serving.compressor import Comi
from comi_jax.training import estimate, loop, optim
from comi_jax.training.dataset import check_held_out, read_examples, read_held_out
from comi_jax.training.signals import Stop
from comi_jax.training.state import abstract, create
from comi_jax.weights.starting_model import StartingModel


@dataclasses.dataclass(frozen=True)
class System:
    """A model that the run trains: that of its config, or mean-pooling beside it."""

    title: str
    run: Run
    folder: Folder


@dataclasses.dataclass(frozen=True)
class Data:
    """The training examples, shared by all systems, and the shapes that they are padded to."""

    examples: Examples
    shapes: Shapes


def run(
    config: Config, console: Console, *, allow_change: bool = False, dry_run: bool = False, evaluate: bool = True
) -> bool:  # fmt: skip
    """Run one training run, with the closing table if ``evaluate``. Returns whether it reached its end; False if a
    signal stopped it, after saving. Raises UserError."""
    say = functools.partial(console.print, highlight=False)
    output = Folder(config.train.output or f"runs/{config.name}")
    scratch = tempfile.TemporaryDirectory(prefix="comi_jax-") if dry_run else None  # instead of the run's folder

    def leave() -> None:
        console.show_cursor()
        if scratch:
            scratch.cleanup()
        else:
            lock.release(output)

    stop = Stop(say, leave, distributed.peers())
    with contextlib.ExitStack() as until_end:
        until_end.enter_context(scratch or contextlib.nullcontext())
        until_end.enter_context(distributed.tidying(leave))
        until_end.enter_context(stop.listening())

        # --- 1. validate what is cheap to validate, before anything is written ---
        with stop.saved():
            check(config)
            start = StartingModel.open(config)
            start.check()
            systems = systems_of(config, start, output)
            for system in systems:
                devices(system.run)
                check_folder(system.folder, system.run, allow_change)
            held_out, _ = read_held_out(config, console)
            check_held_out(held_out, start.tokenizer, config, start.backbone)

            # --- 2. lock the folder, and tokenise the data into it ---
            if not scratch:
                distributed.meet("all but the training data is validated")
                if distributed.is_first():
                    until_end.enter_context(lock.held(output, say))
            place = Path(scratch.name) if scratch else None
            data = read_data(config, start, systems, output, console, place)

        # --- 3. train every system ---
        for system in systems:
            with stop.saved():
                job = prepare(system, data, start, held_out, console, allow_change, dry_run)
                if not dry_run:
                    enter(job, allow_change, console)
                if job.progress.step < job.steps:
                    loop.describe(job, console)
            if dry_run:
                job.close()
            elif not loop.Loop(job, stop, console).run():
                return False
            else:
                say(f"{system.title}: checkpoint in {system.folder}")
            del job  # the next system needs its memory

        # --- 4. evaluate all systems ---
        with stop.saved():
            if held_out and evaluate and not dry_run:
                closing_table(systems, held_out, output, console)
    if dry_run:
        say("dry run: everything is in order; nothing was trained or written")
    return True


# --- 1. validate ------------------------------------------------------------------------------------------------------


def check(config: Config) -> None:
    """Raises ConfigError for training settings that are missing or conflict."""
    if not config.data.train:
        raise ConfigError(
            "data.train is not set; pass data.train=FILE.jsonl (comma-separated for several, .gz allowed)"
        )
    if config.train.eval_every and not config.data.eval:
        raise ConfigError(
            f"train.eval_every is {config.train.eval_every}, but data.eval is not set; pass data.eval=FILE"
        )


def systems_of(config: Config, start: StartingModel, output: Folder) -> list[System]:
    """All systems to train, that of the config first."""
    configs = {config.title: config}
    if config.train.compare_mean_pooling:
        plain = dataclasses.replace(config.compression, coarse=False, fine=False)
        configs["mean-pooling"] = dataclasses.replace(config, system="comi", compression=plain)
    runs = {title: Run(settings, start.backbone, start.stop) for title, settings in configs.items()}
    return [System(title, run, output.of_system(title)) for title, run in runs.items()]


def devices(run: Run) -> jax.sharding.Mesh:
    """The mesh of a run. Raises ConfigError if it does not divide the devices, heads or batch."""
    mesh = sharding.make_mesh(run.config.mesh)
    sharding.check_heads(run.backbone, mesh)
    sharding.micro_batches(run.config, mesh)
    return mesh


# --- 2. the data ------------------------------------------------------------------------------------------------------


def read_data(
    config: Config, start: StartingModel, systems: list[System], output: Folder, console: Console, scratch: Path | None
) -> Data:
    """The training examples, tokenised into ``output`` (or ``scratch``) unless already there, and the shapes that they
    are padded to. Raises DataError or LengthError."""
    examples = read_examples(config, start.tokenizer, output, console, scratch)
    for system in systems:
        check_positions(examples, start.backbone, system.run.config, min(config.compression.rates))
    return Data(examples, Shapes.fit(examples, config.data, config.compression))


# --- 3. training ------------------------------------------------------------------------------------------------------


def prepare(
    system: System,
    data: Data,
    start: StartingModel,
    held_out: list[Record],
    console: Console,
    allow_change: bool,
    read_only: bool,
) -> loop.Job:
    """``system`` on its devices, restored from its newest whole checkpoint or initialised. In its folder, damaged
    checkpoints are renamed (unless ``read_only``) and nothing else changes."""
    say = functools.partial(console.print, highlight=False)
    run, output, config, settings = system.run, system.folder, system.run.config, system.run.config.train
    examples, shapes = data.examples, data.shapes
    mesh = devices(run)
    update = optim.optimizer(config.optimizer, settings.steps, config.autoencoding_steps)
    checkpoints = Checkpoints(output, settings.keep_checkpoints, say, read_only=read_only)
    micro_batches = sharding.micro_batches(config, mesh)
    plan = Plan.of(examples, shapes, settings.batch_size, settings.seed, settings.share_context, micro_batches)
    batches = training_batches(
        plan, config.compression.rates, settings.seed,
        own=sharding.own_contexts(mesh, plan.contexts_at_once), put=functools.partial(sharding.put_batch, mesh=mesh),
    )  # fmt: skip
    progress = Progress(0, batches.get_state(), examples=examples.about.fingerprint)
    if output.has_begun():
        like = abstract(run.architecture, update, mesh)
        state, found = checkpoints.restore_newest(like[0])
        frozen = restore_frozen(output, like[1], say)
        if found.examples not in ("", progress.examples) and not allow_change:
            raise CheckpointError(
                f"data.train holds other examples than those that the run in {output} was trained on; give it the same "
                "ones, or --allow-config-change to resume with these"
            )
        batches.set_state(found.position)
        progress = dataclasses.replace(found, examples=progress.examples)
        say(f"{system.title}: resuming from step {progress.step} of {settings.steps} in {output}")
    else:
        state, frozen = create(start.load(run, mesh), run.architecture, update, mesh)
    longest = max(examples, key=lambda example: len(example.context))
    size = (shapes.size([longest])[0], shapes.query, shapes.answer)
    largest = collate([longest] * (settings.batch_size // micro_batches), shapes, settings.share_context, size=size)
    lengths = flops.Lengths(*size, min(config.compression.rates))
    rows = plan.contexts_at_once // sharding.row_shards(mesh)
    available = int(distributed.agreed(np.array(estimate.available_bytes(jax.local_devices()[0]))))
    arch, told = estimate.resolve_remat(
        run.architecture.on(mesh), *abstract(run.architecture, update, mesh), lengths, rows, settings.share_context,
        mesh, available,
    )  # fmt: skip
    if told:
        say(f"{system.title}: {told}")
    return loop.Job(
        system.title, run, output, mesh, update, state, frozen, plan, batches, largest, held_out, start.tokenizer,
        checkpoints, progress, arch,
    )  # fmt: skip


def enter(job: loop.Job, allow_change: bool, console: Console) -> None:
    """Write the run's description, or the settings that changed on resuming, and the frozen weights into the folder of
    ``job``."""
    distributed.meet(f"{job.title} is validated")
    if distributed.is_first():
        changes = open_run(job.output, job.run, job.tokenizer, allow_change)
        if changes:
            console.print(f"{job.title}: settings changed: {'; '.join(changes)}", highlight=False)
    distributed.meet(f"{job.title} is open")
    if not job.output.has_begun():
        save_frozen(job.output, job.frozen)


# --- 4. evaluation ----------------------------------------------------------------------------------------------------


def closing_table(systems: list[System], records: list[Record], output: Folder, console: Console) -> None:
    """Evaluate every system, and the first one closed book, on the held-out records; print and save the table."""
    rows, closed = {}, {}
    for system in systems:
        folder = system.folder
        model = Comi.load(folder, mesh=sharding.make_mesh(read_run(folder).config.mesh))
        step = existing(folder)
        answerer = ComiAnswerer(model, weights_of(folder, step), step=step)
        rows[system.title] = predictions.evaluate(answerer, records, folder.predictions, console=console)
        if system is systems[0]:
            answerer = dataclasses.replace(answerer, closed_book=True)
            path = output.closed_book_predictions
            closed["closed book"] = predictions.evaluate(answerer, records, path, console=console)
    if distributed.is_first():
        for row in (rows | closed).values():
            row |= {"data": list(systems[0].run.config.data.eval), "of": row["n"]}
        tables.save_table(rows | closed, output.results)
        tables.print_table(rows | closed, console)
    distributed.meet("the table is written")
