"""Compression against docs/method.md written out as loops in float64; padding, batches, gradients and memory."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from comi_jax import config
from comi_jax.config import Compression
from comi_jax.model import compress as c
from comi_jax.model.architecture import SCALARS

LENGTH, WIDTH, LOWEST_RATE = 48, 6, 2
SLOTS = config.max_groups(LENGTH, LOWEST_RATE)
# Rows: nothing, one token, less than a group, one group, multiples of a rate and neighbours, a high rate, a full row.
LENGTHS = np.array([0, 1, 3, 4, 5, 15, 16, 17, 31, 48, 47, 48], np.int32)
RATES = np.array([4, 4, 4, 4, 4, 8, 8, 8, 32, 2, 3, 16], np.int32)
ROWS = len(LENGTHS)

SWITCHES = {
    "all on": {},
    "coarse off": {"coarse": False},
    "fine off": {"fine": False},
    "coarse redundancy off": {"coarse_redundancy": False},
    "fine redundancy off": {"fine_redundancy": False},
    "mean pooling": {"coarse": False, "fine": False},
}


# --- docs/method.md, section 2, by loops ------------------------------------------------------------------------------


def cosine(a, b):
    return float(a @ b) / (max(np.linalg.norm(a), 1e-12) * max(np.linalg.norm(b), 1e-12))


def redundancy(x, i, others):
    return max((cosine(x[i], x[j]) for j in others if j != i), default=0.0)


def softmax(values):
    power = [math.exp(v - max(values)) for v in values]
    return [p / sum(power) for p in power]


def share_out(gains, n):
    """(5), (6): sizes of the groups of these gains."""
    quotas = [n * p for p in softmax([-g for g in gains])]
    sizes = [math.floor(q) for q in quotas]
    by_fraction = sorted(range(len(quotas)), key=lambda i: (sizes[i] - quotas[i], i))
    for i in by_fraction[: n - sum(sizes)]:
        sizes[i] += 1
    return sizes


def loops(x, query, rate, scalars, options):
    """What docs/method.md says of one context, as a dictionary of lists."""
    n = len(x)
    relevance = [cosine(token, query) for token in x]
    if n == 0:
        return {"sizes": [], "memory": [], "weights": [], "relevance": [], "redundancy": [], "mig": []}
    if options.coarse:
        groups = [range(start, min(start + rate, n)) for start in range(0, n, rate)]
        heads = [max(group, key=lambda i: (relevance[i], -i)) for group in groups]
        repeated = [redundancy(x, i, heads) if options.coarse_redundancy else 0.0 for i in heads]
        gains = [
            scalars["alpha_coarse"] * relevance[i] - scalars["beta_coarse"] * r
            for i, r in zip(heads, repeated, strict=True)
        ]
        sizes = share_out(gains, n)
    else:
        m = max(1, round(n / rate))
        sizes = [n // m + (i < n % m) for i in range(m)]
    memory, weights, fine_redundancy, fine_mig, start = [], [], [], [], 0
    for size in sizes:
        group = range(start, start + size)
        start += size
        repeated = [redundancy(x, i, group) if options.fine_redundancy else 0.0 for i in group]
        gains = [
            scalars["alpha_fine"] * relevance[i] - scalars["beta_fine"] * r
            for i, r in zip(group, repeated, strict=True)
        ]
        if size:
            share = softmax(gains if options.fine else [0.0] * size)
            memory.append(sum(w * x[i] for w, i in zip(share, group, strict=True)))
            weights += share
            fine_redundancy += repeated
            fine_mig += gains
    return {
        "sizes": sizes, "memory": memory, "weights": weights, "relevance": relevance, "redundancy": fine_redundancy,
        "mig": fine_mig,
    }  # fmt: skip


# --- ours -------------------------------------------------------------------------------------------------------------


def options_of(switch):
    return Compression(rates=(2, 32), **SWITCHES[switch])


compiled = jax.jit(c.compress, static_argnums=(5, 6))


def run(states, query, lengths, rates, scalars, options, slots=SLOTS):
    """The result as numpy arrays."""
    return jax.tree.map(np.asarray, compiled(states, query, lengths, rates, scalars, options, slots))


def random_input(seed, anisotropy=1.0):
    """States of all lengths and sizes, all leaning the same way, as a language model's do."""
    rng = np.random.default_rng(seed)
    states = rng.standard_normal((ROWS, LENGTH, WIDTH)) + anisotropy * rng.standard_normal(WIDTH)
    states *= 10.0 ** rng.uniform(-3, 3, (ROWS, LENGTH, 1))
    return states, rng.standard_normal((ROWS, WIDTH))


