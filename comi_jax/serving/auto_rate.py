"""``rate="auto"``: of the rates that a model was trained at, the one that a calibration chooses for a question.

    p_r = sigmoid(w_r · (x_r - mean_r) / scale_r + b_r)         the rate: argmax over r of  p_r - price / r

x_r are statistics of the compression at rate r, which are known before decoding; p_r estimates that the answer at r is
right, and price / r is the price of the memory vectors per context token. ``comi_jax.calibrate`` fits and tests them.
"""

import dataclasses
import json
import logging
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from comi_jax.config import Compression
from comi_jax.errors import ConfigError
from comi_jax.overrides import to_dict
from comi_jax.params import flatten
from comi_jax.runs.description import Run

FORMAT = 1  # increment when the statistics or the file change
COMMAND = "python -m comi_jax.calibrate --checkpoint={} --data=FILE --floor=0.02"
STATISTICS = (
    "best relevance", "mean relevance", "best MIG", "spread of MIG", "lead of the best MIG", "redundancy of the best",
    "weight of the most relevant token", "size of its group", "overflow of the top groups", "context tokens",
    "question tokens",
)  # fmt: skip
PARTS = ("mean", "scale", "weights")  # of an estimator, a number for each statistic
TOP = 8  # one group in so many is a top group


def statistics(
    tokens: Mapping[str, np.ndarray], groups: Mapping[str, np.ndarray], rate: int, question: int
) -> Float[np.ndarray, " F"]:
    """STATISTICS of a context compressed at ``rate`` for a question of so many tokens. ``tokens`` and ``groups`` (those
    before re-allocation) are as ``examined.joined`` gives them."""
    relevance, mig, slot = tokens["relevance"], groups["mig"], tokens["group"]
    sizes = np.bincount(slot)[slot]  # of the memory slot of each token
    order, most = np.argsort(-mig, kind="stable"), int(np.argmax(relevance))
    top = order[: max(1, len(order) // TOP)]
    return np.array([
        relevance[most],
        relevance.mean(),
        mig[order[0]],
        mig.std(),
        mig[order[0]] - mig[order[1]] if len(order) > 1 else 0.0,
        groups["redundancy"][order[0]],
        tokens["weights"][most],
        math.log2(sizes[most] / rate),
        np.log2(sizes[groups["token"][top]] / rate).mean(),  # above 0: they share slots with other tokens
        math.log2(len(relevance)),
        math.log2(question),
    ], np.float64)  # fmt: skip


@dataclass(frozen=True)
class Estimator:
    """A logistic regression, at one rate."""

    mean: tuple[float, ...]
    scale: tuple[float, ...]
    weights: tuple[float, ...]
    bias: float

    def probability(self, x: Float[np.ndarray, "N F"]) -> Float[np.ndarray, " N"]:
        """The estimated probability that an answer is right."""
        logits = ((x - np.array(self.mean)) / np.array(self.scale)) @ np.array(self.weights) + self.bias
        return 0.5 * (1 + np.tanh(logits / 2))


def probabilities(estimators: Sequence[Estimator], x: Float[np.ndarray, "N R F"]) -> Float[np.ndarray, "N R"]:
    """p_r of each question at each rate."""
    return np.stack([each.probability(x[:, r]) for r, each in enumerate(estimators)], axis=1)


def choices(p: Float[np.ndarray, "N R"], rates: Sequence[int], price: float) -> Int[np.ndarray, " N"]:
    """The index of the chosen rate of each question; ties go to the lower rate, which comes first."""
    return np.argmax(p - price / np.array(rates), axis=1)


@dataclass(frozen=True)
class Calibration:
    """What ``comi_jax.calibrate`` has found for one checkpoint."""

    weights: str  # the fingerprint of the checkpoint
    settings: dict[str, Any]  # of the compression, by path; see ``settings_of``
    rates: tuple[int, ...]  # ascending
    estimators: tuple[Estimator, ...]  # one for each rate
    price: float | None  # None: the statistics did not beat fixed rates, and ``fixed`` is used
    fixed: int
    said: str  # the outcome in one sentence
    report: dict[str, Any]  # of the calibration: data, floor, table, curve

    def choose(self, x: Float[np.ndarray, "R F"]) -> int:
        """The rate for a question with the STATISTICS ``x`` at each rate."""
        if self.price is None:
            return self.fixed
        p = probabilities(self.estimators, x[None])
        return self.rates[int(choices(p, self.rates, self.price)[0])]

    def save(self, path: Path) -> None:
        """Write it as JSON, atomically."""
        draft = Path(f"{path}.draft")
        draft.write_text(json.dumps({"format": FORMAT, **dataclasses.asdict(self)}, indent=2) + "\n", encoding="utf-8")
        os.replace(draft, path)


def settings_of(run: Run) -> dict[str, Any]:
    """The settings that the statistics and the accuracy depend on, by path."""
    return _by_path(run.config.compression) | {"model.dtype": run.architecture.dtype}


def _by_path(compression: Compression) -> dict[str, Any]:
    return {path.replace("/", "."): value for path, value in flatten({"compression": to_dict(compression)}).items()}


def read(path: Path | None, run: Run, weights: str, name: str) -> Calibration:
    """The calibration in ``path`` of the model called ``name``. Raises ConfigError, with the command to run, if there
    is none, or if it is damaged or of other weights or settings."""
    rates = run.config.compression.rates
    if len(rates) < 2:
        raise ConfigError(
            f'rate="auto" chooses among the rates that a checkpoint was trained at, and {name} was trained at '
            f"{', '.join(map(str, rates))} alone; train with several, e.g. compression.rates=8,16,32, then run "
            f"{COMMAND.format('DIR')}"
        )
    command = COMMAND.format("DIR" if path is None else path.parents[1])
    if path is None or not path.is_file():
        raise ConfigError(f'rate="auto" needs a calibration, and {name} has none; run {command}')
    try:
        found = _parsed(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path} is damaged or of another version ({error}); run {command} again") from None
    if found.weights != weights:
        raise ConfigError(f"{path} is the calibration of other weights than those of {name}; run {command} again")
    defaults = _by_path(Compression())  # what a setting meant before there was one
    for setting, value in settings_of(run).items():
        before = found.settings.get(setting, _plain(defaults.get(setting)))
        if before != _plain(value):
            raise ConfigError(
                f"{path} was calibrated with {setting}={before}, but {name} was loaded with {_plain(value)}; load it "
                f"with that, or run {command} again"
            )
    if found.price is None:
        logging.getLogger(__name__).warning(found.said)
    return found


def _parsed(values: dict[str, Any]) -> Calibration:
    """The calibration that was saved as ``values``."""
    if values.pop("format") != FORMAT:
        raise ValueError(f"its format is not {FORMAT}")
    estimators = tuple(
        Estimator(bias=float(each["bias"]), **{name: tuple(map(float, each[name])) for name in PARTS})
        for each in values["estimators"]
    )
    made = Calibration(**values | {"estimators": estimators, "rates": tuple(values["rates"])})
    right = all(len(getattr(each, name)) == len(STATISTICS) for each in estimators for name in PARTS)
    if not right or len(estimators) != len(made.rates) or made.fixed not in made.rates:
        raise ValueError("its parts do not belong together")
    return made


def _plain(value: Any) -> Any:
    """``value`` as JSON gives it back."""
    return json.loads(json.dumps(value))
