"""Summaries of evaluations as a JSON file and as a printed table."""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table


def save_table(rows: Mapping[str, dict[str, Any]], path: str | Path) -> None:
    """Write the summaries as JSON, atomically."""
    draft = Path(f"{path}.draft")
    draft.write_text(json.dumps(dict(rows), indent=2) + "\n", encoding="utf-8")
    os.replace(draft, path)


def print_table(rows: Mapping[str, dict[str, Any]], console: Console, shown: Sequence[str] = ("em", "f1_max")) -> None:
    """Print the metrics ``shown`` with their intervals, and the achieved ratio; one column per system."""
    table = Table(title=f"{next(iter(rows.values()))['n']} held-out questions, 95 % bootstrap intervals")
    table.add_column("")
    for title in rows:
        table.add_column(title, justify="right")
    for name in shown:
        table.add_row(name, *(_interval(row["metrics"][name]) for row in rows.values()))
    table.add_row("compression ratio", *(f"{row['ratio']:.1f}" if row["ratio"] else "-" for row in rows.values()))
    console.print(table)


def print_rows(title: str, rows: Sequence[Mapping[str, Any]], notes: Sequence[str], console: Console) -> None:
    """Print ``rows``, which have the same keys, with their keys as the columns, and ``notes`` below. A value may be a
    mean with its interval (metrics.summarize), a number, a text, True or False, or None."""
    table, tenths = Table(title=title, title_justify="left"), {}
    for name in rows[0]:
        texts = any(isinstance(row[name], str) for row in rows)
        tenths[name] = all(round(row[name], 1) == row[name] for row in rows if isinstance(row[name], float))
        table.add_column(name, justify="left" if texts else "right", overflow="fold")
    for row in rows:
        table.add_row(*(_cell(value, tenths[name]) for name, value in row.items()))
    console.print(table)
    for note in notes:
        console.print(f"  {note}", highlight=False, markup=False)


def _cell(value: Any, tenths: bool) -> str:
    if isinstance(value, Mapping):
        return _interval(value)
    if value is None or isinstance(value, bool):
        return {None: "-", True: "yes", False: ""}[value]
    if isinstance(value, float):
        return f"{value:.1f}" if tenths else f"{value:.3f}"
    return escape(" ".join(str(value).splitlines()))


def _interval(value: Mapping[str, float]) -> str:
    return f"{value['mean']:.3f} [{value['low']:.3f}, {value['high']:.3f}]"


def latex_interval(value: Mapping[str, float], unit: int = 100) -> str:
    """A mean with its interval for LaTeX, times ``unit``: in percent as in the paper."""
    mean, low, high = (f"{unit * value[end]:.2f}" for end in ("mean", "low", "high"))
    return rf"{mean} {{\scriptsize [{low}, {high}]}}"