def scalars_of(values=(1.0, 1.0, 1.0, 1.0), dtype=np.float32):
    return dict(zip(SCALARS, map(dtype, values), strict=True))


def check_against_loops(out, states, query, lengths, rates, scalars, options, atol):
    for row, n in enumerate(lengths):
        want = loops(states[row, :n], query[row], int(rates[row]), scalars, options)
        m = len(want["sizes"])
        np.testing.assert_array_equal(out.aux.group_sizes[row, :m], want["sizes"])
        assert not np.any(out.aux.group_sizes[row, m:]) and np.sum(out.aux.group_sizes[row]) == n
        found = len(want["memory"])
        np.testing.assert_array_equal(out.mask[row], np.arange(SLOTS) < found)
        for name in ("weights", "relevance", "redundancy", "mig"):
            np.testing.assert_allclose(getattr(out.aux, name)[row, :n], want[name], atol=atol)
        scale = max((np.abs(v).max() for v in want["memory"]), default=1.0) or 1.0
        np.testing.assert_allclose(
            out.memory[row, :found] / scale, np.reshape(want["memory"], (found, WIDTH)) / scale, atol=atol
        )
        assert not np.any(out.memory[row, found:])


@pytest.mark.parametrize("switch", SWITCHES)
def test_every_switch_computes_what_spec_says(switch):
    """In float64, so that no rounding moves a token from one group to the next."""
    options = options_of(switch)
    with jax.enable_x64(True):
        for seed, values in enumerate([(1.0, 1.0, 1.0, 1.0), (6.0, 3.0, 5.0, 2.0), (0.0, 25.0, -3.0, 0.0)]):
            states, query = random_input(seed)
            scalars = scalars_of(values, np.float64)
            out = run(states, query, LENGTHS, RATES, scalars, options)
            check_against_loops(out, states, query, LENGTHS, RATES, scalars, options, 1e-9)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    st.integers(0, 2**32 - 1),
    st.tuples(*[st.integers(0, LENGTH)] * ROWS),
    st.tuples(*[st.integers(LOWEST_RATE, 40)] * ROWS),
    st.tuples(*[st.floats(-20, 20)] * 4),
    st.sampled_from([0.0, 1.0, 10.0]),
)
def test_any_lengths_rates_and_scalars_compute_what_spec_says(seed, lengths, rates, values, anisotropy):
    options = options_of("all on")
    with jax.enable_x64(True):
        states, query = random_input(seed, anisotropy)
        scalars = scalars_of(values, np.float64)
        lengths, rates = np.array(lengths, np.int32), np.array(rates, np.int32)
        out = run(states, query, lengths, rates, scalars, options)
        check_against_loops(out, states, query, lengths, rates, scalars, options, 1e-8)


@functools.cache
def result(switch="all on"):
    """One float32 result that several tests look at."""
    states, query = (np.asarray(x, np.float32) for x in random_input(3))
    return states, query, run(states, query, LENGTHS, RATES, scalars_of(), options_of(switch))


def test_float32_computes_what_spec_says():
    states, query, out = result()
    assert out.memory.dtype == jnp.float32
    check_against_loops(
        out,
        states.astype(np.float64),
        query.astype(np.float64),
        LENGTHS,
        RATES,
        scalars_of(),
        options_of("all on"),
        1e-5,
    )


