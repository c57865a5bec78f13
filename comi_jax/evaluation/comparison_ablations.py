"""The paper's table 2: COMI without each of its steps, trained without it and switched off on one checkpoint.

The paper does not say which of the two its table is.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from comi_jax.evaluation.comparison import Row
from comi_jax.evaluation.comparison_seeds import SPREAD
from comi_jax.evaluation.diagnostics import Table

OFF = "_off"  # suffix of the name of a system that is switched off on COMI's checkpoint


def table_2(rows: Sequence[Row], titles: Mapping[str, str]) -> Table:
    """The table of joined ``rows`` of comparison: "comi", and each of ``titles`` as NAME (trained) or NAME_off."""
    found = {(row.name, row.rate): row for row in rows if not row.refused}
    rates = list(dict.fromkeys(row.rate for row in rows))
    lines = []
    for name, title in {"comi": "COMI", **titles}.items():
        for rate in rates:
            pair = {"trained": found.get((name, rate)), "switched off": found.get((name + OFF, rate))}
            if any(pair.values()):
                label = next(row.label for row in pair.values() if row)
                cells = [_cells(how, row) for how, row in pair.items()]
                trained, whole = pair["trained"], found.get(("comi", rate))
                same = name != "comi" and trained and whole and trained.folder == whole.folder
                lines.append(
                    {"system": f"{title} (COMI's own)" if same else title, "rate": label, **cells[0], **cells[1]}
                )
    notes = [
        SPREAD,
        "trained: a run of its own without the step; switched off: without it on the checkpoint of COMI",
        "minus COMI: paired over the questions, with 95 % bootstrap intervals",
        *(f"{row.title} at {row.label}: {row.refused}" for row in rows if row.refused),
    ]
    if any(row.untrained for row in rows):
        notes.append("* a rate that the system was not trained at")
    return Table("2", f"{next(iter(found.values())).result['n']} questions", lines, notes)


def _cells(how: str, row: Row | None) -> dict[str, Any]:
    values: list[Any] = [None, None, None]
    if row:
        measured, difference = row.result["metrics"], row.differences.get(str(row.rate))
        values = [measured["em"], measured["f1_first"], difference["em"] if difference else None]
    return dict(zip((f"EM, {how}", f"F1, {how}", f"EM minus COMI, {how}"), values, strict=True))
