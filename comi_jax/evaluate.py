"""Evaluate a checkpoint on held-out questions: ``python -m comi_jax.evaluate --checkpoint=DIR --data=FILE``."""

import contextlib
import dataclasses

import jax
from rich.console import Console

from comi_jax import cli
from comi_jax.config import Mesh
from comi_jax.devices import compilations, sharding
from comi_jax.errors import ConfigError
from comi_jax.evaluation import worst
from comi_jax.evaluation.answerers import ComiAnswerer
from comi_jax.evaluation.predictions import evaluate
from comi_jax.evaluation.tables import print_table, save_table
from comi_jax.runs import lock
from comi_jax.runs.folder import Folder
from comi_jax.runs.selection import choose_step
from comi_jax.runs.stored_weights import weights_of
from comi_jax.serving.compressor import Comi
from comi_jax.training.dataset import of_data, read_held_out


def main(arguments: list[str] | None = None) -> None:
    """Evaluate a checkpoint on a file of records."""
    parser = cli.Parser(
        prog="python -m comi_jax.evaluate",
        description="Evaluate a COMI checkpoint on all devices of this machine.",
    )
    parser.add_argument("--checkpoint", type=cli.path, required=True, help="folder of a training run")
    parser.add_argument("--step", default="newest", help='step of the checkpoint, "best" or "newest" (default)')
    parser.add_argument(
        "--data",
        required=True,
        nargs="+",
        help="as data.eval: files, globs, hf://..., each [SCHEMA:]PLACE[@WEIGHT]",
    )
    parser.add_argument(
        "--output", type=cli.path, help="folder for predictions.jsonl and results.json (default: CHECKPOINT/evaluation)"
    )
    parser.add_argument("--rate", type=int, help="context tokens per memory vector")
    parser.add_argument("--limit", type=int, help="use only the first LIMIT records")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--max-new-tokens", type=int)
    parser.add_argument("--repetition-penalty", type=float)
    parser.add_argument("--closed-book", action="store_true", help="answer without the contexts")
    parser.add_argument("--skip-bad-records", action="store_true")
    parser.add_argument("--explain-worst", type=cli.at_least(1), metavar="N",
        help="show what was kept for the N answers of lowest f1_max: pages in OUTPUT/explanations")  # fmt: skip
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="path=value",
        help="override a setting, e.g. data.on_long=truncate",
    )
    given = parser.parse_args(arguments)
    console = Console(width=cli.width(), soft_wrap=True, markup=False)  # paths and data may hold brackets
    with cli.one_way_out(), contextlib.ExitStack() as until_end:
        compilations.keep()
        if given.limit is not None and given.limit < 1:
            raise ConfigError(f"--limit={given.limit} leaves no records; give at least 1")
        step = choose_step(given.checkpoint, given.step)
        output = Folder(given.output or Folder(given.checkpoint).evaluation)
        until_end.enter_context(lock.held(output, console.print))
        mesh = sharding.make_mesh(Mesh(data=1, fsdp=0)) if jax.device_count() > 1 else None
        model = Comi.load(given.checkpoint, batch_size=given.batch_size, overrides=given.set, step=step, mesh=mesh)
        if given.explain_worst:
            worst.check(model, given.rate, given.closed_book)
        records, skipped = read_held_out(of_data(model.run.config, given.data, given.skip_bad_records), console)
        changes = {"max_new_tokens": given.max_new_tokens, "repetition_penalty": given.repetition_penalty}
        changes = {name: value for name, value in changes.items() if value is not None}
        decoding = dataclasses.replace(model.run.config.generation, **changes)
        weights, closed = weights_of(given.checkpoint, step), given.closed_book
        answerer = ComiAnswerer(model, weights, given.rate, decoding, step=step, closed_book=closed)
        result = evaluate(answerer, records[: given.limit], output.predictions, console=console)
        result |= {"data": given.data, "of": len(records), "skipped_records": skipped}
        rows = {"closed book" if closed else model.run.config.title: result}
        save_table(rows, output.results)
        if given.explain_worst:
            found = worst.worst(output.predictions, given.explain_worst)
            account = {"config": model.run.config.name, "checkpoint": given.checkpoint, "step": step}
            pages = worst.write_pages(
                model, records, found, output.explanations, rate=given.rate, decoding=decoding, account=account
            )
            console.print(f"what was kept for the {len(pages)} worst answers: {output.explanations}", highlight=False)
    print_table(rows, console, tuple(result["metrics"]))
    console.print(
        f"mean output {result['mean_output_tokens']:.1f} tokens, {result['truncated_contexts']} contexts and "
        f"{result['truncated_queries']} questions truncated, "
        f"{skipped} records skipped; predictions and results in {output}",
        highlight=False,
    )


if __name__ == "__main__":
    main()
