"""The rows of a comparison over seeds: means with lowest and highest seed, and paired differences to a reference."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from comi_jax.config import MEASURES
from comi_jax.evaluation import metrics
from comi_jax.evaluation.comparison import Row, predictions_of
from comi_jax.evaluation.predictions import COSTS

SPREAD = "brackets: 95 % bootstrap intervals over the questions; of several seeds, the lowest and the highest seed"


def joined(rows: Sequence[Row], folder: Path, reference: str) -> list[Row]:
    """One row for each system and rate, in the order of ``rows``, with its difference to the rows of ``reference`` (a
    system's name; empty: none). ``folder`` has the predictions of ``rows``.

    The metrics of several seeds are their mean, and the lowest and highest of them as ``low`` and ``high``.
    """
    groups: dict[tuple[str, int | None], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.name, row.rate), []).append(row)
    scores = (
        {key: _scores(folder, group) for key, group in groups.items() if not any(row.refused for row in group)}
        if reference
        else {}
    )
    found = []
    for (name, rate), group in groups.items():
        refused = next((row for row in group if row.refused), None)
        seeds = tuple(row.seed for row in group if row.seed is not None)
        row = refused or (group[0] if len(group) == 1 else dataclasses.replace(group[0], result=_mean(group)))
        differences = {
            str(other): _difference(scores[name, rate], scores[reference, other])
            for (against, other) in scores
            if against == reference != name and rate in (None, other) and (name, rate) in scores
        }
        found.append(dataclasses.replace(row, seed=None, seeds=seeds, differences=differences))
    return found


def _mean(rows: Sequence[Row]) -> dict[str, Any]:
    """The summary of one system with several seeds."""
    accounts, first = [row.result["account"] for row in rows], rows[0].result
    account = {name: float(np.mean([a[name] for a in accounts])) for name in ("entries", *COSTS)}
    ratios = [a["ratio"] for a in accounts if a["ratio"]]
    ends = {"mean": np.mean, "min": min, "max": max}
    ratio = {end: float(of([r[end] for r in ratios])) for end, of in ends.items()} if ratios else None
    values = {name: [row.result["metrics"][name]["mean"] for row in rows] for name in first["metrics"]}
    return {
        "n": first["n"],
        "records": first["records"],
        "metrics": {
            name: {"mean": float(np.mean(v)), "low": min(v), "high": max(v), "n": first["n"], "seeds": len(v)}
            for name, v in values.items()
        },
        "account": account | {"ratio": ratio},
    }


def _scores(folder: Path, rows: Sequence[Row]) -> list[dict[str, float]]:
    """The metrics of each question, means over the seeds."""
    seeds = [predictions_of(folder, row) for row in rows]
    return [{name: float(np.mean([p[name] for p in of])) for name in MEASURES} for of in zip(*seeds, strict=True)]


def _difference(scores: Sequence[Mapping[str, float]], others: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    """``scores`` minus ``others``, question by question, with the bootstrap interval of their mean."""
    pairs = zip(scores, others, strict=True)
    return metrics.summarize([{name: a[name] - b[name] for name in MEASURES} for a, b in pairs])
