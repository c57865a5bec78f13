"""Several systems on the same questions at several rates: the rows of the paper's tables 1, 2, 4, 7 and 9.

Every row has its predictions and its summary in files of its own. A row whose cache key (records, version, weights and
options) is unchanged is taken over by the next comparison; any other is evaluated again. Rows of a system that was
trained with several seeds are joined by ``comparison_seeds``.
"""

import dataclasses
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from comi_jax.data.encode import LengthError
from comi_jax.data.fingerprint import fingerprint_of
from comi_jax.data.records import Record
from comi_jax.evaluation.predictions import FORMAT, Answerer, evaluate
from comi_jax.version import __version__


@dataclass(frozen=True)
class Contender:
    """A system of a comparison, trained with ``seed`` if it is trained. ``open()`` loads it and gives the function from
    a rate (None for a system that has none) to the system at that rate."""

    name: str
    title: str
    open: Callable[[], Callable[[int | None], Answerer]]
    rated: bool = True
    trained: tuple[int, ...] | None = None  # the rates that it was trained at; None: it needs no training
    seed: int | None = None
    folder: str = ""  # of its training run

    @property
    def label(self) -> str:
        return self.title if self.seed is None else f"{self.title}, seed {self.seed},"


@dataclass(frozen=True)
class Row:
    """A system at a rate: the summary of its evaluation, or why there is none."""

    name: str
    title: str
    rate: int | None
    untrained: bool  # a trained system at a rate that it was not trained at
    result: Mapping[str, Any]
    refused: str = ""
    seed: int | None = None  # of its training; None: untrained, or a checkpoint that was given
    folder: str = ""  # of its training run
    seeds: tuple[int, ...] = ()  # that ``result`` is the mean of (``comparison_seeds``)
    differences: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # to the reference, by its rate

    @property
    def label(self) -> str:
        return "-" if self.rate is None else f"{self.rate}{'*' if self.untrained else ''}"


def compare(
    contenders: Sequence[Contender], rates: Sequence[int], records: Sequence[Record], folder: Path, console: Console
) -> list[Row]:
    """The rows of ``contenders`` at ``rates``. Writes into ``folder``. One contender is loaded at a time."""
    rows = []
    for contender in contenders:
        answerer_at = contender.open()
        for rate in rates if contender.rated else (None,):
            untrained = contender.trained is not None and rate not in contender.trained and contender.rated
            row = Row(
                contender.name, contender.title, rate, untrained, {}, seed=contender.seed, folder=contender.folder
            )
            answerer = answerer_at(rate)
            try:
                answerer.encode(records)
            except LengthError as error:
                rows.append(dataclasses.replace(row, refused=str(error)))
                console.print(f"{contender.label} at {row.label}: refused: {error}", highlight=False)
                continue
            result = _evaluated(answerer, records, place(folder, row), console)
            rows.append(dataclasses.replace(row, result=result))
            console.print(
                f"{contender.label} at {row.label}: em {result['metrics']['em']['mean']:.3f}", highlight=False
            )
    return rows


def place(folder: Path, row: Row) -> Path:
    """The path of the files of ``row``, without their suffix."""
    seed = "" if row.seed is None else f"_seed{row.seed}"
    return folder / "predictions" / f"{row.name}{seed}{'' if row.rate is None else f'_{row.rate}x'}"


def predictions_of(folder: Path, row: Row) -> list[dict[str, Any]]:
    """The predictions of ``row``, in the order of the records."""
    return [json.loads(line) for line in _with(place(folder, row), "jsonl").read_text(encoding="utf-8").splitlines()]


def _with(path: Path, suffix: str) -> Path:
    return path.with_name(f"{path.name}.{suffix}")


def _evaluated(answerer: Answerer, records: Sequence[Record], path: Path, console: Console) -> dict[str, Any]:
    """The summary of ``answerer``: the one at ``path``, if it is of the same records, version and identity."""
    summary, predictions = (_with(path, suffix) for suffix in ("json", "jsonl"))
    key = {
        "records": fingerprint_of(records),
        "version of comi_jax": f"{__version__}, format {FORMAT}",
        "weights or options": answerer.identity,
    }
    if answerer.identity and summary.is_file() and predictions.is_file():
        found = json.loads(summary.read_text(encoding="utf-8"))
        before = found["of"] if isinstance(found["of"], dict) else {}  # version 0.1 wrote one text
        other = [name for name in key if before.get(name) != key[name]]
        if not other:
            return found["result"]
        console.print(f"{summary} is of other {' and '.join(other)}: evaluated again", highlight=False)
    result = evaluate(answerer, records, predictions, console=console)
    draft = Path(f"{summary}.draft")
    draft.write_text(json.dumps({"of": key, "result": result}, indent=2) + "\n", encoding="utf-8")
    os.replace(draft, summary)
    return result
