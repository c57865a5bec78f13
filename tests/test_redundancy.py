"""max_cosine against a loop and against its readable twin: values, partners, ties and gradients, across tiles."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from comi_jax.kernels import redundancy
from comi_jax.kernels.redundancy import TILE, max_cosine, max_cosine_reference
from hypothesis import given, settings
from hypothesis import strategies as st

LENGTH = 300  # two whole tiles and a part of one
WIDTH = 4
jitted = jax.jit(max_cosine)


@pytest.fixture(params=[redundancy.SHORT_TILE, TILE], scope="module", autouse=True)
def tile(request):
    """Everything with the tiles of short rows and with those of long ones."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(redundancy, "SHORT_TILE", request.param)
        jax.clear_caches()
        gradients.cache_clear()
        yield request.param
    jax.clear_caches()
    gradients.cache_clear()


def groups(sizes, length=LENGTH):
    """Group ids of consecutive groups of ``sizes``; -1 behind them."""
    ids = np.repeat(np.arange(len(sizes)), sizes)[:length]
    return np.pad(ids, (0, length - len(ids)), constant_values=-1).astype(np.int32)


def oracle(x, group):
    """The definition by a loop: value and partner of every token of one row."""
    value, index = np.zeros(len(x)), np.full(len(x), -1)
    for i in range(len(x)):
        partners = np.flatnonzero((group == group[i]) & (group >= 0) & (np.arange(len(x)) != i))
        if partners.size:
            products = x[partners] @ x[i]
            value[i], index[i] = products.max(), partners[products.argmax()]
    return value, index


def small_integers(seed, shape):
    """Vectors whose products are exact and often equal."""
    return np.random.default_rng(seed).integers(-2, 3, shape).astype(np.float32)


def check(x, group, f=jitted):
    value, index = f(jnp.asarray(x), jnp.asarray(group))
    for row in range(len(x)):
        want_value, want_index = oracle(x[row], group[row])
        np.testing.assert_array_equal(value[row], want_value)
        np.testing.assert_array_equal(index[row], want_index)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    st.integers(0, 2**32 - 1),
    st.tuples(*[st.lists(st.integers(1, LENGTH), min_size=1, max_size=12) for _ in range(2)]),
)
def test_values_partners_and_ties_are_the_definitions(seed, sizes):
    x = small_integers(seed, (2, LENGTH, WIDTH))
    check(x, np.stack([groups(s) for s in sizes]))


@pytest.mark.parametrize(
    "sizes",
    [
        [LENGTH],
        [1] * LENGTH,
        [2] * (LENGTH // 2),
        [TILE, TILE, LENGTH - 2 * TILE],
        [TILE - 1, 2, TILE, 1],
        [TILE + 1, TILE - 1, 5],
        [1, LENGTH - 2, 1],
        [3, 2 * TILE, 7],
        [1],
        [],
    ],
    ids=lambda sizes: f"{len(sizes)} groups from {sizes[:1]}",
)
def test_groups_of_one_of_all_and_along_the_borders_of_tiles(sizes):
    check(small_integers(5, (2, LENGTH, WIDTH)), np.stack([groups(sizes), groups([4, 290])]))


@pytest.mark.parametrize("length", [1, 5, TILE, TILE + 1])
def test_lengths_around_a_tile(length):
    check(small_integers(6, (1, length, WIDTH)), groups([length // 2, length - length // 2], length)[None])


def test_the_readable_twin_is_the_definition_too():
    check(small_integers(7, (2, 40, WIDTH)), np.stack([groups([7, 1, 30], 40), groups([40], 40)]), max_cosine_reference)


def test_a_negative_maximum_stays_negative():
    x = np.array([[[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0]]], np.float32)
    value, index = max_cosine(jnp.asarray(x), jnp.array([[0, 0, 1]], jnp.int32))
    np.testing.assert_array_equal(value, [[-1.0, -1.0, 0.0]])
    np.testing.assert_array_equal(index, [[1, 0, -1]])


@functools.cache
def gradients():
    def pull(f, x, group, cotangent):
        return jax.grad(lambda x: jnp.sum(f(x, group)[0] * cotangent))(x)

    return tuple(jax.jit(functools.partial(pull, f)) for f in (max_cosine, max_cosine_reference))


@pytest.mark.parametrize("sizes", [[LENGTH], [1] * 20 + [TILE] + [9] * 10, [250]])
def test_gradient_is_the_readable_twins(sizes):
    """Where no two products are equal. One token is the partner of many, so their pulls must add up."""
    rng = np.random.default_rng(8)
    x = rng.standard_normal((1, LENGTH, WIDTH)).astype(np.float32)
    x[0, 100] *= 10  # everyone's favourite
    cotangent = rng.standard_normal((1, LENGTH)).astype(np.float32)
    ours, twin = (f(jnp.asarray(x), jnp.asarray(groups(sizes)[None]), jnp.asarray(cotangent)) for f in gradients())
    np.testing.assert_allclose(ours, twin, rtol=1e-5, atol=1e-5 * np.abs(twin).max())
    assert np.abs(ours).max() > 0


def test_of_equal_partners_the_first_takes_the_whole_gradient():
    """As PyTorch's max does; jnp.max would split it."""
    x = jnp.array([[[1.0, 0.0], [1.0, 0.0], [1.0, 0.0]]])
    cotangent = jnp.array([[0.0, 0.0, 5.0]])
    got = jax.grad(lambda x: jnp.sum(max_cosine(x, jnp.zeros((1, 3), jnp.int32))[0] * cotangent))(x)
    np.testing.assert_array_equal(got, [[[5.0, 0.0], [0.0, 0.0], [5.0, 0.0]]])


def test_memory_is_linear_in_the_number_of_tokens():
    """Forward and backward at 32K, whatever the groups: they are data. A [S, S] matrix would be 4.3 GB."""

    def temporaries(length):
        x = jax.ShapeDtypeStruct((1, length, 64), jnp.float32)
        group = jax.ShapeDtypeStruct((1, length), jnp.int32)
        f = jax.jit(jax.value_and_grad(lambda x, g: jnp.sum(redundancy.max_cosine(x, g)[0])))
        return f.lower(x, group).compile().memory_analysis().temp_size_in_bytes

    half, whole = temporaries(16_384), temporaries(32_768)
    assert whole < 2.1 * half
    assert whole < 100e6
