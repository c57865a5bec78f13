"""Several systems on the same questions at several rates: the rows of the paper's tables 1 and 7.

Every row has its predictions and its summary in files of its own. A row whose cache key (records, weights, options) is
unchanged is taken over by the next comparison; any other is evaluated again.
"""

import dataclasses
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from comi_jax.config import MEASURES
from comi_jax.data.encode import LengthError
from comi_jax.data.fingerprint import fingerprint_of
from comi_jax.data.records import Record
from comi_jax.evaluation import metrics
from comi_jax.evaluation.predictions import FORMAT, Answerer, evaluate


@dataclass(frozen=True)
class Contender:
    """A system of a comparison. ``answerer(rate)`` is it at a rate, None for a system that has none."""

    name: str
    title: str
    answerer: Callable[[int | None], Answerer]
    rated: bool = True
    trained: tuple[int, ...] | None = None  # the rates that it was trained at; None: it needs no training


@dataclass(frozen=True)
class Row:
    """A system at a rate: the summary of its evaluation, or why there is none."""

    name: str
    title: str
    rate: int | None
    untrained: bool  # a trained system at a rate that it was not trained at
    result: Mapping[str, Any]
    refused: str = ""
    differences: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # to the reference, by its rate

    @property
    def label(self) -> str:
        return "-" if self.rate is None else f"{self.rate}{'*' if self.untrained else ''}"


def compare(
    contenders: Sequence[Contender],
    rates: Sequence[int],
    records: Sequence[Record],
    folder: Path,
    reference: str,
    console: Console,
) -> list[Row]:
    """The rows of ``contenders`` at ``rates``, with their differences to the rows of ``reference`` (a contender's name;
    empty: none) in paired bootstraps. Writes into ``folder``."""
    rows = []
    for contender in contenders:
        for rate in rates if contender.rated else (None,):
            untrained = contender.trained is not None and rate not in contender.trained
            place = _place(folder, contender.name, rate)
            answerer = contender.answerer(rate)
            try:
                answerer.encode(records)
            except LengthError as error:
                rows.append(Row(contender.name, contender.title, rate, untrained, {}, str(error)))
                console.print(f"{contender.title} at {rows[-1].label}: refused: {error}", highlight=False)
                continue
            rows.append(
                Row(contender.name, contender.title, rate, untrained, _evaluated(answerer, records, place, console))
            )
            em = rows[-1].result["metrics"]["em"]["mean"]
            console.print(f"{contender.title} at {rows[-1].label}: em {em:.3f}", highlight=False)
    return [dataclasses.replace(row, differences=_differences(row, rows, folder, reference)) for row in rows]


def _place(folder: Path, name: str, rate: int | None) -> Path:
    return folder / "predictions" / (name if rate is None else f"{name}_{rate}x")


def _evaluated(answerer: Answerer, records: Sequence[Record], place: Path, console: Console) -> dict[str, Any]:
    """The summary of ``answerer``: the one at ``place``, if it is of the same records and identity."""
    summary, predictions = (place.with_name(f"{place.name}.{suffix}") for suffix in ("json", "jsonl"))
    key = f"{FORMAT} {fingerprint_of(records)} {answerer.identity}"
    if answerer.identity and summary.is_file() and predictions.is_file():
        found = json.loads(summary.read_text(encoding="utf-8"))
        if found["of"] == key:
            return found["result"]
        console.print(f"{summary} is of other records, weights or options: evaluated again", highlight=False)
    result = evaluate(answerer, records, predictions, console=console)
    draft = Path(f"{summary}.draft")
    draft.write_text(json.dumps({"of": key, "result": result}, indent=2) + "\n", encoding="utf-8")
    os.replace(draft, summary)
    return result


def _scores(folder: Path, row: Row) -> list[dict[str, float]]:
    lines = Path(f"{_place(folder, row.name, row.rate)}.jsonl").read_text(encoding="utf-8").splitlines()
    return [{name: prediction[name] for name in MEASURES} for prediction in map(json.loads, lines)]


def _differences(row: Row, rows: Sequence[Row], folder: Path, reference: str) -> dict[str, Any]:
    """By rate of the reference: metrics of ``row`` minus the reference's, question by question, with the interval of
    their mean. A row with a rate is compared with the reference at that rate alone."""
    found = {}
    for other in rows:
        same = row.rate in (None, other.rate)
        if other.name == reference and row.name != reference and same and not (row.refused or other.refused):
            pairs = zip(_scores(folder, row), _scores(folder, other), strict=True)
            found[str(other.rate)] = metrics.summarize([{n: a[n] - b[n] for n in MEASURES} for a, b in pairs])
    return found
