"""What each term of the gain changes: the sizes of groups (coarse) and the weights of the merge (fine) without it.

Both stages are a softmax of gains, so that a term can do no more than its spread: where the gains of two groups differ
by s, so do the logarithms of their sizes; where those of two tokens do, so do the logarithms of their weights.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from comi_jax.errors import ConfigError
from comi_jax.evaluation.diagnostics import RESAMPLES, Anatomy, Table
from comi_jax.evaluation.metrics import summarize

COARSE = {"on": "MIG", "relevance": "relevance alone", "off": "equal groups"}
FINE = {"on": "MIG", "relevance": "relevance alone", "off": "plain mean"}


def measure_terms(anatomy: Anatomy) -> dict[str, float]:
    """For both stages as they are ("on"), without the redundancy ("relevance") and without any score ("off"): what
    changes against "on", and what the answer gets, if it is in the context. Raises ConfigError for
    compression.fine=false, which has no weights to compare."""
    if not anatomy.fine:
        raise ConfigError(
            "this checkpoint has compression.fine=false, so its merge has no terms to compare; pass "
            "--set compression.fine=true"
        )
    return _coarse(anatomy) | _fine(anatomy)


# --- coarse -----------------------------------------------------------------------------------------------------------


def _coarse(anatomy: Anatomy) -> dict[str, float]:
    groups, scalars = anatomy.initial, anatomy.scalars
    alone = scalars["alpha_coarse"] * groups.relevance
    within = [anatomy.segment == number for number in range(anatomy.segment[-1] + 1)]
    sizes = {
        "on": anatomy.allocated,
        "relevance": np.concatenate([allocate(alone[here], int(groups.sizes[here].sum())) for here in within]),
        "off": groups.sizes,
    }
    found = {
        "coarse spread relevance": _average([alone[here].std() for here in within]),
        "coarse spread redundancy": _average([(alone - groups.mig)[here].std() for here in within]),
        "coarse spread off": _average([groups.mig[here].std() for here in within]),
        "coarse correlation": _average([rank_correlation(alone[here], groups.mig[here]) for here in within]),
    }
    for name, size in sizes.items():
        found[f"coarse changed {name}"] = float((size != sizes["on"]).mean())
        found[f"coarse moved {name}"] = float(np.abs(size - sizes["on"]).sum() / 2 / size.sum())
        found[f"coarse stays {name}"] = overlap(groups.sizes, size)
        if anatomy.subject.status == "found":
            found[f"coarse answer {name}"] = float(size[_holding(size, anatomy.subject.answer)].mean())
    return found


def allocate(gain: Float[np.ndarray, " M"], tokens: int) -> Int[np.ndarray, " M"]:
    """(5), (6): the sizes of groups with ``gain`` that have ``tokens`` tokens together."""
    share = np.exp(-gain - np.max(-gain))
    quota = tokens * share / share.sum()
    sizes = np.floor(quota).astype(np.int64)
    larger = np.argsort(-(quota - sizes), kind="stable")[: tokens - sizes.sum()]
    sizes[larger] += 1
    return sizes


def overlap(before: Int[np.ndarray, " M"], after: Int[np.ndarray, " M"]) -> float:
    """The fraction of tokens that are in the group of the same number when consecutive tokens are cut into groups of
    ``before`` and of ``after``."""
    own = [np.repeat(np.arange(len(sizes)), sizes) for sizes in (before, after)]
    return float((own[0] == own[1]).mean())


def _average(values: list[Any]) -> float:
    return float(np.mean(values))


def _holding(sizes: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """The numbers of the groups of ``sizes`` that hold any of the marked ``tokens``."""
    return np.unique(np.repeat(np.arange(len(sizes)), sizes)[tokens])


def rank_correlation(a: Float[np.ndarray, " M"], b: Float[np.ndarray, " M"]) -> float:
    """Spearman's: the correlation of the ranks; 1 for fewer than two groups, or where all of a side are equal."""
    first, second = _ranks(a), _ranks(b)
    if min(first.std(), second.std()) == 0:
        return 1.0
    return float(np.corrcoef(first, second)[0, 1])


def _ranks(values: np.ndarray) -> np.ndarray:
    """The rank of each value; equal ones share their mean rank."""
    _, which, count = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(count) - (count - 1) / 2)[which]


