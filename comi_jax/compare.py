"""Compare systems on the same questions: ``python -m comi_jax.compare --checkpoint=DIR --rates=2,4,8,16,32``."""

import contextlib
import dataclasses
import functools
import shlex
from pathlib import Path
from typing import Any

import jax
from rich.console import Console

from comi_jax import cli
from comi_jax.config import Config, Mesh
from comi_jax.data.records import Record
from comi_jax.devices import compilations, sharding
from comi_jax.errors import ConfigError
from comi_jax.evaluation import comparison_tables
from comi_jax.evaluation.answerers import ComiAnswerer
from comi_jax.evaluation.comparison import Contender, Row, compare
from comi_jax.evaluation.systems import SYSTEMS, check_names, llmlingua2
from comi_jax.evaluation.systems.answerer import SystemAnswerer
from comi_jax.evaluation.systems.bm25 import BM25
from comi_jax.overrides import load
from comi_jax.runs import lock
from comi_jax.runs.description import read_run
from comi_jax.runs.folder import Folder
from comi_jax.runs.selection import choose_step
from comi_jax.runs.stored_weights import weights_of
from comi_jax.serving.compressor import Comi
from comi_jax.serving.language_model import LanguageModel
from comi_jax.training.dataset import read_held_out


def rates_of(text: str) -> tuple[int, ...]:
    """An argparse type: whole numbers of at least 1, each once."""
    rates = tuple(map(cli.at_least(1), text.split(",")))
    return tuple(dict.fromkeys(rates))


def parser() -> cli.Parser:
    made = cli.Parser(
        prog="python -m comi_jax.compare",
        description="Evaluate trained and untrained systems on the same questions, charged by the same rules, and "
        "write the paper's table. What is finished is taken over by the next start.",
    )
    made.add_argument("--checkpoint", type=cli.path, nargs="+", default=[], help="folders of training runs, one a row")
    made.add_argument("--config", help="without a checkpoint: the config whose language model and data are used")
    made.add_argument("--systems", default="all", help=f"of those without training: all, none, or {','.join(SYSTEMS)}")
    made.add_argument("--rates", type=rates_of, default=(2, 4, 8, 16, 32), help="context tokens per KV entry")
    made.add_argument("--data", nargs="+", help="as data.eval (default: that of the first checkpoint or of the config)")
    made.add_argument("--limit", type=cli.at_least(1), help="use only the first LIMIT records")
    made.add_argument("--output", type=cli.path, help="folder (default: CHECKPOINT/comparison, or runs/compare_CONFIG)")
    made.add_argument("--batch-size", type=cli.at_least(1), default=16)
    made.add_argument("--llmlingua2", metavar="PYTHON [MODEL]", help="Python of an environment that has llmlingua")
    made.add_argument("overrides", nargs="*", metavar="path=value", help="settings, e.g. model.path=DIR")
    return made


def trained(folder: str, given: Any, mesh: Any) -> Contender:
    """The system of the run in ``folder``."""
    step, config = choose_step(folder, "newest"), read_run(folder).config
    weights = weights_of(folder, step)

    @functools.lru_cache(maxsize=1)
    def model() -> Comi:
        return Comi.load(folder, batch_size=given.batch_size, step=step, mesh=mesh)

    def answerer(rate: int | None) -> ComiAnswerer:
        return ComiAnswerer(model(), weights, rate, step=step)

    rated = config.system != "full_prompt"
    return Contender(config.system, config.title, answerer, rated, config.compression.rates)


def untrained(names: list[str], config: Config, given: Any, mesh: Any, texts: Path) -> list[Contender]:
    """The systems ``names`` of ``evaluation.systems``, with the language model of ``config`` as their decoder."""

    @functools.lru_cache(maxsize=1)
    def model() -> LanguageModel:
        return LanguageModel.open(config, batch_size=given.batch_size, mesh=mesh)

    def answerer(name: str, rate: int | None) -> SystemAnswerer:
        system = SYSTEMS[name].system
        if name == "llmlingua2" and texts.is_file():
            system = llmlingua2.LLMLingua2.open(texts)
        return SystemAnswerer(name, system, model(), config.data, config.generation, rate)

    rows = ((name, SYSTEMS[name]) for name in names)
    return [
        Contender(name, row.title, functools.partial(answerer, name), row.system.needs_budget) for name, row in rows
    ]


