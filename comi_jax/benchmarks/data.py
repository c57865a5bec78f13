"""Throughput and padding of the training data: ``python -m comi_jax.benchmarks.data --config=NAME [...]``.

    tokenised   reading and tokenising records, which a run does once for all epochs and restarts
    batches     padding batches and placing them on the devices, with nothing else running
    trained     the config's train step on this machine (--steps=0: not measured; the others only need a tokenizer)

Tokens are those of contexts, questions and answers, without padding. Padding is the fraction of all positions of the
first epoch, with batches of like length and, for comparison, with plain shuffling.
"""

import contextlib
import dataclasses
import tempfile
import time
from pathlib import Path

import jax
import numpy as np
from rich.console import Console
from rich.table import Table

from comi_jax import cli
from comi_jax.config import Config
from comi_jax.data import batches, order
from comi_jax.devices import sharding
from comi_jax.errors import ConfigError
from comi_jax.overrides import load
from comi_jax.runs.description import Run
from comi_jax.runs.examples import Examples, make
from comi_jax.training import dataset, estimate, optim
from comi_jax.training.meter import Tally
from comi_jax.training.state import TrainState, abstract, create
from comi_jax.training.step import CompiledStep
from comi_jax.weights.starting_model import StartingModel, tokenizer_of

WARM = 4  # warm-up batches or steps: prefetched batches, and compilation


def tokenise(config: Config, folder: Path) -> tuple[Examples, float]:
    """The training examples, written to ``folder``, and the tokens per second of making them."""
    new = dataset.NewExamples(config, tokenizer_of(config))
    since = time.perf_counter()
    examples = make(folder, new, "", new.report)
    seconds = time.perf_counter() - since
    total = sum(len(part) for e in examples for part in (e.context, e.query, e.answer))
    return examples, total / seconds


def batches_per_second(config: Config, plan: batches.Plan, mesh: jax.sharding.Mesh, count: int) -> float:
    """Tokens per second of making ``count`` batches as for a run on ``mesh``."""
    made = batches.training_batches(
        plan, config.compression.rates, config.train.seed, own=sharding.own_contexts(mesh, plan.contexts_at_once),
        put=lambda batch: sharding.put_batch(batch, mesh),
    )  # fmt: skip
    with contextlib.closing(made):
        for _ in range(WARM):
            next(made)
        since = time.perf_counter()
        total = sum(Tally.of(next(made)[0]).tokens for _ in range(count - 1))
        batch, placed = next(made)
        jax.block_until_ready(placed)
        total += Tally.of(batch).tokens
        return total / (time.perf_counter() - since)


def trained_per_second(config: Config, plan: batches.Plan, mesh: jax.sharding.Mesh, steps: int) -> float:
    """Tokens per second of ``steps`` updates, all on the run's first batch, already on the devices."""
    start = StartingModel.open(config)
    run = Run(config, start.backbone, start.stop)
    update = optim.optimizer(config.optimizer, config.train.steps)
    state, frozen = create(start.load(run, mesh), run.architecture, update, mesh)
    rows, lengths = plan.contexts_at_once // sharding.row_shards(mesh), estimate.longest(config)
    arch, _ = estimate.resolve_remat(
        run.architecture.on(mesh), *abstract(run.architecture, update, mesh), lengths, rows, plan.share, mesh,
        estimate.available_bytes(jax.local_devices()[0]),
    )  # fmt: skip
    step = CompiledStep(arch, update)
    rates = np.resize(config.compression.rates, plan.order.batch * plan.share)
    batch = plan.batch(0, rates)
    placed, key = sharding.put_batch(batch, mesh), jax.random.key(0)

    def run_steps(state: TrainState, count: int) -> TrainState:
        for _ in range(count):
            state, _ = step(state, frozen, placed, key)
        return jax.block_until_ready(state)

    state = run_steps(state, WARM)
    since = time.perf_counter()
    run_steps(state, steps)
    return steps * Tally.of(batch).tokens / (time.perf_counter() - since)


def measure(config: Config, folder: Path, count: int, steps: int) -> tuple[str, list[tuple[str, str, str]]]:
    """The title and rows of the table."""
    if not config.data.train:
        raise ConfigError("data.train is not set; pass data.train=FILE.jsonl")
    mesh, settings = sharding.make_mesh(config.mesh), config.train
    micro_batches = sharding.micro_batches(config, mesh)
    examples, tokenised = tokenise(config, folder)
    shapes = batches.Shapes.fit(examples, config.data, config.compression)
    plan = batches.Plan.of(examples, shapes, settings.batch_size, settings.seed, settings.share_context, micro_batches)
    padding, sizes = plan.forecast()
    unsorted = order.Order(np.zeros(len(plan.groups)), plan.order.batch, settings.seed)
    shuffled, _ = dataclasses.replace(plan, order=unsorted).forecast()
    speeds = {"tokenised": tokenised, "batches": batches_per_second(config, plan, mesh, count)}
    if steps:
        speeds["trained"] = trained_per_second(config, plan, mesh, steps)
    last = list(speeds.values())[-1]
    rows = [(name, f"{speed:,.0f} tokens/s", f"{speed / last:,.1f}" if steps else "") for name, speed in speeds.items()]
    rows.append(("padding", f"{padding:.1%}", ""))
    rows.append(("padding with plain shuffling", f"{shuffled:.1%}", ""))
    title = (
        f"{len(examples):,} examples, micro-batches of {settings.batch_size // micro_batches} in {len(sizes)} "
        f"shapes, {sum(sizes.values()):,} per epoch"
    )
    return title, rows


def main(arguments: list[str] | None = None) -> None:
    """Measure and print a table; an error that the user can fix ends in one sentence and exit status 1."""
    parser = cli.Parser(prog="python -m comi_jax.benchmarks.data", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--config", required=True, help="a name from comi_jax/configs: tiny, qwen2, llama2, qwen3")
    parser.add_argument("--batches", type=cli.at_least(1), default=100, help="number of batches to time")
    parser.add_argument(
        "--steps", type=cli.at_least(0), default=20, help="number of updates to time; 0 needs no weights"
    )
    parser.add_argument("overrides", nargs="*", metavar="path=value", help="settings, e.g. data.train=nq:nq.jsonl.gz")
    options = parser.parse_intermixed_args(arguments)
    with cli.one_way_out():
        config = load(options.config, options.overrides)
        with tempfile.TemporaryDirectory(prefix="comi_jax-") as folder:
            title, rows = measure(config, Path(folder), options.batches, options.steps)
        table = Table("", "", "x trained" if options.steps else "", title=title)
        for row in rows:
            table.add_row(*row)
        Console(width=cli.width()).print(table)


if __name__ == "__main__":
    main()
