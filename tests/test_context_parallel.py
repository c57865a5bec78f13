"""Compression of a sequence that is split over devices: what one device computes, values and gradients."""

import functools
import itertools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from comi_jax.config import Compression
from comi_jax.model import compress as c
from comi_jax.model import mig
from comi_jax.model.context_parallel import Split

LENGTH, WIDTH, SLOTS = 64, 6, 32
LENGTHS, RATES = np.array([64, 37, 5, 0], np.int32), np.array([8, 2, 32, 8], np.int32)
MESHES = {"all on one row": (1, 1, 1, 4), "rows too": (2, 1, 1, 2), "heads too": (1, 1, 2, 2)}


def mesh_of(sizes):
    axes = ("data", "fsdp", "tensor", "context")
    return jax.make_mesh(sizes, axes, axis_types=(jax.sharding.AxisType.Auto,) * 4)


def inputs(seed, length=LENGTH):
    rng = np.random.default_rng(seed)
    states, query = rng.standard_normal((4, length, WIDTH)), rng.standard_normal((4, WIDTH))
    states[0] += 2 * query[0]
    states[0, 16:24] -= 4 * query[0]  # of the coarse groups one is against the query: it becomes the large one
    return jnp.asarray(states, jnp.float32), jnp.asarray(query, jnp.float32)


def scalars(**values):
    names = ("alpha_coarse", "beta_coarse", "alpha_fine", "beta_fine")
    return {name: jnp.float32(values.get(name, 1.0)) for name in names}


def compressed(states, query, scalars, settings, mesh=None):
    lengths, rates = jnp.asarray(LENGTHS).clip(max=states.shape[1]), jnp.asarray(RATES)
    return c.compress(states, query, lengths, rates, scalars, settings, SLOTS, mesh=mesh)


def gradients(states, query, scalars, settings, mesh=None):
    weight = jnp.asarray(np.random.default_rng(3).standard_normal((4, SLOTS, WIDTH)), jnp.float32)

    def loss(states, query, scalars):
        return jnp.sum(compressed(states, query, scalars, settings, mesh).memory * weight)

    return jax.grad(loss, argnums=(0, 1, 2))(states, query, scalars)


@functools.cache
def program(function, settings, mesh=None):
    return jax.jit(functools.partial(function, settings=settings, mesh=mesh))


def same(function, settings, mesh, arguments):
    alone, split = (program(function, settings, where)(*arguments) for where in (None, mesh))
    for ours, want in zip(jax.tree.leaves(split), jax.tree.leaves(alone), strict=True):
        np.testing.assert_allclose(ours, want, rtol=1e-5, atol=1e-5)
    return alone


@pytest.mark.parametrize(
    "mesh, off",
    [("all on one row", None), ("heads too", None)]
    + [pytest.param("rows too", None, marks=pytest.mark.slow)]
    + [pytest.param("all on one row", off, marks=pytest.mark.slow) for off in ("coarse", "fine", "fine_redundancy")],
)
def test_a_split_sequence_is_compressed_as_a_whole_one(mesh, off):
    sizes = MESHES[mesh]
    settings = Compression(rates=(2, 32), **({off: False} if off else {}))
    arguments = (*inputs(1), scalars(alpha_coarse=3.0))
    alone = same(compressed, settings, mesh_of(sizes), arguments)
    if off is None:  # a group that begins on one device, covers a second and ends on a third
        assert np.max(alone.aux.group_sizes[0]) > 2 * LENGTH // 4
    same(gradients, settings, mesh_of(sizes), arguments)


def test_one_group_of_everything_passes_through_all_devices():
    settings = Compression(rates=(64,), coarse=False)
    states, query = inputs(2)
    rates = jnp.full(4, 64, jnp.int32)

    def memory(states, query, mesh=None):
        return c.compress(states, query, jnp.asarray(LENGTHS), rates, scalars(), settings, 1, mesh=mesh)

    alone, split = (jax.jit(functools.partial(memory, mesh=m))(states, query) for m in (None, mesh_of((1, 1, 1, 4))))
    np.testing.assert_allclose(split.memory, alone.memory, atol=1e-5)
    np.testing.assert_allclose(split.aux.redundancy, alone.aux.redundancy, atol=1e-5)


def test_of_equal_partners_on_several_devices_the_first_takes_the_gradient():
    """Vectors whose cosines are 0 or 1/2, exactly: every token has many best partners, on all devices."""
    states = np.zeros((1, 15, WIDTH), np.float32)
    for token, pair in enumerate(itertools.combinations(range(WIDTH), 2)):
        states[0, token, list(pair)] = 1
    query, one = jnp.asarray(np.random.default_rng(3).standard_normal((1, WIDTH)), jnp.float32), jnp.array([64])

    def pull(states, mesh=None):
        def loss(states):
            settings = Compression(rates=(64,), coarse=False)
            out = c.compress(states, query, jnp.array([15]), one, scalars(), settings, 1, mesh=mesh)
            return jnp.sum(out.memory * jnp.arange(1.0, 1 + WIDTH)[None, None])

        return jax.jit(jax.grad(loss))(states)

    alone = pull(jnp.asarray(states))
    np.testing.assert_allclose(pull(jnp.asarray(states), mesh_of((1, 1, 1, 4))), alone, atol=1e-6)
    assert np.abs(alone).max() > 0.1


