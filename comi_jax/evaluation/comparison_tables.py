"""A comparison as a printed table, as CSV, LaTeX and JSON."""

import csv
import dataclasses
import io
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from comi_jax.evaluation.comparison import Row
from comi_jax.evaluation.comparison_seeds import SPREAD
from comi_jax.evaluation.paper_figures import NOT_COMPARABLE, beside
from comi_jax.evaluation.tables import latex_interval

# The metrics of the paper's tables, as this project names them, and their headings.
SHOWN = {"em": "EM, strict", "acc_subspan": "contained", "f1_first": "F1, first reference"}
STAR = "* a rate that the system was not trained at"


def write(
    rows: Sequence[Row], runs: Sequence[Row], about: Mapping[str, Any], command: Callable[[Row], str], folder: Path
) -> None:
    """Write results.json (all of it, each row with its ``command``, and the ``runs`` that rows of several seeds are the
    mean of), table.csv and table.tex into ``folder``, each atomically."""
    content = {"about": dict(about), "brackets": SPREAD, "rows": [_entry(row, command) for row in rows]}
    if any(len(row.seeds) > 1 for row in rows):
        content["seeds"] = [_entry(row, command) for row in runs if row.seed is not None]
    for name, text in (
        ("results.json", json.dumps(content, indent=2) + "\n"),
        ("table.csv", as_csv(rows)),
        ("table.tex", as_latex(rows)),
    ):
        write_text(folder / name, text)


def _entry(row: Row, command: Callable[[Row], str]) -> dict[str, Any]:
    return dataclasses.asdict(row) | {"paper": beside("1", row.name, row.rate), "command": command(row)}


def write_text(path: Path, text: str) -> None:
    """Write a file atomically."""
    draft = path.with_name(f"{path.name}.draft")
    draft.write_text(text, encoding="utf-8")
    os.replace(draft, path)


def show(rows: Sequence[Row], reference: str, console: Console) -> None:
    """Print the table, and below it what was refused and why."""
    counts = {row.result["n"] for row in rows if not row.refused}
    paper = [beside("1", row.name, row.rate) for row in rows]
    several = any(len(row.seeds) > 1 for row in rows)
    table = Table(title=f"{', '.join(map(str, sorted(counts)))} questions; {SPREAD}")
    table.add_column("system")
    for heading in ("rate", *SHOWN.values(), "entries", "achieved [min, max]"):
        table.add_column(heading, justify="right")
    if reference:
        table.add_column(f"EM minus {reference}'s, paired", justify="right")
    if several:
        table.add_column("seeds", justify="right")
    if any(paper):
        table.add_column("paper, %")
    for row, text in zip(rows, paper, strict=True):
        more = [_difference(row)] if reference else []
        more += [str(len(row.seeds) or "-")] if several else []
        table.add_row(row.title, row.label, *_cells(row), *more, *([text] if any(paper) else []))
    console.print(table)
    if any(row.untrained for row in rows):
        console.print(STAR, highlight=False)
    if any(paper):
        console.print(NOT_COMPARABLE, highlight=False)
    for row in rows:
        if row.refused:
            console.print(f"{row.title} at {row.label}: {row.refused}", highlight=False)


def _cells(row: Row) -> list[str]:
    if row.refused:
        return ["-"] * (len(SHOWN) + 2)
    values = [row.result["metrics"][name] for name in SHOWN]
    entries, ratio = row.result["account"]["entries"], row.result["account"]["ratio"]
    achieved = f"{ratio['mean']:.2f} [{ratio['min']:.2f}, {ratio['max']:.2f}]" if ratio else "-"
    return [*(f"{v['mean']:.3f} [{v['low']:.3f}, {v['high']:.3f}]" for v in values), f"{entries:.1f}", achieved]


def _difference(row: Row) -> str:
    value = row.differences.get(str(row.rate))
    return f"{value['em']['mean']:+.3f} [{value['em']['low']:+.3f}, {value['em']['high']:+.3f}]" if value else "-"


def as_csv(rows: Sequence[Row]) -> str:
    """One line per row: every metric with its interval (of several seeds: the lowest and highest), the account, and the
    difference to the reference."""
    out = io.StringIO()
    names = [f"{name}{end}" for name in SHOWN for end in ("", "_low", "_high")]
    costs = ["entries", "kv_bytes", "ingest_flop", "question_flop"]
    ratios, paired = (
        ["ratio_mean", "ratio_min", "ratio_max"],
        ["em_difference", "em_difference_low", "em_difference_high"],
    )
    lines = csv.writer(out, lineterminator="\n")
    lines.writerow(
        ["system", "title", "rate", "untrained_rate", "seeds", "n", *names, *costs, *ratios, *paired, "refused"]
    )
    for row in rows:
        first = [row.name, row.title, row.rate, int(row.untrained), " ".join(map(str, row.seeds))]
        if row.refused:
            lines.writerow([*first, *[""] * (1 + len(names) + len(costs) + len(ratios) + len(paired)), row.refused])
            continue
        account, ends = row.result["account"], ("mean", "low", "high")
        values = [row.result["metrics"][name][end] for name in SHOWN for end in ends]
        ratio = [account["ratio"][end] if account["ratio"] else "" for end in ("mean", "min", "max")]
        difference = row.differences.get(str(row.rate))
        minus = [difference["em"][end] if difference else "" for end in ends]
        lines.writerow([*first, row.result["n"], *values, *(account[c] for c in costs), *ratio, *minus, ""])
    return out.getvalue()


def as_latex(rows: Sequence[Row]) -> str:
    """A tabular for booktabs, in percent as in the paper."""
    lines = [r"\begin{tabular}{lr" + "r" * len(SHOWN) + "rr}", r"\toprule"]
    headings = ["System", "Rate", *SHOWN.values(), "Entries", "Achieved"]
    lines += [" & ".join(headings) + r" \\", r"\midrule"]
    before = ""
    for row in rows:
        cells = ["--"] * (len(SHOWN) + 2)
        if not row.refused:
            ratio = row.result["account"]["ratio"]
            cells = [latex_interval(row.result["metrics"][name]) for name in SHOWN]
            cells += [f"{row.result['account']['entries']:.1f}", f"{ratio['mean']:.2f}" if ratio else "--"]
        title = "" if row.title == before else row.title
        before = row.title
        lines.append(" & ".join([title, "--" if row.rate is None else row.label, *cells]) + r" \\")
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", ""])
