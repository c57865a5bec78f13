"""The learning rate over a run, what weight decay acts on, and clipping."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny_models
from jax import numpy_dtype_promotion

from comi_jax.config import Optimizer
from comi_jax.model import architecture
from comi_jax.model.architecture import SCALARS
from comi_jax.params import flatten
from comi_jax.training import optim


@pytest.mark.parametrize(
    "name, warmup, expected",
    [
        # learning rate, as a share of its peak, of the updates 0, 5, 10, 55 and 100 of 100
        ("linear", 0.1, [0.0, 0.5, 1.0, 0.5, 0.0]),
        ("cosine", 0.1, [0.0, 0.5, 1.0, 0.5, 0.0]),
        ("constant", 0.1, [0.0, 0.5, 1.0, 1.0, 1.0]),
        ("linear", 0.0, [1.0, 0.95, 0.9, 0.45, 0.0]),
        ("cosine", 0.0, [1.0, None, None, 0.5 + 0.5 * np.cos(0.55 * np.pi), 0.0]),
        ("constant", 0.0, [1.0, 1.0, 1.0, 1.0, 1.0]),
    ],
)
def test_the_learning_rate_rises_over_warm_up_and_then_decays(name, warmup, expected):
    rate = optim.schedule(Optimizer(learning_rate=2e-3, schedule=name, warmup=warmup), 100)
    for step, share in zip((0, 5, 10, 55, 100), expected, strict=True):
        assert share is None or float(rate(step)) == pytest.approx(2e-3 * share, abs=1e-9)


@pytest.mark.parametrize("name", ["linear", "cosine", "constant"])
@pytest.mark.parametrize("steps", [1, 2, 3])
def test_the_shortest_runs_still_learn(name, steps):
    rate = optim.schedule(Optimizer(learning_rate=1.0, schedule=name, warmup=0.1), steps)
    assert float(rate(0)) == 1.0 and all(float(rate(step)) > 0 for step in range(steps))


MATRICES = {"embed", "head", "q", "k", "v", "o", "gate", "up", "down", "a", "b"}
OTHERS = {"norm", "attention_norm", "mlp_norm", "q_norm", "k_norm", "q_bias", "k_bias", "v_bias", *SCALARS}


@pytest.mark.parametrize("kind", ["qwen2", "qwen3"])
def test_weight_decay_acts_on_matrices_and_on_nothing_else(kind):
    paths = flatten(architecture.specs(tiny_models.architecture(kind, lora=2)))
    decayed = optim.decayed({path: jnp.zeros(()) for path in paths})
    last = {path: path.rpartition("/")[2] for path in paths}
    assert set(last.values()) <= MATRICES | OTHERS
    assert decayed == {path: name in MATRICES for path, name in last.items()}


def first_update(gradient, **settings):
    """The change of a matrix and a norm of ones under a constant rate of 0.1, and the new state."""
    params = {"lsa/layers/q": jnp.ones((2, 2)), "lsa/norm": jnp.ones(2)}
    update = optim.optimizer(Optimizer(learning_rate=0.1, schedule="constant", warmup=0.0, **settings), 10)
    gradients = {path: jnp.full_like(x, gradient) for path, x in params.items()}
    with numpy_dtype_promotion("standard"):  # as optax needs it
        return update.update(gradients, update.init(params), params)


def test_decay_is_decoupled_from_the_gradient():
    change, _ = first_update(0.0, weight_decay=0.5)
    np.testing.assert_allclose(change["lsa/layers/q"], -0.1 * 0.5, rtol=1e-6)
    np.testing.assert_array_equal(change["lsa/norm"], 0.0)


@pytest.mark.parametrize("clip, norm", [(1.0, 1.0), (0.0, 7 * 6**0.5), (100.0, 7 * 6**0.5)])
def test_gradients_are_clipped_by_their_global_norm_unless_that_is_off(clip, norm):
    _, state = first_update(7.0, clip_norm=clip, beta1=0.5)
    mean = optax.tree_utils.tree_get(state, "mu")
    assert float(optax.tree.norm(mean)) == pytest.approx(0.5 * norm, rel=1e-5)
