"""--table=terms: sizes and weights without a term are those that the model computes with the term switched off."""

import dataclasses

import numpy as np
import pytest
import train_fixtures
from scipy import stats

from comi_jax.data.records import Record
from comi_jax.evaluation import diagnostics_terms as terms
from comi_jax.evaluation.diagnostics import anatomies, subjects
from comi_jax.serving.compressor import Comi

quick_compilation, world = train_fixtures.quick_compilation, train_fixtures.world

RATE = 2
ROWS = [row for facts in (4, 1, 8, 3) for row in train_fixtures.records(1, seed=facts, facts=facts)]
RECORDS = [Record(tuple(row["input"]), row["prompt"], tuple(row["answer"])) for row in ROWS]


def made(world, *overrides):
    model = Comi.load(world.run, batch_size=4, overrides=overrides)
    found = {a.subject.number: a for a in anatomies(model, subjects(RECORDS, model), RATE)}
    return [found[number] for number in range(len(RECORDS))]


@pytest.fixture(scope="module")
def found(world):
    return made(world)


def test_without_a_term_is_the_switch_of_the_model(world, found):
    """The sizes of coarse_redundancy=false; the weights of fine_redundancy=false, whose groups are the same."""
    off = made(world, "compression.coarse_redundancy=false")
    changed = []
    for a, b in zip(found, off, strict=True):
        measure = terms.measure_terms(a)
        assert measure["coarse changed relevance"] == pytest.approx((a.allocated != b.allocated).mean())
        assert measure["coarse stays relevance"] == pytest.approx(terms.overlap(a.initial.sizes, b.allocated))
        moved = np.abs(a.allocated - b.allocated).sum() / 2 / a.allocated.sum()
        assert measure["coarse moved relevance"] == pytest.approx(moved)
        changed.append(measure["coarse changed relevance"])
    assert max(changed) > 0
    off = made(world, "compression.fine_redundancy=false")
    for a, b in zip(found, off, strict=True):
        measure, starts = terms.measure_terms(a), np.cumsum(a.final.sizes) - a.final.sizes
        moved = np.add.reduceat(np.abs(a.weights.astype(np.float64) - b.weights), starts).mean() / 2
        assert measure["fine moved relevance"] == pytest.approx(moved, abs=1e-5) and moved > 0


def test_nothing_changes_against_itself_and_a_plain_mean_is_even(found):
    for a in found:
        measure = terms.measure_terms(a)
        for stage in ("coarse", "fine"):
            assert measure[f"{stage} changed on"] == 0 and measure[f"{stage} moved on"] == pytest.approx(0, abs=1e-6)
        assert measure["coarse stays off"] == 1
        assert measure["coarse changed off"] == pytest.approx((a.allocated != a.initial.sizes).mean())
        starts = np.cumsum(a.final.sizes) - a.final.sizes
        even = np.repeat(1 / a.final.sizes, a.final.sizes)
        moved = np.add.reduceat(np.abs(a.weights.astype(np.float64) - even), starts).mean() / 2
        assert measure["fine moved off"] == pytest.approx(moved, abs=1e-5)
        held = len(np.unique(np.repeat(np.arange(len(starts)), a.final.sizes)[a.subject.answer]))
        share = a.weights[a.subject.answer].sum() / held
        assert measure["fine answer on"] == pytest.approx(float(share), abs=1e-5)


def test_a_constant_term_changes_nothing(found):
    """Softmax does not see a redundancy that all groups and tokens share."""
    a = found[2]
    constant = np.full_like(a.initial.redundancy, 0.7)
    same = dataclasses.replace(
        a,
        initial=dataclasses.replace(a.initial, mig=a.initial.relevance - constant),
        allocated=terms.allocate(a.initial.relevance, int(a.initial.sizes.sum())),
        segment=np.zeros_like(a.segment),
        token_redundancy=np.full_like(a.token_redundancy, 0.7),
    )
    measure = terms.measure_terms(same)
    assert measure["coarse changed relevance"] == 0 and measure["fine moved relevance"] == pytest.approx(0, abs=1e-6)
    assert measure["coarse spread redundancy"] == pytest.approx(0, abs=1e-6)
    assert measure["coarse correlation"] == pytest.approx(1)


def test_sizes_by_hand():
    assert terms.allocate(np.zeros(4), 10).tolist() == [3, 3, 2, 2]
    assert terms.allocate(np.log([1.0, 2.0, 4.0]), 7).tolist() == [4, 2, 1]
    assert terms.overlap(np.array([2, 2, 2]), np.array([1, 3, 2])) == pytest.approx(5 / 6)
    assert terms.overlap(np.array([2, 2]), np.array([0, 4])) == 0.5


def test_the_rank_correlation_is_spearmans():
    rng = np.random.default_rng(0)
    for _ in range(20):
        a, b = rng.integers(0, 5, 12).astype(float), rng.integers(0, 5, 12).astype(float)
        assert terms.rank_correlation(a, b) == pytest.approx(stats.spearmanr(a, b).statistic)
    assert terms.rank_correlation(np.zeros(3), np.arange(3.0)) == 1.0


def test_answers_count_only_where_there_are_any(found):
    measures = [terms.measure_terms(a) for a in found]
    absent = dataclasses.replace(found[0].subject, status="absent")
    without = terms.measure_terms(dataclasses.replace(found[0], subject=absent))
    table = terms.summary_terms([*measures, without])
    assert [(row["stage"], row["by"]) for row in table.rows][:2] == [("coarse", "MIG"), ("coarse", "relevance alone")]
    assert table.rows[0]["answer"]["n"] == len(measures) and table.rows[0]["moved"]["n"] == len(measures) + 1
    assert f"{len(measures) + 1} examples, {len(measures)} with an answer" in table.notes[0]
    assert terms.summary_terms([without]).rows[0]["answer"] is None