EXTREMES = {
    "one token, repeated": lambda x: np.broadcast_to(x[:, :1], x.shape),
    "pairs of tokens": lambda x: np.repeat(x[:, ::2], 2, axis=1),
    "huge norms": lambda x: x * 1e15,
    "tiny norms": lambda x: x * 1e-15,
    "huge and tiny norms": lambda x: x * 10.0 ** np.where(np.arange(LENGTH) % 2, 12.0, -12.0)[None, :, None],
    "nothing but zeros": np.zeros_like,
}


@pytest.mark.fault
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", EXTREMES)
def test_extreme_states_are_compressed_as_the_float64_loops_do(name, dtype):
    states, query = random_input(5)
    states = np.asarray(jnp.asarray(np.array(EXTREMES[name](states)), dtype), np.float32)
    query = np.asarray(jnp.asarray(query, dtype), np.float32)
    out = run(jnp.asarray(states, dtype), jnp.asarray(query, dtype), LENGTHS, RATES, scalars_of(), options_of("all on"))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(out))
    wide = (x.astype(np.float64) for x in (states, query))
    check_against_loops(out, *wide, LENGTHS, RATES, scalars_of(), options_of("all on"), 1e-5)


def test_short_floats_are_compressed_in_float32():
    states, query, _ = result()
    short = jnp.asarray(states, jnp.bfloat16), jnp.asarray(query, jnp.bfloat16)
    rest = jnp.asarray(LENGTHS), jnp.asarray(RATES), scalars_of()
    out = jax.eval_shape(lambda *arrays: c.compress(*arrays, options_of("all on"), SLOTS), *short, *rest)
    assert {leaf.dtype for leaf in jax.tree.leaves(out)} == {jnp.dtype(t) for t in ("float32", "int32", "bool")}


@pytest.mark.parametrize("row", [5, 10])
def test_a_mixed_rate_padded_batch_is_its_examples_one_by_one(row):
    """Row by row without padding, with no more slots than that row needs."""
    states, query, batch = result()
    n, rate = int(LENGTHS[row]), int(RATES[row])
    one = slice(row, row + 1)
    slots = config.max_groups(n, rate)
    alone = run(states[one, :n], query[one], LENGTHS[one], RATES[one], scalars_of(), options_of("all on"), slots)
    scale = np.abs(alone.memory).max()
    np.testing.assert_allclose(batch.memory[one, :slots] / scale, alone.memory / scale, atol=1e-6)
    np.testing.assert_array_equal(batch.mask[one, :slots], alone.mask)
    np.testing.assert_array_equal(batch.aux.group_sizes[one, :slots], alone.aux.group_sizes)
    np.testing.assert_allclose(batch.aux.mig[one, :n], alone.aux.mig, atol=1e-6)


@functools.cache
def gradient():
    def pull(states, query, scalars, lengths, rates, cotangent, options):
        memory = c.compress(states, query, lengths, rates, scalars, options, SLOTS).memory
        return jnp.sum(memory * cotangent)

    return jax.jit(jax.value_and_grad(pull, argnums=(0, 1, 2)), static_argnums=6)


@pytest.mark.parametrize("rubbish", [0.0, 1e30, np.inf, np.nan])
def test_padding_may_hold_anything(rubbish):
    """Neither the result nor a gradient changes by a bit, and padding gets a gradient of zero."""
    states, query, out = result()
    padding = np.arange(LENGTH)[None, :, None] >= LENGTHS[:, None, None]
    other = np.where(padding, np.float32(rubbish), states)
    got = run(other, query, LENGTHS, RATES, scalars_of(), options_of("all on"))
    np.testing.assert_array_equal(got.memory, out.memory)
    np.testing.assert_array_equal(got.aux.group_sizes, out.aux.group_sizes)
    cotangent = np.random.default_rng(0).standard_normal(out.memory.shape).astype(np.float32)
    rest = query, scalars_of(), LENGTHS, RATES, cotangent, options_of("all on")
    grads, want = gradient()(other, *rest)[1], gradient()(np.where(padding, 1, states), *rest)[1]
    jax.tree.map(np.testing.assert_array_equal, grads, want)
    assert not np.any(np.where(padding, grads[0], 0.0))


