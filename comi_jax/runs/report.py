"""The metrics of runs, read from their folders, and their curves as one picture."""

import datetime
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from comi_jax.runs import journal
from comi_jax.runs.checksums import CheckpointError
from comi_jax.runs.description import Run, is_run, read_run
from comi_jax.runs.folder import Folder
from comi_jax.runs.selection import best_of, evaluations
from comi_jax.version import __version__

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")  # a colour-blind-safe palette
SMOOTHED = 40  # curves with more points than this also get a moving average


@dataclass(frozen=True)
class Course:
    """One trained system: its settings, metrics, evaluations and row of the closing table; the first system of a run
    also has the whole table."""

    title: str
    folder: Path
    home: Path  # the run's folder, which is the folder of its first system
    run: Run
    steps: list[dict[str, Any]]
    evaluated: list[dict[str, Any]]
    final: dict[str, Any] | None
    results: dict[str, Any]

    @property
    def date(self) -> datetime.date:
        """The date of the last line of metrics."""
        return datetime.date.fromtimestamp(Folder(self.folder).metrics.stat().st_mtime)

    @property
    def measured(self) -> list[dict[str, Any]]:
        """The evaluations during training and that of the closing table, by the step of their weights."""
        if self.final is None:
            return self.evaluated
        last = self.steps[-1]["step"]
        ended = last if last >= self.run.config.train.steps else None
        step = self.final.get("step", ended)  # earlier versions did not write it
        if step is None or step > last or step in (row["step"] for row in self.evaluated):
            return self.evaluated
        return sorted([*self.evaluated, {**self.final, "step": step}], key=lambda row: row["step"])

    def curve(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """Steps and values of a metric, where it was logged; non-finite values are NaN."""
        rows = [(row["step"], row[name]) for row in self.steps if name in row]
        return np.array([step for step, _ in rows]), np.array([np.nan if v is None else v for _, v in rows], float)


def read(folder: Path) -> list[Course]:
    """The systems of the run in ``folder``. Raises CheckpointError if it has no metrics yet."""
    run = read_run(folder)
    steps = journal.rows(Folder(folder).metrics)
    if not steps:
        raise CheckpointError(
            f"{folder} has no metrics yet: metrics.jsonl is missing or empty; wait for the first logged step"
        )
    home, results = Path(folder).resolve(), _closing_table(Folder(folder).results)
    first = Course(_title(run), home, home, run, steps, evaluations(folder), results.get(run.config.title), results)
    below = Folder(folder).of_system("mean-pooling")
    if not is_run(below) or not (steps := journal.rows(below.metrics)):
        return [first]
    run, row = read_run(below), results.get("mean-pooling")
    return [first, Course(_title(run), below.path.resolve(), home, run, steps, evaluations(below), row, {})]


def _title(run: Run) -> str:
    """The system's title in closing tables."""
    settings = run.config.compression
    return run.config.title if settings.coarse or settings.fine else "mean-pooling"


def _closing_table(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
        for row in rows.values():
            _ = (
                [(value["mean"], value["low"], value["high"]) for value in row["metrics"].values()],
                row["ratio"],
                row["n"],
            )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{path} is not a closing table ({error}); run the training command again to rewrite it"
        ) from None
    return rows


def labels(courses: Sequence[Course]) -> list[str]:
    """A unique label for each: its title, with the run's folder if titles repeat."""
    titles = [course.title for course in courses]
    by_name = [f"{course.title} ({course.home.name})" for course in courses]
    by_path = [f"{course.title} ({course.home})" for course in courses]
    return next((names for names in (titles, by_name) if len(set(names)) == len(names)), by_path)


def heading(courses: Sequence[Course]) -> str:
    """The configs and systems, as a title."""
    configs = dict.fromkeys(course.run.config.name for course in courses)
    return f"{', '.join(configs)}: {', '.join(labels(courses))}"


def origin(courses: Sequence[Course]) -> str:
    """The dates of training and the version of comi_jax."""
    dates = sorted({str(course.date) for course in courses})
    return f"trained {' to '.join(dict.fromkeys((dates[0], dates[-1])))}, comi_jax {__version__}"


def draw(courses: Sequence[Course]) -> bytes:
    """The curves as a PNG. Raises CheckpointError if matplotlib is not installed."""
    picture = io.BytesIO()
    figure_of(courses).savefig(picture, format="png")
    return picture.getvalue()


def figure_of(courses: Sequence[Course]) -> Any:
    """The curves as a matplotlib figure; raises as ``draw``."""
    try:
        from matplotlib.figure import Figure
        from matplotlib.layout_engine import ConstrainedLayoutEngine
        from matplotlib.ticker import LogLocator, NullFormatter
    except ImportError:
        raise CheckpointError(
            "comi_jax.report needs matplotlib, which is not installed; pip install 'comi-jax[report]'"
        ) from None
    left_out = any(row["loss"] is None for course in courses for row in course.steps)
    panels = [
        ("loss", "loss", f"nats per answer token{'; red: not finite, skipped' if left_out else ''}"),
        ("accuracy", "accuracy", "fraction of answer tokens predicted correctly"),
        ("learning_rate", "learning rate", ""),
        ("tokens_per_second", "throughput", "tokens per second"),
        ("gradient_norm", "gradient norm", "before clipping, log scale"),
    ]
    figure = Figure(figsize=(11, 9.6), dpi=120, layout=ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.12))
    axes = figure.subplots(3, 2, sharex=True).ravel()
    names, colours = labels(courses), _colours(len(courses))
    for axis, (name, title, unit) in zip(axes, panels, strict=False):
        for place, (course, label, colour) in enumerate(zip(courses, names, colours, strict=True)):
            if name == "learning_rate":  # often identical: later curves are thinner, so that all are visible
                axis.plot(
                    *course.curve(name), color=colour, label=label, linewidth=1.6 + 2.4 * (len(courses) - 1 - place)
                )
            else:
                _curve(axis, *course.curve(name), label, colour)
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
    figure.suptitle(heading(courses), x=0.02, ha="left", fontsize=13, fontweight="bold")
    if len(courses) > 1:
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    figure.text(0.98, 0.985, origin(courses), ha="right", va="top", fontsize=9, color="#555")
    return figure


