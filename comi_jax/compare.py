"""Compare systems on the same questions: ``python -m comi_jax.compare --config=tiny --systems=all --seeds=3``, which
trains what is not trained yet, or with ``--checkpoint=DIR`` the given runs alone."""

import contextlib
import dataclasses
import difflib
import functools
import shlex
import sys
from pathlib import Path
from typing import Any

import jax
from rich.console import Console

from comi_jax import cli
from comi_jax.config import Config, Mesh
from comi_jax.data.records import Record
from comi_jax.devices import compilations, sharding
from comi_jax.errors import ConfigError
from comi_jax.evaluation import comparison_plots, comparison_tables
from comi_jax.evaluation.comparison import Contender, Row, compare
from comi_jax.evaluation.comparison_seeds import joined
from comi_jax.evaluation.systems import SYSTEMS, check_names
from comi_jax.evaluation.systems.bm25 import BM25
from comi_jax.overrides import load
from comi_jax.runs import lock
from comi_jax.runs.folder import Folder
from comi_jax.training import contenders, series
from comi_jax.training.dataset import read_held_out
from comi_jax.training.signals import STOPPED

TABLES = {
    "1": "accuracy of every system at every rate",
    "7": "the same as table 1; --rates=2,4,8,16,32 is the default of both",
}
DIAGNOSED = ("1a", "1b", "5", "6", "8")  # tables and figures of comi_jax.diagnose
RATES = (2, 4, 8, 16, 32)


def rates_of(text: str) -> tuple[int, ...]:
    """An argparse type: whole numbers of at least 1, each once."""
    rates = tuple(map(cli.at_least(1), text.split(",")))
    return tuple(dict.fromkeys(rates))


def parser() -> cli.Parser:
    made = cli.Parser(
        prog="python -m comi_jax.compare",
        description="Train what is not trained yet, evaluate all systems on the same questions, charged by the same "
        "rules, and write the paper's table. What is finished is taken over by the next start.",
    )
    made.add_argument("--config", help="the config by which systems are trained, in OUTPUT/runs")
    made.add_argument("--checkpoint", type=cli.path, nargs="+", default=[], help="instead: folders of runs, one a row")
    made.add_argument(
        "--systems",
        default="all",
        help=f"all, none, trained, untrained or names; trained: {','.join(series.TRAINED)} (with --config); untrained: "
        f"{','.join(SYSTEMS)}",
    )
    made.add_argument("--table", default="1", help="; ".join(f"{name}: {text}" for name, text in TABLES.items()))
    made.add_argument("--rates", type=rates_of, help="context tokens per KV entry")
    made.add_argument("--seeds", type=cli.at_least(1), default=1, help="seeds that each system is trained with")
    made.add_argument("--data", nargs="+", help="as data.eval (default: that of the first checkpoint or of the config)")
    made.add_argument("--limit", type=cli.at_least(1), help="use only the first LIMIT records")
    made.add_argument("--output", type=cli.path, help="folder (default: CHECKPOINT/comparison, or runs/compare_CONFIG)")
    made.add_argument("--batch-size", type=cli.at_least(1), default=16)
    made.add_argument("--llmlingua2", metavar="PYTHON [MODEL]", help="Python of an environment that has llmlingua")
    made.add_argument("overrides", nargs="*", metavar="path=value", help="settings, e.g. train.steps=100")
    return made


def check_table(name: str) -> None:
    """Raises ConfigError unless this command makes the table ``name``."""
    if name in DIAGNOSED:
        raise ConfigError(
            f"table {name} is of one checkpoint: python -m comi_jax.diagnose --checkpoint=DIR --data=FILE "
            f"--table={name}"
        )
    if name not in TABLES:
        near = difflib.get_close_matches(name, [*TABLES, *DIAGNOSED], n=3, cutoff=0.1)
        nearest = f"; the nearest are {', '.join(near)}" if near else ""
        raise ConfigError(f"there is no table {name!r}{nearest}; there are {', '.join(TABLES)}")


def names_of(given: Any) -> tuple[list[str], list[str]]:
    """The trained and the untrained systems of --systems. Raises ConfigError for one that does not exist, or that
    would have to be trained where checkpoints are given."""
    trained = list(series.SYSTEMS) if given.config else []
    untrained = [name for name in SYSTEMS if name != "llmlingua2" or given.llmlingua2]
    groups = {"all": [*trained, *untrained], "none": [], "trained": trained, "untrained": untrained}
    names = list(dict.fromkeys(groups.get(given.systems, given.systems.split(","))))
    check_names(names, [*series.TRAINED, *SYSTEMS])
    if given.checkpoint and (wrong := [name for name in names if name in series.TRAINED]):
        raise ConfigError(f"{wrong[0]} is trained: add its run to --checkpoint, or train it with --config=NAME")
    if given.config and not names:
        raise ConfigError(f"--systems={given.systems} leaves nothing to compare; name some systems")
    return [name for name in names if name in series.TRAINED], [name for name in names if name in SYSTEMS]