def test_gradients_are_finite_differences():
    """Memory by states, query and α, β of the fine stage; not by the coarse ones: sizes are integers."""
    options, step = options_of("all on"), 1e-6
    rng = np.random.default_rng(4)
    with jax.enable_x64(True):
        states = rng.standard_normal((ROWS, LENGTH, WIDTH)) + 0.5
        query = rng.standard_normal((ROWS, WIDTH))
        scalars = scalars_of((1.0, 1.0, 1.5, 0.7), np.float64)
        cotangent = rng.standard_normal((ROWS, SLOTS, WIDTH))

        def value(states, query, scalars):
            return gradient()(states, query, scalars, LENGTHS, RATES, cotangent, options)

        _, (by_states, by_query, by_scalars) = value(states, query, scalars)
        for _ in range(3):
            d_states, d_query = rng.standard_normal(states.shape), rng.standard_normal(query.shape)
            up, down = (value(states + s * d_states, query + s * d_query, scalars)[0] for s in (step, -step))
            want = np.sum(by_states * d_states) + np.sum(by_query * d_query)
            np.testing.assert_allclose((up - down) / (2 * step), want, rtol=1e-6)
        for name in ("alpha_fine", "beta_fine"):
            up, down = (value(states, query, scalars | {name: scalars[name] + s})[0] for s in (step, -step))
            np.testing.assert_allclose((up - down) / (2 * step), by_scalars[name], rtol=1e-6)
            assert abs(by_scalars[name]) > 1e-3
        assert by_scalars["alpha_coarse"] == by_scalars["beta_coarse"] == 0


# --- sizes ------------------------------------------------------------------------------------------------------------

reallocate = jax.jit(c.reallocate)
GAINS = st.integers(-5000, 5000).map(lambda i: i / 64) | st.sampled_from([-2.0, 0.0, 1.0])


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.lists(st.tuples(st.lists(GAINS, min_size=1, max_size=16), st.integers(0, 40_000)), min_size=4, max_size=4))
def test_sizes_sum_to_n_and_fall_with_the_gain(rows):
    """For any gains, equal and extreme ones among them; a tie goes to the lower index."""
    gain, exists = np.full((4, 16), np.nan, np.float32), np.zeros((4, 16), bool)
    for row, (gains, _) in enumerate(rows):
        gain[row, : len(gains)], exists[row, : len(gains)] = gains, True
    gain = np.where(exists, gain, 9.0)
    lengths = np.array([n for _, n in rows], np.int32)
    size = np.asarray(reallocate(gain, exists, lengths))
    np.testing.assert_array_equal(size.sum(1), lengths)
    assert (size >= 0).all() and not size[~exists].any()
    for row, (gains, n) in enumerate(rows):
        quota = n * np.array(softmax([-float(g) for g in gains]))
        assert np.abs(size[row, : len(gains)] - quota).max() < 1 + 1e-5 * n
        order = sorted(range(len(gains)), key=lambda i: (gains[i], i))
        assert (np.diff(size[row, order]) <= 0).all()


