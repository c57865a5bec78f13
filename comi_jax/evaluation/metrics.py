"""Metrics of a predicted answer against its references, with bootstrap intervals.

    F1 = 2 |common| / (|prediction| + |reference|),  common = the shared tokens (F1) or their LCS (ROUGE-L)

All but ROUGE-L, which tokenises differently, compare strings under SQuAD's normalisation. There is no plain "EM" or
"F1", as published tables mean different metrics by these names (a strict `em` can exceed `f1_first`).
"""

import math
import re
import string
from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np

_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)
ARTICLES = re.compile(r"\b(a|an|the)\b")
# Han, kana and the scripts of Thai, Lao, Tibetan, Burmese and Khmer, which put no space between words.
UNSPACED = (
    "\u0e00-\u0fff\u1000-\u109f\u1780-\u17ff\u3005-\u3007\u3041-\u30fa\u30fc-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
    "\U00020000-\U0003ffff"
)
_LATIN = "\u0000-\u036f\u1d00-\u1eff\u2000-\u2c7f\ua720-\ua7ff\uff00-\uff5f"  # and signs such as one sixth
# Runs of a-z and 0-9, as rouge_score has them; a letter of the scripts without spaces; a run of letters of others.
_ROUGE_TOKENS = re.compile(rf"[a-z0-9]+|[{UNSPACED}]|[^\W_{_LATIN}{UNSPACED}]+")
_YES_NO = frozenset({"yes", "no", "noanswer"})


def normalize(text: str) -> str:
    """SQuAD's normalisation: lower-case, remove ASCII punctuation, remove a / an / the, collapse white space.

    Source: the SQuAD v1.1 evaluation script. Non-ASCII punctuation and accents are kept.
    """
    return " ".join(ARTICLES.sub(" ", text.lower().translate(_NO_PUNCTUATION)).split())


def score(prediction: str, references: Sequence[str]) -> dict[str, float]:
    """All metrics of MEASURES for one prediction, each in [0, 1].

    - `em`: the prediction equals any reference, both normalised.
    - `f1_max`: token F1 (SQuAD), the best over the references.
    - `f1_first`: token F1 with the first reference only; 0 if either is yes / no / noanswer and they differ (HotpotQA).
    - `acc_subspan`: any normalised reference is a substring of the normalised prediction (lost-in-the-middle).
    - `acc_subspan_firstline`: the same on the prediction up to its first newline, as in that work's evaluation, so that
      copying the context earns nothing. Leading white space is not stripped: an empty first line counts as empty.
    - `rougeL`: ROUGE-L F-measure, the best over the references, as rouge_score without stemming: tokens are runs of a-z
      and 0-9 in the lower-cased text. Other scripts, which rouge_score ignores, get tokens too: each letter of scripts
      that put no spaces between words (Chinese, Japanese, Thai, ...), runs of letters of the others (Russian, Arabic).
      Two equal texts without any token, such as "!", score 1.

    The other measures split words at spaces. In a script without spaces a whole sentence is one token: `em` asks for a
    sentence with the same punctuation, `f1_max` and `f1_first` are nearly always 0 or 1, and `acc_subspan`, which
    compares letters, says more.

    A reference that normalises to the empty string ("The", "?") only matches a prediction that does so too; otherwise,
    as the empty substring, it would match every prediction.

    Raises:
        ValueError: no references, or a string instead of a list of strings.
    """
    if isinstance(references, str):
        raise ValueError(f"references is one text ({references[:40]!r}); give a list of texts")
    if not references:
        raise ValueError("the list of references is empty; give at least one")
    predicted = normalize(prediction)
    expected = [normalize(reference) for reference in references]
    first_line = normalize(prediction.split("\n", 1)[0])
    first = expected[0]
    yes_no_differs = predicted != first and (predicted in _YES_NO or first in _YES_NO)
    return {
        "em": float(predicted in expected),
        "f1_max": max(_token_f1(predicted, reference) for reference in expected),
        "f1_first": 0.0 if yes_no_differs else _token_f1(predicted, first),
        "acc_subspan": float(any(_contains(predicted, reference) for reference in expected)),
        "acc_subspan_firstline": float(any(_contains(first_line, reference) for reference in expected)),
        "rougeL": max(_rouge_l(prediction, text) for text in references),
    }


def _contains(predicted: str, reference: str) -> bool:
    return reference in predicted if reference else not predicted


def _token_f1(predicted: str, reference: str) -> float:
    """Token F1 of two normalised texts. If either is empty: 1 if both are, else 0 (the SQuAD 2.0 rule)."""
    a, b = predicted.split(), reference.split()
    if not a or not b:
        return float(a == b)
    return 2 * (Counter(a) & Counter(b)).total() / (len(a) + len(b))


def _rouge_l(predicted: str, reference: str) -> float:
    a, b = (_ROUGE_TOKENS.findall(text.lower()) for text in (predicted, reference))
    if not a and not b:
        return float(predicted.strip() == reference.strip() != "")
    return 2 * _lcs_length(a, b) / (len(a) + len(b))


def _lcs_length(a: list[str], b: list[str]) -> int:
    """Length of the longest common subsequence, by the bit-parallel dynamic programme of Hyyro (2004).

    A row of the table is one integer: bit j of `row` is 0 where the table increases at b[j].
    """
    positions: dict[str, int] = {}
    for j, token in enumerate(b):
        positions[token] = positions.get(token, 0) | 1 << j
    full = (1 << len(b)) - 1
    row = full
    for token in a:
        matches = row & positions.get(token, 0)
        row = ((row + matches) | (row - matches)) & full
    return len(b) - row.bit_count()


def summarize(
    per_example: Sequence[Mapping[str, float | int]], *, seed: int = 0, resamples: int = 1000
) -> dict[str, dict[str, float | int]]:
    """Mean and 95 % percentile bootstrap interval of each metric over the examples.

    Args:
        per_example: one mapping per example, all with the same names: `score`'s, or any other finite quantities.
        seed: of the resampling; the same seed, values and number of resamples give the same intervals.
        resamples: the number of bootstrap samples, each of size n; all metrics share them.

    Returns:
        name -> {"mean", "low", "high", "n"}.

    Raises:
        ValueError: no examples, examples with different names, a non-finite value, or fewer than 1 resample.
    """
    if not per_example:
        raise ValueError("there are no examples to summarize")
    if resamples < 1:
        raise ValueError(f"resamples is {resamples}; expected at least 1")
    names = list(per_example[0])
    for i, example in enumerate(per_example):
        if set(example) != set(names):
            raise ValueError(f"example {i} has the measures {sorted(example)}, example 0 has {sorted(names)}")
        for name in names:
            if not math.isfinite(example[name]):
                raise ValueError(f'example {i}: measure "{name}" is {example[name]}; expected a finite number')
    values = np.array([[example[name] for name in names] for example in per_example], dtype=np.float64)
    n = len(values)
    rng = np.random.default_rng(seed)
    # One resample at a time: all at once would take resamples x n x metrics numbers, gigabytes for a large set.
    means = np.stack([values[rng.integers(0, n, size=n)].mean(axis=0) for _ in range(resamples)])
    low, high = np.quantile(means, [0.025, 0.975], axis=0)
    return {
        name: {"mean": float(mean), "low": float(lo), "high": float(hi), "n": n}
        for name, mean, lo, hi in zip(names, values.mean(axis=0), low, high, strict=True)
    }
