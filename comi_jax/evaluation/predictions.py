"""Held-out questions answered and measured.

Every prediction is written as a JSON line as it comes, and an evaluation that was killed goes on where it was. The
summary has the mean and a 95 % bootstrap interval of each metric, the achieved compression ratio (all context tokens
over all memory vectors) and the decoding options.
"""

import contextlib
import dataclasses
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from rich.console import Console
from rich.progress import track

from comi_jax.config import MEASURES, Generation
from comi_jax.data import encode
from comi_jax.data.records import Record
from comi_jax.devices import distributed
from comi_jax.evaluation import metrics
from comi_jax.serving.compressor import Answer, Comi


def evaluate(
    model: Comi,
    records: Sequence[Record],
    output: str | Path,
    *,
    rate: int | None = None,
    options: Generation | None = None,
    closed_book: bool = False,
    weights: str = "",
    console: Console | None = None,
) -> dict[str, Any]:
    """Answer ``records``, write predictions to ``output`` (JSON Lines) and return the summary.

    ``closed_book`` withholds the contexts: the same decoder answers from the question alone. ``weights`` identifies the
    model's weights: what an earlier attempt with the same ones, and all else equal, has answered is taken over; if
    empty, nothing is. Several processes answer together; the first one writes and returns, the others return {}.
    """
    options = options or model.run.config.generation
    data = model.run.config.data
    examples, report = encode.encode(records, model.tokenizer, data, targets=False)
    if closed_book:
        examples = [dataclasses.replace(e, context=e.context[:0]) for e in examples]
    model.check(examples, rate, options.max_new_tokens)
    part, writes = Path(f"{output}.part"), distributed.is_first()
    found: dict[int, dict[str, Any]] = {}
    if writes:
        Path(output).parent.mkdir(parents=True, exist_ok=True)
        of = _identity(records, model, weights, rate, options, closed_book)
        found = _begin(part, of, len(records) if weights else 0)
    if found and console:
        console.print(f"{len(found)} of {len(records)} answers were there already, in {part}", highlight=False)
    left = distributed.agreed(np.array([row not in found for row in range(len(records))]))
    order = sorted(np.flatnonzero(left).tolist(), key=lambda i: len(examples[i].context))
    chunk = model.batch_size * 8
    quiet = console is None or not console.is_terminal or not order
    with part.open("a", encoding="utf-8") if writes else contextlib.nullcontext() as lines:
        for first in track(range(0, len(order), chunk), "evaluating", console=console, disable=quiet, transient=True):
            rows = order[first : first + chunk]
            for row, answer in zip(rows, model.generate([examples[i] for i in rows], rate, options), strict=True):
                if writes:
                    found[row] = _prediction(row, records[row], answer)
                    lines.write(json.dumps(found[row]) + "\n")
            if writes:
                lines.flush()
    if not writes:
        return {}
    predictions = [found[row] for row in range(len(records))]
    _finish(part, Path(output), predictions)
    vectors = sum(p["memory_vectors"] for p in predictions)
    return {
        "n": len(records),
        "records": _fingerprint(records),
        "metrics": metrics.summarize([{name: p[name] for name in MEASURES} for p in predictions]),
        "ratio": sum(p["context_tokens"] for p in predictions) / vectors if vectors else 0.0,
        "mean_output_tokens": sum(p["output_tokens"] for p in predictions) / len(predictions),
        "rate": None if closed_book else rate or model.run.config.compression.rates[0],
        "closed_book": closed_book,
        "decoding": {"method": "greedy", **dataclasses.asdict(options)},
        "truncated_contexts": 0 if closed_book else report.truncated_contexts,
        "truncated_queries": report.truncated_queries,
    }


def _identity(records: Sequence[Record], model: Comi, *others: Any) -> str:
    """All that the predictions depend on, as a short name."""
    return _fingerprint(records, (model.run, others))


def _fingerprint(records: Sequence[Record], beside: Any = None) -> str:
    """A short name for ``records`` in their order, and what stands ``beside`` them."""
    of = xxhash.xxh3_128(repr(beside).encode())
    for record in records:
        of.update(repr(record).encode("utf-8", "surrogatepass"))
    return of.hexdigest()


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
