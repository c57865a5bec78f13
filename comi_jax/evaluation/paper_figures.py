"""Numbers that the paper prints, to stand beside ours. They are of other data and far larger models: not comparable.

In percent, except seconds. Figure 4 was read from its picture, to about one point. The diagnostics have their own:
``diagnostics_attention``, ``diagnostics_auc``.
"""

from typing import NamedTuple

NOT_COMPARABLE = "the paper's figures are of other data and models: not comparable"


class Figure(NamedTuple):
    """One number of the paper, of ``system`` (a name of ours) at ``rate`` (None: it has none)."""

    table: str  # "1", ..., "figure 4"
    system: str
    rate: int | None
    what: str  # data set, metric and model
    value: float


FIGURES = (
    Figure("1", "comi", 32, "EM, NQ, Qwen2-7B", 49.15),
    Figure("figure 4", "comi", 2, "EM, NQ, Qwen2-7B", 70.5),
    Figure("figure 4", "comi", 4, "EM, NQ, Qwen2-7B", 69.3),
    Figure("figure 4", "comi", 8, "EM, NQ, Qwen2-7B", 64.2),
    Figure("figure 4", "comi", 16, "EM, NQ, Qwen2-7B", 57.5),
    Figure("figure 4", "comi", 32, "EM, NQ, Qwen2-7B", 47.5),
    Figure("3", "comi", 32, "seconds to compress, NarrativeQA", 2.76),
    Figure("3", "comi", 32, "seconds to generate, NarrativeQA", 0.50),
    Figure("4", "original", None, "F1, NQ, Qwen3-4B", 16.90),
    Figure("4", "comi", 16, "F1, NQ, Qwen3-4B", 34.79),
    Figure("4", "comi", 32, "F1, NQ, Qwen3-4B", 28.89),
    Figure("9", "original", None, "F1, NarrativeQA, Qwen3-4B", 10.69),
    Figure("9", "comi", 16, "F1, NarrativeQA, Qwen3-4B", 22.79),
)
TABLES = {"1": ("1", "figure 4"), "7": ("1", "figure 4")}  # of our tables, where the paper has its numbers


def beside(table: str, system: str, rate: int | None) -> str:
    """What the paper prints of ``system`` at ``rate`` in what our ``table`` corresponds to; empty: nothing."""
    wanted = TABLES.get(table, (table,))
    found = [f for f in FIGURES if f.table in wanted and (f.system, f.rate) == (system, rate)]
    return "; ".join(f"{f.value:.2f} ({f.what}{', figure 4' if f.table == 'figure 4' else ''})" for f in found)
