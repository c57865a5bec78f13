"""Prepare a training mixture once: ``python -m comi_jax.prepare --config=NAME [path=value ...] --output=DIR``.

DIR gets train.jsonl.gz, eval.jsonl.gz if data.eval is set, and report.json: counts, token lengths, the share of answers
found in their contexts, dropped records with reasons, and fingerprints. ``data.train=DIR data.eval=DIR`` trains on it,
and is refused if the records do not match the report. Sources are streamed twice, so they may be of any size.
"""

import os
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from comi_jax import cli
from comi_jax.data.mixture import PARTS, PERCENTILES, prepare
from comi_jax.overrides import load
from comi_jax.weights.starting_model import tokenizer_of


def print_report(report: dict[str, Any], output: Path, console: Console) -> None:
    """Print a report as tables, with the first dropped records."""
    sizes, lengths = Table(title="examples"), Table(title="tokens")
    for name in ("source", "examples", "answer in context", "above data.max_*", "dropped"):
        sizes.add_column(name, justify="left" if name == "source" else "right", overflow="fold")
    for name in ("source", "", *(f"{p} %" for p in PERCENTILES[:-1]), "longest"):
        lengths.add_column(name, justify="left" if name in ("source", "") else "right", overflow="fold")
    notes = []
    for split, entry in report["splits"].items():
        for row in entry["sources"]:
            title, dropped = f"{split}: {row['source']}", sum(count for count, *_ in row["dropped"].values())
            found = f"{row['in_context'] / row['written']:.1%}" if row["written"] else "-"
            longer = ", ".join(f"{count:,} {part}" for part, count in row["longer"].items() if count)
            sizes.add_row(title, f"{row['written']:,}", found, longer or "-", f"{dropped:,}")
            for part, values in row["tokens"].items():
                lengths.add_row(title if part == PARTS[0] else "", part, *(f"{value:,}" for value in values))
            for reason, (count, *first) in row["dropped"].items():
                notes += [f"{title}: {count:,} dropped: {reason}", *(f"    {example}" for example in first)]
    console.print(sizes, lengths)
    for note in notes:
        console.print(note, highlight=False)
    prints = ", ".join(f"{split} {entry['fingerprint']}" for split, entry in report["splits"].items())
    console.print(f"{output}: fingerprint {report['fingerprint']} (records: {prints})", highlight=False)


def main(arguments: list[str] | None = None) -> None:
    """Prepare; an error that the user can fix ends in one sentence and exit status 1."""
    parser = cli.Parser(prog="python -m comi_jax.prepare", description="Prepare a training mixture once.")
    parser.add_argument("--config", required=True, help="a name from comi_jax/configs: tiny, qwen2, llama2, qwen3")
    parser.add_argument(
        "--output", type=cli.path, required=True, help="folder to write; data.train=FOLDER trains on it"
    )
    parser.add_argument("--skip-bad-records", action="store_true", help="skip, count and list bad records")
    parser.add_argument("overrides", nargs="*", metavar="path=value", help="settings, e.g. data.train=nq:nq.jsonl.gz")
    options = parser.parse_intermixed_args(arguments)
    overrides = options.overrides + ["data.skip_bad_records=true"] * options.skip_bad_records
    console = Console(width=cli.width(), soft_wrap=True, markup=False)  # paths and data may hold brackets
    with cli.one_way_out():
        config = load(options.config, overrides)
        output = Path(os.path.abspath(options.output))
        print_report(prepare(config, tokenizer_of(config), output, console), Path(options.output), console)


if __name__ == "__main__":
    main()
