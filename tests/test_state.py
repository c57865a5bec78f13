"""Weights and optimizer state are born where they belong: nothing of a model is whole anywhere."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import train_fixtures

from comi_jax.config import Compression, Lora, Mesh, Optimizer
from comi_jax.devices import sharding
from comi_jax.model import architecture
from comi_jax.model.architecture import Architecture
from comi_jax.params import flatten, initialize
from comi_jax.training import optim, state

ARCH = Architecture(
    train_fixtures.backbone(num_hidden_layers=2),
    Compression(rates=(2,), encoder_layers=1, segment_size=16),
    Lora(rank=2),
)
UPDATE = optim.optimizer(Optimizer(), 10)


@pytest.fixture
def mesh():
    return sharding.make_mesh(Mesh(data=1, fsdp=2, tensor=2))


def born(arch, mesh, dtype=jnp.float32):
    """Random parameters, each made by the devices that hold it."""
    specs = architecture.specs(arch)
    make = jax.jit(
        lambda: flatten(initialize(specs, jax.random.key(0), dtype)), out_shardings=sharding.parameters(specs, mesh)
    )
    return make()


def test_the_state_is_as_planned_and_each_device_holds_its_part(mesh):
    made, frozen = state.create(born(ARCH, mesh), ARCH, UPDATE, mesh)
    planned = state.abstract(ARCH, UPDATE, mesh)
    for array, plan in zip(jax.tree.leaves((made, frozen)), jax.tree.leaves(planned), strict=True):
        assert (array.shape, array.dtype, array.sharding) == (plan.shape, plan.dtype, plan.sharding)
    # Of gate and up in encoder and LSA, two each.
    moments = [x for x in jax.tree.leaves(made.optimizer) if x.shape == made.trained["encoder/layers/gate"].shape]
    assert len(moments) == 8 and all(x.addressable_shards[0].data.nbytes * 4 == x.nbytes for x in moments)


def test_no_array_comes_through_this_process(mesh, monkeypatch):
    """Neither what lies where it belongs nor what has to be cast is fetched."""
    arch = dataclasses.replace(ARCH, dtype="bfloat16")
    params = born(arch, mesh)
    fetched = []
    monkeypatch.setattr(type(params["encoder/norm"]), "__array__", lambda self, *a, **k: fetched.append(self.shape))
    made, frozen = state.create(dict(params), arch, UPDATE, mesh)
    assert not fetched
    assert frozen["decoder/embed"].dtype == jnp.bfloat16 and made.trained["encoder/embed"] is params["encoder/embed"]


def test_own_parameters_do_not_depend_on_the_devices(mesh):
    """Adapters at random: on four devices as on one."""
    alone, sharded = architecture.own_parameters(ARCH, 3), architecture.own_parameters(ARCH, 3, mesh)
    assert sharded["lora/q/a"].sharding == sharding.parameters(architecture.specs(ARCH), mesh)["lora/q/a"]
    for path, array in alone.items():
        np.testing.assert_allclose(sharded[path], array, rtol=1e-6, err_msg=path)
