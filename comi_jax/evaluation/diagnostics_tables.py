"""The paper's tables 6 and 8, and the merge weight of the answer, from the anatomies of examples.

Each table is a ``measure`` of one anatomy, which keeps only numbers, and a ``summary`` of the measures of all.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from comi_jax.evaluation.diagnostics import RESAMPLES, Anatomy, Groups, Table, check_answers, counts
from comi_jax.evaluation.metrics import summarize

RETENTION = (10, 25, 50, 75, 100)  # percent of the groups
VECTORS = ("representatives", "merged vectors")


# --- table 6: how alike the groups are that a score would keep --------------------------------------------------------


def mean_cosine(vectors: Float[np.ndarray, "N D"]) -> float:
    """The mean cosine of two different ones of ``vectors``; 0 if there are fewer than two."""
    count = len(vectors)
    if count < 2:
        return 0.0
    wide = vectors.astype(np.float64)
    unit = wide / np.maximum(np.linalg.norm(wide, axis=1, keepdims=True), 1e-12)
    return float((np.square(unit.sum(axis=0)).sum() - np.square(unit).sum()) / (count * (count - 1)))


def measure_6(anatomy: Anatomy) -> dict[str, float]:
    """The mean cosine of the vectors that MIG and relevance keep, by kind of vector, percent kept and score. A merged
    vector has the scores of the initial group that its tokens were allocated to."""
    every, filled, found = np.ones(len(anatomy.allocated), bool), anatomy.allocated > 0, {}
    kinds = ((VECTORS[0], every, anatomy.representatives), (VECTORS[1], filled, anatomy.merged))
    for kind, there, vectors in kinds:
        for name, scores in (("MIG", anatomy.initial.mig), ("relevance", anatomy.initial.relevance)):
            order = np.argsort(-scores[there], kind="stable")
            for percent in RETENTION:
                kept = order[: -(-percent * len(order) // 100)]
                # Summed in the order of the context, so that both scores give the same number where they keep the same.
                found[f"{kind} {percent} {name}"] = mean_cosine(vectors[np.sort(kept)])
    return found


def summary_6(measures: Sequence[dict[str, float]]) -> Table:
    """Table 6."""
    rows, equal = [], True
    for kind in VECTORS:
        for percent in RETENTION:
            pairs = [[row[f"{kind} {percent} {name}"] for name in ("MIG", "relevance")] for row in measures]
            named = [{"by MIG": a, "by relevance": b, "MIG minus relevance": a - b} for a, b in pairs]
            rows.append({"of": kind, "retention": percent / 100, **summarize(named, resamples=RESAMPLES)})
            equal &= percent < 100 or all(a == b for a, b in pairs)
    notes = [
        f"{len(measures)} examples; at retention 1 both scores keep everything and must be equal: "
        f"{'they are, in every example' if equal else 'THEY ARE NOT'}",
        "merged vectors are those before the LSA; the cosine of fewer than two vectors counts as 0",
    ]
    return Table("6", "Table 6: mean pairwise cosine of what is kept", rows, notes, {"equal_at_1": equal})


# --- table 8: the groups of one example -------------------------------------------------------------------------------


def table_8(anatomy: Anatomy) -> Table:
    """Table 8: every initial group of one example, with its text, scores and sizes before and after re-allocation."""
    subject, initial = anatomy.subject, anatomy.initial
    ends = np.cumsum(initial.sizes)
    filled = np.cumsum(anatomy.allocated > 0) - 1  # the final group that an initial one became
    holding, holding_after = initial.holding(subject.answer), anatomy.final.holding(subject.answer)
    rows = []
    for i in range(len(initial.sizes)):
        row = {"group": i + 1} | ({"segment": int(anatomy.segment[i]) + 1} if anatomy.segment[-1] else {})
        rows.append(
            row
            | {
                "text": subject.text(range(int(ends[i] - initial.sizes[i]), int(ends[i]))),
                "relevance": float(initial.relevance[i]),
                "redundancy": float(initial.redundancy[i]),
                "MIG": float(initial.mig[i]),
                "P": float(anatomy.share[i]),
                "initial": int(initial.sizes[i]),
                "final": int(anatomy.allocated[i]),
                "holds answer": bool(holding[i]),
                "after": bool(anatomy.allocated[i] and holding_after[filled[i]]),
            }
        )
    n, total = int(initial.sizes.sum()), int(anatomy.allocated.sum())
    status = {"found": "", "absent": "; no answer is in the context", "cut": "; the answers were truncated away"}
    notes = [
        f"record {subject.number + 1}: {subject.record.prompt.strip()} -> {' | '.join(subject.record.answers)}"
        + status[subject.status],
        f"final sizes sum to {total} of n = {n} tokens; {(anatomy.allocated > 0).sum()} groups have a memory vector",
        '"holds answer" is of the initial group, whose text this is; "after" of the group that it became',
    ]
    title = f"Table 8: the groups of record {subject.number + 1}"
    return Table("8", title, rows, notes, {"record": subject.number, "n": n, "final_sum": total})


# --- the merge weight of the answer -----------------------------------------------------------------------------------

ANSWER_WEIGHT = {
    "COMI": "COMI: (8) in the re-allocated groups",
    "mean": "mean pooling of the same groups, 1/size",
    "equal": "mean pooling of the initial groups, 1/size",
}


def measure_answer_weight(anatomy: Anatomy) -> dict[str, Any]:
    """For each of ANSWER_WEIGHT, the merge weight on answer tokens, and on these and the tokens behind them in their
    group, whose states can hold the answer too; both summed and divided by the number of groups that hold any. Also the
    size of these groups, and whether one is at the place of an initial group that held an answer. Only the status if no
    answer is in the context."""
    answer = anatomy.subject.answer
    found: dict[str, Any] = {"status": anatomy.subject.status}
    if anatomy.subject.status != "found":
        return found
    before, after = anatomy.initial.holding(answer), np.zeros(len(anatomy.allocated), bool)
    after[anatomy.allocated > 0] = anatomy.final.holding(answer)
    found["stays"] = float((before & after).any())
    for groups, weights in (
        (anatomy.final, {"COMI": anatomy.weights, "mean": _uniform(anatomy.final)}),
        (anatomy.initial, {"equal": _uniform(anatomy.initial)}),
    ):
        holding, behind = groups.holding(answer), _at_or_behind(groups, answer)
        for name, weight in weights.items():
            found[name] = float(weight[answer].sum(dtype=np.float64) / holding.sum())
            found[f"{name} behind"] = float(weight[behind].sum(dtype=np.float64) / holding.sum())
            found[f"{name} size"] = float(groups.sizes[holding].mean())
    return found


def _at_or_behind(groups: Groups, answer: np.ndarray) -> np.ndarray:
    """Which tokens are part of an answer, or behind one in their group."""
    ends = np.cumsum(groups.sizes)
    return np.concatenate([np.logical_or.accumulate(part) for part in np.split(answer, ends[:-1])])


def _uniform(groups: Groups) -> np.ndarray:
    """The merge weights of mean pooling."""
    return np.repeat(1 / groups.sizes, groups.sizes)


def summary_answer_weight(measures: Sequence[dict[str, Any]]) -> Table:
    """The merge weight of the answer. Raises DiagnosisError if no example has an answer in its context."""
    reasons = check_answers([measure["status"] for measure in measures])
    used = [measure for measure in measures if measure["status"] == "found"]
    values = [
        {f"{name}{part}": row[f"{name}{part}"] for name in ANSWER_WEIGHT for part in ("", " behind", " size")}
        | {f"{name} gap": row["COMI"] - row[name] for name in ANSWER_WEIGHT}
        | {"stays": row["stays"]}
        for row in used
    ]
    mean = summarize(values, resamples=RESAMPLES)
    rows = [
        {
            "merge": text,
            "weight on the answer": mean[name],
            "COMI minus this": None if name == "COMI" else mean[f"{name} gap"],
            "on it or behind it in its group": mean[f"{name} behind"],
            "tokens of such a group": mean[f"{name} size"],
        }
        for name, text in ANSWER_WEIGHT.items()
    ]
    notes = [
        f"{len(used)} examples; {counts(reasons) if reasons else 'no example left out'}",
        "weight on the answer: the sum of the merge weights on answer tokens / the number of groups that hold any; the "
        "states of tokens behind an answer can hold it too, as the encoder is causal",
        f"contexts are cut afresh after re-allocation: in {mean['stays']['mean']:.3f} of the examples an initial group "
        "with the answer became a group that still has it",
    ]
    more = {"examples": len(used), "left_out": dict(reasons), "stays": mean["stays"]}
    return Table("answer-weight", "Merge weight on the tokens of the answer", rows, notes, more)
