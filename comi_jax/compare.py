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
from comi_jax.data.encode import token_ids
from comi_jax.data.fingerprint import fingerprint_of
from comi_jax.data.records import Record
from comi_jax.devices import compilations, sharding
from comi_jax.errors import ConfigError
from comi_jax.evaluation import comparison_ablations, comparison_lengths, comparison_output, table_files
from comi_jax.evaluation.comparison import Row, compare
from comi_jax.evaluation.comparison_seeds import joined
from comi_jax.evaluation.systems import SYSTEMS, check_names
from comi_jax.evaluation.systems.bm25 import BM25
from comi_jax.overrides import load, settings
from comi_jax.runs import lock
from comi_jax.runs.description import read_run
from comi_jax.runs.folder import Folder
from comi_jax.runs.selection import choose_step
from comi_jax.runs.stored_weights import weights_of
from comi_jax.serving.compressor import Comi
from comi_jax.serving.language_model import starting_model
from comi_jax.training import contenders, series, timing
from comi_jax.training.dataset import read_held_out
from comi_jax.training.signals import STOPPED
from comi_jax.version import __version__
from comi_jax.weights.starting_model import StartingModel

TABLES = {
    "1": "accuracy of every system at every rate",
    "2": "COMI without each of its steps, trained so and switched off",
    "3": "latency, and from where on compression pays; with --config of fresh weights, which take as long",
    "4": "accuracy on each entry of --data",
    "7": "as table 1; --rates=2,4,8,16,32 is the default of both",
    "9": "accuracy by the length of the context",
}
DIAGNOSED = ("1a", "1b", "5", "6", "8")  # tables and figures of comi_jax.diagnose
RATES = (2, 4, 8, 16, 32)  # of tables 1 and 7; those of the others are the config's
SYSTEMS_OF = {  # what --systems=all is, where not every system of the paper's table 1
    "2": ("comi", *series.ABLATIONS, *series.ALPHAS),
    "4": ("original", "full_prompt", "comi"),
    "9": ("original", "full_prompt", "comi"),
}


def numbers(text: str) -> tuple[int, ...]:
    """An argparse type: whole numbers of at least 1, each once."""
    return tuple(dict.fromkeys(map(cli.at_least(1), text.split(","))))


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
    made.add_argument("--rates", type=numbers, help="context tokens per KV entry")
    made.add_argument("--seeds", type=cli.at_least(1), default=1, help="seeds that each system is trained with")
    made.add_argument(
        "--start-from", type=cli.path, default="", metavar="DIR",
        help="with --config: the output of an earlier comparison; each system goes on from its own run there",
    )  # fmt: skip
    made.add_argument("--data", nargs="+", help="as data.eval (default: that of the first checkpoint or of the config)")
    made.add_argument("--limit", type=cli.at_least(1), help="use only the first LIMIT records (table 4: of each entry)")
    made.add_argument("--bins", type=numbers, help="of tables 3 and 9: rising context lengths in tokens")
    made.add_argument("--new-tokens", type=cli.at_least(2), default=32, help="of table 3: tokens of an answer")
    made.add_argument("--repeat", type=cli.at_least(5), default=5, help="of table 3: how often each stage is timed")
    made.add_argument("--output", type=cli.path, help="folder (default: CHECKPOINT/comparison, or runs/compare_CONFIG)")
    made.add_argument(
        "--tuned-decoder", action="store_true",
        help="also evaluate the untrained systems with the decoder of the tuned full prompt",
    )  # fmt: skip
    made.add_argument("--batch-size", type=cli.at_least(1), default=16)
    made.add_argument("--llmlingua2", metavar="PYTHON [MODEL]", help="Python of an environment that has llmlingua")
    made.add_argument("overrides", nargs="*", metavar="path=value", help="settings, e.g. train.steps=100")
    return made


