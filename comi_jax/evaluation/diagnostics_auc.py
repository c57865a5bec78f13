"""The paper's table 5: how well a score of a group's representative finds the groups that hold the answer.

AUC = P(score of a group with the answer > score of one without) + P(equal) / 2           Mann and Whitney
"""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float

from comi_jax.evaluation.diagnostics import (
    ADVICE,
    NOT_COMPARABLE,
    RESAMPLES,
    Anatomy,
    DiagnosisError,
    Groups,
    Table,
    counts,
)  # fmt: skip
from comi_jax.evaluation.metrics import summarize

SCORES = ("MIG", "relevance", "-redundancy", "position", "random")
PAPER_5 = {"MIG": 0.5809, "relevance": 0.5423}


def auc(scores: Float[np.ndarray, " N"], labels: Bool[np.ndarray, " N"]) -> float:
    """The area under the ROC curve by Mann and Whitney: the share of (positive, negative) pairs in which the positive
    has the higher score, ties counted 1/2. Both classes must be there."""
    return float(wins(scores[labels], scores[~labels]).mean() / (~labels).sum())


def wins(scores: Float[np.ndarray, " N"], others: Float[np.ndarray, " K"]) -> Float[np.ndarray, " N"]:
    """For each of ``scores``, the number of ``others`` below it, ties counted 1/2."""
    others = np.sort(others)
    return (np.searchsorted(others, scores, "left") + np.searchsorted(others, scores, "right")) / 2


def pooled_auc(examples: Sequence[tuple[np.ndarray, np.ndarray]], seed: int = 0) -> dict[str, float]:
    """The AUC over the (scores, labels) of all ``examples`` together, with a 95 % interval by bootstrap of the
    examples. Each example needs both classes."""
    count = len(examples)
    owner = np.repeat(np.arange(count), [labels.sum() for _, labels in examples])
    positive = np.concatenate([scores[labels] for scores, labels in examples])
    won = np.empty((count, count))  # of the pairs (positive of example i, negative of example j)
    for j, (scores, labels) in enumerate(examples):
        won[:, j] = np.bincount(owner, wins(positive, scores[~labels]), count)
    pairs = np.array([[labels.sum(), (~labels).sum()] for _, labels in examples], np.float64)

    def of(times: np.ndarray) -> float:
        return float(times @ won @ times / np.prod(times @ pairs))

    rng = np.random.default_rng(seed)
    drawn = [of(np.bincount(rng.integers(0, count, count), minlength=count).astype(float)) for _ in range(RESAMPLES)]
    low, high = np.quantile(drawn, [0.025, 0.975])
    return {"mean": of(np.ones(count)), "low": float(low), "high": float(high), "n": count}


def measure_5(anatomy: Anatomy) -> dict[str, Any]:
    """The scores of the initial and the re-allocated groups, and which groups hold the answer."""
    number, answer = anatomy.subject.number, anatomy.subject.answer
    kinds = (("initial", anatomy.initial), ("re-allocated", anatomy.final))
    found = {kind: (_scores(groups, number), groups.holding(answer)) for kind, groups in kinds}
    return {"number": number, "status": anatomy.subject.status} | found


def _scores(groups: Groups, number: int) -> dict[str, np.ndarray]:
    """The score of each group by each of SCORES. The random one depends on the record alone, not on its batch."""
    random = np.random.default_rng([0, number]).random(len(groups.sizes))
    position = np.arange(len(groups.sizes), dtype=np.float64)
    return dict(zip(SCORES, (groups.mig, groups.relevance, -groups.redundancy, position, random), strict=True))


def summary_5(measures: Sequence[dict[str, Any]]) -> Table:
    """Table 5. Raises DiagnosisError if no example has groups of both classes."""
    rows, notes, more = [], [], {}
    for kind in ("initial", "re-allocated"):
        reasons = Counter(_left_out(measure, kind) for measure in measures)
        used = [measure[kind] for measure in measures if not _left_out(measure, kind)]
        single = [values for measure in measures for values in scored(measure, kind)]
        if not used:
            raise DiagnosisError(f"--table=5 has no example with groups of both classes: {counts(reasons)}; {ADVICE}")
        labels = [holding for _, holding in used]
        groups, positive = sum(map(len, labels)), sum(map(np.sum, labels))
        mean = summarize(single, resamples=RESAMPLES)
        for name in SCORES:
            row = {"groups": kind, "score": name, "AUC, pooled": pooled_auc([(s[name], h) for s, h in used])}
            row["AUC, mean of examples"] = mean[name]
            rows.append(row | {"paper": PAPER_5.get(name) if kind == "initial" else None})
        rows.append({"groups": kind, "score": "MIG minus relevance", "AUC, pooled": None,
                     "AUC, mean of examples": mean["gap"], "paper": None})  # fmt: skip
        out = {why: n for why, n in reasons.items() if why}
        more[kind] = {"examples": len(used), "groups": groups, "base_rate": float(positive / groups), "left_out": out}
        notes.append(
            f"{kind}: {len(used)} examples with {groups} groups, of which {positive / groups:.3f} hold the answer; "
            f"{counts(Counter(out)) if out else 'no example left out'}"
        )
    notes.append("a group holds the answer if any token of any occurrence of any normalised answer lies in it")
    notes.append(f"paper: NQ with Qwen2-7B, {NOT_COMPARABLE}; position: later groups score higher (a control)")
    return Table("5", 'Table 5: AUC of scores of a group\'s representative for "holds the answer"', rows, notes, more)


def scored(measure: dict[str, Any], kind: str) -> list[dict[str, float]]:
    """The AUC of each of SCORES in one example, and the gap of MIG and relevance; none without both classes."""
    if _left_out(measure, kind):
        return []
    scores, holding = measure[kind]
    found = {name: auc(scores[name], holding) for name in SCORES}
    return [found | {"gap": found["MIG"] - found["relevance"]}]


def _left_out(measure: dict[str, Any], kind: str) -> str:
    """Why an example has no AUC; empty if it has one."""
    holding = measure[kind][1]
    if measure["status"] != "found":
        return measure["status"]
    return "single" if len(holding) == 1 else "all" if holding.all() else ""
