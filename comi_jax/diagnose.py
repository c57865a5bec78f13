"""Look inside a trained compressor: ``python -m comi_jax.diagnose --checkpoint=DIR --data=FILE --table 5 6 8``.

The paper's figure 1 and tables 5, 6 and 8, the merge weight of the answer, and the sensitivity to the segment size.
"""

import argparse
import contextlib
import dataclasses
import datetime
import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from rich.console import Console

from comi_jax import cli
from comi_jax.config import Mesh
from comi_jax.data.fingerprint import fingerprint_of
from comi_jax.devices import compilations, sharding
from comi_jax.errors import ConfigError
from comi_jax.evaluation import diagnostics_attention, diagnostics_plots
from comi_jax.evaluation.diagnosis import TABLES, Diagnosis, Sweep
from comi_jax.evaluation.diagnostics import Table
from comi_jax.evaluation.diagnostics_memory import title
from comi_jax.evaluation.tables import print_rows, save_table
from comi_jax.params import Tree
from comi_jax.runs import lock
from comi_jax.runs.description import change
from comi_jax.runs.folder import Folder
from comi_jax.runs.selection import choose_step
from comi_jax.runs.stored_weights import weights_of
from comi_jax.serving.compressor import Comi
from comi_jax.training.dataset import of_data, read_held_out
from comi_jax.version import __version__
from comi_jax.weights.starting_model import StartingModel


def parser() -> argparse.ArgumentParser:
    """The arguments of the command."""
    made = cli.Parser(
        prog="python -m comi_jax.diagnose", description="Diagnose a COMI checkpoint on all devices of this machine."
    )
    what = "; ".join(f"{name}: {text}" for name, text in TABLES.items())
    add = made.add_argument
    add("--checkpoint", type=cli.path, required=True, help="folder of a training run")
    add("--step", default="newest", help='step of the checkpoint, "best" or "newest" (default)')
    add("--data", required=True, nargs="+", help="as data.eval: files, globs, hf://..., each [SCHEMA:]PLACE[@WEIGHT]")
    add("--table", required=True, nargs="+", help=f"one or several of: {what}; or all")
    add("--rate", type=int, help="context tokens per memory vector")
    add("--limit", type=int, help="use only the first LIMIT records")
    add("--encoder", choices=("trained", "base"), default="trained",
        help="whose states are compressed: the checkpoint's, or those of the language model it is from")  # fmt: skip
    add("--base", type=cli.path, help="folder of that language model (default: the run's model.path)")
    add("--example", type=int, metavar="N",
        help="the record of table 8 and figure 1b, from 1 (default: the first with an answer in it)")  # fmt: skip
    sinks = f"leave the first {diagnostics_attention.SINKS} context tokens out of figure 1"
    add("--no-sinks", action="store_true", help=sinks)
    add("--beside", type=cli.path, nargs="+", default=[], metavar="DIR", help="other runs for --table=memory")
    add("--segment-sizes", default="", metavar="N,N", help="the sizes of --table=segments, in tokens")
    add("--output", type=cli.path, help="folder for the tables, JSON and PNG (default: CHECKPOINT/diagnostics)")
    add("--batch-size", type=int, default=16)
    add("--skip-bad-records", action="store_true")
    add(
        "--set",
        action="append",
        default=[],
        metavar="path=value",
        help="override a setting, e.g. data.on_long=truncate",
    )
    return made


def chosen_tables(words: Sequence[str]) -> list[str]:
    """The names of TABLES among ``words``, which may hold commas, or all of them for "all"."""
    names = [name for word in words for name in word.split(",") if name]
    for name in names or [""]:
        if name not in (*TABLES, "all"):
            close = difflib.get_close_matches(name, TABLES, n=3, cutoff=0.3)
            nearest = f"; the nearest are {', '.join(close)}" if close else ""
            raise ConfigError(f"there is no table {name!r}{nearest}; there are: {', '.join(TABLES)}, all")
    return [name for name in TABLES if name in names or "all" in names]


def chosen_sizes(text: str) -> tuple[int, ...]:
    """The numbers of --segment-sizes."""
    words = [word for word in text.split(",") if word]
    if not all(word.isdecimal() for word in words):
        raise ConfigError(f"--segment-sizes={text} must be whole numbers of tokens, e.g. 128,256")
    return tuple(sorted({int(word) for word in words}))


def base_of(model: Comi, folder: str | None, part: str) -> Tree:
    """``part`` of the model in ``folder`` (None: the one that the checkpoint started from)."""
    run = model.run
    settings = dataclasses.replace(run.config.model, path=folder or run.config.model.path, hub="")
    advice = "pass --base=DIR, the folder of the language model that the checkpoint started from"
    try:
        start = StartingModel.open(dataclasses.replace(run.config, model=settings))
    except ConfigError:
        what = f"{settings.path} is not a model's folder" if settings.path else "the checkpoint names no model"
        raise ConfigError(f"{what}; {advice}") from None
    if start.backbone != run.backbone:
        raise ConfigError(f"the model in {start.folder} has another shape than the checkpoint; {advice}")
    return start.load_parts(run, [part], model.mesh)