def test_questions_about_one_split_sequence_are_those_of_a_whole_one():
    """Two questions a row, each at a rate of its own, values and gradients: one copy of the states on one device, on
    several, and written out."""
    states, _ = inputs(6)
    query = jnp.asarray(np.random.default_rng(7).standard_normal((8, WIDTH)), jnp.float32)
    rates, lengths = jnp.asarray([8, 2, 4, 32, 2, 2, 8, 8], jnp.int32), jnp.asarray(LENGTHS)

    def loss(states, query, copies, mesh):
        states, n = (jnp.repeat(a, copies, axis=0) for a in (states, lengths))
        memory = c.compress(states, query, n, rates, scalars(), Compression(rates=(2, 32)), SLOTS, mesh=mesh).memory
        return jnp.sum(jnp.sin(memory)), memory

    gradient = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True), static_argnums=(2, 3))
    apart = gradient(states, query, 2, None)
    for mesh in (None, mesh_of((1, 1, 1, 4)), mesh_of((2, 1, 1, 2))):
        for ours, want in zip(jax.tree.leaves(gradient(states, query, 1, mesh)), jax.tree.leaves(apart), strict=True):
            np.testing.assert_allclose(ours, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "sizes", [(1, 2, 1, 2), *(pytest.param(s, marks=pytest.mark.slow) for s in ((1, 1, 1, 4), (2, 1, 2, 1)))]
)
def test_kept_tokens_and_known_norms_of_a_split_sequence_are_those_of_a_whole_one(sizes):
    """Of one row that is asked four times, which no axis of rows divides; 61 tokens, some of them kept."""
    states, query = inputs(8, 61)
    kept = jnp.asarray(np.random.default_rng(9).random((4, 61)) < 0.3)

    @functools.partial(jax.jit, static_argnames="mesh")
    def apart(one, query, kept, mesh):
        return c.compress(
            one, query, jnp.asarray([61], jnp.int32), jnp.asarray(RATES), scalars(), Compression(rates=(2, 32)), 61,
            norms=mig.norms(one), kept=kept, mesh=mesh,
        )  # fmt: skip

    alone, split = (apart(states[:1], query, kept, mesh) for mesh in (None, mesh_of(sizes)))
    assert alone.mask[0].sum() > kept[0].sum()
    for ours, want in zip(jax.tree.leaves(split), jax.tree.leaves(alone), strict=True):
        np.testing.assert_allclose(ours, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("sizes, devices", [([8] * 8, 0), ([8] * 5, 0), ([], 0), ([8, 16, 40], 2), ([60, 4], 3)])
def test_vectors_pass_as_far_as_a_group_reaches(sizes, devices):
    """Also where the tokens of the last devices have no group."""
    ids = np.repeat(np.arange(len(sizes)), sizes)
    group = jnp.asarray(np.pad(ids, (0, LENGTH - len(ids)), constant_values=-1)[None], jnp.int32)
    mesh, everywhere = mesh_of((1, 1, 1, 4)), jax.sharding.PartitionSpec()
    split = Split("context", 4, mesh.axis_names)
    reach = jax.shard_map(
        lambda g: split._reach(g, LENGTH // 4), mesh=mesh, in_specs=everywhere, out_specs=everywhere, check_vma=False
    )
    assert int(jax.jit(reach)(group)) == devices


def test_a_length_that_does_not_divide_is_padded():
    out = same(compressed, Compression(rates=(2, 32)), mesh_of((1, 1, 1, 4)), (*inputs(4, 61), scalars()))
    assert out.aux.group.shape == (4, 61)


def test_no_device_holds_the_whole_sequence():
    """Of 4096 x 64 states, in float32 a megabyte, no buffer of the compiled program holds all."""
    settings, length = Compression(rates=(32,)), 4096
    mesh = mesh_of((1, 1, 1, 4))
    place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, "context"))
    states = jax.ShapeDtypeStruct((1, length, 64), jnp.float32, sharding=place)
    numbers = (jnp.array([length], jnp.int32), jnp.array([32], jnp.int32), scalars())

    def loss(states, query):
        return jnp.sum(c.compress(states, query, *numbers, settings, length // 32, mesh=mesh).memory)

    text = jax.jit(jax.grad(loss)).lower(states, jax.ShapeDtypeStruct((1, 64), jnp.float32)).compile().as_text()
    sizes = [math.prod(map(int, dims.split(","))) for dims in re.findall(r"f32\[([\d,]+)\]", text)]
    assert max(sizes) == 3 * 1024 * 64  # a device's own states between those of two others
