"""The curve of a calibration, accuracy against ratio, as PNG. matplotlib, an extra, is imported only here."""

import io
from collections.abc import Mapping
from typing import Any

import numpy as np

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#555555")  # a colour-blind-safe palette


def draw(report: Mapping[str, Any], caption: str) -> bytes | None:
    """The curve of a calibration's ``report`` with ``caption`` below; None if matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return None
    figure = Figure(figsize=(9, 5.5), dpi=120, layout="constrained")
    axis, more = figure.subplots(), report["more"]
    fixed, curve, floor = more["fixed"], more["curve"], more["floor"]
    cost, accuracy = ([policy[name] for policy in fixed] for name in ("per_token", "accuracy"))
    _points(axis, cost, accuracy, "fixed rates", COLOURS[0], "o", "none")
    between = np.linspace(min(cost), max(cost), 400)
    axis.plot(1 / between, _best_mixture(between, cost, accuracy), color=COLOURS[0], linestyle="--", linewidth=1.2,
              label="random choice between two of them")  # fmt: skip
    x, mean, low, high = zip(
        *((1 / p["per_token"], *(p["accuracy"][end] for end in ("mean", "low", "high"))) for p in curve), strict=True
    )
    axis.plot(x, mean, color=COLOURS[1], linewidth=1.6, label="auto, by its price")
    axis.fill_between(x, low, high, color=COLOURS[1], alpha=0.15, linewidth=0)
    for policy in curve:
        if policy["price"] == more["chosen"]:
            _points(
                axis, [policy["per_token"]], [policy["accuracy"]], "auto, within the floor", COLOURS[1], "s", "none"
            )
    axis.axhline(accuracy[0]["mean"] - floor, color=COLOURS[3], linestyle=":", linewidth=1.2,
                 label=f"the lowest rate's accuracy minus the floor, {floor:g}")  # fmt: skip
    axis.set_xscale("log", base=2)
    ratios = [1 / each for each in cost]
    axis.set_xticks(ratios, [f"{ratio:.1f}" for ratio in ratios])
    axis.minorticks_off()
    axis.set_xlabel("achieved ratio: context tokens per memory vector", fontsize=9)
    axis.set_ylabel(f"{more['metric']}, 95 % interval", fontsize=9)
    axis.tick_params(labelsize=9)
    axis.grid(color="#e4e4e4", linewidth=0.7)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(loc="lower left", bbox_to_anchor=(0, 1.0), frameon=False, fontsize=9, ncols=2)
    figure.suptitle(report["title"], x=0.02, ha="left", fontsize=12, fontweight="bold")
    figure.supxlabel(caption, x=0.98, ha="right", fontsize=8, color="#555")
    picture = io.BytesIO()
    figure.savefig(picture, format="png")
    return picture.getvalue()


def _points(axis: Any, cost: list[float], values: list[dict[str, float]], label: str, colour: str, marker: str,
            line: str) -> None:  # fmt: skip
    mean = [value["mean"] for value in values]
    spread = np.abs([[v["mean"] - v["low"] for v in values], [v["high"] - v["mean"] for v in values]])
    axis.errorbar([1 / each for each in cost], mean, spread, color=colour, linestyle=line, marker=marker, markersize=6,
                  capsize=3, label=label, zorder=4)  # fmt: skip


def _best_mixture(per_token: np.ndarray, cost: list[float], accuracy: list[dict[str, float]]) -> np.ndarray:
    """The accuracy of the best random choice between two fixed rates with ``per_token`` vectors per context token: the
    upper concave hull of the fixed rates."""
    mean = [value["mean"] for value in accuracy]
    lines = []
    for a in range(len(cost)):
        for b in range(a + 1, len(cost)):
            inside = (per_token <= cost[a]) & (per_token >= cost[b])
            share = (per_token - cost[b]) / (cost[a] - cost[b])
            lines.append(np.where(inside, share * mean[a] + (1 - share) * mean[b], -1.0))
    return np.max(lines, axis=0)
