"""A comparison as plots: accuracy against the achieved ratio (the paper's figure 4), against FLOP and against bytes.

matplotlib is an extra and is imported only in functions.
"""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from comi_jax.errors import ConfigError
from comi_jax.evaluation.comparison import Row
from comi_jax.evaluation.comparison_tables import SHOWN

MARKERS = "osD^v<>PX*"


def accuracy(rows: Sequence[Row], path: Path) -> None:
    """Accuracy against the achieved ratio, with the brackets of the table, as a PNG. A system without a rate is a
    level; hollow markers are rates that a system was not trained at."""
    panels = [(_ratio, SHOWN[name], name) for name in ("em", "f1_first")]
    figure = _panels(rows, panels, levels=True)
    for axes in figure.axes:
        axes.set(xlabel="achieved ratio: context tokens per KV entry")
        ticks = sorted({row.rate for row in rows if row.rate})
        axes.set_xlim(min(ticks, default=1) / 1.3, max(ticks, default=1) * 1.3)
        axes.set_xticks(ticks, [str(tick) for tick in ticks])
        axes.minorticks_off()
    save(figure, path)


def costs(rows: Sequence[Row], path: Path) -> None:
    """Accuracy against the FLOP until the first token of an answer, encoder included, and against the bytes of the KV
    entries that stand for the context, as a PNG. A system that reads no context is a level."""
    figure = _panels(rows, [(_flop, SHOWN["em"], "em"), (_bytes, SHOWN["em"], "em")], levels=False)
    figure.axes[0].set(xlabel="FLOP from context and question to the first token")
    figure.axes[1].set(xlabel="bytes of KV entries kept for the context")
    for axes in figure.axes:
        low, high = axes.get_xlim()
        axes.set_xlim(low / 1.5, high * 1.5)  # so that systems of nearly equal cost leave room for two labels
        mark(axes.xaxis)
    save(figure, path)


def _ratio(row: Row) -> float:
    return row.result["account"]["ratio"]["mean"]


def _flop(row: Row) -> float:
    return row.result["account"]["ingest_flop"] + row.result["account"]["question_flop"]


def _bytes(row: Row) -> float:
    return row.result["account"]["kv_bytes"]


def mark(axis: Any) -> None:
    """Label a logarithmic ``axis`` at 1, 2, 5, 10, ..., as k, M and G where numbers are large."""
    from matplotlib.ticker import EngFormatter, LogLocator, NullLocator

    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.set_major_formatter(EngFormatter())
    axis.set_minor_locator(NullLocator())


def new_figure(width: float, height: float) -> Any:
    """An empty matplotlib figure. Raises ConfigError if the package is missing."""
    try:
        from matplotlib.figure import Figure  # slow to import
    except ImportError:
        raise ConfigError("the plot needs the package matplotlib; pip install 'comi-jax[compare]'") from None
    return Figure(figsize=(width, height), layout="constrained")


def _panels(rows: Sequence[Row], panels: Sequence[tuple[Callable[[Row], float], str, str]], levels: bool) -> Any:
    """One panel of all systems for each of ``panels``: the value on the x axis, the heading and the metric of the y
    axis. With ``levels``, a system without a rate is a horizontal line."""
    figure = new_figure(13.0, 5.5)
    from matplotlib import colormaps

    titles = list(dict.fromkeys(row.title for row in rows if not row.refused))
    for axes, (x_of, heading, metric) in zip(figure.subplots(1, len(panels), sharey=True), panels, strict=True):
        for number, title in enumerate(titles):
            own = [row for row in rows if row.title == title and not row.refused]
            style: dict[str, Any] = {"color": colormaps["tab20"](number % 20), "label": title}
            if (levels and own[0].rate is None) or not own[0].result["account"]["entries"]:
                axes.axhline(own[0].result["metrics"][metric]["mean"], linestyle="--" if number % 2 else ":", **style)
                continue
            _line(axes, own, x_of, metric, number, style)
        axes.set(xscale="log", ylabel=heading, ylim=(-0.02, 1.02))
        axes.grid(alpha=0.3)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", fontsize="small")
    return figure


def _line(
    axes: Any, rows: Sequence[Row], x_of: Callable[[Row], float], metric: str, number: int, style: dict[str, Any]
) -> None:
    x, values = [x_of(row) for row in rows], [row.result["metrics"][metric] for row in rows]
    y = [value["mean"] for value in values]
    error = [[v["mean"] - v["low"] for v in values], [v["high"] - v["mean"] for v in values]]
    marker, line = MARKERS[number % len(MARKERS)], "-" if number < 10 else "-."
    axes.errorbar(x, y, error, linestyle=line, marker=marker, capsize=2, linewidth=1.2, markersize=5, **style)
    hollow = [(a, b) for a, b, row in zip(x, y, rows, strict=True) if row.untrained]
    if hollow:
        axes.plot(*zip(*hollow, strict=True), marker, color="white", markeredgecolor=style["color"], zorder=5)


def save(figure: Any, path: Path) -> None:
    """Write ``figure`` as a PNG, atomically and without what differs between two runs."""
    draft = path.with_name(f"{path.name}.draft")
    figure.savefig(draft, dpi=140, format="png", metadata={"Software": None})
    os.replace(draft, path)
