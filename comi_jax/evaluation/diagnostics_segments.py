"""How much the size of the segments that are compressed on their own matters, at one rate."""

import os
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console

from comi_jax.data.records import Record
from comi_jax.evaluation.answerers import ComiAnswerer
from comi_jax.evaluation.diagnostics import RESAMPLES, Subject, Table, anatomies
from comi_jax.evaluation.diagnostics_auc import measure_5, scored
from comi_jax.evaluation.diagnostics_tables import measure_answer_weight
from comi_jax.evaluation.metrics import summarize
from comi_jax.evaluation.predictions import evaluate
from comi_jax.serving.compressor import Comi


def default_sizes(trained: int, longest: int, rate: int) -> list[int]:
    """The sizes to try: the smallest half, quarter, ... of ``trained`` that no context exceeds, ``trained`` itself if
    some exceed its half; and its half, quarter and eighth, while a segment is more than one group."""
    largest = trained
    while largest // 2 >= longest:
        largest //= 2
    return sorted({size for size in (largest // 2**k for k in range(4)) if size > rate} | {largest})


def segment_sizes(
    models: Mapping[int, Comi],
    records: Sequence[Record],
    subjects: Sequence[Subject],
    rate: int,
    output: str | os.PathLike,
    *,
    weights: str = "",
    trained: int = 0,
    console: Console | None = None,
) -> Table:
    """Accuracy, achieved ratio and diagnostics of ``models``, one for each segment size. ``output`` is a folder for
    the predictions; ``weights`` a hash by which those of an earlier attempt are reused; ``trained`` the size that the
    model was trained with."""
    rows, longest = [], max(len(subject.example.context) for subject in subjects)
    for size, model in sorted(models.items()):
        path = os.path.join(output, f"predictions_segment_{size}.jsonl")
        result = evaluate(ComiAnswerer(model, weights, rate), records, path, console=console)
        singles, shares, segments = [], [], 0
        for anatomy in anatomies(model, subjects, rate):
            segments += int(anatomy.segment[-1]) + 1
            measures = measure_5(anatomy), measure_answer_weight(anatomy)
            singles += scored(measures[0], "initial")
            shares += [{"weight": measures[1]["COMI"]}] if measures[1]["status"] == "found" else []
        rows.append(
            {
                "segment size": size,
                "as trained": min(size, longest) == min(trained, longest),
                "segments, mean": segments / len(subjects),
                "em": result["metrics"]["em"],
                "f1_max": result["metrics"]["f1_max"],
                "ratio": result["ratio"],
                "AUC of MIG": _mean(singles, "MIG"),
                "AUC of relevance": _mean(singles, "relevance"),
                "weight on the answer": _mean(shares, "weight"),
            }
        )
    notes = [
        f"{len(records)} examples at rate {rate}; AUC and weight on the answer (tables 5 and answer-weight) over those "
        "that have one",
        f"the model was trained with {trained}; sizes from the longest context up, {longest} tokens, are the same",
        "the paper's own word segment is our group, whose size is the rate: vary --rate for that",
    ]
    return Table("segments", "Sensitivity to the segment size", rows, notes)


def _mean(values: Sequence[dict[str, float]], name: str) -> dict[str, Any] | None:
    return summarize([{name: value[name]} for value in values], resamples=RESAMPLES)[name] if values else None
