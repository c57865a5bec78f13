"""A table of the paper as JSON, CSV and LaTeX, each written atomically."""

import csv
import dataclasses
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from comi_jax.evaluation.comparison_tables import write_text
from comi_jax.evaluation.diagnostics import Table
from comi_jax.evaluation.tables import latex_interval


def write(table: Table, about: Mapping[str, Any], folder: Path) -> None:
    """Write ``table``, with ``about`` in its JSON, as FOLDER/table_NAME.json, .csv and .tex."""
    content = {"about": dict(about), **dataclasses.asdict(table)}
    path = folder / f"table_{table.name}"
    write_text(path.with_suffix(".json"), json.dumps(content, indent=2) + "\n")
    write_text(path.with_suffix(".csv"), as_csv(table.rows))
    write_text(path.with_suffix(".tex"), as_latex(table.rows, 1 if table.name == "3" else 100))


def stored(name: str, about: Mapping[str, Any], folder: Path) -> Table | None:
    """The table ``name`` in ``folder``, if it was written with the same ``about``."""
    path = folder / f"table_{name}.json"
    if not path.is_file():
        return None
    content = json.loads(path.read_text(encoding="utf-8"))
    same = content.pop("about") == json.loads(json.dumps(dict(about)))
    return Table(**content) if same else None


def as_csv(rows: Sequence[Mapping[str, Any]]) -> str:
    """One line per row; a mean with its interval is three columns."""
    out = io.StringIO()
    lines = csv.writer(out, lineterminator="\n")
    spread = {name: any(isinstance(row[name], Mapping) for row in rows) for name in rows[0]}
    columns = ([name, f"{name}, low", f"{name}, high"] if wide else [name] for name, wide in spread.items())
    lines.writerow([column for part in columns for column in part])
    for row in rows:
        cells: list[Any] = []
        for name, wide in spread.items():
            value = row[name]
            found = [value[end] for end in ("mean", "low", "high")] if isinstance(value, Mapping) else [value]
            found = ["" if cell is None else cell for cell in found]
            cells += found + [""] * (3 - len(found)) if wide else found
        lines.writerow(cells)
    return out.getvalue()


def as_latex(rows: Sequence[Mapping[str, Any]], unit: int = 100) -> str:
    """A tabular for booktabs; means and their intervals times ``unit``: in percent as in the paper."""
    lines = [r"\begin{tabular}{l" + "r" * (len(rows[0]) - 1) + "}", r"\toprule"]
    lines += [" & ".join(map(_escaped, rows[0])) + r" \\", r"\midrule"]
    lines += [" & ".join(_latex(value, unit) for value in row.values()) + r" \\" for row in rows]
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", ""])


def _latex(value: Any, unit: int) -> str:
    if isinstance(value, Mapping):
        return latex_interval(value, unit)
    if value is None or value == "":
        return "--"
    return f"{value:.3g}" if isinstance(value, float) else _escaped(str(value))


def _escaped(text: str) -> str:
    return "".join(f"\\{letter}" if letter in "%_&#$" else letter for letter in text)