def test_equal_gains_give_equal_sizes_with_the_rest_in_front():
    for n in (0, 1, 7, 8, 9, 23, 24, 32_768):
        for m in (1, 3, 7, 16):
            exists = (np.arange(16) < m)[None]
            size = reallocate(np.full((1, 16), 0.3, np.float32), exists, np.array([n], np.int32))[0]
            np.testing.assert_array_equal(size[:m], [n // m + (i < n % m) for i in range(m)])


def test_near_equal_groups_for_every_length_and_rate():
    """Coarse off: max(1, round(n / r)) groups, halves to even."""
    lengths, rates = (x.reshape(-1).astype(np.int32) for x in np.meshgrid(np.arange(130), np.arange(1, 41)))
    sizes = np.asarray(jax.jit(c.equal_sizes, static_argnums=2)(lengths, rates, 130))
    for n, r, got in zip(lengths, rates, sizes, strict=True):
        m = max(1, round(int(n) / int(r)))
        assert list(got[:m]) == [n // m + (i < n % m) for i in range(m)] and not got[m:].any()


def test_every_rate_of_a_length_fits_the_slots():
    for n in range(1, 200):
        for r in range(1, 50):
            assert config.max_groups(n, r) == math.ceil(n / r) >= max(1, round(n / r))


def test_no_matrix_of_tokens_by_tokens_or_groups_is_ever_held():
    """Compress and its gradient at 32K and rate 16: [n, n] would take 4.3 GB, [n, m] 268 MB, the states take 8 MB."""
    n, options = 32_768, Compression(rates=(16,))

    def loss(states, query, scalars):
        lengths, rates = jnp.full((1,), n, jnp.int32), jnp.full((1,), 16, jnp.int32)
        return jnp.sum(c.compress(states, query, lengths, rates, scalars, options, n // 16).memory)

    shapes = jax.ShapeDtypeStruct((1, n, 64), jnp.float32), jax.ShapeDtypeStruct((1, 64), jnp.float32)
    lowered = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(*shapes, scalars_of())
    assert lowered.compile().memory_analysis().temp_size_in_bytes < 100e6


def test_kept_tokens_are_groups_of_one_and_the_others_are_cut_as_if_alone():
    rng = np.random.default_rng(5)
    rows, length, slots = 6, 24, 24
    states = rng.standard_normal((rows, length, WIDTH)).astype(np.float32)
    query = rng.standard_normal((rows, WIDTH)).astype(np.float32)
    lengths, rates = np.array([24, 23, 9, 1, 24, 24], np.int32), np.array([3, 4, 2, 4, 8, 3], np.int32)
    kept = (rng.random((rows, length)) < 0.25) & (np.arange(length) < lengths[:, None])
    kept[4:] = [[False] * length, np.arange(length) % 2 == 0]
    compact = np.zeros_like(states)
    for row in range(rows):
        others = states[row, : lengths[row]][~kept[row, : lengths[row]]]
        compact[row, : len(others)] = others
    apart = jax.jit(functools.partial(c.compress, settings=Compression(), slots=slots))
    inputs = query, lengths, rates, scalars_of()
    out = jax.tree.map(np.asarray, apart(states, *inputs, kept=kept))
    others = lengths - kept.sum(1, dtype=np.int32)
    alone = jax.tree.map(np.asarray, apart(compact, query, others, *inputs[2:], kept=np.zeros_like(kept)))
    for row, n in enumerate(lengths):
        group, own = out.aux.group[row, :n], kept[row, :n]
        assert (np.diff(group) >= 0).all() and (out.aux.group[row, n:] == -1).all()
        counts = np.bincount(group, minlength=slots)
        np.testing.assert_array_equal(counts, out.aux.group_sizes[row])
        np.testing.assert_array_equal(counts > 0, out.mask[row])
        assert (counts[group[own]] == 1).all()
        np.testing.assert_allclose(out.memory[row, group[own]], states[row, :n][own], atol=1e-6)
        place = np.flatnonzero(~own)
        theirs, ours = alone.aux.group[row, : len(place)], group[place]
        neighbours = np.diff(place) == 1
        np.testing.assert_array_equal((np.diff(ours) == 0)[neighbours], (np.diff(theirs) == 0)[neighbours])
        assert (np.diff(ours) > 0)[~neighbours].all()
        assert out.mask[row].sum() <= alone.mask[row].sum() + own.sum() + (~neighbours).sum()
