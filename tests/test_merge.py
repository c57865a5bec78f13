"""The group softmax merge of every implementation against its readable twin and by its properties; the choice among
implementations, and both kernels on several devices.

The kernel for TPU runs here step by step, in Pallas' interpreters; that for GPU is plain XLA.
"""

import functools
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import PartitionSpec

from comi_jax.kernels import dispatch, merge_tpu
from comi_jax.kernels.merge import merge, merge_reference, weights
from comi_jax.kernels.redundancy import max_cosine

LENGTH, WIDTH, SLOTS = 300, 5, 310
IMPLEMENTATIONS = {
    "xla": jax.jit(functools.partial(merge, implementation="xla"), static_argnums=3),
    "tpu": jax.jit(functools.partial(merge, implementation="interpret"), static_argnums=3),
    "gpu": jax.jit(functools.partial(merge, implementation="gpu"), static_argnums=3),
}
each_implementation = pytest.mark.parametrize("name", IMPLEMENTATIONS)
twin = jax.jit(merge_reference, static_argnums=3)


def groups(sizes, length=LENGTH):
    ids = np.repeat(np.arange(len(sizes)), sizes)[:length]
    return jnp.asarray(np.pad(ids, (0, length - len(ids)), constant_values=-1).astype(np.int32))


def inputs(seed, length=LENGTH, width=WIDTH, dtype=jnp.float32, rows=2):
    rng = np.random.default_rng(seed)
    gain = jnp.asarray(3 * rng.standard_normal((rows, length)), jnp.float32)
    return jnp.asarray(rng.standard_normal((rows, length, width)), dtype), gain


def check(f, x, gain, group, slots=SLOTS):
    (memory, normalizer), (want, want_normalizer) = f(x, gain, group, slots), twin(x, gain, group, slots)
    assert memory.dtype == normalizer.dtype == jnp.float32
    np.testing.assert_allclose(memory, want, atol=3e-6)
    np.testing.assert_allclose(normalizer, want_normalizer, rtol=1e-6, atol=1e-6)


def test_the_readable_twin_is_the_definition():
    """(7), (8) by a loop."""
    x, gain = inputs(1, 8)
    memory, normalizer = merge_reference(x, gain, jnp.stack([groups([3, 0, 4], 8)] * 2), 4)
    for row in range(2):
        for slot, tokens in enumerate([range(3), range(0), range(3, 7), range(0)]):
            power = np.exp(np.asarray(gain[row], np.float64))[list(tokens)]
            want = power @ np.asarray(x[row], np.float64)[list(tokens)] / max(power.sum(), 1e-300)
            np.testing.assert_allclose(memory[row, slot], want, atol=1e-6)
            with np.errstate(divide="ignore"):
                np.testing.assert_allclose(normalizer[row, slot], np.log(power.sum()), atol=1e-6)


@each_implementation
@settings(max_examples=15, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 2**32 - 1),
    sizes=st.tuples(*[st.lists(st.integers(0, LENGTH), min_size=1, max_size=12) for _ in range(2)]),
)
def test_random_groups(name, seed, sizes):
    check(IMPLEMENTATIONS[name], *inputs(seed), jnp.stack([groups(s) for s in sizes]))


@each_implementation
def test_a_context_that_is_shared_is_one_written_out(name):
    """Two contexts, three times each, with groups and gains of its own every time; values and gradients."""
    (x, _), (_, gain) = inputs(4), inputs(5, rows=6)
    group = jnp.stack([groups(s) for s in ([100, 190], [7] * 40, [1, 298], [300], [], [128, 128])])

    def loss(x, gain):
        memory, normalizer = IMPLEMENTATIONS[name](x, gain, group, SLOTS)
        return jnp.sum(jnp.sin(memory)) + jnp.sum(jnp.where(normalizer > -jnp.inf, normalizer, 0.0)), (
            memory,
            normalizer,
        )

    gradient = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))
    (to_x, to_gain), ours = gradient(x, gain)
    (want_x, want_gain), apart = gradient(jnp.repeat(x, 3, axis=0), gain)
    for mine, want in zip(ours, apart, strict=True):
        np.testing.assert_allclose(mine, want, atol=1e-6)
    np.testing.assert_allclose(to_gain, want_gain, atol=1e-6)
    np.testing.assert_allclose(to_x, want_x.reshape(2, 3, *x.shape[1:]).sum(1), atol=1e-6)


