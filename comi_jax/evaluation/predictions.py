"""Answer held-out questions, write the predictions and summarise their metrics.

Predictions are appended as JSON lines, so that a killed evaluation resumes where it stopped. The summary has the mean
and 95 % bootstrap interval of each metric, the achieved compression ratio (all context tokens over all memory vectors),
the account (means over the examples, and the range of their ratios) and the decoding options.
"""

import contextlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from rich.console import Console
from rich.progress import track

from comi_jax.config import MEASURES
from comi_jax.data.encode import Example, LengthReport
from comi_jax.data.fingerprint import fingerprint_of
from comi_jax.data.records import Record
from comi_jax.devices import compilations, distributed
from comi_jax.evaluation import metrics
from comi_jax.serving.answers import Answer

FORMAT = 2  # increment when predictions get other fields
COSTS = ("kv_bytes", "ingest_flop", "question_flop")  # of serving.account.Account, beside its entries


@runtime_checkable
class Answerer(Protocol):
    """A system under evaluation: a COMI model (``answerers``), or one that it is compared with."""

    @property
    def identity(self) -> str:
        """A hash of everything but the records that the answers depend on; empty: do not resume an earlier attempt."""
        ...

    @property
    def at_once(self) -> int:
        """The number of examples per call of ``answer``; at most so many predictions are lost if the process dies."""
        ...

    def encode(self, records: Sequence[Record]) -> tuple[list[Example], LengthReport]:
        """Tokenise ``records`` without their answers. Raises LengthError or ConfigError for what cannot be answered."""
        ...

    def answer(self, examples: Sequence[Example]) -> list[Answer]:
        """One answer per example."""
        ...

    def account(self) -> dict[str, Any]:
        """The options of answering, for the summary: rate, decoding."""
        ...


def evaluate(
    answerer: Answerer, records: Sequence[Record], output: str | os.PathLike, *, console: Console | None = None
) -> dict[str, Any]:
    """Answer ``records``, write the predictions to ``output`` (JSON Lines) and return the summary.

    Predictions of an earlier attempt with the same records and identity are reused. Several processes answer together;
    the first one writes and returns the summary, the others return {}.
    """
    examples, report = answerer.encode(records)
    part, writes = Path(f"{output}.part"), distributed.is_first()
    found: dict[int, dict[str, Any]] = {}
    if writes:
        Path(output).parent.mkdir(parents=True, exist_ok=True)
        key = f"{FORMAT} {fingerprint_of(records)} {answerer.identity}"
        found = _begin(part, key, len(records) if answerer.identity else 0)
    if found and console:
        console.print(f"resuming with {len(found)} of {len(records)} answers from {part}", highlight=False)
    left = distributed.agreed(np.array([row not in found for row in range(len(records))]))
    order = sorted(np.flatnonzero(left).tolist(), key=lambda i: len(examples[i].context))
    quiet = console is None or not console.is_terminal or not order
    with part.open("a", encoding="utf-8") if writes else contextlib.nullcontext() as lines:
        steps = range(0, len(order), answerer.at_once)
        for first in track(steps, "evaluating", console=console, disable=quiet, transient=True):
            rows = order[first : first + answerer.at_once]
            for row, answer in zip(rows, answerer.answer([examples[i] for i in rows]), strict=True):
                if lines:
                    found[row] = _prediction(row, records[row], answer)
                    lines.write(json.dumps(found[row]) + "\n")
            if lines:
                lines.flush()
            compilations.drop_if_many()
    if not writes:
        return {}
    predictions = [found[row] for row in range(len(records))]
    _finish(part, Path(output), predictions)
    vectors = sum(p["memory_vectors"] for p in predictions)
    return {
        "n": len(records),
        "records": fingerprint_of(records),
        "metrics": metrics.summarize([{name: p[name] for name in MEASURES} for p in predictions]),
        "ratio": sum(p["context_tokens"] for p in predictions) / vectors if vectors else 0.0,
        "account": account_of(predictions),
        "mean_output_tokens": sum(p["output_tokens"] for p in predictions) / len(predictions),
        **answerer.account(),
        "truncated_contexts": report.truncated_contexts if vectors else 0,
        "truncated_queries": report.truncated_queries,
    }


def account_of(predictions: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The mean account of ``predictions``, and mean, least and largest ratio of those with a context."""
    ratios = [p["context_tokens"] / p["memory_vectors"] for p in predictions if p["memory_vectors"]]
    ratio = {"mean": sum(ratios) / len(ratios), "min": min(ratios), "max": max(ratios)} if ratios else None
    means = {name: sum(p[name] for p in predictions) / len(predictions) for name in ("memory_vectors", *COSTS)}
    return {"entries": means.pop("memory_vectors"), "ratio": ratio, **means}


def _begin(part: Path, key: str, count: int) -> dict[int, dict[str, Any]]:
    """The predictions in ``part`` by index of the record, if its cache key is ``key``. Otherwise, or if ``count`` is 0,
    ``part`` is started anew. A torn last line is cut off."""
    found, whole = {}, 0
    if count and part.is_file():
        for number, line in enumerate(part.read_bytes().splitlines(keepends=True)):
            try:
                row = json.loads(line)
                good = line.endswith(b"\n") and (row["index"] in range(count) if number else row["of"] == key)
            except (ValueError, KeyError, TypeError):
                row, good = {}, False
            if not good:
                break
            whole += len(line)
            if number:
                found[row["index"]] = row
    if whole:
        os.truncate(part, whole)
    else:
        part.write_text(json.dumps({"of": key}) + "\n", encoding="utf-8")
    return found


def _finish(part: Path, output: Path, predictions: Sequence[dict[str, Any]]) -> None:
    """Write ``predictions``, in the order of the records, to ``output`` atomically, and remove ``part``."""
    draft = Path(f"{output}.draft")
    with draft.open("w", encoding="utf-8") as lines:
        lines.writelines(json.dumps(prediction, ensure_ascii=False) + "\n" for prediction in predictions)
    os.replace(draft, output)
    part.unlink()


def _prediction(number: int, record: Record, answer: Answer) -> dict[str, Any]:
    return {
        "index": number,
        "prompt": record.prompt,
        "answers": list(record.answers),
        "prediction": answer.text,
        "context_tokens": answer.context_tokens,
        "memory_vectors": answer.memory_vectors,
        "output_tokens": len(answer.tokens),
        **{name: getattr(answer.account, name) for name in COSTS},
        **metrics.score(answer.text, record.answers),
    }
