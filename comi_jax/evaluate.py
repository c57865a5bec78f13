"""Answer held-out questions and measure: ``python -m comi_jax.evaluate --checkpoint=DIR --data=FILE``.

Every prediction is written as a JSON line; the summary has the mean and a 95 % bootstrap interval of each metric, the
achieved compression ratio (all context tokens over all memory vectors) and the decoding options.
"""

import argparse
import dataclasses
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track
from rich.table import Table

from comi_jax import metrics, weights
from comi_jax.answer import Answer, Comi
from comi_jax.checkpoint import CheckpointError
from comi_jax.config import ConfigError, Generation
from comi_jax.data import loader
from comi_jax.data.records import DataError, Record, read_records


def evaluate(
    model: Comi,
    records: Sequence[Record],
    output: str | Path,
    *,
    rate: int | None = None,
    options: Generation | None = None,
    closed_book: bool = False,
    console: Console | None = None,
) -> dict[str, Any]:
    """Answer ``records``, write predictions to ``output`` (JSON Lines) and return the summary.

    ``closed_book`` withholds the contexts: the same decoder answers from the question alone.
    """
    options = options or model.run.config.generation
    data = model.run.config.data
    examples, report = loader.encode(records, model.tokenizer, data, targets=False)
    if closed_book:
        examples = [dataclasses.replace(e, context=e.context[:0]) for e in examples]
    order = sorted(range(len(examples)), key=lambda i: len(examples[i].context))
    chunk = model.batch_size * 8
    answers: list[Any] = [None] * len(examples)
    starts = range(0, len(order), chunk)
    quiet = console is None or not console.is_terminal
    for first in track(starts, "evaluating", console=console, disable=quiet, transient=True):
        rows = order[first : first + chunk]
        for row, answer in zip(rows, model.generate([examples[i] for i in rows], rate, options), strict=True):
            answers[row] = answer
    scores = [metrics.score(a.text, r.answers) for a, r in zip(answers, records, strict=True)]
    Path(output).parent.mkdir(parents=True, exist_ok=True)
    with Path(output).open("w", encoding="utf-8") as lines:
        for number, (record, answer, score) in enumerate(zip(records, answers, scores, strict=True)):
            lines.write(json.dumps(_prediction(number, record, answer, score), ensure_ascii=False) + "\n")
    vectors = sum(a.memory_vectors for a in answers)
    return {
        "n": len(records),
        "metrics": metrics.summarize(scores),
        "ratio": sum(a.context_tokens for a in answers) / vectors if vectors else 0.0,
        "mean_output_tokens": sum(len(a.tokens) for a in answers) / len(answers),
        "rate": None if closed_book else rate or model.run.config.compression.rates[0],
        "closed_book": closed_book,
        "decoding": {"method": "greedy", **dataclasses.asdict(options)},
        "truncated_contexts": 0 if closed_book else report.truncated_contexts,
        "truncated_queries": report.truncated_queries,
    }


def _prediction(number: int, record: Record, answer: Answer, score: Mapping[str, float]) -> dict[str, Any]:
    return {
        "index": number,
        "prompt": record.prompt,
        "answers": list(record.answers),
        "prediction": answer.text,
        "context_tokens": answer.context_tokens,
        "memory_vectors": answer.memory_vectors,
        **score,
    }


def save_table(rows: Mapping[str, dict[str, Any]], path: str | Path) -> None:
    """Write the summaries as JSON."""
    Path(path).write_text(json.dumps(dict(rows), indent=2) + "\n", encoding="utf-8")


def print_table(rows: Mapping[str, dict[str, Any]], console: Console, shown: Sequence[str] = ("em", "f1_max")) -> None:
    """Print the metrics ``shown`` of every system with their intervals, and the achieved ratio; a column a system."""
    table = Table(title=f"{next(iter(rows.values()))['n']} held-out questions, 95 % bootstrap intervals")
    table.add_column("")
    for title in rows:
        table.add_column(title, justify="right")
    for name in shown:
        table.add_row(name, *(_interval(row["metrics"][name]) for row in rows.values()))
    table.add_row("compression ratio", *(f"{row['ratio']:.1f}" if row["ratio"] else "-" for row in rows.values()))
    console.print(table)


def _interval(value: Mapping[str, float]) -> str:
    return f"{value['mean']:.3f} [{value['low']:.3f}, {value['high']:.3f}]"


def main(arguments: list[str] | None = None) -> None:
    """Evaluate a checkpoint on a file of records."""
    parser = argparse.ArgumentParser(prog="python -m comi_jax.evaluate", description="Measure a COMI checkpoint.")
    parser.add_argument("--checkpoint", required=True, help="folder of a training run")
    parser.add_argument("--data", required=True, nargs="+", help="JSON Lines files, plain or .gz")
    parser.add_argument(
        "--output", help="folder for predictions.jsonl and results.json (default: CHECKPOINT/evaluation)"
    )
    parser.add_argument("--rate", type=int, help="context tokens per memory vector")
    parser.add_argument("--limit", type=int, help="the first so many records only")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--max-new-tokens", type=int)
    parser.add_argument("--repetition-penalty", type=float)
    parser.add_argument("--closed-book", action="store_true", help="withhold the contexts")
    parser.add_argument("--skip-bad-records", action="store_true")
    parser.add_argument(
        "--set", action="append", default=[], metavar="path=value", help="another setting, e.g. data.on_long=truncate"
    )
    given = parser.parse_args(arguments)
    console = Console(soft_wrap=True, markup=False)  # paths and data may hold brackets
    try:
        if given.limit is not None and given.limit < 1:
            raise ConfigError(f"--limit={given.limit} leaves no records; it must be at least 1")
        model = Comi.load(given.checkpoint, batch_size=given.batch_size, overrides=given.set)
        records, report = read_records(given.data, skip_bad=given.skip_bad_records)
        for line in report.skipped:
            console.print(f"left out {line}", highlight=False)
        output = Path(given.output or Path(given.checkpoint) / "evaluation")
        changes = {"max_new_tokens": given.max_new_tokens, "repetition_penalty": given.repetition_penalty}
        changes = {name: value for name, value in changes.items() if value is not None}
        result = evaluate(
            model,
            records[: given.limit],
            output / "predictions.jsonl",
            rate=given.rate,
            options=dataclasses.replace(model.run.config.generation, **changes),
            closed_book=given.closed_book,
            console=console,
        )
        result["skipped_records"] = len(report.skipped)
        save_table({"model": result}, output / "results.json")
    except (CheckpointError, ConfigError, DataError, loader.LengthError, weights.WeightsError, OSError) as error:
        sys.exit(f"error: {error}")
    print_table({"closed book" if given.closed_book else "COMI": result}, console, tuple(result["metrics"]))
    console.print(
        f"mean output {result['mean_output_tokens']:.1f} tokens, {result['truncated_contexts']} contexts cut, "
        f"{len(report.skipped)} records left out; predictions and results in {output}",
        highlight=False,
    )


if __name__ == "__main__":
    main()