# --- fine -------------------------------------------------------------------------------------------------------------


def _fine(anatomy: Anatomy) -> dict[str, float]:
    starts = np.cumsum(anatomy.final.sizes) - anatomy.final.sizes
    group = np.repeat(np.arange(len(starts)), anatomy.final.sizes)
    alone = anatomy.scalars["alpha_fine"] * anatomy.token_relevance.astype(np.float64)
    dropped = anatomy.scalars["beta_fine"] * anatomy.token_redundancy.astype(np.float64)

    def softmax(gain: np.ndarray) -> np.ndarray:
        weight = np.exp(gain - np.maximum.reduceat(gain, starts)[group])
        return weight / np.add.reduceat(weight, starts)[group]

    def spread(values: np.ndarray) -> float:
        center = np.add.reduceat(values, starts) / anatomy.final.sizes
        square = np.add.reduceat((values - center[group]) ** 2, starts) / anatomy.final.sizes
        return float(np.sqrt(square)[anatomy.final.sizes > 1].mean()) if (anatomy.final.sizes > 1).any() else 0.0

    weights = {"on": softmax(alone - dropped), "relevance": softmax(alone), "off": softmax(np.zeros_like(alone))}
    found = {
        "fine spread relevance": spread(alone),
        "fine spread redundancy": spread(dropped),
        "fine spread off": spread(alone - dropped),
    }
    answer = anatomy.subject.answer
    for name, weight in weights.items():
        found[f"fine changed {name}"] = float((_top(weight, starts) != _top(weights["on"], starts)).mean())
        moved = np.add.reduceat(np.abs(weight - weights["on"]), starts) / 2
        found[f"fine moved {name}"] = float(moved.mean())
        if anatomy.subject.status == "found":
            found[f"fine answer {name}"] = float(weight[answer].sum() / len(np.unique(group[answer])))
    return found


def _top(weight: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """The token of the largest weight in each group."""
    return np.array([part.argmax() for part in np.split(weight, starts[1:])])


# --- the table --------------------------------------------------------------------------------------------------------


def summary_terms(measures: Sequence[dict[str, float]]) -> Table:
    """The table of all examples."""
    whole = summarize([{k: v for k, v in row.items() if " answer " not in k} for row in measures], resamples=RESAMPLES)
    answered = [{k: v for k, v in row.items() if " answer " in k} for row in measures]
    answers = summarize([row for row in answered if row], resamples=RESAMPLES) if any(answered) else {}
    value: Callable[[str], Any] = (whole | answers).get
    rows = []
    for stage, titles in (("coarse", COARSE), ("fine", FINE)):
        for name, title in titles.items():
            dropped = {"on": None, "relevance": "redundancy", "off": "off"}[name]
            rows.append(
                {
                    "stage": stage,
                    "by": title,
                    "spread of what is dropped": value(f"{stage} spread {dropped}") if dropped else None,
                    "groups that change": value(f"{stage} changed {name}"),
                    "moved": value(f"{stage} moved {name}"),
                    "tokens that stay": value(f"{stage} stays {name}"),
                    "answer": value(f"{stage} answer {name}"),
                }
            )
    correlation = whole["coarse correlation"]["mean"]
    spreads = [whole[f"{stage} spread relevance"] for stage in ("coarse", "fine")]
    notes = [
        f"{len(measures)} examples, {sum(map(bool, answered))} with an answer in the context; against the first row of "
        "its stage",
        "coarse: groups whose size changes, the fraction of all tokens that other groups get, the fraction that is "
        "still in its group when the context is cut afresh, the tokens of a group that holds the answer",
        "fine: groups whose heaviest token changes, the fraction of a group's weight that moves, the merge weight on "
        "the answer",
        "spread: the standard deviation among the groups of a segment, or the tokens of a group; that of relevance is "
        f"{spreads[0]['mean']:.3f} among groups and {spreads[1]['mean']:.3f} among tokens",
        f"the rank correlation of MIG and relevance among groups is {correlation:.3f}",
    ]
    more = {name: value(name) for name in ("coarse correlation", "coarse spread relevance", "fine spread relevance")}
    return Table("terms", "What the terms of the gain change", rows, notes, more)
