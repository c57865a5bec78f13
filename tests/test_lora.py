"""Adapters: nothing at the start, the same merged as applied, dropout only with a key."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_models

from comi_jax.config import Lora
from comi_jax.model import backbone as lm
from comi_jax.model import lora
from comi_jax.params import initialize

BACKBONE = tiny_models.BACKBONES["qwen2"]
LORA = Lora(rank=3, alpha=6.0, dropout=0.5)


@pytest.fixture(scope="module")
def weights():
    return tiny_models.shaken(lm.specs(BACKBONE, 3, embed=False, head=False))


@pytest.fixture(scope="module")
def adapted():
    return tiny_models.shaken(lora.specs(BACKBONE, LORA), seed=1)


X = jnp.asarray(np.random.default_rng(0).standard_normal((2, 10, 32)), jnp.float32)


@functools.partial(jax.jit, static_argnums=2)
def states(weights, adapters, with_dropout=False):
    """With dropout, ``adapters`` come with a key."""
    tree, key = adapters if with_dropout else (adapters, None)
    ready = None if tree is None else lora.adapters(tree, LORA, key)
    return lm.forward(weights, X, BACKBONE, lora=ready)[0]


def test_fresh_adapters_change_nothing(weights):
    fresh = initialize(lora.specs(BACKBONE, LORA), jax.random.key(0))
    assert all(jnp.any(pair["a"] != 0) and jnp.all(pair["b"] == 0) for pair in fresh.values())
    np.testing.assert_allclose(states(weights, fresh), states(weights, None), atol=1e-6)


def test_merging_is_applying(weights, adapted):
    merged = {**weights, "layers": lora.merge(weights["layers"], adapted, LORA)}
    applied = states(weights, adapted)
    assert np.abs(applied - states(weights, None)).max() > 0.1
    np.testing.assert_allclose(states(merged, None), applied, atol=2e-5)


@pytest.mark.parametrize("target", lora.TARGETS)
def test_each_target_is_adapted_by_its_own_pair(weights, adapted, target):
    """x W + (alpha / rank) x A B, for one projection of one layer."""
    merged = lora.merge(weights["layers"], adapted, LORA)
    w, new = (np.asarray(tree[target], np.float64)[1] for tree in (weights["layers"], merged))
    a, b = (np.asarray(adapted[target][part], np.float64)[1] for part in "ab")
    np.testing.assert_allclose(new, w + 6.0 / 3 * (a @ b).reshape(w.shape), atol=1e-5)
    assert set(merged) == set(weights["layers"])


def test_merged_weights_keep_their_dtype(weights, adapted):
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), weights["layers"])
    merged = lora.merge(half, adapted, LORA)
    assert {leaf.dtype for leaf in jax.tree.leaves(merged)} == {jnp.dtype("bfloat16")}


def test_dropout_needs_a_key_and_follows_it(weights, adapted):
    once, again, other = (states(weights, (adapted, jax.random.key(k)), True) for k in (0, 0, 1))
    np.testing.assert_array_equal(once, again)
    plain = states(weights, adapted)
    assert np.abs(once - other).max() > 1e-3 and np.abs(once - plain).max() > 1e-3


def test_dropout_keeps_its_share_and_the_mean():
    """Each input is dropped with probability 1/2 and doubled otherwise; layers and targets draw their own."""
    one = {name: {"a": jnp.eye(64)[None].repeat(2, 0), "b": jnp.eye(64)[None].repeat(2, 0)} for name in lora.TARGETS}
    ready = lora.adapters(one, Lora(rank=64, alpha=64.0, dropout=0.5), jax.random.key(0))
    layers = [jax.tree.map(lambda leaf, i=i: leaf[i], ready) for i in range(2)]
    x = jnp.ones((1, 500, 64))
    drawn = [np.asarray(lora.apply(layer, name, x)) for layer in layers for name in ("q", "k")]
    for sample in drawn:
        assert set(np.unique(sample)) == {0.0, 2.0} and abs(sample.mean() - 1) < 0.03
    assert all((a != b).mean() > 0.4 for i, a in enumerate(drawn) for b in drawn[:i])
    off = lora.adapters(one, Lora(rank=64, alpha=64.0, dropout=0.0), jax.random.key(0))
    assert off.keys is None
