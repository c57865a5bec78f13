"""Cosines as SPEC defines them, for vectors of any length, and the marginal information gain made of them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from comi_jax import mig

unit = jax.jit(mig.unit)


@pytest.mark.parametrize("length", [1e-30, 1e-6, 1.0, 1e4, 1e30])
def test_unit_vectors_neither_overflow_nor_underflow(length):
    """x / max(‖x‖, 1e-12) in float32, though the square of 1e30 is infinite and that of 1e-30 zero."""
    direction = np.array([[[3.0, 0.0, -4.0, 12.0]]]) / 13.0
    want = direction * min(length / 1e-12, 1.0)
    got = unit(jnp.asarray(direction * length, jnp.float32))
    np.testing.assert_allclose(got, want, rtol=1e-5)


def test_the_zero_vector_has_no_direction_and_a_finite_gradient():
    x = jnp.zeros((1, 1, 4))
    np.testing.assert_array_equal(unit(x), x)
    assert jnp.isfinite(jax.grad(lambda x: unit(x).sum())(x)).all()


def test_the_gradient_of_a_unit_vector_is_the_projection():
    x = jnp.asarray(np.random.default_rng(0).standard_normal((1, 1, 5)), jnp.float32)
    v = np.asarray(x[0, 0] / jnp.linalg.norm(x))
    want = (np.eye(5) - np.outer(v, v)) / np.linalg.norm(x)
    np.testing.assert_allclose(jax.jit(jax.jacrev(lambda x: unit(x)[0, 0]))(x)[:, 0, 0], want, atol=1e-6)


def test_cosines_are_computed_in_float32_whatever_comes_in():
    x = jnp.asarray(np.random.default_rng(1).standard_normal((2, 3, 64)), jnp.bfloat16)
    assert unit(x).dtype == jnp.float32
    np.testing.assert_array_equal(unit(x), unit(x.astype(jnp.float32)))
    with jax.enable_x64(True):
        assert unit(jnp.ones((1, 1, 3), jnp.float64)).dtype == jnp.float64


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
        tokens = mig.unit(x)
        relevance = mig.relevance(tokens, mig.unit(q))
        return mig.gain(relevance, mig.redundancy(tokens, group), jnp.float32(alpha), jnp.float32(beta))

    got = gain(x.astype(np.float32), q.astype(np.float32), group)
    np.testing.assert_allclose(got[0], want, atol=1e-5)
