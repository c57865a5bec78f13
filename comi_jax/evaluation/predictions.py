"""Held-out questions answered and measured.

Every prediction is written as a JSON line as it comes, and an evaluation that was killed goes on where it was. The
summary has the mean and a 95 % bootstrap interval of each metric, the achieved compression ratio (all context tokens
over all memory vectors) and the decoding options.
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
from comi_jax.devices import distributed
from comi_jax.evaluation import metrics
from comi_jax.serving.compressor import Answer


@runtime_checkable
class Answerer(Protocol):
    """Who answers examples: a COMI model (``answerers``), or a system that it is compared with."""

    @property
    def identity(self) -> str:
        """A short name for all that its answers depend on beside the examples; empty: no answer of an earlier attempt
        is taken over."""
        ...

    @property
    def at_once(self) -> int:
        """How many examples to ask it at a time: the predictions of so many are lost when the process dies."""
        ...

    def encode(self, records: Sequence[Record]) -> tuple[list[Example], LengthReport]:
        """``records`` as examples without their answers. Raises LengthError or ConfigError for what it cannot answer,
        before any work."""
        ...

    def answer(self, examples: Sequence[Example]) -> list[Answer]:
        """Its answers, one for each of ``examples``."""
        ...

    def account(self) -> dict[str, Any]:
        """How it answered, for the summary: rate, decoding."""
        ...


def evaluate(
    answerer: Answerer, records: Sequence[Record], output: str | os.PathLike, *, console: Console | None = None
) -> dict[str, Any]:
    """Let ``answerer`` answer ``records``, write its predictions to ``output`` (JSON Lines) and return the summary.

    What an earlier attempt of the same identity has answered is taken over. Several processes answer together; the
    first one writes and returns, the others return {}.
    """
    examples, report = answerer.encode(records)
    part, writes = Path(f"{output}.part"), distributed.is_first()
    found: dict[int, dict[str, Any]] = {}
    if writes:
        Path(output).parent.mkdir(parents=True, exist_ok=True)
        of = f"{fingerprint_of(records)} {answerer.identity}"
        found = _begin(part, of, len(records) if answerer.identity else 0)
    if found and console:
        console.print(f"{len(found)} of {len(records)} answers were there already, in {part}", highlight=False)
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
        "mean_output_tokens": sum(p["output_tokens"] for p in predictions) / len(predictions),
        **answerer.account(),
        "truncated_contexts": report.truncated_contexts if vectors else 0,
        "truncated_queries": report.truncated_queries,
    }


def _begin(part: Path, of: str, count: int) -> dict[int, dict[str, Any]]:
    """The predictions in ``part`` by record, if they are of this evaluation and ``count`` is not 0; afterwards ``part``
    holds its first line and them. A last line that is torn is cut off."""
    found, whole = {}, 0
    if count and part.is_file():
        for number, line in enumerate(part.read_bytes().splitlines(keepends=True)):
            try:
                row = json.loads(line)
                good = line.endswith(b"\n") and (row["index"] in range(count) if number else row["of"] == of)
            except (ValueError, KeyError, TypeError):
                good = False
            if not good:
                break
            whole += len(line)
            if number:
                found[row["index"]] = row
    if whole:
        os.truncate(part, whole)
    else:
        part.write_text(json.dumps({"of": of}) + "\n", encoding="utf-8")
    return found


def _finish(part: Path, output: Path, predictions: Sequence[dict[str, Any]]) -> None:
    """``predictions`` in the order of the records as ``output``, at once; ``part`` goes."""
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
        **metrics.score(answer.text, record.answers),
    }
