"""max_cosine of every implementation against a loop and against its readable twin: values, partners, ties, gradients.

The kernel for TPU runs here step by step, in Pallas' interpreters; that for GPU is plain XLA.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental.pallas import tpu as pltpu

from comi_jax.kernels import redundancy, redundancy_tpu
from comi_jax.kernels.redundancy import max_cosine, max_cosine_reference

LENGTH = 300  # no multiple of any tile
WIDTH = 4
IMPLEMENTATIONS = {
    "xla": jax.jit(functools.partial(max_cosine, implementation="xla")),
    "tpu": jax.jit(functools.partial(max_cosine, implementation="interpret")),
    "gpu": jax.jit(functools.partial(max_cosine, implementation="gpu")),
}
each_implementation = pytest.mark.parametrize("name", IMPLEMENTATIONS)


def groups(sizes, length=LENGTH):
    """Group ids of consecutive groups of ``sizes``, a number left out for each empty one; -1 behind them."""
    ids = np.repeat(np.arange(len(sizes)), sizes)[:length]
    return np.pad(ids, (0, length - len(ids)), constant_values=-1).astype(np.int32)


def oracle(x, inverse, group):
    """The definition by a loop in float64: value and partner of every token of one row."""
    x, inverse = np.asarray(x, np.float64), np.asarray(inverse, np.float64)
    value, index = np.zeros(len(x)), np.full(len(x), -1)
    for i in range(len(x)):
        partners = np.flatnonzero((group == group[i]) & (group >= 0) & (np.arange(len(x)) != i))
        if partners.size:
            cosines = x[partners] @ x[i] * inverse[partners] * inverse[i]
            value[i], index[i] = cosines.max(), partners[cosines.argmax()]
    return value, index


def small_numbers(seed, shape, dtype=jnp.float32):
    """Vectors and inverse lengths whose cosines are exact and often equal."""
    rng = np.random.default_rng(seed)
    return jnp.asarray(rng.integers(-2, 3, shape), dtype), jnp.asarray(
        2.0 ** rng.integers(-1, 2, shape[:2]), jnp.float32
    )


def check(f, x, inverse, group):
    value, index = f(x, inverse, jnp.asarray(group))
    assert value.dtype == jnp.float32 and index.dtype == jnp.int32
    for row in range(len(x)):
        want_value, want_index = oracle(x[row], inverse[row], group[row])
        np.testing.assert_array_equal(value[row], want_value)
        np.testing.assert_array_equal(index[row], want_index)


@each_implementation
@settings(max_examples=15, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 2**32 - 1),
    sizes=st.tuples(*[st.lists(st.integers(0, LENGTH), min_size=1, max_size=12) for _ in range(2)]),
)
def test_values_partners_and_ties_are_the_definitions(name, seed, sizes):
    x, inverse = small_numbers(seed, (2, LENGTH, WIDTH))
    check(IMPLEMENTATIONS[name], x, inverse, np.stack([groups(s) for s in sizes]))


SIZES = [
    [LENGTH],
    [1] * LENGTH,
    [2] * (LENGTH // 2),
    [128, 128, 44],
    [127, 2, 128, 1],
    [65, 63, 5],
    [1, LENGTH - 2, 1],
    [3, 256, 7],
    [5, 0, 0, 9, 200, 0, 3],
    [1],
    [],
]


@each_implementation
@pytest.mark.parametrize("sizes", SIZES, ids=lambda sizes: f"{len(sizes)} groups from {sizes[:1]}")
def test_groups_of_one_of_all_and_along_the_borders_of_tiles(name, sizes):
    x, inverse = small_numbers(5, (2, LENGTH, WIDTH))
    check(IMPLEMENTATIONS[name], x, inverse, np.stack([groups(sizes), groups([4, 290])]))


@each_implementation
def test_a_context_that_is_shared_is_one_written_out(name):
    """Two contexts, three times each, with other groups every time; values, partners and gradients."""
    rng = np.random.default_rng(8)
    x = jnp.asarray(rng.standard_normal((2, LENGTH, WIDTH)), jnp.float32)
    inverse = 1 / jnp.linalg.norm(x, axis=2)
    group = jnp.stack([groups(s) for s in ([100, 190], [7] * 40, [1, 298], [300], [], [128, 128])])

    def loss(x, inverse):
        value, index = IMPLEMENTATIONS[name](x, inverse, group)
        return jnp.sum(jnp.sin(value)), (value, index)

    gradient = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))
    ours, (value, index) = gradient(x, inverse)
    apart, (want, partner) = gradient(*(jnp.repeat(a, 3, axis=0) for a in (x, inverse)))
    np.testing.assert_allclose(value, want, atol=1e-6)
    np.testing.assert_array_equal(index, partner)
    for mine, each in zip(ours, apart, strict=True):
        np.testing.assert_allclose(mine, each.reshape(2, 3, *mine.shape[1:]).sum(1), atol=1e-5)


@each_implementation
@pytest.mark.parametrize("length", [1, 5, 128, 129, 257])
def test_lengths_around_a_tile(name, length):
    group = groups([length // 2, length - length // 2], length)[None]
    check(IMPLEMENTATIONS[name], *small_numbers(6, (1, length, WIDTH)), group)


@each_implementation
@pytest.mark.parametrize("width", [1, 64, 200])
def test_widths_around_a_part(name, width):
    check(IMPLEMENTATIONS[name], *small_numbers(6, (1, 90, width)), groups([40, 13, 30], 90)[None])


@each_implementation
def test_groups_from_one_to_two_thousand_in_one_call(name):
    length = 2800
    group = groups([1, 2000, 1, 2, 31, 64, 500, 1, 150], length)[None]
    check(IMPLEMENTATIONS[name], *small_numbers(9, (1, length, WIDTH)), group)


def test_the_readable_twin_is_the_definition_too():
    group = np.stack([groups([7, 1, 30], 40), groups([40], 40)])
    check(max_cosine_reference, *small_numbers(7, (2, 40, WIDTH)), group)


@each_implementation
def test_bfloat16_is_multiplied_exactly(name):
    """The cosine of the bfloat16 vectors themselves, to float32's rounding. Normalised in bfloat16 they would be off by
    a thousand times more, which is the reference's own rounding."""
    rng = np.random.default_rng(10)
    x = jnp.asarray(rng.standard_normal((1, 200, 96)), jnp.bfloat16)
    length = np.linalg.norm(np.asarray(x, np.float64), axis=2)
    group = groups([90, 3, 100], 200)[None]
    value, index = IMPLEMENTATIONS[name](x, jnp.asarray(1 / length, jnp.float32), jnp.asarray(group))
    want, partner = oracle(x[0], 1 / length[0], group[0])
    np.testing.assert_allclose(value[0], want, atol=5e-7)
    np.testing.assert_array_equal(index[0], partner)
    rounded = (np.asarray(x, np.float64) / length[:, :, None]).astype(jnp.bfloat16).astype(np.float64)
    assert np.abs(oracle(rounded[0], np.ones(200), group[0])[0] - want).max() > 5e-4


