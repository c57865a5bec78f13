"""The report of runs as one self-contained HTML page."""

import base64
import html
from collections.abc import Sequence
from typing import Any

import numpy as np

from comi_jax.overrides import to_dict
from comi_jax.params import flatten
from comi_jax.runs.report import Course, heading, labels, origin
from comi_jax.runs.selection import best_of

STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; color: #222; max-width: 1060px; margin: 2em auto; padding: 0 1em }
h1 { font-size: 1.5em } h2 { font-size: 1.15em; margin-top: 1.8em } img { width: 100%; height: auto }
table { border-collapse: collapse; margin: .5em 0 } th, td { padding: .25em .9em; border-bottom: 1px solid #ddd }
th { text-align: left; font-weight: 600 }
td { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap }
td.text { text-align: left; white-space: normal }
summary { cursor: pointer } .note { color: #666 } div.wide { overflow-x: auto }
"""


def page(courses: Sequence[Course], picture: bytes) -> str:
    """The whole report as HTML."""
    names, title = labels(courses), html.escape(heading(courses))
    image = base64.b64encode(picture).decode()
    parts = [f"<h1>{title}</h1>", f'<img alt="curves" src="data:image/png;base64,{image}">']
    parts += ["<h2>Training</h2>", _table(["", *names], _facts(courses))]
    runs = list(dict.fromkeys(course.home.name for course in courses))
    for course, name in zip(courses, names, strict=True):
        if course.results:
            where = f", run of {html.escape(name)}" if len(runs) > 1 else ""
            parts += [f"<h2>Closing table{where}</h2>", _results(course.results)]
        if course.evaluated:
            parts += [f"<h2>Evaluations of {html.escape(name)}</h2>", _results(_by_step(course), "step")]
    parts += ["<h2>Settings</h2>", *_settings(courses)]
    note = f"{', '.join(runs)}: {origin(courses)}; intervals are 95 %, by bootstrap"
    parts.append(f'<p class="note">{html.escape(note)}</p>')
    head = f'<meta charset="utf-8"><title>{title}</title><style>{STYLE}</style>'
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
        "memory, peak": lambda c: (
            f"{np.nanmax(c.curve('memory_gb')[1]):.2f} GB" if c.curve("memory_gb")[1].size else "-"
        ),
        "updates skipped": lambda c: last(c, "skipped", ".0f"),
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
    """All settings, with those that differ between the runs first."""
    flat = [flatten(to_dict(course.run.config)) for course in courses]
    names = sorted({name for values in flat for name in values})
    rows = {name: [_word(values.get(name)) for values in flat] for name in names}
    other = [[name.replace("/", "."), *values] for name, values in rows.items() if len(set(values)) > 1]
    header = ["", *labels(courses)]
    parts = []
    if other:
        parts += ["<p>Settings that differ:</p>", _table(header, other, "text")]
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
