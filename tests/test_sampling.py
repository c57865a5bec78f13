"""Drawn tokens against NumPy, and what a draw may depend on: the row's seed and the token's number, never the batch."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_models

from comi_jax.config import Generation
from comi_jax.errors import ConfigError
from comi_jax.model import architecture, generate, sampling
from comi_jax.model import backbone as lm

ARCH = tiny_models.architecture("qwen3", lora=2)
PROMPT, NEW = 9, 10
LENGTHS = np.array([9, 4, 1], np.int32)
NOTHING = Generation(max_new_tokens=NEW, temperature=1.5, seed=7)


@pytest.fixture(scope="module")
def params():
    specs = architecture.specs(ARCH)
    return tiny_models.shaken({"decoder": specs["decoder"], "lora": specs["lora"]}, seed=2)


@pytest.fixture(scope="module")
def prompt():
    return np.random.default_rng(0).standard_normal((3, PROMPT, 32)).astype(np.float32)


@jax.jit
def _begin(params, prompt, lengths, rules):
    return generate.begin(params, ARCH, prompt, lengths, rules, (61,), NEW, sampled=True)


@jax.jit
def _proceed(params, decoding, rules, until):
    return generate.proceed(params, ARCH, decoding, rules, (61,), until, sampled=True)


def joined(*each):
    """One row of rules after another."""
    rows = [sampling.rules(options, 1) for options in each]
    return jax.tree.map(lambda *parts: np.concatenate(parts), *rows)


def ids(params, prompt, rules, rows=(0, 1, 2)):
    rows = list(rows)
    return np.asarray(run(params, prompt[rows], LENGTHS[rows], rules).ids)


def run(params, prompt, lengths, rules, until=NEW):
    return _proceed(params, _begin(params, prompt, lengths, rules), rules, jnp.int32(until))


# --- which tokens may be drawn ----------------------------------------------------------------------------------------


def twin(scores, top_k, top_p):
    """The same as ``sampling.kept`` for one row, token by token."""
    order = sorted(range(len(scores)), key=lambda i: (-scores[i], i))[: top_k or len(scores)]
    weights = np.exp(scores[order].astype(np.float64) - scores.max())
    kept, mass = np.zeros(len(scores), bool), 0.0
    for token, probability in zip(order, weights / weights.sum(), strict=True):
        if mass >= top_p:
            break
        kept[token], mass = True, mass + probability
    return kept


def test_the_tokens_kept_are_those_of_a_loop():
    rng = np.random.default_rng(3)
    limits = [(k, p) for k in (0, 1, 2, 5, 40, 1000) for p in (1e-6, 0.13, 0.57, 0.91, 1.0)]
    scores = rng.standard_normal((len(limits), 23)).astype(np.float32) * 2
    scores[:, 4] = scores[:, 17]  # ties
    scores[3] = 0.0
    k, p = np.array([k for k, _ in limits], np.int32), np.array([p for _, p in limits], np.float32)
    found = np.asarray(jax.jit(sampling.kept)(scores, k, p))
    want = np.array([twin(row, *limit) for row, limit in zip(scores, limits, strict=True)])
    assert found.tolist() == want.tolist() and len({row.sum() for row in want}) > 5
    mass = np.where(found, jax.nn.softmax(scores, axis=-1), 0).sum(1)
    assert (mass >= np.where(k == 0, p, 0) - 1e-5).all()  # top-p keeps at least that mass


def test_draws_have_the_probabilities_of_the_scores():
    """20,000 draws at as many places of an answer: within 4 standard deviations, and nothing that was left out."""
    n, scores = 20_000, np.array([1.0, 0.0, -1.0, 2.0, -3.0], np.float32)
    for options, allowed in (
        (Generation(temperature=0.7, seed=1), [0, 1, 2, 3, 4]),
        (Generation(temperature=1.3, seed=2**40 + 5, top_k=3), [0, 1, 3]),
        (Generation(temperature=1.0, seed=3, top_p=0.8), [0, 3]),
    ):
        rules = sampling.rules(options, n)
        drawn = np.asarray(jax.jit(sampling.draw)(np.tile(scores, (n, 1)), np.arange(n, dtype=np.int32), rules))
        weights = np.zeros(5)
        weights[allowed] = np.exp(scores[allowed] / options.temperature)
        want = weights / weights.sum()
        found = np.bincount(drawn, minlength=5) / n
        assert (np.abs(found - want) <= 4 * np.sqrt(want * (1 - want) / n)).all(), (found, want)


# --- what an answer depends on ----------------------------------------------------------------------------------------


def test_a_row_draws_the_same_answer_in_any_batch(params, prompt):
    each = [dataclasses.replace(NOTHING, seed=seed) for seed in (7, 8, 2**33 + 7)]
    together = ids(params, prompt, joined(*each))
    assert ids(params, prompt, joined(*each[::-1]), (2, 1, 0)).tolist() == together[::-1].tolist()
    for row in range(3):
        assert ids(params, prompt, joined(each[row]), (row,)).tolist() == together[row : row + 1].tolist()
    same = ids(params, prompt, joined(*each), (0, 0, 0))
    assert len({tuple(row) for row in same.tolist()}) == 3  # other seeds, the high word counts too
    again = ids(params, prompt, joined(each[0], each[0], each[0]), (0, 0, 0))
    assert (again == together[0]).all()


def test_one_token_to_draw_from_is_greedy(params, prompt):
    options = Generation(max_new_tokens=NEW, repetition_penalty=1.3)
    best = jax.jit(lambda *a: generate.greedy(*a, options, (61,)), static_argnums=1)(params, ARCH, prompt, LENGTHS)
    for drawn in ({"top_k": 1}, {"top_p": 1e-9}, {"temperature": 1e-30}):
        rules = joined(*[dataclasses.replace(options, **{"temperature": 2.0, "seed": 5} | drawn)] * 3)
        assert ids(params, prompt, rules).tolist() == np.asarray(best.ids).tolist(), drawn
    mixed = joined(options, dataclasses.replace(options, temperature=2.0), options)
    found = ids(params, prompt, mixed)
    assert found[[0, 2]].tolist() == np.asarray(best.ids)[[0, 2]].tolist()
    assert found[1].tolist() != np.asarray(best.ids)[1].tolist()


def test_going_on_with_some_rows_or_a_few_tokens_at_a_time_is_the_same(params, prompt):
    each = joined(*[dataclasses.replace(NOTHING, seed=seed) for seed in (7, 8, 9)])
    whole = run(params, prompt, LENGTHS, each)
    half = run(params, prompt, LENGTHS, each, 4)
    assert np.asarray(half.count).tolist() == [4, 4, 4]
    rest, rules = generate.take_rows(half, each, jnp.array([2, 0]))
    rest = _proceed(params, rest, rules, jnp.int32(NEW))
    assert np.asarray(rest.ids).tolist() == np.asarray(whole.ids)[[2, 0]].tolist()


def test_log_probabilities_are_those_of_the_model(params, prompt):
    """Of the logits without penalty and temperature, from one pass over prompt and answer."""
    options = dataclasses.replace(NOTHING, repetition_penalty=1.5)
    out = run(params, prompt, LENGTHS, joined(options, options, options))
    lora = generate.adapters(params, ARCH)
    for row, length in enumerate(LENGTHS):
        answer = params["decoder"]["embed"][out.ids[row]]
        whole = jnp.concatenate([prompt[row, :length], answer])[None]
        states, _ = jax.jit(lambda x: lm.forward(params["decoder"], x, ARCH.backbone, lora=lora))(whole)
        log_p = jax.nn.log_softmax(lm.logits(params["decoder"], states[0, length - 1 : -1]), axis=-1)
        want = np.take_along_axis(np.asarray(log_p), np.asarray(out.ids)[row][:, None], axis=1)[:, 0]
        np.testing.assert_allclose(out.logprobs[row], want, atol=1e-4)


@pytest.mark.parametrize(
    "values, message",
    [
        ({"temperature": -0.1}, "generation.temperature is -0.1; it is 0 .greedy. or positive"),
        ({"temperature": float("nan")}, "generation.temperature is nan"),
        ({"top_p": 0.0}, r"generation.top_p is 0.0; it must lie in \(0, 1\]"),
        ({"top_p": 1.1}, "generation.top_p is 1.1"),
        ({"top_k": -1}, "generation.top_k is -1"),
        ({"seed": -1}, "generation.seed is -1"),
        ({"seed": 2**63}, "generation.seed is"),
        ({"stop_strings": tuple("abcdefghijklmnopq")}, "generation.stop_strings holds 17 texts; give at most 16"),
        ({"stop_strings": ("a", "")}, "generation.stop_strings holds an empty text"),
        ({"repetition_penalty": 0.0}, "generation.repetition_penalty is 0.0"),
    ],
)
def test_options_that_mean_nothing_are_refused(values, message):
    with pytest.raises(ConfigError, match=message):
        Generation(**values)
