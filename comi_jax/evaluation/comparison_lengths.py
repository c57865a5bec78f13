"""The paper's tables 4 and 9: systems on several data sets, and on contexts of several lengths."""

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from comi_jax.errors import ConfigError
from comi_jax.evaluation import metrics
from comi_jax.evaluation.comparison import Row, predictions_of
from comi_jax.evaluation.diagnostics import Table
from comi_jax.evaluation.paper_figures import NOT_COMPARABLE, beside

METRICS = {"em": "EM, strict", "f1_first": "F1, first reference", "f1_max": "F1, best reference"}
BINS = (4096, 8192, 16384, 32768, 65536)  # tokens, of table 9


def bins_of(lengths: Sequence[int], ends: Sequence[int]) -> dict[str, list[int]]:
    """The indices of ``lengths`` by bin: up to each of ``ends``, and beyond the last. Bins may be empty. Raises
    ConfigError unless ``ends`` rise."""
    if list(ends) != sorted(ends):
        raise ConfigError(f"the bins {','.join(map(str, ends))} do not rise; give rising lengths in tokens")
    edges = [*ends, max([*lengths, ends[-1]])]
    labels = [f"{first + 1} to {end}" for first, end in itertools.pairwise([0, *ends])] + [f"over {ends[-1]}"]
    places = np.searchsorted(edges, lengths)
    return {label: np.flatnonzero(places == i).tolist() for i, label in enumerate(labels)}


def by_group(
    name: str, what: str, rows: Sequence[Row], folder: Path, groups: Mapping[str, Sequence[int]],
    lengths: Sequence[int], longest: int,
) -> Table:  # fmt: skip
    """The table ``name``: the ``rows`` of a comparison, whose predictions are in ``folder``, on each of ``groups`` of
    questions. ``lengths`` are the tokens of whole contexts, of which systems read at most ``longest``. Several seeds of
    a system are averaged question by question."""
    systems: dict[tuple[str, int | None], list[Row]] = {}
    for row in rows:
        systems.setdefault((row.name, row.rate), []).append(row)
    lines = []
    for of in systems.values():
        if any(row.refused for row in of):
            continue
        seeds = [predictions_of(folder, row) for row in of]
        for label, members in groups.items():
            if members:
                chosen = [[seed[i] for i in members] for seed in seeds]
                lines.append({"system": of[0].title, "rate": of[0].label, what: label, **_cells(chosen)})
                lines[-1]["truncated"] = sum(lengths[i] > longest for i in members)
                lines[-1]["paper, %"] = beside(name, of[0].name, of[0].rate)
    empty = [label for label, members in groups.items() if not members]
    notes = ["brackets: 95 % bootstrap intervals over the questions, of the mean over the seeds"]
    notes += [f"no question has a context of {', '.join(empty)} tokens"] if empty else []
    notes += ["* a rate that the system was not trained at"] if any(row.untrained for row in rows) else []
    notes += [NOT_COMPARABLE] if any(line["paper, %"] for line in lines) else []
    notes += [f"{row.title} at {row.label}: {row.refused}" for row in rows if row.refused]
    title = f"{len(lengths)} questions with contexts of {min(lengths)} to {max(lengths)} tokens"
    return Table(name, title, lines, notes)


def _cells(seeds: Sequence[Sequence[Mapping[str, Any]]]) -> dict[str, Any]:
    """The metrics of a system's predictions of some questions, and how much it read."""
    pairs = list(zip(*seeds, strict=True))
    scores = [{name: float(np.mean([p[name] for p in of])) for name in METRICS} for of in pairs]
    values = metrics.summarize(scores)
    vectors = [p["memory_vectors"] for of in pairs for p in of]
    return {
        "n": len(pairs),
        **{heading: values[name] for name, heading in METRICS.items()},
        "entries": float(np.mean(vectors)),
    }