def settings_apart(given: Any) -> None:
    """Take the settings that follow --data=A B, which argparse reads as more of its values, out of it."""
    paths, words = settings(), given.data or []
    found = [word for word in words if word.partition("=")[0] in paths and "=" in word]
    given.data, given.overrides = [word for word in words if word not in found] or None, [*given.overrides, *found]


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
    every = SYSTEMS_OF.get(
        given.table, (*series.SYSTEMS, *(n for n in SYSTEMS if n != "llmlingua2" or given.llmlingua2))
    )
    every = [name for name in every if given.config or name in SYSTEMS]
    groups: dict[str, list[str]] = {"all": every, "none": []}
    groups |= {"trained": [n for n in every if n in series.TRAINED], "untrained": [n for n in every if n in SYSTEMS]}
    asked: list[str] = groups[given.systems] if given.systems in groups else given.systems.split(",")
    names = list(dict.fromkeys(asked))
    check_names(names, [*series.TRAINED, *SYSTEMS])
    if given.checkpoint and (wrong := [name for name in names if name in series.TRAINED]):
        raise ConfigError(f"{wrong[0]} is trained: add its run to --checkpoint, or train it with --config=NAME")
    if given.table == "2" and (wrong := [name for name in names if name not in SYSTEMS_OF["2"]]):
        raise ConfigError(f"{wrong[0]} is not COMI without a step; table 2 has {', '.join(SYSTEMS_OF['2'])}")
    if given.table == "2" and given.config:
        names = list(dict.fromkeys(["comi", *names]))  # what the others are compared with, and switched off on
    if given.tuned_decoder and given.table in ("2", "3"):
        raise ConfigError(f"--tuned-decoder is for tables of untrained systems' accuracy, not for table {given.table}")
    if given.tuned_decoder and given.config and "full_prompt" not in names:
        raise ConfigError(contenders.NO_TUNED)
    if given.config and not names:
        raise ConfigError(f"--systems={given.systems} leaves nothing to compare; name some systems")
    return [name for name in names if name in series.TRAINED], [name for name in names if name in SYSTEMS]


def config_of(given: Any) -> Config:
    """The config whose data and language model are used: of the first checkpoint, or the one that is named. Raises
    ConfigError for checkpoints that do not belong into one table."""
    if bool(given.checkpoint) == bool(given.config):
        raise ConfigError("pass either --config=NAME, to train the systems, or --checkpoint=DIR, for trained ones")
    if given.config:
        more = [f"model.path={series.language_model(given.start_from)}"] if given.start_from else []
        return load(given.config, [*given.overrides, *more])
    if given.start_from:
        raise ConfigError(f"--start-from={given.start_from} is for training; pass --config=NAME, not --checkpoint")
    if given.overrides:
        raise ConfigError(f"{given.overrides[0]}: settings come from the checkpoints; pass --config to give some")
    if given.seeds > 1:
        raise ConfigError(f"--seeds={given.seeds} trains systems; pass --config=NAME instead of --checkpoint")
    return contenders.check_checkpoints(given.checkpoint)


def command_of(given: Any, output: Folder, row: Row) -> str:
    """The command that makes ``row`` alone, or takes over what of it is there."""
    words = ["--checkpoint", *given.checkpoint] if given.checkpoint else [f"--config={given.config}", *given.overrides]
    words += [f"--seeds={given.seeds}"] if given.seeds > 1 else []
    words += [f"--start-from={given.start_from}"] if given.start_from else []
    words += [f"--output={output}"] if given.config and given.output else []  # where its runs are
    words += ["--data", *given.data] if given.data else []
    words += [f"--limit={given.limit}"] if given.limit else []
    words += [f"--table={given.table}"] if given.table != "1" else []
    words += [f"--bins={','.join(map(str, given.bins))}"] if given.bins else []
    words += [f"--llmlingua2={given.llmlingua2}"] if row.name == "llmlingua2" else []
    name = "comi" if row.name.endswith(comparison_ablations.OFF) else row.name
    names = [name] if name in SYSTEMS or (given.config and name in series.TRAINED) else []
    if name.endswith(contenders.TUNED):
        words += ["--tuned-decoder"]
        names = ["full_prompt"] * bool(given.config) + [name.removesuffix(contenders.TUNED)]
    words += [f"--systems={','.join(names) or 'none'}"]
    words += [f"--rates={row.rate}"] if row.rate else []
    return shlex.join(["python", "-m", "comi_jax.compare", *words])


def held_out(given: Any, config: Config, console: Console) -> dict[str, list[Record]]:
    """The records that all systems answer, by the entry of the data where the table tells these apart."""
    words = tuple(given.data or config.data.eval)
    found = {}
    for entry in [(word,) for word in words] if given.table == "4" else [words]:
        data = dataclasses.replace(config.data, eval=entry)
        found[" ".join(entry)] = read_held_out(dataclasses.replace(config, data=data), console)[0][: given.limit]
    if not any(found.values()):
        raise ConfigError("there are no questions; pass --data=FILE, or set data.eval")
    return found


