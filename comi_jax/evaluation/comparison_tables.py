"""A comparison as a printed table, as CSV, LaTeX and JSON, and as the plot of the paper's figure 4."""

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

from comi_jax.errors import ConfigError
from comi_jax.evaluation.comparison import Row

# The metrics of the paper's tables, as this project names them, and their headings.
SHOWN = {"em": "EM, strict", "acc_subspan": "contained", "f1_first": "F1, first reference"}
STAR = "* a rate that the system was not trained at"


def write(rows: Sequence[Row], about: Mapping[str, Any], command: Callable[[Row], str], folder: Path) -> None:
    """Write results.json (all of it, each row with its ``command``), table.csv and table.tex into ``folder``, each
    atomically."""
    content = {"about": dict(about), "rows": [dataclasses.asdict(row) | {"command": command(row)} for row in rows]}
    for name, text in (
        ("results.json", json.dumps(content, indent=2) + "\n"),
        ("table.csv", as_csv(rows)),
        ("table.tex", as_latex(rows)),
    ):
        draft = folder / f"{name}.draft"
        draft.write_text(text, encoding="utf-8")
        os.replace(draft, folder / name)


def show(rows: Sequence[Row], reference: str, console: Console) -> None:
    """Print the table, and below it what was refused and why."""
    counts = {row.result["n"] for row in rows if not row.refused}
    table = Table(title=f"{', '.join(map(str, sorted(counts)))} questions, 95 % bootstrap intervals")
    table.add_column("system")
    for heading in ("rate", *SHOWN.values(), "entries", "achieved [min, max]"):
        table.add_column(heading, justify="right")
    if reference:
        table.add_column(f"EM minus {reference}'s, paired", justify="right")
    for row in rows:
        table.add_row(row.title, row.label, *_cells(row), *([_difference(row)] if reference else []))
    console.print(table)
    if any(row.untrained for row in rows):
        console.print(STAR, highlight=False)
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
    """One line per row: every metric with its interval, the account, and the difference to the reference."""
    out = io.StringIO()
    names = [f"{name}{end}" for name in SHOWN for end in ("", "_low", "_high")]
    costs = ["entries", "kv_bytes", "ingest_flop", "question_flop"]
    ratios, paired = (
        ["ratio_mean", "ratio_min", "ratio_max"],
        ["em_difference", "em_difference_low", "em_difference_high"],
    )
    lines = csv.writer(out, lineterminator="\n")
    lines.writerow(["system", "title", "rate", "untrained_rate", "n", *names, *costs, *ratios, *paired, "refused"])
    for row in rows:
        first = [row.name, row.title, row.rate, int(row.untrained)]
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
            cells = [f"{100 * row.result['metrics'][name]['mean']:.2f}" for name in SHOWN]
            cells += [f"{row.result['account']['entries']:.1f}", f"{ratio['mean']:.2f}" if ratio else "--"]
        title = "" if row.title == before else row.title
        before = row.title
        lines.append(" & ".join([title, "--" if row.rate is None else row.label, *cells]) + r" \\")
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", ""])


def plot(rows: Sequence[Row], path: Path) -> None:
    """Accuracy against the achieved ratio, with intervals (figure 4), as a PNG. A system without a rate is a level;
    hollow markers are rates that a system was not trained at."""
    try:
        from matplotlib import colormaps  # an extra, and slow to import
        from matplotlib.figure import Figure
    except ImportError:
        raise ConfigError("the plot needs the package matplotlib; pip install 'comi-jax[compare]'") from None
    panels = {name: SHOWN[name] for name in ("em", "f1_first")}
    figure = Figure(figsize=(13, 5.5), layout="constrained")
    titles = list(dict.fromkeys(row.title for row in rows if not row.refused))
    for axes, (metric, heading) in zip(figure.subplots(1, len(panels), sharey=True), panels.items(), strict=True):
        for number, title in enumerate(titles):
            own = [row for row in rows if row.title == title and not row.refused]
            style: dict[str, Any] = {"color": colormaps["tab20"](number % 20), "label": title}
            if own[0].rate is None:
                axes.axhline(own[0].result["metrics"][metric]["mean"], linestyle="--" if number % 2 else ":", **style)
                continue
            marker = "osD^v<>PX*"[number % 10]
            x = [row.result["account"]["ratio"]["mean"] for row in own]
            values = [row.result["metrics"][metric] for row in own]
            y = [value["mean"] for value in values]
            error = [[v["mean"] - v["low"] for v in values], [v["high"] - v["mean"] for v in values]]
            line = "-" if number < 10 else "-."
            axes.errorbar(x, y, error, linestyle=line, marker=marker, capsize=2, linewidth=1.2, markersize=5, **style)
            hollow = [(a, b) for a, b, row in zip(x, y, own, strict=True) if row.untrained]
            if hollow:
                axes.plot(*zip(*hollow, strict=True), marker, color="white", markeredgecolor=style["color"], zorder=5)
        axes.set(xscale="log", xlabel="achieved ratio: context tokens per KV entry", ylabel=heading, ylim=(-0.02, 1.02))
        ticks = sorted({row.rate for row in rows if row.rate})
        axes.set_xlim(min(ticks, default=1) / 1.3, max(ticks, default=1) * 1.3)
        axes.set_xticks(ticks, [str(tick) for tick in ticks])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", fontsize="small")
    draft = path.with_name(f"{path.name}.draft")
    figure.savefig(draft, dpi=140, format="png", metadata={"Software": None})
    os.replace(draft, path)
