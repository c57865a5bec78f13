"""A step whose loss or gradients are not finite leaves everything as it was, but for the step's own number."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import train_fixtures
from tiny_models import architecture, shaken

from comi_jax.config import Data, Optimizer
from comi_jax.data import batches, encode
from comi_jax.data.encode import Example
from comi_jax.data.records import Record
from comi_jax.model import comi
from comi_jax.model.architecture import is_trained, specs
from comi_jax.model.batch import Batch
from comi_jax.params import partition
from comi_jax.training import optim
from comi_jax.training.state import TrainState
from comi_jax.training.step import CompiledStep, add_gradients, apply_gradients

ARCH = architecture()
pytestmark = pytest.mark.fault


@pytest.fixture(scope="module")
def parts():
    """A state, frozen weights, a batch, and the step, whose gradients a further argument multiplies."""
    trained, frozen = partition(shaken(specs(ARCH)), lambda path: is_trained(path, ARCH))
    chain = optim.optimizer(Optimizer(learning_rate=0.01), steps=10)
    facts = ("the red box holds a coin .", "the blue box holds a key .")
    records = [Record(facts, "what does it hold ?", ("key",)), Record(facts[:1], "what ?", ("coin",))]
    examples, _ = encode.encode(records, train_fixtures.tokenizer(), Data())
    examples = [Example(e.context, e.query, e.answer, rate=2) for e in examples]
    batch = batches.collate(examples, batches.Shapes.of(examples, Data(), ARCH.compression))
    batch = jax.tree.map(jnp.asarray, batch)
    state = TrainState(jnp.int32(0), trained, chain.init(trained))

    @jax.jit
    def step(state, frozen, scale):
        # The cotangent of the loss goes through this scale, which the loss itself does not see.
        marked = frozen | {"decoder/norm": _scaled(frozen["decoder/norm"], scale)}
        total = add_gradients(None, state, marked, batch, jax.random.key(0), jnp.int32(0), arch=ARCH)
        return apply_gradients(state, total, update=chain)

    return state, frozen, step


@jax.custom_jvp
def _scaled(x, scale):
    return x * jnp.where(jnp.isfinite(scale), 1.0, scale)


@_scaled.defjvp
def _(primals, tangents):
    return _scaled(*primals), tangents[0] * primals[1]


def bits(tree):
    return [np.asarray(x).tobytes() for x in jax.tree.leaves(tree)]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_step_that_is_not_finite_changes_nothing_but_its_number(parts, bad):
    state, frozen, step = parts
    state, _ = step(state, frozen, 1.0)
    after, metrics = step(state, frozen, bad)
    assert int(metrics["skipped"]) == 1 and int(after.step) == int(state.step) + 1
    assert bits((after.trained, after.optimizer)) == bits((state.trained, state.optimizer))


def test_a_run_with_bad_steps_ends_as_one_that_left_them_out(parts):
    state, frozen, step = parts
    with_bad = state
    counted = []
    for scale in (1.0, np.nan, 1.0, np.inf, np.nan, 1.0):
        with_bad, metrics = step(with_bad, frozen, scale)
        counted.append(int(metrics["skipped"]))
    assert counted == [0, 1, 0, 1, 1, 0]
    without = state
    for _ in range(3):
        without, metrics = step(without, frozen, 1.0)
        assert float(metrics["gradient_norm"]) > 0
    assert bits((with_bad.trained, with_bad.optimizer)) == bits((without.trained, without.optimizer))


def test_gradients_alone_that_are_not_finite_are_enough(parts):
    state, frozen, _ = parts
    chain = optim.optimizer(Optimizer(learning_rate=0.01), steps=10)

    def loss(params, arch, rows, rate, key):
        zero = jnp.sum(params["encoder"]["norm"] * 0)  # sqrt at 0: finite itself, its slope is not
        return comi.LossSums(jnp.sqrt(zero) + 1, jnp.float32(0), jnp.float32(1), jnp.float32(1))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("comi_jax.training.step.comi.loss", loss)
        batch = Batch(*(np.zeros(shape, np.int32) for shape in ((2, 4), 2, (2, 3), 2, (2, 2), 2, 2)))
        state = jax.tree.map(jnp.copy, state)  # it is used up
        before = bits((state.trained, state.optimizer))
        after, metrics = CompiledStep(ARCH, chain)(state, frozen, (batch,), jax.random.key(0))
    assert np.isfinite(metrics["loss"]) and int(metrics["skipped"]) == 1
    assert bits((after.trained, after.optimizer)) == before