def main(arguments: list[str] | None = None) -> None:
    """Train what is missing, evaluate all systems at all rates and write the comparison."""
    given = parser().parse_intermixed_args(arguments)
    settings_apart(given)
    console = Console(width=cli.width(), soft_wrap=True, markup=False)
    with cli.one_way_out(), contextlib.ExitStack() as until_end:
        check_table(given.table)
        comparison_lengths.bins_of([], given.bins or comparison_lengths.BINS)  # refused early if they do not rise
        config = config_of(given)
        trained, untrained = names_of(given)
        if "bm25" in untrained:
            BM25().scores(["a text"], "text")  # which needs a package
        if untrained:
            starting_model(config)  # refused before anything is trained
        default = Path(given.checkpoint[0]) / "comparison" if given.checkpoint else Path(f"runs/compare_{given.config}")
        output = Folder(given.output or default)
        runs = []
        if trained:
            runs = series.members(given.config, given.overrides, trained, given.seeds, output, given.start_from)
        until_end.enter_context(lock.held(output, console.print))
        compilations.keep()
        records = held_out(given, config, console)
        rates = given.rates or (RATES if given.table in ("1", "7") else config.compression.rates)
        every = [record for part in records.values() for record in part]
        if given.table == "3":
            time_systems(given, config, runs, untrained, rates, every, output, console)
            return
        if not series.train(runs, console):
            sys.exit(STOPPED)
        mesh = sharding.make_mesh(Mesh(data=1, fsdp=0)) if jax.device_count() > 1 else None
        places: list[Any] = [(folder, None) for folder in given.checkpoint] or [(str(run.folder), run) for run in runs]
        systems = contenders.of_runs(places, given.batch_size, mesh, given.table == "2")
        texts = output.path / "llmlingua2.jsonl"
        tuned = contenders.tuned_decoders(places) if given.tuned_decoder else []
        systems += contenders.untrained(untrained, config, given.batch_size, mesh, texts, tuned)
        for system in systems:
            if system.name == "llmlingua2" and given.llmlingua2:
                contenders.compress_texts(system, given.llmlingua2, rates, every, texts)
        rows = compare(systems, rates, every, output.path, console)
        about = {"data": list(given.data or config.data.eval), "n": len(every), "rates": rates}
        about |= {"language_model": config.model.path, "trained_by": [run.command for run in runs]}
        write(given, config, rows, records, about, output, console)


def time_systems(
    given: Any, config: Config, runs: list[series.Member], untrained: list[str], rates: tuple[int, ...],
    records: list[Record], output: Folder, console: Console,
) -> None:  # fmt: skip
    """Table 3; one that was measured by the same command on such a machine is shown again."""
    words = ("checkpoint", "config", "overrides", "start_from", "data", "limit", "bins", "new_tokens", "repeat")
    about = {name: getattr(given, name) for name in words}
    about |= {"systems": [*(run.name for run in runs), *untrained], "rates": rates, "machine": timing.machine()}
    about |= {"records": fingerprint_of(records), "version": __version__, "weights": []}
    about["weights"] = [weights_of(folder, choose_step(folder, "newest")) for folder in given.checkpoint]
    table = table_files.stored("3", about, output.path)
    if table:
        path = output.path / "table_3.json"
        console.print(f"{path} was measured by this command before; remove it to measure again", highlight=False)
    else:
        models = {read_run(folder).config.system: Comi.load(folder, batch_size=1) for folder in given.checkpoint}
        models |= {run.name: timing.fresh(run.config) for run in runs if run.seed == config.train.seed}
        table = timing.table(
            models, untrained, config, records, rates, given.bins, given.new_tokens, given.repeat,
            output.path / "table_3.png", console,
        )  # fmt: skip
    comparison_output.sheet(table, about, output.path, console)
    console.print(f"the picture is {output.path / 'table_3.png'}", highlight=False)


def write(
    given: Any, config: Config, rows: list[Row], records: dict[str, list[Record]], about: dict[str, Any],
    output: Folder, console: Console,
) -> None:  # fmt: skip
    """Write and print the table of ``rows``."""
    command = functools.partial(command_of, given, output)
    if given.table in ("1", "7"):
        comparison_output.accuracy(rows, about, command, output.path, console)
        return
    if given.table == "2":
        titles = {name: variant.title for name, variant in (series.ABLATIONS | series.ALPHAS).items()}
        table = comparison_ablations.table_2(joined(rows, output.path, "comi"), titles)
    else:
        every = [record for part in records.values() for record in part]
        tokens = token_ids(StartingModel.open(config).tokenizer, [record.context_text() for record in every])
        lengths, number = [len(ids) for ids in tokens], iter(range(len(every)))
        groups = {entry: [next(number) for _ in part] for entry, part in records.items()}
        if given.table == "9":
            groups = comparison_lengths.bins_of(lengths, given.bins or comparison_lengths.BINS)
        what, longest = {"4": "data", "9": "context tokens"}[given.table], config.data.max_context
        table = comparison_lengths.by_group(given.table, what, rows, output.path, groups, lengths, longest)
    table.more["commands"] = {f"{row.title} at {row.label}": command(row) for row in rows}
    comparison_output.sheet(table, about, output.path, console)


if __name__ == "__main__":
    main()
