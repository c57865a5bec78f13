"""A run as one picture and one page."""

import base64
import html
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from comi_jax.overrides import to_dict
from comi_jax.params import flatten
from comi_jax.runs import journal
from comi_jax.runs.checksums import CheckpointError
from comi_jax.runs.description import Run, is_run, read_run
from comi_jax.runs.folder import Folder
from comi_jax.runs.selection import best_of, evaluations
from comi_jax.version import __version__

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")  # told apart by colour-blind eyes too
SMOOTHED = 40  # curves of more points also get their moving average
STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; color: #222; max-width: 1060px; margin: 2em auto; padding: 0 1em }
h1 { font-size: 1.5em } h2 { font-size: 1.15em; margin-top: 1.8em } img { width: 100%; height: auto }
table { border-collapse: collapse; margin: .5em 0 } th, td { padding: .25em .9em; border-bottom: 1px solid #ddd }
th { text-align: left; font-weight: 600 }
td { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap }
td.text { text-align: left; white-space: normal }
summary { cursor: pointer } .note { color: #666 } div.wide { overflow-x: auto }
"""


@dataclass(frozen=True)
class Course:
    """One run: its settings, the numbers of its steps and of its evaluations, and its closing table."""

    name: str
    run: Run
    steps: list[dict[str, Any]]
    evaluated: list[dict[str, Any]]
    results: dict[str, Any]

    def curve(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """Steps and values of a number, where it was logged; what was not finite is NaN."""
        rows = [(row["step"], row[name]) for row in self.steps if name in row]
        return np.array([step for step, _ in rows]), np.array([np.nan if v is None else v for _, v in rows], float)


def read(folder: Path) -> list[Course]:
    """The run in ``folder`` and the one beneath it that it was compared with. Raises CheckpointError if there is
    nothing to draw."""
    run = read_run(folder)
    steps = journal.rows(Folder(folder).metrics)
    if not steps:
        raise CheckpointError(f"{folder} has no metrics yet: metrics.jsonl is missing or empty; nothing can be drawn")
    table = Folder(folder).results
    results = json.loads(table.read_text(encoding="utf-8")) if table.is_file() else {}
    courses = [Course(folder.resolve().name, run, steps, evaluations(folder), results)]
    below = Folder(folder).of_system("mean-pooling")
    if is_run(below) and journal.rows(below.metrics):
        name = f"{courses[0].name}, mean-pooling"
        courses.append(Course(name, read_run(below), journal.rows(below.metrics), evaluations(below), {}))
    return courses


def draw(courses: Sequence[Course]) -> bytes:
    """The curves as a PNG. Raises CheckpointError if the library that draws is not installed."""
    try:
        from matplotlib.figure import Figure
        from matplotlib.ticker import LogLocator, NullFormatter
    except ImportError:
        raise CheckpointError(
            "comi_jax.report draws with matplotlib, which is not installed; pip install 'comi-jax[report]'"
        ) from None
    left_out = any(row["loss"] is None for course in courses for row in course.steps)
    panels = [
        ("loss", "loss", f"nats per answer token{'; red: not finite, left out' if left_out else ''}"),
        ("accuracy", "accuracy", "share of answer tokens predicted right"),
        ("learning_rate", "learning rate", ""),
        ("tokens_per_second", "throughput", "tokens per second"),
        ("gradient_norm", "gradient norm", "before clipping, log scale"),
    ]
    figure = Figure(figsize=(11, 9.6), dpi=120, layout="constrained")
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.12)
    axes = figure.subplots(3, 2, sharex=True).ravel()
    for axis, (name, title, unit) in zip(axes, panels, strict=False):
        for course, colour in zip(courses, _colours(len(courses)), strict=True):
            _curve(axis, *course.curve(name), course.name, colour, smooth=name != "learning_rate")
        _finish(axis, title, unit)
    axes[0].set_ylim(bottom=0)
    axes[1].set_ylim(-0.02, 1.02)
    axes[2].yaxis.set_major_formatter("{x:.3g}")
    axes[3].set_ylim(bottom=0)
    axes[3].yaxis.set_major_formatter("{x:,.0f}")
    axes[4].set_yscale("log")
    axes[4].yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes[4].yaxis.set_major_formatter("{x:g}")
    axes[4].yaxis.set_minor_formatter(NullFormatter())
    for course in courses:
        for row in course.steps:
            if row["loss"] is None:
                axes[0].axvline(row["step"], color="#c00", linewidth=0.8, alpha=0.6)
    _draw_evaluations(axes[5], courses)
    if len(courses) > 1:
        handles, labels = axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper center", ncols=min(len(courses), 3), frameon=False)
    picture = io.BytesIO()
    figure.savefig(picture, format="png")
    return picture.getvalue()


def _colours(count: int) -> list[str]:
    return [COLOURS[i % len(COLOURS)] for i in range(count)]


def _curve(axis: Any, steps: np.ndarray, values: np.ndarray, label: str, colour: str, smooth: bool) -> None:
    if not smooth or len(steps) <= SMOOTHED:
        axis.plot(steps, values, color=colour, label=label, linewidth=1.6)
        return
    width = max(len(steps) // 50, 3)
    averaged = [
        np.nanmean(values[max(i - width, 0) : i + 1]) if np.isfinite(values[i]) else np.nan for i in range(len(values))
    ]
    axis.plot(steps, values, color=colour, alpha=0.3, linewidth=0.9)
    axis.plot(steps, averaged, color=colour, label=label, linewidth=1.8)


def _draw_evaluations(axis: Any, courses: Sequence[Course]) -> None:
    """The metric that chooses the best checkpoint, with its 95 % interval; a ring around the best."""
    metrics, highest = dict.fromkeys(course.run.config.train.best_by for course in courses), []
    for course, colour in zip(courses, _colours(len(courses)), strict=True):
        metric = course.run.config.train.best_by
        steps = [row["step"] for row in course.evaluated]
        values = [row["metrics"][metric] for row in course.evaluated]
        if not steps:
            continue
        mean = [value["mean"] for value in values]
        highest += [value["high"] for value in values]
        axis.fill_between(
            steps, [v["low"] for v in values], [v["high"] for v in values], color=colour, alpha=0.15, linewidth=0
        )
        axis.plot(steps, mean, color=colour, marker="o", markersize=4, linewidth=1.6)
        best = steps.index(best_of(course.evaluated, metric))
        axis.plot(steps[best], mean[best], marker="o", markersize=11, fillstyle="none", color=colour, linestyle="none")
    _finish(axis, "evaluation", f"{' / '.join(metrics)}, 95 % interval, best ringed")
    axis.set_ylim(0, min(1.02, 1.15 * max(highest, default=0.9)))
    if not highest:
        text = "no evaluation on the way\n(train.eval_every was 0)"
        axis.text(0.5, 0.5, text, ha="center", va="center", color="#777", transform=axis.transAxes)


def _finish(axis: Any, title: str, unit: str) -> None:
    axis.set_title(title, loc="left", fontweight="bold", fontsize=11)
    axis.set_title(unit, loc="right", fontsize=8.5, color="#555")
    axis.set_xlabel("step", fontsize=9)
    axis.tick_params(labelsize=9, labelbottom=True)
    axis.grid(color="#e4e4e4", linewidth=0.7)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)
    axis.margins(x=0.02)


def page(courses: Sequence[Course], picture: bytes) -> str:
    """The whole report as HTML."""
    names = ", ".join(course.name for course in courses)
    image = base64.b64encode(picture).decode()
    parts = [f"<h1>{html.escape(names)}</h1>", f'<img alt="curves" src="data:image/png;base64,{image}">']
    parts += ["<h2>Training</h2>", _table(["", *(course.name for course in courses)], _facts(courses))]
    for course in courses:
        if course.results:
            parts += [f"<h2>Results of {html.escape(course.name)}</h2>", _results(course.results)]
        if course.evaluated:
            parts += [f"<h2>Evaluations of {html.escape(course.name)}</h2>", _results(_by_step(course), "step")]
    parts += ["<h2>Settings</h2>", *_settings(courses)]
    parts.append(f'<p class="note">comi_jax {__version__}; intervals are 95 %, by bootstrap</p>')
    head = f'<meta charset="utf-8"><title>{html.escape(names)}</title><style>{STYLE}</style>'
    return f'<!DOCTYPE html>\n<html lang="en"><head>{head}</head><body>\n' + "\n".join(parts) + "\n</body></html>\n"


def _facts(courses: Sequence[Course]) -> list[list[str]]:
    def last(course: Course, name: str, form: str) -> str:
        values = course.curve(name)[1]
        values = values[np.isfinite(values)]
        return format(values[-1], form) if len(values) else "-"

    def middle(course: Course, name: str, form: str) -> str:
        values = course.curve(name)[1]
        return format(float(np.nanmedian(values)), form) if np.isfinite(values).any() else "-"

    def best(course: Course) -> str:
        metric = course.run.config.train.best_by
        step = best_of(course.evaluated, metric)
        means = {row["step"]: row["metrics"][metric]["mean"] for row in course.evaluated}
        return "-" if step is None else f"{step} ({metric} {means[step]:.3f})"

    rows = {
        "steps done": lambda c: f"{c.steps[-1]['step']} of {c.run.config.train.steps}",
        "last loss": lambda c: last(c, "loss", ".4f"),
        "last accuracy": lambda c: last(c, "accuracy", ".3f"),
        "tokens per second, median": lambda c: middle(c, "tokens_per_second", ",.0f"),
        "model FLOP utilisation, median": lambda c: middle(c, "mfu", ".1%"),
        "padding, median": lambda c: middle(c, "padding", ".1%"),
        "compression ratio, median": lambda c: middle(c, "ratio", ".1f"),
        "memory, most": lambda c: (
            f"{np.nanmax(c.curve('memory_gb')[1]):.2f} GB" if c.curve("memory_gb")[1].size else "-"
        ),
        "updates left out": lambda c: last(c, "skipped", ".0f"),
        "best evaluated step": best,
    }
    return [[name, *(fact(course) for course in courses)] for name, fact in rows.items()]


def _by_step(course: Course) -> dict[str, Any]:
    return {str(row["step"]): row for row in course.evaluated}


def _results(rows: dict[str, Any], title: str = "") -> str:
    metrics = list(next(iter(rows.values()))["metrics"])
    cells = [
        [
            name,
            *(f"{m['mean']:.3f} [{m['low']:.3f}, {m['high']:.3f}]" for m in (row["metrics"][k] for k in metrics)),
            f"{row['ratio']:.1f}" if row["ratio"] else "-",
            str(row["n"]),
        ]
        for name, row in rows.items()
    ]
    return _table([title, *metrics, "ratio", "n"], cells)


def _settings(courses: Sequence[Course]) -> list[str]:
    """Every setting; those that differ between the runs first."""
    flat = [flatten(to_dict(course.run.config)) for course in courses]
    names = sorted({name for values in flat for name in values})
    rows = {name: [_word(values.get(name)) for values in flat] for name in names}
    other = [[name.replace("/", "."), *values] for name, values in rows.items() if len(set(values)) > 1]
    header = ["", *(course.name for course in courses)]
    parts = []
    if other:
        parts += ["<p>What the runs differ in:</p>", _table(header, other, "text")]
    whole = _table(header, [[name.replace("/", "."), *values] for name, values in rows.items()], "text")
    return [*parts, f"<details><summary>all {len(names)} settings</summary>{whole}</details>"]


def _word(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _table(header: Sequence[str], rows: Sequence[Sequence[str]], kind: str = "") -> str:
    head = "".join(f"<th>{html.escape(name)}</th>" for name in header)
    cell = f'<td class="{kind}">' if kind else "<td>"
    body = "".join(
        f"<tr><th>{html.escape(row[0])}</th>" + "".join(f"{cell}{html.escape(v)}</td>" for v in row[1:]) + "</tr>"
        for row in rows
    )
    return f'<div class="wide"><table><tr>{head}</tr>{body}</table></div>'
