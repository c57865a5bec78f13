"""The calibration of ``rate="auto"``: fitted on half of the contexts, tested on the other half.

    fit     for each rate, a logistic regression of "the answer is right" on auto_rate.STATISTICS
    test    on held-out contexts, with the interval of a paired bootstrap over contexts:
            - within the floor: accuracy minus that of the lowest rate is above -floor. Prices are tested from the most
              careful on, until one fails (fixed-sequence testing): that any of those before is not within the floor
              has a probability of at most 2.5 %. So are the fixed rates.
            - better than chance: accuracy minus that of drawing one of two fixed rates, so that there are as many
              memory vectors, is above 0. Of all pairs of rates, the one that is drawn best.

A price that passes both is used; else the highest fixed rate within the floor.
"""

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from comi_jax.errors import ConfigError
from comi_jax.evaluation.diagnostics import Table
from comi_jax.evaluation.diagnostics_auc import auc
from comi_jax.serving.auto_rate import STATISTICS, Calibration, Estimator, choices, probabilities

PRICES = tuple(float(price) for price in np.geomspace(1e-3, 1e2, 61))
PENALTY = 1.0  # of the squared weights of standardised statistics
RESAMPLES = 2000


@dataclass(frozen=True)
class Outcomes:
    """N questions at R rates."""

    rates: tuple[int, ...]  # ascending
    statistics: Float[np.ndarray, "N R F"]
    accuracy: Float[np.ndarray, "N R"]  # of the answers, by the metric
    vectors: Int[np.ndarray, "N R"]  # of the memories
    tokens: Int[np.ndarray, " N"]  # of the contexts
    context: Int[np.ndarray, " N"]  # which context each question is about

    def of(self, rows: np.ndarray) -> "Outcomes":
        """Some of the questions."""
        values = {
            name: getattr(self, name)[rows] for name in ("statistics", "accuracy", "vectors", "tokens", "context")
        }
        return dataclasses.replace(self, **values)

    def halves(self, seed: int) -> tuple["Outcomes", "Outcomes"]:
        """The questions about half of the contexts, and the others. Raises ConfigError for fewer than 4 contexts."""
        contexts = np.unique(self.context)
        if len(contexts) < 4:
            raise ConfigError(
                f"--data has {len(contexts)} contexts; a calibration needs at least 4, and hundreds to be sure of much"
            )
        first = np.random.default_rng(seed).permutation(contexts)[: len(contexts) // 2]
        inside = np.isin(self.context, first)
        return self.of(inside), self.of(~inside)


def fit(x: Float[np.ndarray, "N F"], y: Float[np.ndarray, " N"]) -> Estimator:
    """The logistic regression of y in [0, 1] on x, standardised, with a penalty of PENALTY / 2 · ‖w‖² on the weights
    and a thousandth of that on the bias; by Newton's method."""
    mean, scale = x.mean(axis=0), x.std(axis=0)
    scale = np.where(scale > 1e-9, scale, 1.0)
    z = np.column_stack([(x - mean) / scale, np.ones(len(x))])
    penalty = np.append(np.full(x.shape[1], PENALTY), PENALTY / 1000)

    def cost(w: np.ndarray) -> float:
        logits = z @ w
        return float(np.sum(np.logaddexp(0, logits) - y * logits) + penalty @ w**2 / 2)

    w = np.zeros(z.shape[1])
    for _ in range(100):
        p = 0.5 * (1 + np.tanh(z @ w / 2))
        gradient = z.T @ (p - y) + penalty * w
        step = np.linalg.solve((z * (p * (1 - p))[:, None]).T @ z + np.diag(penalty), gradient)
        while cost(w - step) > cost(w) and np.abs(step).max() > 1e-9:
            step = step / 2
        w = w - step
        if np.abs(step).max() < 1e-9:
            break
    return Estimator(tuple(mean.tolist()), tuple(scale.tolist()), tuple(w[:-1].tolist()), float(w[-1]))


@dataclass(frozen=True)
class Resamples:
    """The bootstrap of the contexts of N questions; all intervals share its draws."""

    owner: Int[np.ndarray, " N"]  # which of the C contexts each question is about
    times: Float[np.ndarray, "R C"]  # how often each resample has each context

    @classmethod
    def draw(cls, context: Int[np.ndarray, " N"], seed: int = 0) -> "Resamples":
        _, owner = np.unique(context, return_inverse=True)
        count, rng = int(owner.max()) + 1, np.random.default_rng(seed)
        drawn = (np.bincount(rng.integers(0, count, count), minlength=count) for _ in range(RESAMPLES))
        return cls(owner, np.stack([times.astype(np.float32) for times in drawn]))

    def interval(self, values: Float[np.ndarray, " N"]) -> dict[str, Any]:
        """The mean of ``values`` with its 95 % interval."""
        sums, counts = np.bincount(self.owner, values), np.bincount(self.owner)
        low, high = np.quantile((self.times @ sums) / (self.times @ counts), [0.025, 0.975])
        return {"mean": float(values.mean()), "low": float(low), "high": float(high), "n": len(values)}


@dataclass(frozen=True)
class Policy:
    """A way to choose rates, with its result on the held-out questions."""

    name: str
    price: float | None
    shares: tuple[float, ...]  # of the questions, by rate
    per_token: float  # memory vectors per context token
    accuracy: dict[str, Any]
    lost: dict[str, Any]  # accuracy minus that of the lowest rate
    gained: dict[str, Any]  # accuracy minus that of the best random choice with as many vectors

    @property
    def ratio(self) -> float:
        return 1 / self.per_token

    def within(self, floor: float) -> bool:
        """Whether its accuracy is within ``floor`` of the lowest rate's."""
        return self.lost["low"] > -floor


def measured(
    name: str, held: Outcomes, resamples: Resamples, chosen: Int[np.ndarray, " N"], price: float | None = None
) -> Policy:
    """The policy that gave the held-out questions the rates of the indices ``chosen``."""
    rows = np.arange(len(chosen))
    accuracy, per_token = held.accuracy[rows, chosen], held.vectors[rows, chosen].sum() / held.tokens.sum()
    mixed = held.accuracy @ np.array(mixture(held, per_token))
    shares = np.bincount(chosen, minlength=len(held.rates)) / len(chosen)
    intervals = [resamples.interval(x) for x in (accuracy, accuracy - held.accuracy[:, 0], accuracy - mixed)]
    return Policy(name, price, tuple(shares.tolist()), float(per_token), *intervals)


def mixture(held: Outcomes, per_token: float) -> tuple[float, ...]:
    """The probabilities with which a random choice between two rates has ``per_token`` vectors per context token, for
    the two that are then most accurate."""
    cost, accuracy = held.vectors.sum(axis=0) / held.tokens.sum(), held.accuracy.mean(axis=0)
    per_token = float(np.clip(per_token, cost.min(), cost.max()))
    best: tuple[float, tuple[float, ...]] = (-1.0, ())
    for a, b in itertools.combinations(range(len(held.rates)), 2):
        share = (per_token - cost[b]) / (cost[a] - cost[b]) if cost[a] > cost[b] else 1.0
        if -1e-9 <= share <= 1 + 1e-9:
            weights = [0.0] * len(held.rates)
            weights[a], weights[b] = float(share), float(1 - share)
            best = max(best, (float(accuracy @ np.array(weights)), tuple(weights)))
    return best[1]


def last_within(policies: Sequence[Policy], floor: float) -> Policy | None:
    """Of ``policies`` in the order of their tests, the last one before the first that is not within the floor."""
    passed = list(itertools.takewhile(lambda policy: policy.within(floor), policies))
    return passed[-1] if passed else None


def calibrate(
    outcomes: Outcomes, floor: float, metric: str, weights: str, settings: Mapping[str, Any], about: Mapping[str, Any]
) -> tuple[Calibration, list[Table]]:
    """The calibration of the checkpoint ``weights`` with ``settings``, and its tables; ``about`` is stored with it."""
    rates, (fitted, held) = outcomes.rates, outcomes.halves(seed=0)
    estimators = tuple(fit(fitted.statistics[:, r], fitted.accuracy[:, r]) for r in range(len(rates)))
    p = probabilities(estimators, held.statistics)
    draws = Resamples.draw(held.context)
    fixed = [measured(f"fixed rate {r}", held, draws, np.full(len(p), i)) for i, r in enumerate(rates)]
    tried = [measured("auto", held, draws, choices(p, rates, price), price) for price in PRICES]
    safe, auto = last_within(fixed, floor), last_within(tried, floor)
    good = auto is not None and auto.gained["low"] > 0
    used = rates[fixed.index(safe)] if safe else rates[0]
    said = _said(auto, good, used, floor, metric, held)
    right = held.accuracy >= 0.5
    highest = np.where(right.any(axis=1), len(rates) - 1 - np.argmax(right[:, ::-1], axis=1), len(rates) - 1)
    rows = [*fixed, auto or tried[0], measured("oracle: the highest rate that is right", held, draws, highest)]
    table = Table(
        "calibration",
        f"{len(held.tokens)} held-out questions about {len(np.unique(held.context))} contexts, 95 % intervals",
        [_row(policy, rates, floor, metric) for policy in rows],
        [said, _best_gain(tried, metric)],
        {
            "floor": floor, "metric": metric, "fitted_on": len(fitted.tokens),
            "fixed": [dataclasses.asdict(policy) for policy in fixed],
            "curve": [dataclasses.asdict(policy) for policy in tried],
            "chosen": auto and auto.price,
        },
    )  # fmt: skip
    told = _what_statistics_tell(held, p)
    report = {**about, **dataclasses.asdict(table), "statistics": told.rows}
    price = auto.price if auto is not None and good else None
    return Calibration(weights, dict(settings), rates, estimators, price, used, said, report), [told, table]


def _said(auto: Policy | None, good: bool, fixed: int, floor: float, metric: str, held: Outcomes) -> str:
    """The outcome in a sentence."""
    where = f"on {len(held.tokens)} held-out questions"
    if auto is None:
        return (
            f'rate="auto" is the fixed rate {fixed}: no choice by statistics is within {floor:g} {metric} of the '
            f"lowest rate {where}; give more data or a larger floor"
        )
    lost, gained = (f"{x['mean']:+.3f} [{x['low']:+.3f}, {x['high']:+.3f}]" for x in (auto.lost, auto.gained))
    random = f"{metric} minus that of a random choice with as many vectors is {gained}"
    if auto.shares[-1] == 1:
        return (
            f'rate="auto" is the fixed rate {fixed}: no statistic beat fixed rates, as the highest is itself within '
            f"{floor:g} of the lowest {where}, where {metric} minus the lowest's is {lost}"
        )
    if not good:
        return f'rate="auto" is the fixed rate {fixed}: no statistic beat fixed rates {where}, where {random}'
    own = f"{metric} minus the lowest rate's is {lost}"
    return f'rate="auto" chooses by statistics: ratio {auto.ratio:.1f}; {where} {own}, and {random}'


def _best_gain(tried: Sequence[Policy], metric: str) -> str:
    """How much choosing by statistics is worth at best, at whatever price."""
    best = max(tried, key=lambda policy: policy.gained["mean"])
    gained = f"{best.gained['mean']:+.3f} [{best.gained['low']:+.3f}, {best.gained['high']:+.3f}]"
    return (
        f"of {len(tried)} prices the one best on these questions has ratio {best.ratio:.1f} and {metric} "
        f"{best.accuracy['mean']:.3f}, minus that of a random choice with as many vectors: {gained}"
    )


def _row(policy: Policy, rates: Sequence[int], floor: float, metric: str) -> dict[str, Any]:
    oracle = policy.name.startswith("oracle")
    shares = " ".join(f"{rate}:{share:.0%}" for rate, share in zip(rates, policy.shares, strict=True) if share)
    return {
        "rates": policy.name, "share of each": shares, "ratio": policy.ratio, metric: policy.accuracy,
        "minus the lowest rate's": policy.lost, "within the floor": policy.within(floor),
        "minus random choice": None if oracle or policy.price is None else policy.gained,
    }  # fmt: skip


def _what_statistics_tell(held: Outcomes, p: Float[np.ndarray, "N R"]) -> Table:
    """The AUC of each statistic, and of the regressions, for "the answer is right" at each rate."""
    scores = {name: held.statistics[:, :, i] for i, name in enumerate(STATISTICS)} | {"all, by the regression": p}
    rows = []
    for name, values in scores.items():
        row: dict[str, Any] = {"statistic": name}
        for r, rate in enumerate(held.rates):
            right = held.accuracy[:, r] >= 0.5
            row[f"rate {rate}"] = auc(values[:, r], right) if 0 < right.sum() < len(right) else None
        rows.append(row)
    return Table("statistics", 'AUC for "the answer is right", held-out questions', rows)