def config_of(given: Any) -> Config:
    """The config whose data and language model are used: of the first checkpoint, or the one that is named. Raises
    ConfigError for checkpoints that do not belong into one table."""
    if bool(given.checkpoint) == bool(given.config):
        raise ConfigError("pass either --config=NAME, to train the systems, or --checkpoint=DIR, for trained ones")
    if given.config:
        return load(given.config, given.overrides)
    if given.overrides:
        raise ConfigError(f"{given.overrides[0]}: settings come from the checkpoints; pass --config to give some")
    if given.seeds > 1:
        raise ConfigError(f"--seeds={given.seeds} trains systems; pass --config=NAME instead of --checkpoint")
    return contenders.check_checkpoints(given.checkpoint)


def command_of(given: Any, output: Folder, row: Row) -> str:
    """The command that makes ``row`` alone, or takes over what of it is there."""
    words = ["--checkpoint", *given.checkpoint] if given.checkpoint else [f"--config={given.config}", *given.overrides]
    words += [f"--seeds={given.seeds}"] if given.seeds > 1 else []
    words += [f"--output={output}"] if given.config and given.output else []  # where its runs are
    words += ["--data", *given.data] if given.data else []
    words += [f"--limit={given.limit}"] if given.limit else []
    words += [f"--llmlingua2={given.llmlingua2}"] if row.name == "llmlingua2" else []
    alone = row.name in SYSTEMS or (given.config and row.name in series.TRAINED)
    words += [f"--systems={row.name if alone else 'none'}"]
    words += [f"--rates={row.rate}"] if row.rate else []
    return shlex.join(["python", "-m", "comi_jax.compare", *words])


def held_out(given: Any, config: Config, console: Console) -> list[Record]:
    """The records that all systems answer."""
    data = dataclasses.replace(config.data, eval=tuple(given.data or config.data.eval))
    records, _ = read_held_out(dataclasses.replace(config, data=data), console)
    if not records:
        raise ConfigError("there are no questions; pass --data=FILE, or set data.eval")
    return records[: given.limit]


def main(arguments: list[str] | None = None) -> None:
    """Train what is missing, evaluate all systems at all rates and write the comparison."""
    given = parser().parse_intermixed_args(arguments)
    console = Console(width=cli.width(), soft_wrap=True, markup=False)
    with cli.one_way_out(), contextlib.ExitStack() as until_end:
        check_table(given.table)
        config = config_of(given)
        trained, untrained = names_of(given)
        if "bm25" in untrained:
            BM25().scores(["a text"], "text")  # which needs a package
        default = Path(given.checkpoint[0]) / "comparison" if given.checkpoint else Path(f"runs/compare_{given.config}")
        output = Folder(given.output or default)
        runs = series.members(given.config, given.overrides, trained, given.seeds, output) if trained else []
        until_end.enter_context(lock.held(output, console.print))
        compilations.keep()
        records = held_out(given, config, console)
        if not series.train(runs, console):
            sys.exit(STOPPED)
        mesh = sharding.make_mesh(Mesh(data=1, fsdp=0)) if jax.device_count() > 1 else None
        systems = [contenders.of_run(folder, given.batch_size, mesh) for folder in given.checkpoint]
        systems += [contenders.of_run(str(run.folder), given.batch_size, mesh, run) for run in runs]
        systems += untrained_of(given, untrained, config, mesh, records, output)
        reference = "comi" if any(c.name == "comi" for c in systems) else ""
        rates = given.rates or RATES
        rows = compare(systems, rates, records, output.path, console)
        table = joined(rows, output.path, reference)
        about = {"data": list(given.data or config.data.eval), "n": len(records), "rates": rates}
        about |= {"language_model": config.model.path, "trained_by": [run.command for run in runs]}
        comparison_tables.write(table, rows, about, functools.partial(command_of, given, output), output.path)
        comparison_plots.accuracy(table, output.path / "accuracy.png")
        comparison_plots.costs(table, output.path / "costs.png")
    comparison_tables.show(table, "COMI" if reference else "", console)
    console.print(f"results.json, table.csv, table.tex, accuracy.png and costs.png are in {output}", highlight=False)


def untrained_of(
    given: Any, names: list[str], config: Config, mesh: Any, records: list[Record], output: Folder
) -> list[Contender]:
    """The untrained systems ``names``; for LLMLingua-2 its program is run first."""
    texts = output.path / "llmlingua2.jsonl"
    found = contenders.untrained(names, config, given.batch_size, mesh, texts)
    for contender in found:
        if contender.name == "llmlingua2" and given.llmlingua2:
            contenders.compress_texts(contender, given.llmlingua2, given.rates or RATES, records, texts)
    return found


if __name__ == "__main__":
    main()
