"""Calibrate ``rate="auto"``: ``python -m comi_jax.calibrate --checkpoint=DIR --data=FILE --floor=0.02``.

All records are answered at every trained rate. What is fitted and tested on them is in ``evaluation.calibration``; it
is stored beside the checkpoint, DIR/calibration/step_N.json, with its curve as a picture.
"""

import argparse
import contextlib
import dataclasses
import datetime
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from rich.console import Console
from rich.progress import track

from comi_jax import cli
from comi_jax.config import MEASURES
from comi_jax.data.fingerprint import fingerprint_of
from comi_jax.data.records import Record
from comi_jax.devices import compilations, sharding
from comi_jax.errors import ConfigError
from comi_jax.evaluation import calibration, calibration_plot
from comi_jax.evaluation.answerers import ComiAnswerer
from comi_jax.evaluation.calibration import Outcomes
from comi_jax.evaluation.predictions import evaluate
from comi_jax.evaluation.tables import print_rows
from comi_jax.runs import lock
from comi_jax.runs.folder import Folder
from comi_jax.runs.selection import choose_step
from comi_jax.runs.stored_weights import weights_of
from comi_jax.serving import asking, auto_rate, explanation, rates
from comi_jax.serving.compressor import Comi
from comi_jax.training.dataset import of_data, read_held_out
from comi_jax.version import __version__


def parser() -> argparse.ArgumentParser:
    """The arguments of the command."""
    made = cli.Parser(prog="python -m comi_jax.calibrate", description='Calibrate rate="auto" of a checkpoint.')
    add = made.add_argument
    add("--checkpoint", type=cli.path, required=True, help="folder of a training run")
    add("--step", default="newest", help='step of the checkpoint, "best" or "newest" (default)')
    add("--data", required=True, nargs="+", help="as data.eval: files, globs, hf://..., each [SCHEMA:]PLACE[@WEIGHT]")
    add("--floor", type=_floor, default=0.02, help="how much accuracy may be lost against the lowest rate")
    add("--metric", choices=MEASURES, default="em", help="what accuracy is")
    add("--limit", type=cli.at_least(1), help="use only the first LIMIT records; of synthetic ones, make so many")
    add("--batch-size", type=cli.at_least(1), default=64)
    add("--skip-bad-records", action="store_true")
    add("--set", action="append", default=[], metavar="path=value",
        help="override a setting, e.g. data.on_long=truncate")  # fmt: skip
    cli.add_mesh(made)
    return made


def main(arguments: list[str] | None = None) -> None:
    """Answer all records at all rates, fit, test, store and print."""
    given = parser().parse_args(arguments)
    console = Console(width=cli.width(), soft_wrap=True, markup=False)  # paths and data may hold brackets
    with cli.one_way_out(), contextlib.ExitStack() as until_end:
        compilations.keep()
        step = choose_step(given.checkpoint, given.step)
        place = Folder(given.checkpoint).calibration(step)
        mesh = sharding.make_mesh(given.mesh) if given.mesh else None
        model = Comi.load(given.checkpoint, batch_size=given.batch_size, overrides=given.set, step=step, mesh=mesh)
        check(model, f"{given.checkpoint} at step {step}")
        until_end.enter_context(lock.held(place.parent, console.print))
        records, skipped = read_records(model, given, console)
        outcomes = measure(
            model, records, given.metric, place.with_suffix(""), weights_of(given.checkpoint, step), console
        )
        about: dict[str, Any] = {
            "config": model.run.config.name, "checkpoint": given.checkpoint, "step": step, "data": given.data,
            "records": fingerprint_of(records), "n": len(records), "skipped_records": skipped, "set": given.set,
            "decoding": dataclasses.asdict(model.run.config.generation), "date": str(datetime.date.today()),
            "version": __version__,
        }  # fmt: skip
        settings = auto_rate.settings_of(model.run)
        made, tables = calibration.calibrate(outcomes, given.floor, given.metric, model.origin.weights, settings, about)
        for table in tables:
            print_rows(table.title, table.rows, table.notes, console)
        place.parent.mkdir(parents=True, exist_ok=True)
        made.save(place)
        caption = f"{about['config']}, step {step}, {len(records)} records, half of them held out; {about['date']}, " \
                  f"comi_jax {__version__}"  # fmt: skip
        picture = calibration_plot.draw(made.report, caption)
        if picture is not None:
            place.with_suffix(".png").write_bytes(picture)
    console.print(f"written: {place}" + ("" if picture is None else f" and {place.with_suffix('.png').name}"))
    if picture is None:
        console.print("for the picture, pip install 'comi-jax[report]'")


def check(model: Comi, name: str) -> None:
    """Raise ConfigError for a model whose rate cannot be chosen."""
    explanation.check_system(model)
    settings = model.run.config.compression
    if len(settings.rates) < 2:
        raise ConfigError(
            f"{name} was trained at the rate {', '.join(map(str, settings.rates))} alone, so there is nothing to "
            "choose; train with several, e.g. compression.rates=8,16,32"
        )
    if not settings.coarse:
        raise ConfigError(f"{name} has compression.coarse=false, so its groups have no MIG to choose by")


def read_records(model: Comi, given: argparse.Namespace, console: Console) -> tuple[list[Record], int]:
    """The records to calibrate on, and how many bad ones were skipped."""
    config = of_data(model.run.config, given.data, given.skip_bad_records)
    if given.limit is not None:
        config = dataclasses.replace(config, data=dataclasses.replace(config.data, eval_examples=given.limit))
    return read_held_out(config, console)


def measure(
    model: Comi, records: Sequence[Record], metric: str, folder: Path, weights: str, console: Console
) -> Outcomes:
    """The answers of ``records`` at every trained rate, whose predictions go into ``folder``, and the statistics."""
    trained = tuple(sorted(model.run.config.compression.rates))
    answered = []
    for rate in trained:
        output = folder / f"rate_{rate}.jsonl"
        summary = evaluate(ComiAnswerer(model, weights, rate), records, output, console=console)
        console.print(f"rate {rate}: {metric} {summary['metrics'][metric]['mean']:.3f}", highlight=False)
        with output.open(encoding="utf-8") as lines:
            answered.append([json.loads(line) for line in lines])
    accuracy, vectors = (
        np.array([[row[name] for row in rows] for rows in answered]).T for name in (metric, "memory_vectors")
    )
    number: dict[str, int] = {}
    context = np.array([number.setdefault(record.context_text(), len(number)) for record in records])
    tokens = np.array([row["context_tokens"] for row in answered[0]])
    statistics = statistics_of(model, records, trained, console)
    return Outcomes(trained, statistics, accuracy.astype(np.float64), vectors, tokens, context)


def statistics_of(
    model: Comi, records: Sequence[Record], trained: tuple[int, ...], console: Console
) -> Float[np.ndarray, "N R F"]:
    """auto_rate.STATISTICS of each record at each rate, as rate="auto" will compute them."""
    made = np.zeros((len(records), len(trained), len(auto_rate.STATISTICS)))
    order = sorted(range(len(records)), key=lambda i: records[i].context_text())  # a context is encoded once
    text, document = None, None
    for i in track(order, "statistics", console=console, disable=not console.is_terminal, transient=True):
        if document is None or records[i].context_text() != text:
            text = records[i].context_text()
            document = model.encode(text)
        (asked,) = asking.ask(model, [document], [records[i].prompt], {"rate": trained[-1]}, 1)
        made[i] = rates.statistics(model, asked.contents, asked.query, trained)
    return made


def _floor(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"{text} is no accuracy between 0 and 1")
    return value


if __name__ == "__main__":
    main()
