"""The spec tree: what is drawn from it, counted in it, and taken apart and put together again."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from comi_jax.params import ParamSpec, abstract, combine, count, flatten, initialize, partition, unflatten

SPECS = {
    "layers": {"q": ParamSpec((64, 4, 100), ("embed", "heads", "head"), "normal", fan_in=64)},
    "norm": ParamSpec((7,), ("norm",), 1.0),
    "scalar": ParamSpec((), (), -2.5),
}


def test_shape_and_axes_must_agree():
    with pytest.raises(ValueError, match="differ in length"):
        ParamSpec((3, 4), ("embed",), 0.0)


def test_initialisation_follows_the_specs():
    tree = initialize(SPECS, jax.random.key(0))
    np.testing.assert_array_equal(tree["norm"], np.ones(7))
    assert tree["scalar"] == -2.5
    q = np.asarray(tree["layers"]["q"])
    assert q.shape == (64, 4, 100)
    assert abs(q.std() * 8 - 1) < 0.02 and abs(q.mean()) < 0.005  # 25,600 numbers of deviation 1/sqrt(64)


def test_a_parameter_depends_on_the_key_and_its_own_path_only():
    tree = initialize(SPECS, jax.random.key(0))
    alone = initialize({"layers": SPECS["layers"]}, jax.random.key(0))
    np.testing.assert_array_equal(tree["layers"]["q"], alone["layers"]["q"])
    other = initialize({"layers": {"k": SPECS["layers"]["q"]}}, jax.random.key(0))["layers"]["k"]
    again = initialize(SPECS, jax.random.key(1))["layers"]["q"]
    for different in (other, again):
        assert np.abs(np.corrcoef(np.ravel(different), np.ravel(tree["layers"]["q"]))[0, 1]) < 0.03


def test_every_view_of_the_specs_agrees_with_what_is_drawn():
    tree = initialize(SPECS, jax.random.key(0), jnp.bfloat16)
    shapes = abstract(SPECS, jnp.bfloat16)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), tree) == jax.tree.map(lambda x: (x.shape, x.dtype), shapes)
    assert count(SPECS) == count(tree) == 64 * 4 * 100 + 7 + 1


def test_flattening_and_partition_lose_nothing():
    flat = flatten(SPECS)
    assert list(flat) == ["layers/q", "norm", "scalar"]
    assert unflatten(flat) == SPECS
    kept, rest = partition(SPECS, lambda path: path.startswith("layers/"))
    assert set(kept) == {"layers/q"} and set(rest) == {"norm", "scalar"}
    assert combine(rest, kept) == SPECS
