"""Pictures of the diagnostics, as PNG. matplotlib is an extra and is imported only here."""

import io
from collections.abc import Callable
from typing import Any

import numpy as np

from comi_jax.evaluation.diagnostics import Table
from comi_jax.evaluation.diagnostics_auc import SCORES
from comi_jax.evaluation.diagnostics_tables import VECTORS

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")  # a colour-blind-safe palette


def draw(table: Table, caption: str) -> bytes | None:
    """``table`` as a PNG with ``caption`` below; None if matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return None
    figure = Figure(figsize=(9, 5), dpi=120, layout="constrained")
    DRAWN[table.name](figure, table)
    figure.suptitle(table.title, x=0.02, ha="left", fontsize=12, fontweight="bold")
    figure.supxlabel(caption, x=0.98, ha="right", fontsize=8, color="#555")
    picture = io.BytesIO()
    figure.savefig(picture, format="png")
    return picture.getvalue()


def _finish(axis: Any, title: str, x: str, y: str) -> None:
    axis.set_title(title, loc="left", fontsize=10)
    axis.set_xlabel(x, fontsize=9)
    axis.set_ylabel(y, fontsize=9)
    axis.tick_params(labelsize=9)
    axis.grid(color="#e4e4e4", linewidth=0.7)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)


def _with_interval(
    axis: Any, x: list[Any], values: list[dict[str, float]], label: str, colour: str, style: str = "-"
) -> None:
    mean = [value["mean"] for value in values]
    spread = [[v["mean"] - v["low"] for v in values], [v["high"] - v["mean"] for v in values]]
    axis.errorbar(
        x, mean, np.abs(spread), color=colour, linestyle=style, marker="o", markersize=4, capsize=3, label=label
    )


def _bars(axis: Any, place: np.ndarray, values: list[dict[str, float]], label: str, colour: str) -> None:
    mean = [value["mean"] for value in values]
    spread = [[v["mean"] - v["low"] for v in values], [v["high"] - v["mean"] for v in values]]
    axis.barh(place, mean, 0.36, xerr=np.abs(spread), color=colour, label=label, ecolor="#333", capsize=2)


def _figure_1a(figure: Any, table: Table) -> None:
    axis, rows = figure.subplots(), table.rows
    percent = [row["top tokens, %"] for row in rows]
    low, high = ([row[name] for row in rows] for name in ("min", "max"))
    axis.fill_between(percent, low, high, color=COLOURS[0], alpha=0.15, label="lowest and highest example")
    _with_interval(axis, percent, [row["mass, %"] for row in rows], "mean, 95 % interval", COLOURS[0])
    paper = [(row["top tokens, %"], row["paper, %"]) for row in rows if row["paper, %"] is not None]
    axis.plot(*zip(*paper, strict=True), "x", color=COLOURS[1], label="paper (other data and model)")
    axis.set_xscale("log")
    axis.set_xticks([0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50], ["0.1", "0.2", "0.5", "1", "2", "5", "10", "20", "50"])
    axis.set_ylim(0, 103)
    sinks = "" if table.more["sinks"] else ", without the sinks"
    _finish(axis, f"of the question's attention to the context{sinks}", "top p % of the context tokens", "mass, %")
    axis.legend(frameon=False, fontsize=9)


def _figure_1b(figure: Any, table: Table) -> None:
    axis, cosines = figure.subplots(), np.array(table.more["cosines"])
    image = axis.imshow(cosines, cmap="viridis", vmin=min(0.0, float(cosines.min(initial=0.0))), vmax=1)
    words = [word or "␣" for word in table.more["tokens"]]
    axis.set_xticks(range(len(words)), words, rotation=60, ha="right", fontsize=8, parse_math=False)
    axis.set_yticks(range(len(words)), words, fontsize=8, parse_math=False)
    axis.set_title(f"record {table.more['record'] + 1}, in the order of its context", loc="left", fontsize=10)
    figure.colorbar(image, ax=axis, label="cosine")


def _table_5(figure: Any, table: Table) -> None:
    kinds = list(dict.fromkeys(row["groups"] for row in table.rows))
    axes = figure.subplots(1, len(kinds), sharey=True)
    for axis, kind in zip(axes, kinds, strict=True):
        rows = [row for row in table.rows if row["groups"] == kind and row["score"] in SCORES]
        height = np.arange(len(rows), dtype=float)
        for shift, (name, colour) in enumerate(zip(("AUC, pooled", "AUC, mean of examples"), COLOURS, strict=False)):
            values = [row[name] for row in rows]
            _bars(axis, height - 0.2 + 0.4 * shift, values, name, colour)
        for at, row in zip(height, rows, strict=True):
            if row["paper"] is not None:
                axis.plot(row["paper"], at - 0.2, "x", color="#000", markersize=8)
        axis.axvline(0.5, color="#000", linewidth=1, linestyle=":")
        axis.set_yticks(height, [row["score"] for row in rows])
        axis.set_xlim(0, 1)
        _finish(axis, f"{kind} groups, base rate {table.more[kind]['base_rate']:.3f}", "AUC (x: the paper's)", "")
    axes[0].invert_yaxis()  # of both, which share it
    figure.legend(*axes[1].get_legend_handles_labels(), loc="outside lower left", frameon=False, fontsize=9, ncols=2)


def _table_6(figure: Any, table: Table) -> None:
    for axis, kind in zip(figure.subplots(1, 2), VECTORS, strict=True):
        rows = [row for row in table.rows if row["of"] == kind]
        for name, colour in zip(("by MIG", "by relevance"), COLOURS, strict=False):
            _with_interval(axis, [row["retention"] for row in rows], [row[name] for row in rows], name, colour)
        _finish(axis, kind, "share of the groups that is kept", "mean pairwise cosine")
        axis.legend(frameon=False, fontsize=9)


def _table_8(figure: Any, table: Table) -> None:
    axis, below = figure.subplots(2, 1, sharex=True, height_ratios=(2, 1))
    place = np.array([row["group"] for row in table.rows], float)
    for shift, name in ((-0.2, "initial"), (0.2, "final")):
        holds = "holds answer" if name == "initial" else "after"
        colours = [COLOURS[1] if row[holds] else COLOURS[0] for row in table.rows]
        alpha = 0.4 if name == "initial" else 1.0
        axis.bar(place + shift, [row[name] for row in table.rows], 0.38, color=colours, alpha=alpha, label=name)
    _finish(axis, "sizes before (pale) and after re-allocation; orange: the group holds the answer", "", "tokens")
    for name, colour in zip(("MIG", "relevance", "redundancy"), COLOURS[2:], strict=False):
        below.plot(place, [row[name] for row in table.rows], marker="o", markersize=3, color=colour, label=name)
    _finish(below, "", "group", "")
    below.legend(frameon=False, fontsize=8, ncols=3, loc="lower center", bbox_to_anchor=(0.5, 1.0))


def _answer_weight(figure: Any, table: Table) -> None:
    axis = figure.subplots()
    height = np.arange(len(table.rows), dtype=float)
    for shift, name in enumerate(("weight on the answer", "on it or behind it in its group")):
        _bars(axis, height - 0.2 + 0.4 * shift, [row[name] for row in table.rows], name, COLOURS[shift])
    axis.set_yticks(height, [row["merge"] for row in table.rows])
    axis.invert_yaxis()
    _finish(axis, "", "merge weight, per group that holds any token of the answer", "")
    axis.legend(frameon=False, fontsize=9)


def _terms(figure: Any, table: Table) -> None:
    for axis, stage in zip(figure.subplots(1, 2), ("coarse", "fine"), strict=True):
        rows = [row for row in table.rows if row["stage"] == stage]
        height = np.arange(len(rows), dtype=float)
        for shift, name in enumerate(("groups that change", "moved")):
            _bars(axis, height - 0.2 + 0.4 * shift, [row[name] for row in rows], name, COLOURS[shift])
        axis.set_yticks(height, [row["by"] for row in rows])
        axis.invert_yaxis()
        _finish(axis, {"coarse": "sizes of groups", "fine": "weights of the merge"}[stage], "fraction, against MIG", "")
        axis.legend(frameon=False, fontsize=9)


def _segment_sizes(figure: Any, table: Table) -> None:
    sizes = [row["segment size"] for row in table.rows]
    panels = (("answers", ("em", "f1_max")), ("diagnostics", ("AUC of MIG", "weight on the answer")))
    for axis, (title, names) in zip(figure.subplots(1, 2), panels, strict=True):
        for name, colour, style in zip(names, COLOURS, ("-", "--"), strict=False):
            there = [(size, row[name]) for size, row in zip(sizes, table.rows, strict=True) if row[name] is not None]
            if there:
                _with_interval(axis, [size for size, _ in there], [value for _, value in there], name, colour, style)
        axis.set_xscale("log", base=2)
        axis.set_xticks(sizes, list(map(str, sizes)))
        axis.minorticks_off()
        axis.set_ylim(0, 1.03)
        _finish(axis, title, "compression.segment_size, tokens", "")
        axis.legend(frameon=False, fontsize=9)


def _memory(figure: Any, table: Table) -> None:
    axis, height = figure.subplots(), np.arange(len(table.rows), dtype=float)
    for shift, name in enumerate(("mean cosine", "largest cosine with another")):
        _bars(axis, height - 0.2 + 0.4 * shift, [row[name] for row in table.rows], name, COLOURS[shift])
    axis.set_yticks(height, [f"{row['system']}, ratio {row['ratio']:.1f}" for row in table.rows])
    axis.invert_yaxis()
    _finish(axis, "", "cosine of memory vectors", "")
    axis.legend(frameon=False, fontsize=9)


DRAWN: dict[str, Callable[[Any, Table], None]] = {
    "1a": _figure_1a,
    "1b": _figure_1b,
    "5": _table_5,
    "6": _table_6,
    "8": _table_8,
    "answer-weight": _answer_weight,
    "terms": _terms,
    "segments": _segment_sizes,
    "memory": _memory,
}