@each_implementation
def test_a_negative_maximum_stays_negative_and_zero_vectors_are_partners(name):
    x = jnp.array([[[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, 0.0], [0.0, 2.0]]])
    value, index = IMPLEMENTATIONS[name](x, jnp.array([[1.0, 1.0, 1.0, 1e12, 0.5]]), jnp.array([[0, 0, 1, 2, 2]]))
    np.testing.assert_array_equal(value, [[-1.0, -1.0, 0.0, 0.0, 0.0]])
    np.testing.assert_array_equal(index, [[1, 0, -1, 4, 3]])


@each_implementation
def test_what_stands_behind_the_groups_is_not_seen(name):
    x, inverse = small_numbers(11, (1, LENGTH, WIDTH))
    group = groups([30, 100, 70])[None]
    poisoned = x.at[:, 200:].set(jnp.nan)
    for got, want in zip(*(IMPLEMENTATIONS[name](y, inverse, jnp.asarray(group)) for y in (poisoned, x)), strict=True):
        np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_the_tpu_kernel_reads_nothing_unwritten_and_races_with_nothing(dtype, capfd):
    """In the interpreter that simulates memories: unwritten memory, and what lies outside of arrays, is NaN."""
    simulated = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan")
    x, inverse = small_numbers(12, (1, LENGTH, WIDTH), dtype)
    check(functools.partial(redundancy_tpu.max_cosine, interpret=simulated), x, inverse, groups([100, 7, 150])[None])
    assert "RACE" not in "".join(capfd.readouterr())