def _colours(count: int) -> list[str]:
    return [COLOURS[i % len(COLOURS)] for i in range(count)]


def _curve(axis: Any, steps: np.ndarray, values: np.ndarray, label: str, colour: str) -> None:
    if len(steps) <= SMOOTHED:
        axis.plot(steps, values, color=colour, label=label, linewidth=1.6)
        return
    width = max(len(steps) // 50, 3)
    averaged = [
        np.nanmean(values[max(i - width, 0) : i + 1]) if np.isfinite(values[i]) else np.nan for i in range(len(values))
    ]
    axis.plot(steps, values, color=colour, alpha=0.3, linewidth=0.9)
    axis.plot(steps, averaged, color=colour, label=label, linewidth=1.8)


def _draw_evaluations(axis: Any, courses: Sequence[Course]) -> None:
    """The metric train.best_by with its 95 % interval over the evaluations, a ring around the best, and a dotted line
    for the closed-book result."""
    metrics, highest = dict.fromkeys(course.run.config.train.best_by for course in courses), []
    for course, colour in zip(courses, _colours(len(courses)), strict=True):
        metric, measured = course.run.config.train.best_by, course.measured
        values = [row["metrics"][metric] for row in measured]
        if not values:
            continue
        steps, mean = [row["step"] for row in measured], [value["mean"] for value in values]
        spread = [
            [value["mean"] - value["low"] for value in values],
            [value["high"] - value["mean"] for value in values],
        ]
        highest += [value["high"] for value in values]
        axis.errorbar(
            steps, mean, spread, color=colour, marker="o", markersize=4, linewidth=1.6, elinewidth=1, capsize=3
        )
        axis.annotate(
            f"{mean[-1]:.3f}", (steps[-1], mean[-1]), (-9, 0), textcoords="offset points", ha="right", va="center",
            fontsize=9, color=colour,
        )  # fmt: skip
        best = best_of(course.evaluated, metric)
        if best is not None:
            at = steps.index(best)
            axis.plot(best, mean[at], marker="o", markersize=11, fillstyle="none", color=colour, linestyle="none")
        closed = course.results.get("closed book")
        if closed:
            axis.axhline(closed["metrics"][metric]["mean"], color=colour, linewidth=1, linestyle=":")
    rings = ", best ringed" if any(course.evaluated for course in courses) else ""
    dotted = ", dotted: closed book" if any("closed book" in course.results for course in courses) else ""
    _finish(axis, "evaluation", f"{' / '.join(metrics)}, 95 % interval{rings}{dotted}")
    axis.set_ylim(0, min(1.05, 1.15 * max(highest, default=0.9)))
    if not highest:
        text = "not evaluated yet"
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
