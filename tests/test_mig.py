"""Cosines as docs/method.md defines them, for vectors of any length, and the marginal information gain made of them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from comi_jax.model import mig


def unit(x):
    """x / max(‖x‖, ε), from its direction."""
    x, inverse = mig.directions(x)
    return x.astype(inverse.dtype) * inverse[..., None]


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("length", [1e-30, 1e-6, 1.0, 1e4, 1e14, 1e15, 1e30, 1e38])
def test_directions_neither_overflow_nor_underflow(length, dtype):
    """x / max(‖x‖, 1e-12), though the square of 1e30 is infinite and that of 1e-30 zero in float32."""
    direction = np.array([[[3.0, 0.0, -4.0, 12.0]]]) / 13.0
    x = jnp.asarray(direction * length, dtype)
    exact = np.asarray(x, np.float64)
    want = exact / max(np.linalg.norm(exact), 1e-12)
    np.testing.assert_allclose(jax.jit(unit)(x), want, rtol=1e-6, atol=1e-18)


def test_vectors_of_usual_length_are_taken_as_they_are():
    x = jnp.asarray(np.random.default_rng(3).standard_normal((1, 5, 4)) * 1e4, jnp.bfloat16)
    assert (mig.directions(x)[0] == x).all() and mig.directions(x)[0].dtype == jnp.bfloat16


def test_the_zero_vector_has_no_direction_and_a_finite_gradient():
    x = jnp.zeros((1, 1, 4))
    np.testing.assert_array_equal(unit(x), x)
    assert jnp.isfinite(jax.grad(lambda x: unit(x).sum())(x)).all()


@pytest.mark.parametrize("length", [1.0, 1e20])
def test_the_gradient_of_a_unit_vector_is_the_projection(length):
    x = jnp.asarray(np.random.default_rng(0).standard_normal((1, 1, 5)), jnp.float32) * length
    v = np.asarray(x[0, 0] / length, np.float64)
    norm, v = np.linalg.norm(v), v / np.linalg.norm(v)
    want = (np.eye(5) - np.outer(v, v)) / norm / length
    np.testing.assert_allclose(jax.jit(jax.jacrev(lambda x: unit(x)[0, 0]))(x)[:, 0, 0], want, atol=1e-6 / length)


def test_cosines_are_computed_in_float32_whatever_comes_in():
    x = jnp.asarray(np.random.default_rng(1).standard_normal((2, 3, 64)), jnp.bfloat16)
    (_, inverse), (_, wide) = mig.directions(x), mig.directions(x.astype(jnp.float32))
    assert inverse.dtype == jnp.float32
    np.testing.assert_array_equal(inverse, wide)
    query = jnp.asarray(np.random.default_rng(2).standard_normal((2, 64)), jnp.float32)
    got = mig.relevance(x, inverse, query)
    np.testing.assert_allclose(got, mig.relevance(x.astype(jnp.float32), inverse, query), rtol=1e-6)
    with jax.enable_x64(True):
        assert mig.directions(jnp.ones((1, 1, 3), jnp.float64))[1].dtype == jnp.float64


def test_gain_is_equation_1():
    """α cos(x_i, q̄) − β max_{j≠i} cos(x_i, x_j), by a loop, in two groups and a token of none."""
    rng = np.random.default_rng(2)
    x, q = rng.standard_normal((1, 8, 5)), rng.standard_normal((1, 5))
    group = np.array([[0, 0, 0, 1, 1, 1, 2, -1]], np.int32)
    alpha, beta = 1.5, 0.5

    def cos(a, b):
        return a @ b / (np.linalg.norm(a) * np.linalg.norm(b))

    want = np.zeros(8)
    for i in range(8):
        others = [cos(x[0, i], x[0, j]) for j in range(8) if j != i and group[0, j] == group[0, i] >= 0]
        want[i] = alpha * cos(x[0, i], q[0]) - beta * max(others, default=0.0)

    @jax.jit
    def gain(x, q, group):
        tokens = mig.directions(x)
        relevance = mig.relevance(*tokens, q)
        return mig.gain(relevance, mig.redundancy(*tokens, group), jnp.float32(alpha), jnp.float32(beta))

    got = gain(x.astype(np.float32), q.astype(np.float32), group)
    np.testing.assert_allclose(got[0], want, atol=1e-5)