@functools.cache
def gradients():
    def pull(f, x, inverse, group, cotangent):
        return jax.grad(lambda x, i: jnp.sum(f(x, i, group)[0] * cotangent), argnums=(0, 1))(x, inverse)

    return tuple(jax.jit(functools.partial(pull, f)) for f in (max_cosine, max_cosine_reference))


@pytest.mark.parametrize("sizes", [[LENGTH], [1] * 20 + [128] + [9] * 10, [250]])
def test_gradients_are_the_readable_twins(sizes):
    """Where no two cosines are equal. One token is the partner of many, so their pulls must add up."""
    rng = np.random.default_rng(8)
    x = rng.standard_normal((1, LENGTH, WIDTH)).astype(np.float32)
    x[0, 100] *= 10  # everyone's favourite
    inverse, cotangent = (rng.standard_normal((1, LENGTH)).astype(np.float32) for _ in range(2))
    arguments = x, np.abs(inverse) + 0.5, groups(sizes)[None], cotangent
    for ours, twin in zip(*(f(*map(jnp.asarray, arguments)) for f in gradients()), strict=True):
        np.testing.assert_allclose(ours, twin, rtol=1e-5, atol=1e-5 * np.abs(twin).max())
        assert np.abs(ours).max() > 0


def test_gradients_of_bfloat16_are_summed_in_float32():
    """300 pulls of 2^-8 on one token of length 1: a sum in bfloat16 would stop at 1."""
    x = jnp.zeros((1, LENGTH, 2), jnp.bfloat16).at[:, :, 0].set(1.0).at[:, 1:, 0].set(2.0**-8)
    got = jax.grad(lambda x: jnp.sum(max_cosine(x, jnp.ones((1, LENGTH)), jnp.zeros((1, LENGTH), jnp.int32))[0]))(x)
    assert got.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(got[0, 0, 0], np.float32), 300 * 2.0**-8, rtol=2**-7)


def test_gradients_do_not_see_what_stands_behind_the_groups():
    x, inverse = small_numbers(14, (1, LENGTH, WIDTH))
    group = jnp.asarray(groups([30, 100, 70])[None])
    pull = jax.grad(lambda x: jnp.sum(max_cosine(x, inverse, group)[0]))
    np.testing.assert_array_equal(pull(x.at[:, 200:].set(jnp.nan)), pull(x))


def test_of_equal_partners_the_first_takes_the_whole_gradient():
    """As PyTorch's max does; jnp.max would split it."""
    x = jnp.array([[[1.0, 0.0], [1.0, 0.0], [1.0, 0.0]]])
    cotangent = jnp.array([[0.0, 0.0, 5.0]])
    group = jnp.zeros((1, 3), jnp.int32)
    got = jax.grad(lambda x: jnp.sum(max_cosine(x, jnp.ones((1, 3)), group)[0] * cotangent))(x)
    np.testing.assert_array_equal(got, [[[5.0, 0.0], [0.0, 0.0], [5.0, 0.0]]])


def test_memory_beyond_the_input_is_a_tile():
    """At 32K, whatever the groups: they are data. A [S, S] matrix would be 4.3 GB, a copy of the input 8 MB; the
    backward pass has the partners' vectors and the gradient."""
    x, numbers, ids = (
        jax.ShapeDtypeStruct((1, 32_768, *more), t) for more, t in [((64,), "f4"), ((), "f4"), ((), "i4")]
    )

    def temporaries(f):
        return jax.jit(f).lower(x, numbers, ids).compile().memory_analysis().temp_size_in_bytes

    assert temporaries(redundancy.max_cosine) < 2e6
    assert temporaries(jax.grad(lambda x, i, g: jnp.sum(max_cosine(x, i, g)[0]))) < 4 * 8.4e6


def test_float64_is_computed_as_such():
    with jax.enable_x64(True):
        x = jnp.asarray(np.random.default_rng(3).standard_normal((1, 50, 3)))
        value, _ = max_cosine(x, jnp.ones((1, 50)), jnp.asarray(groups([20, 30], 50))[None])
        np.testing.assert_allclose(value[0], oracle(x[0], np.ones(50), groups([20, 30], 50))[0], rtol=1e-14)