def at_segment_size(model: Comi, rate: int | None, size: int) -> Comi:
    """``model`` with segments of ``size`` tokens."""
    words, rates = [f"compression.segment_size={size}"], model.run.config.compression.rates
    if size < max(rates):  # one of them would be more than a segment
        words.append(f"compression.rates={rates[0] if rate is None else rate}")
    run = change(model.run, words)
    return Comi(run, model.params, model.tokenizer, batch_size=model.batch_size, mesh=model.mesh)


def other_models(model: Comi, folders: Sequence[str], words: Sequence[str]) -> dict[str, Comi]:
    """The newest checkpoints of other runs, by title, with the folder where titles repeat; on the devices of
    ``model``."""
    loaded = [Comi.load(folder, batch_size=model.batch_size, overrides=words, mesh=model.mesh) for folder in folders]
    titles = [title(other) for other in loaded]
    names = [
        f"{name} ({folder})" if [title(model), *titles].count(name) > 1 else name
        for name, folder in zip(titles, folders, strict=True)
    ]
    return dict(zip(names, loaded, strict=True))


def suffix(name: str, given: argparse.Namespace) -> str:
    """What the files of a table are also named by, so that those of other options stay."""
    parts = ["no_sinks"] if name in ("1a", "1b") and given.no_sinks else []
    parts += ["base"] if name not in ("1a", "segments", "memory") and given.encoder == "base" else []
    parts += [f"rate_{given.rate}"] if name not in ("1a", "1b") and given.rate is not None else []
    return "".join(f"_{part}" for part in parts)


def put(table: Table, path: Path, account: dict[str, Any], console: Console) -> None:
    """Print ``table``, and write it as JSON and PNG."""
    print_rows(table.title, table.rows, table.notes, console)
    save_table({"account": account, **dataclasses.asdict(table)}, f"{path}.json")
    encoder, rate = f"{account['encoder']} encoder, ", f"rate {account['rate']}, "
    how = {"1a": "base decoder, ", "1b": encoder, "memory": rate, "segments": rate}.get(table.name, rate + encoder)
    who = f"{account['config']}, step {account['step']}, {how}{account['n']} records"
    picture = diagnostics_plots.draw(table, f"{who}; {account['date']}, comi_jax {__version__}")
    if picture is None:
        console.print(f"  {path}.json; no picture: pip install 'comi-jax[report]' for matplotlib\n", highlight=False)
        return
    Path(f"{path}.png").write_bytes(picture)
    console.print(f"  {path}.json and .png\n", highlight=False)


def main(arguments: list[str] | None = None) -> None:
    """Compute, print and store the tables that were asked for."""
    given = parser().parse_args(arguments)
    console = Console(width=cli.width(), soft_wrap=True, markup=False)  # paths and data may hold brackets
    with cli.one_way_out(), contextlib.ExitStack() as until_end:
        compilations.keep()
        names, sizes = chosen_tables(given.table), chosen_sizes(given.segment_sizes)
        if given.limit is not None and given.limit < 1:
            raise ConfigError(f"--limit={given.limit} leaves no records; give at least 1")
        step = choose_step(given.checkpoint, given.step)
        output = Path(given.output or Folder(given.checkpoint).diagnostics)
        until_end.enter_context(lock.held(output, console.print))
        mesh = sharding.make_mesh(Mesh(data=1, fsdp=0)) if jax.device_count() > 1 else None
        model = Comi.load(given.checkpoint, batch_size=given.batch_size, overrides=given.set, step=step, mesh=mesh)
        records, skipped = read_held_out(of_data(model.run.config, given.data, given.skip_bad_records), console)
        weights = weights_of(given.checkpoint, step)
        others = other_models(model, given.beside, given.set) if "memory" in names else {}
        sweep = Sweep(lambda size: at_segment_size(model, given.rate, size), sizes, output, weights)
        diagnosis = Diagnosis(
            model, records[: given.limit], lambda part: base_of(model, given.base, part), sweep, names, others,
            given.rate, given.encoder == "base", not given.no_sinks, given.example, console,
        )  # fmt: skip
        account = {
            "config": model.run.config.name, "checkpoint": given.checkpoint, "step": step, "weights": weights,
            "data": given.data, "records": fingerprint_of(diagnosis.records), "n": len(diagnosis.records),
            "of": len(records), "skipped_records": skipped, "rate": diagnosis.rate_used, "encoder": given.encoder,
            "set": given.set, "date": str(datetime.date.today()), "version": __version__,
        }  # fmt: skip
        for name in names:
            put(diagnosis.table(name), output / f"{FILES[name]}{suffix(name, given)}", account, console)


FILES = {name: f"figure_{name}" if name in ("1a", "1b") else name.replace("-", "_") for name in TABLES}
FILES |= {name: f"table_{name}" for name in ("5", "6", "8")} | {"segments": "segment_sizes"}

if __name__ == "__main__":
    main()
