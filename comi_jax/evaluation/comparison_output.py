"""The files and the printed form of a comparison's tables."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from comi_jax.evaluation import comparison_plots, comparison_tables, table_files
from comi_jax.evaluation.comparison import Row
from comi_jax.evaluation.comparison_seeds import joined
from comi_jax.evaluation.diagnostics import Table
from comi_jax.evaluation.tables import print_rows


def accuracy(
    rows: Sequence[Row], about: Mapping[str, Any], command: Callable[[Row], str], folder: Path, console: Console
) -> None:
    """Tables 1 and 7 and figure 4: every system at every rate, with the differences to COMI's if it is one."""
    reference = "comi" if any(row.name == "comi" for row in rows) else ""
    table = joined(rows, folder, reference)
    comparison_tables.write(table, rows, about, command, folder)
    comparison_plots.accuracy(table, folder / "accuracy.png")
    comparison_plots.costs(table, folder / "costs.png")
    comparison_tables.show(table, "COMI" if reference else "", console)
    console.print(f"results.json, table.csv, table.tex, accuracy.png and costs.png are in {folder}", highlight=False)


def sheet(table: Table, about: Mapping[str, Any], folder: Path, console: Console) -> None:
    """Any other table."""
    table_files.write(table, about, folder)
    print_rows(table.title, table.rows, table.notes, console)
    if "break_even" in table.more:
        title = "context length and questions from which compression pays"
        print_rows(title, table.more["break_even"], table.more["break_even_notes"], console)
    console.print(f"table_{table.name}.json, .csv and .tex are in {folder}", highlight=False)