def compress_texts(asked: Contender, given: Any, records: list[Record], texts: Path) -> None:
    """Have the program of --llmlingua2 write the compressed texts that are missing in ``texts``."""
    for rate in given.rates:
        answerer = asked.answerer(rate)
        assert isinstance(answerer, SystemAnswerer)
        questions, found = answerer.questions(records)[0], {}
        if texts.is_file():
            before = llmlingua2.LLMLingua2.open(texts)
            found = llmlingua2.read_texts(before.texts, before.content)
        wanted = llmlingua2.requests(questions, [answerer.budget(q) for q in questions], found)
        if wanted:
            python, *model = shlex.split(given.llmlingua2)
            llmlingua2.run([python, str(llmlingua2.PROGRAM), *model], wanted, texts)


def configs_of(given: Any) -> Config:
    """The config whose data and language model are used: of the first checkpoint, or the one that is named. Raises
    ConfigError for checkpoints of different language models."""
    if bool(given.checkpoint) == bool(given.config):
        raise ConfigError("pass either --checkpoint=DIR, for trained systems, or --config=NAME, for others alone")
    if given.config:
        return load(given.config, given.overrides)
    if given.overrides:
        raise ConfigError(f"{given.overrides[0]}: settings come from the checkpoints; pass --config to give some")
    runs = [read_run(folder) for folder in given.checkpoint]
    for folder, run in zip(given.checkpoint, runs, strict=True):
        if run.backbone != runs[0].backbone or run.config.model.path != runs[0].config.model.path:
            raise ConfigError(
                f"{folder} has another language model than {given.checkpoint[0]}; compare them in different outputs"
            )
        systems = [other.config.system for other in runs]
        if systems.count(run.config.system) > 1:
            raise ConfigError(f"{folder} is a second run of system={run.config.system}; compare one run of each")
    return runs[0].config


def command_of(given: Any, row: Row) -> str:
    """The command that evaluates ``row`` alone."""
    words = ["--checkpoint", *given.checkpoint] if given.checkpoint else [f"--config={given.config}", *given.overrides]
    words += ["--data", *given.data] if given.data else []
    words += [f"--limit={given.limit}"] if given.limit else []
    words += [f"--llmlingua2={given.llmlingua2}"] if row.name == "llmlingua2" else []
    words += [f"--systems={row.name if row.name in SYSTEMS else 'none'}"]
    words += [f"--rates={row.rate}"] if row.rate else []
    return shlex.join(["python", "-m", "comi_jax.compare", *words])


def main(arguments: list[str] | None = None) -> None:
    """Evaluate all systems at all rates and write the comparison."""
    given = parser().parse_args(arguments)
    console = Console(width=cli.width(), soft_wrap=True, markup=False)
    with cli.one_way_out(), contextlib.ExitStack() as until_end:
        names = {"all": [name for name in SYSTEMS if name != "llmlingua2" or given.llmlingua2], "none": []}.get(
            given.systems, given.systems.split(",")
        )
        check_names(names, list(SYSTEMS))
        if "bm25" in names:
            BM25().scores(["a text"], "text")  # which needs a package
        config = configs_of(given)
        default = Path(given.checkpoint[0]) / "comparison" if given.checkpoint else Path(f"runs/compare_{given.config}")
        output = Folder(given.output or default)
        until_end.enter_context(lock.held(output, console.print))
        compilations.keep()
        data = dataclasses.replace(config.data, eval=tuple(given.data or config.data.eval))
        records, _ = read_held_out(dataclasses.replace(config, data=data), console)
        records = records[: given.limit]
        if not records:
            raise ConfigError("there are no questions; pass --data=FILE, or set data.eval")
        mesh = sharding.make_mesh(Mesh(data=1, fsdp=0)) if jax.device_count() > 1 else None
        contenders = [trained(folder, given, mesh) for folder in given.checkpoint]
        texts = output.path / "llmlingua2.jsonl"
        contenders += untrained(names, config, given, mesh, texts)
        if given.llmlingua2:
            for contender in contenders:
                if contender.name == "llmlingua2":
                    compress_texts(contender, given, records, texts)
        reference = "comi" if any(c.name == "comi" for c in contenders) else ""
        rows = compare(contenders, given.rates, records, output.path, reference, console)
        about = {"data": list(data.eval), "n": len(records), "rates": given.rates, "language_model": config.model.path}
        comparison_tables.write(rows, about, functools.partial(command_of, given), output.path)
        comparison_tables.plot(rows, output.path / "accuracy.png")
    comparison_tables.show(rows, "COMI" if reference else "", console)
    console.print(f"results.json, table.csv, table.tex and accuracy.png are in {output}", highlight=False)


if __name__ == "__main__":
    main()
