"""The paper's table 3 from measured latencies, from where on compression pays, and the picture of both."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from comi_jax.evaluation.comparison_plots import mark, new_figure, save
from comi_jax.evaluation.diagnostics import Table
from comi_jax.evaluation.latency import STAGES, SUMS, Timed
from comi_jax.evaluation.paper_figures import NOT_COMPARABLE, beside

COLOURS = {"encode": "#0072b2", "compress": "#e69f00", "prefill": "#009e73", "decode": "#999999"}
LINES = {
    ("comi", "total"): ("COMI", "-", "#0072b2"),
    ("comi", "next question"): ("COMI, next question", "--", "#0072b2"),
    ("original", "total"): ("original prompt", "-", "#d55e00"),
    ("kept", "next question"): ("KV cache kept, next question", "--", "#d55e00"),
}


def table_3(found: Sequence[tuple[str, str, int | None, Timed]], context: int, tokens: int, machine: str) -> Table:
    """The table of (name, title, rate, latency) of systems that answer one question about ``context`` tokens."""
    rows = []
    for name, title, rate, timed in found:
        row: dict[str, Any] = {"system": title, "rate": "-" if rate is None else str(rate), "entries": timed.entries}
        row |= {f"{stage}, ms": timed.spread(stage) for stage in (*STAGES, *SUMS)}
        rows.append(row | {"paper": beside("3", name, rate)})
    repeats = len(found[0][3].seconds["total"])
    notes = [
        f"one question about {context} tokens, {tokens} tokens of answer, batch 1, on {machine}",
        f"median of {repeats} [least, largest], after warm-up, compilation excluded",
        "encode: once for a document; next question: all but encode; first token: all but decode",
    ]
    notes += [NOT_COMPARABLE] if any(row["paper"] for row in rows) else []
    return Table("3", "latency of one answer", rows, notes)


def break_even(found: Mapping[int, Mapping[str, Timed]], rate: int) -> tuple[list[dict[str, Any]], list[str]]:
    """By context length, COMI beside the original prompt, read anew for each question and with a kept KV cache, and the
    number of questions about a document from which COMI is faster in all. ``found``: length -> "comi", "original",
    "kept" -> latency."""
    rows, faster = [], []
    for length, by in sorted(found.items()):
        comi, original, kept = by["comi"], by["original"], by["kept"]
        faster.append((length, comi.median("total") < original.median("total")))
        rows.append({
            "context tokens": length,
            "COMI, total, ms": comi.spread("total"),
            "original, total, ms": original.spread("total"),
            "COMI, next question, ms": comi.spread("next question"),
            "KV cache kept, next question, ms": kept.spread("next question"),
            "questions, against reading anew": questions(comi, 0.0, original.median("total")),
            "questions, against a kept KV cache": questions(comi, kept.median("encode"), kept.median("next question")),
        })  # fmt: skip
    slow = [length for length, is_faster in faster if not is_faster]
    pays = [length for length, _ in faster if not slow or length > slow[-1]]
    said = f"from {pays[0]} tokens on" if pays else f"at none of these lengths, up to {faster[-1][0]} tokens"
    return rows, [f"COMI at rate {rate} answers a first question sooner than the original prompt {said}"]


def questions(comi: Timed, before: float, each: float) -> str:
    """The number of questions about one document for which COMI takes less time than ``before`` + ``each`` a question
    seconds: "from N", "up to N", "any" or "none"."""
    behind, gain = comi.median("encode") - before, each - comi.median("next question")
    if gain > 0:  # faster for more than behind / gain questions
        least = int(np.floor(behind / gain)) + 1
        return "any" if least <= 1 else f"from {least}"
    if gain == 0:
        return "any" if behind < 0 else "none"
    most = int(np.ceil(behind / gain)) - 1
    return f"up to {most}" if most >= 1 else "none"


def plot(
    found: Sequence[tuple[str, str, int | None, Timed]], lengths: Mapping[int, Mapping[str, Timed]], path: Path
) -> None:
    """Stacked bars of the stages of each system, and totals by context length, as a PNG."""
    figure = new_figure(13.0, 5.5)
    bars, lines = figure.subplots(1, 2, width_ratios=(3, 2))
    labels = [title if rate is None else f"{title}, {rate}x" for _, title, rate, _ in found]
    left = np.zeros(len(found))
    for stage in STAGES:
        values = np.array([1e3 * timed.median(stage) for *_, timed in found])
        bars.barh(labels, values, left=left, color=COLOURS[stage], label=stage)
        left += values
    bars.invert_yaxis()
    bars.set(xlabel="milliseconds, medians")
    bars.legend(fontsize="small")
    sizes = sorted(lengths)
    for (name, what), (label, style, colour) in LINES.items() if sizes else ():
        values = [lengths[size][name].spread(what) for size in sizes]
        middle = [value["mean"] for value in values]
        error = [[v["mean"] - v["low"] for v in values], [v["high"] - v["mean"] for v in values]]
        lines.errorbar(sizes, middle, error, linestyle=style, marker="o", capsize=2, color=colour, label=label)
    lines.set(xscale="log", yscale="log", xlabel="context tokens", ylabel="milliseconds, medians with their range")
    lines.set_xticks(sizes, [str(size) for size in sizes])
    lines.minorticks_off()
    mark(lines.yaxis)
    if sizes:
        lines.legend(fontsize="small")
    for axes in (bars, lines):
        axes.grid(alpha=0.3)
    save(figure, path)