SIZES = [[LENGTH], [1] * LENGTH, [128, 128, 44], [127, 2, 128, 1], [1, 298, 1], [5, 0, 0, 9, 200, 0, 3], [1], []]


@each_implementation
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("sizes", SIZES, ids=lambda sizes: f"{len(sizes)} groups from {sizes[:1]}")
def test_groups_of_one_of_all_and_along_the_borders_of_tiles(name, sizes, dtype):
    """bfloat16 states are multiplied by float32 weights: the bound is float32's."""
    check(IMPLEMENTATIONS[name], *inputs(2, dtype=dtype), jnp.stack([groups(sizes), groups([4, 290])]))


@each_implementation
@pytest.mark.parametrize("length, width", [(1, 1), (5, 300), (128, 4), (129, 256), (2800, 4)])
def test_shapes_around_a_tile(name, length, width):
    group = groups([length // 3, 1, length - length // 3 - 1], length)[None]
    check(IMPLEMENTATIONS[name], *inputs(3, length, width, rows=1), group, 3)


@each_implementation
def test_gains_of_any_size_do_not_overflow(name):
    x, gain = inputs(4)
    check(IMPLEMENTATIONS[name], x, gain.at[0].mul(100).at[1].add(-1e4), jnp.stack([groups([7, 250, 3])] * 2))


@each_implementation
def test_what_stands_behind_the_groups_is_not_seen(name):
    x, gain = inputs(5)
    group = jnp.stack([groups([30, 100, 70])] * 2)
    poisoned = x.at[:, 200:].set(jnp.nan), gain.at[:, 200:].set(jnp.nan)
    for got, want in zip(*(IMPLEMENTATIONS[name](*a, group, 3) for a in (poisoned, (x, gain))), strict=True):
        np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_the_tpu_kernel_reads_nothing_unwritten_and_races_with_nothing(dtype, capfd):
    simulated = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan")
    check(
        functools.partial(merge_tpu.merge, interpret=simulated),
        *inputs(6, dtype=dtype, rows=1),
        groups([100, 7, 150])[None],
        140,
    )
    assert "RACE" not in "".join(capfd.readouterr())


@pytest.mark.parametrize("sizes", [[LENGTH], [1] * 20 + [128] + [9] * 10, [5, 0, 200]])
def test_gradients_are_the_readable_twins(sizes):
    """Of the vectors and of the normalizers, by states and gains; checked against the twin's, which XLA derives."""
    x, gain = inputs(7)
    group = jnp.stack([groups(sizes), groups([17, 200])])
    rng = np.random.default_rng(8)
    to_memory, to_normalizer = (jnp.asarray(rng.standard_normal(s), jnp.float32) for s in ((2, 40, WIDTH), (2, 40)))

    def pull(f):
        def scalar(x, gain):
            memory, normalizer = f(x, gain, group, 40)
            filled = jnp.isfinite(normalizer)
            return jnp.sum(memory * to_memory) + jnp.sum(jnp.where(filled, normalizer, 0.0) * to_normalizer)

        return jax.jit(jax.grad(scalar, argnums=(0, 1)))(x, gain)

    for ours, want in zip(pull(merge), pull(merge_reference), strict=True):
        np.testing.assert_allclose(ours, want, atol=1e-5)
        assert np.abs(ours).max() > 0.1


@each_implementation
def test_gains_of_minus_infinity_weigh_nothing(name):
    """Single ones, all that a kernel sees in one step, and all of a group."""
    x, gain = inputs(13)
    group = jnp.stack([groups([250, 50])] * 2)
    check(IMPLEMENTATIONS[name], x, gain.at[0, :200].set(-jnp.inf).at[1, 250:].set(-jnp.inf), group, 2)


def test_weights_sum_to_one_over_each_group():
    x, gain = inputs(9)
    group = jnp.stack([groups([5, 0, 200, 90]), groups([300])])
    weight = weights(gain, merge(x, gain, group, 4)[1], group)
    np.testing.assert_allclose(weight[0, :5].sum(), 1, rtol=1e-6)
    np.testing.assert_allclose(weight.sum(axis=1), [3, 1], rtol=1e-6)
    assert (weight[0, 295:] == 0).all()


def test_a_group_in_parts_is_merged_exactly():
    """What several devices do with a group that they share: each its part, then the parts by their normalizers."""
    x, gain = inputs(10, rows=1)
    whole, normalizer = merge(x, gain, groups([LENGTH])[None], 1)
    parts = groups([100, 10, 190])[None]
    again, total = merge(*merge(x, gain, parts, 3), jnp.zeros((1, 3), jnp.int32), 1)
    np.testing.assert_allclose(again, whole, atol=1e-6)
    np.testing.assert_allclose(total, normalizer, rtol=1e-6)


def test_memory_beyond_the_input_is_a_tile():
    """At 32K, the input being 8.4 MB; backward, the gradient of each token's vector before it is weighted."""
    x, numbers, ids = (
        jax.ShapeDtypeStruct((1, 32_768, *more), t) for more, t in [((64,), "f4"), ((), "f4"), ((), "i4")]
    )

    def temporaries(f):
        return jax.jit(f).lower(x, numbers, ids).compile().memory_analysis().temp_size_in_bytes

    assert temporaries(lambda x, gain, group: merge(x, gain, group, 1024)) < 2e6
    assert temporaries(jax.grad(lambda x, gain, group: jnp.sum(merge(x, gain, group, 1024)[0]))) < 3 * 8.4e6


@pytest.mark.parametrize("implementation", ["xla", "interpret"])
def test_rows_on_several_devices_need_nothing_of_each_other(implementation):
    """Inside shard_map, with the values of one device and no collective in the compiled program."""
    mesh = jax.make_mesh((4,), ("rows",), axis_types=(jax.sharding.AxisType.Auto,))
    rows = PartitionSpec("rows")
    x, gain = inputs(11, rows=4)
    group = jnp.stack([groups([n, 40, 100]) for n in (1, 60, 130, 150)])

    def both(x, gain, group):
        value = max_cosine(x, jnp.ones_like(gain), group, implementation=implementation)
        return value, merge(x, gain, group, 3, implementation=implementation)

    sharded = jax.jit(jax.shard_map(both, mesh=mesh, in_specs=(rows, rows, rows), out_specs=rows, check_vma=False))
    for got, want in zip(*map(jax.tree.leaves, (sharded(x, gain, group), both(x, gain, group))), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-6)
    text = sharded.lower(x, gain, group).compile().as_text()
    assert not any(word in text for word in ("all-reduce", "all-gather", "all-to-all", "collective-permute"))


def test_what_is_named_is_obeyed_or_refused():
    for name in dispatch.NAMES:
        assert dispatch.choose("merge", name, jnp.dtype("f4")) == name
    with pytest.raises(ValueError, match=r"merge: no implementation 'cuda'; choose from xla, tpu, gpu, interpret\."):
        merge(*inputs(12), jnp.zeros((2, LENGTH), jnp.int32), 1, implementation="cuda")
    with pytest.raises(ValueError, match="'gpu' does not compute in float64"):
        dispatch.choose("merge", "gpu", jnp.dtype("f8"))


CHOICES = [("tpu", "f4", "tpu"), ("gpu", "f2", "gpu"), ("cpu", "f4", "xla"), ("gpu", "f8", "xla"), ("tpu", "f2", "xla")]


@pytest.mark.parametrize("platform, dtype, name", CHOICES)
def test_none_chooses_for_the_device_and_says_so_once(platform, dtype, name, caplog):
    dispatch._log_choice.cache_clear()
    with caplog.at_level(logging.INFO, logger=dispatch.__name__):
        for _ in range(2):
            assert dispatch.choose("merge", None, jnp.dtype(dtype), platform) == name
    assert caplog.messages == [f"merge: {name} for {jnp.dtype(dtype)} on {platform}"]
