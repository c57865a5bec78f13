"""One training run, from settings to the closing table.

The order of a run: settings, data, folder, weights, loop, closing table. The same command goes on where it stopped. The
update itself is in ``step``, the loop in ``loop``.
"""

import contextlib
import dataclasses
import functools
import tempfile
from pathlib import Path

import jax
from rich.console import Console

from comi_jax.config import Config, ConfigError
from comi_jax.data.batches import Plan, Shapes, collate, training_batches
from comi_jax.data.encode import check_positions
from comi_jax.data.records import Record
from comi_jax.devices import distributed, sharding
from comi_jax.evaluation import predictions, tables
from comi_jax.runs import lock
from comi_jax.runs.checkpoints import Checkpoints, Progress
from comi_jax.runs.checksums import CheckpointError
from comi_jax.runs.description import Run, check_folder, open_run, read_run
from comi_jax.runs.examples import Examples
from comi_jax.runs.folder import Folder
from comi_jax.runs.selection import existing
from comi_jax.runs.stored_weights import restore_frozen, save_frozen, weights_of
from comi_jax.serving.compressor import Comi
from comi_jax.training import loop, optim
from comi_jax.training.dataset import check_held_out, read_examples, read_held_out
from comi_jax.training.signals import Stop
from comi_jax.training.state import abstract, create
from comi_jax.weights.starting_model import StartingModel


def devices(run: Run) -> jax.sharding.Mesh:
    """The mesh of a run. Raises ConfigError if it cannot work."""
    mesh = sharding.make_mesh(run.config.mesh)
    sharding.check_heads(run.backbone, mesh)
    sharding.micro_batches(run.config, mesh)
    return mesh


@dataclasses.dataclass(frozen=True)
class Task:
    """What the systems of a run have in common."""

    start: StartingModel
    examples: Examples
    shapes: Shapes
    held_out: list[Record]
    allow_change: bool
    dry_run: bool


