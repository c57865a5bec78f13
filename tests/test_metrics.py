"""Measures against values computed by hand, and the bootstrap's promises."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from comi_jax.config import MEASURES
from comi_jax.evaluation.metrics import normalize, score, summarize


@pytest.mark.parametrize(
    "text, expected",
    [
        ("The  Eiffel\tTower!", "eiffel tower"),
        ("an apple, a pear & the theatre", "apple pear theatre"),
        ("U.S.A.", "usa"),
        ("well-known", "wellknown"),
        ("the-man", "theman"),  # punctuation goes first: what it glued to is no article any more
        ("ÉCOLE «Łódź»", "école «łódź»"),
        ("A\u00a0b\u2003c", "b c"),
        ("?!", ""),
        ("", ""),
    ],
)
def test_normalisation_is_squads(text, expected):
    assert normalize(text) == expected


# prediction, references, em, f1_max, f1_first, acc_subspan, acc_subspan_firstline, rougeL
CASES = [
    ("The Paris.", ["paris"], 1, 1, 1, 1, 1, 2 / 3),
    ("in Paris, France", ["Paris"], 0, 1 / 2, 1 / 2, 1, 1, 1 / 2),
    ("red red blue", ["red blue green"], 0, 2 / 3, 2 / 3, 0, 0, 2 / 3),  # a repeated token is common once
    ("b c d a", ["a b c d"], 1, 1, 1, 1, 1, 3 / 4),  # "a" is an article to SQuAD and a token to ROUGE
    ("two one", ["one two"], 0, 1, 1, 0, 0, 1 / 2),  # F1 ignores the order, the LCS does not
    ("London", ["Paris"], 0, 0, 0, 0, 0, 0),
    ("", ["Paris"], 0, 0, 0, 0, 0, 0),
    (" \n\t", ["Paris", "Rome"], 0, 0, 0, 0, 0, 0),
    ("Łódź", ["łódź"], 1, 1, 1, 1, 1, 1),  # to ROUGE the token "d"
    ("北京", ["北京"], 1, 1, 1, 1, 1, 1),
    ("我住在北京。", ["我 住在 南京"], 0, 0, 0, 0, 0, 8 / 10),  # letters, where no space parts words
    ("кот спит здесь", ["кот здесь"], 0, 4 / 5, 4 / 5, 0, 0, 4 / 5),  # words, where it does
    ("é!", ["é!"], 1, 1, 1, 1, 1, 1),  # no token at all
    ("é!", ["à!"], 0, 0, 0, 0, 0, 0),
    ("I do not know\nIt is Paris", ["Paris"], 0, 2 / 8, 2 / 8, 1, 0, 2 / 8),
    ("\nParis", ["Paris"], 1, 1, 1, 1, 0, 1),
    ("Paris\r\nmore", ["Paris"], 0, 2 / 3, 2 / 3, 1, 1, 2 / 3),
    ("nothing", ["no"], 0, 0, 0, 1, 1, 0),  # substring of characters, as published
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: repr(case[0]))
def test_score_by_hand(case):
    prediction, references, *expected = case
    assert score(prediction, references) == pytest.approx(dict(zip(MEASURES, expected, strict=True)), abs=1e-12)


def test_em_and_f1_max_take_any_reference_and_f1_first_the_first():
    got = score("Wilhelm Röntgen", ["W. C. Röntgen", "Wilhelm Röntgen"])
    assert (got["em"], got["f1_max"], got["f1_first"]) == (1, 1, pytest.approx(2 / 5))
    assert got["em"] > got["f1_first"]
    swapped = score("Wilhelm Röntgen", ["Wilhelm Röntgen", "W. C. Röntgen"])
    assert swapped["f1_first"] == 1
    assert {k: v for k, v in swapped.items() if k != "f1_first"} == {k: v for k, v in got.items() if k != "f1_first"}


@pytest.mark.parametrize(
    "prediction, reference, f1_first, f1_max",
    [
        ("Yes.", "yes", 1, 1),
        ("yes", "no", 0, 0),
        ("yes", "yes it is", 0, 1 / 2),
        ("yes he was", "yes", 0, 1 / 2),
        ("no answer given", "noanswer", 0, 0),
        ("noanswer", "noanswer given", 0, 2 / 3),
        ("yesterday noon", "noon", 2 / 3, 2 / 3),  # the rule is about whole answers
    ],
)
def test_yes_no_rule_is_hotpotqas(prediction, reference, f1_first, f1_max):
    got = score(prediction, [reference])
    assert got["f1_first"] == pytest.approx(f1_first) and got["f1_max"] == pytest.approx(f1_max)


def test_reference_without_content_is_not_found_in_everything():
    wrong = score("Paris", ["The", "?"])
    assert wrong == dict.fromkeys(MEASURES, 0.0)
    assert score("the", ["The"]) == dict.fromkeys(MEASURES, 1.0)


@pytest.mark.parametrize("references", [[], ()])
def test_no_reference_is_refused(references):
    with pytest.raises(ValueError, match="list of references is empty"):
        score("Paris", references)


def test_a_bare_text_as_references_is_refused():
    with pytest.raises(ValueError, match="one text"):
        score("Paris", "Paris")


def _lcs_by_table(a, b):
    table = np.zeros((len(a) + 1, len(b) + 1), dtype=int)
    for i, x in enumerate(a):
        for j, y in enumerate(b):
            table[i + 1, j + 1] = table[i, j] + 1 if x == y else max(table[i, j + 1], table[i + 1, j])
    return table[-1, -1]


def test_rouge_l_equals_the_plain_table():
    rng = np.random.default_rng(0)
    for _ in range(150):
        size_a, size_b, kinds = (int(rng.integers(1, high)) for high in (90, 90, 12))
        a, b = (list(rng.integers(0, kinds, size).astype(str)) for size in (size_a, size_b))
        expected = 2 * _lcs_by_table(a, b) / (len(a) + len(b))
        assert score(" ".join(a), [" ".join(b)])["rougeL"] == pytest.approx(expected, abs=1e-12)


@settings(derandomize=True, deadline=None, max_examples=150)
@given(st.text(max_size=40), st.lists(st.text(max_size=40), min_size=1, max_size=3))
def test_scores_are_bounded_and_ordered(prediction, references):
    got = score(prediction, references)
    assert tuple(got) == MEASURES and all(0 <= value <= 1 for value in got.values())
    assert got["em"] <= got["f1_max"] and got["em"] <= got["acc_subspan"]
    assert got["f1_first"] <= got["f1_max"]
    same = score(references[0], references)
    assert same["em"] == 1 and (same["rougeL"] == 1 or not references[0].strip())


def _examples(n, seed=1):
    rng = np.random.default_rng(seed)
    return [{"em": float(rng.random() < 0.3), "f1_max": float(rng.random())} for _ in range(n)]


def test_summary_has_the_means_and_counts():
    got = summarize([{"em": 1.0, "tokens": 10}, {"em": 0.0, "tokens": 20}, {"em": 0.0, "tokens": 60}])
    assert got["em"]["mean"] == pytest.approx(1 / 3) and got["tokens"]["mean"] == pytest.approx(30)
    assert set(got["em"]) == {"mean", "low", "high", "n"} and got["em"]["n"] == got["tokens"]["n"] == 3


def test_bootstrap_is_deterministic_and_covers_the_mean():
    examples = _examples(200)
    got = summarize(examples)
    assert got == summarize(examples) and got != summarize(examples, seed=1)
    assert all(m["low"] <= m["mean"] <= m["high"] and m["low"] < m["high"] for m in got.values())


def test_bootstrap_interval_is_the_normal_one_for_many_examples_and_shrinks():
    widths = []
    for n in (100, 400, 1600):
        em = summarize(_examples(n), resamples=2000)["em"]
        widths.append(em["high"] - em["low"])
        normal = 2 * 1.96 * np.sqrt(em["mean"] * (1 - em["mean"]) / n)
        assert widths[-1] == pytest.approx(normal, rel=0.12)
    assert widths[0] > 1.7 * widths[1] > 1.7**2 * widths[2]


def test_bootstrap_intervals_hold_the_truth_as_often_as_promised():
    held = 0
    for seed in range(100):
        em = summarize(_examples(100, seed), resamples=200)["em"]
        held += em["low"] <= 0.3 <= em["high"]
    assert 89 <= held <= 99  # 95 expected, standard deviation 2.2


def test_one_or_equal_examples_have_a_point_interval():
    for n in (1, 7):
        em = summarize([{"em": 0.1}] * n)["em"]
        assert em["low"] == em["high"] == pytest.approx(em["mean"], abs=1e-15)


@pytest.mark.parametrize(
    "examples, resamples, message",
    [
        ([], 10, "no examples"),
        ([{"em": 1.0}, {"em": 1.0, "f1_max": 1.0}], 10, "example 1 has the measures"),
        ([{"em": 1.0}, {"em": float("nan")}], 10, 'example 1: measure "em" is nan'),
        ([{"em": 1.0}], 0, "resamples is 0"),
    ],
)
def test_summary_refuses_what_has_no_meaning(examples, resamples, message):
    with pytest.raises(ValueError, match=message):
        summarize(examples, resamples=resamples)