def prepare(task: Task, title: str, run: Run, output: Folder, console: Console) -> loop.Job:
    """``run`` on its devices, as its newest whole checkpoint in ``output`` has it, or at its beginning. Of what is in
    ``output``, damaged checkpoints are renamed, and nothing else is changed."""
    say = functools.partial(console.print, highlight=False)
    config, settings, examples, shapes = run.config, run.config.train, task.examples, task.shapes
    mesh = devices(run)
    update = optim.optimizer(config.optimizer, settings.steps)
    checkpoints = Checkpoints(output, settings.keep_checkpoints, say, read_only=task.dry_run)
    parts = sharding.micro_batches(config, mesh)
    plan = Plan.of(examples, shapes, settings.batch_size, settings.seed, settings.share_context, parts)
    batches = training_batches(
        plan, config.compression.rates, settings.seed,
        own=sharding.own_contexts(mesh, plan.contexts_at_once), put=functools.partial(sharding.put_batch, mesh=mesh),
    )  # fmt: skip
    progress = Progress(0, batches.get_state(), examples=examples.about.fingerprint)
    if output.has_begun():
        like = abstract(run.architecture, update, mesh)
        state, found = checkpoints.restore_newest(like[0])
        frozen = restore_frozen(output, like[1], say)
        if found.examples not in ("", progress.examples) and not task.allow_change:
            raise CheckpointError(
                f"data.train holds other examples than those that the run in {output} was trained on; give it the same "
                "ones, or --allow-config-change to go on with these"
            )
        batches.set_state(found.position)
        progress = dataclasses.replace(found, examples=progress.examples)
        say(f"{title}: going on from step {progress.step} of {settings.steps} in {output}")
    else:
        state, frozen = create(task.start.load(run, mesh), run.architecture, update, mesh)
    longest = max(examples, key=lambda example: len(example.context))
    size = (shapes.size([longest])[0], shapes.query, shapes.answer)
    largest = collate([longest] * (settings.batch_size // parts), shapes, settings.share_context, size=size)
    return loop.Job(
        title, run, output, mesh, update, state, frozen, plan, batches, largest, task.held_out, task.start.tokenizer,
        checkpoints, progress,
    )  # fmt: skip


def enter(job: loop.Job, allow_change: bool, console: Console) -> None:
    """Make the folder of ``job`` its own: the settings with which it begins or goes on, and weights that stay."""
    distributed.meet(f"{job.title} is checked")
    if distributed.is_first():
        changes = open_run(job.output, job.run, job.tokenizer, allow_change)
        if changes:
            console.print(f"{job.title}: settings changed: {'; '.join(changes)}", highlight=False)
    distributed.meet(f"{job.title} is open")
    if not job.output.has_begun():
        save_frozen(job.output, job.frozen)


def run(config: Config, console: Console, *, allow_change: bool = False, dry_run: bool = False) -> None:
    """All of one training run: data, weights, loop, closing table. Raises the errors that ``main`` reports."""
    output = Folder(config.train.output or f"runs/{config.name}")
    scratch = tempfile.TemporaryDirectory(prefix="comi_jax-") if dry_run else None  # in place of the run's folder

    def leave() -> None:
        console.show_cursor()
        if scratch:
            scratch.cleanup()
        else:
            lock.release(output)

    stop = Stop(functools.partial(console.print, highlight=False), leave, distributed.peers())
    with contextlib.ExitStack() as until_end:
        until_end.enter_context(scratch or contextlib.nullcontext())
        until_end.enter_context(distributed.tidying(leave))
        until_end.enter_context(stop.listening())
        with stop.saved():
            task, runs, places = begin(config, output, console, until_end, allow_change, scratch)
        for title, place in places.items():
            with stop.saved():
                job = prepare(task, title, runs[title], place, console)
                if not dry_run:
                    enter(job, allow_change, console)
                training = loop.Loop(job, stop, console)
                if job.progress.step < job.steps:
                    training.describe()
            if dry_run:
                job.batches.close()
                job.checkpoints.close()
            elif not training.run():
                return
            else:
                console.print(f"{title}: checkpoint in {place}", highlight=False)
            del job, training  # the next system needs their memory
        with stop.saved():
            if task.held_out and not dry_run:
                closing_table(places, task.held_out, output, console)
    if dry_run:
        console.print("dry run: everything is in order; nothing was trained or written", highlight=False)


def begin(
    config: Config,
    output: Folder,
    console: Console,
    until_end: contextlib.ExitStack,
    allow_change: bool,
    scratch: tempfile.TemporaryDirectory | None,
) -> tuple[Task, dict[str, Run], dict[str, Folder]]:
    """Refuse what cannot work, what is quickly known first, and read the data; the systems to train, by their titles,
    and their folders. Only the examples are written, into ``output``, whose lock is held ``until_end``; with
    ``scratch``, there."""
    check(config)
    start = StartingModel.open(config)
    start.check()
    runs = {title: Run(settings, start.backbone, start.stop) for title, settings in systems(config).items()}
    places = {title: output.of_system(title) for title in runs}
    for title, place in places.items():
        devices(runs[title])
        check_folder(place, runs[title], allow_change)
    held_out = read_held_out(config, console)
    check_held_out(held_out, start.tokenizer, config, start.backbone)
    if not scratch:
        distributed.meet("all but the training data is checked")
        if distributed.is_first():
            until_end.enter_context(lock.held(output, functools.partial(console.print, highlight=False)))
    examples = read_examples(config, start.tokenizer, output, console, scratch and Path(scratch.name))
    for run in runs.values():
        check_positions(examples, start.backbone, run.config.compression, min(config.compression.rates))
    shapes = Shapes.fit(examples, config.data, config.compression)
    return Task(start, examples, shapes, held_out, allow_change, bool(scratch)), runs, places


def check(config: Config) -> None:
    """Refuse settings that only training has and that do not go together."""
    if not config.data.train:
        raise ConfigError(
            "data.train is not set; pass data.train=FILE.jsonl (several separated by commas, .gz allowed)"
        )
    if config.train.eval_every and not config.data.eval:
        raise ConfigError(f"train.eval_every is {config.train.eval_every}, but data.eval is not set")


def systems(config: Config) -> dict[str, Config]:
    """The settings of all that is trained, by their titles."""
    if not config.train.compare_mean_pooling:
        return {"COMI": config}
    plain = dataclasses.replace(config.compression, coarse=False, fine=False)
    return {"COMI": config, "mean-pooling": dataclasses.replace(config, compression=plain)}


def closing_table(places: dict[str, Folder], records: list[Record], output: Folder, console: Console) -> None:
    """Evaluate every variant, and COMI's decoder without any context, on the held-out records; print and save the
    table."""
    rows = {}
    for title, place in places.items():
        model = Comi.load(place, mesh=sharding.make_mesh(read_run(place).config.mesh))
        same = weights_of(place, existing(place))
        path = place.predictions
        rows[title] = predictions.evaluate(model, records, path, weights=same, console=console)
        if title == "COMI":
            path = output.closed_book_predictions
            closed = predictions.evaluate(model, records, path, closed_book=True, weights=same, console=console)
    if distributed.is_first():
        tables.save_table({**rows, "closed book": closed}, output.results)
        tables.print_table({**rows, "closed book": closed}, console)
    distributed.meet("the table is written")
