"""Neither the devices, nor the mesh axes they are on, nor micro-batches change what is computed."""

import dataclasses
import itertools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import train_fixtures
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from comi_jax.config import Compression, Config, Data, Mesh, Optimizer, Train
from comi_jax.data import batches, encode
from comi_jax.data.records import Record
from comi_jax.devices import sharding
from comi_jax.errors import ConfigError
from comi_jax.model import architecture
from comi_jax.model import backbone as lm
from comi_jax.model.architecture import Architecture
from comi_jax.params import ParamSpec, partition
from comi_jax.training.state import TrainState
from comi_jax.training.step import CompiledStep

ARCH = Architecture(
    train_fixtures.backbone(num_hidden_layers=1),
    Compression(rates=(2, 4), encoder_layers=1, segment_size=16),
    runtime=lm.Runtime(attention="dense"),
)


# --- the mesh and the rules -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings, sizes",
    [
        (Mesh(), (4, 1, 1, 1)),
        (Mesh(fsdp=2), (2, 2, 1, 1)),
        (Mesh(1, 2, 2), (1, 2, 2, 1)),
        (Mesh(tensor=4), (1, 1, 4, 1)),
        (Mesh(data=1, fsdp=0, tensor=2), (1, 2, 2, 1)),
        (Mesh(context=2), (2, 1, 1, 2)),
    ],
)
def test_the_mesh_takes_all_devices(settings, sizes):
    mesh = sharding.make_mesh(settings)
    assert tuple(mesh.shape.items()) == tuple(zip(("data", "fsdp", "tensor", "context"), sizes, strict=True))


@pytest.mark.parametrize("settings", [Mesh(data=3), Mesh(data=2), Mesh(data=8), Mesh(fsdp=3), Mesh(fsdp=2, tensor=4)])
def test_a_mesh_that_does_not_make_the_devices_is_refused(settings):
    with pytest.raises(ConfigError, match=f"x {settings.fsdp} x {settings.tensor} x 1 is not the number of devices, 4"):
        sharding.make_mesh(settings)


@pytest.mark.parametrize("accumulate, share, parts", [(0, 1, 4), (0, 2, 2), (2, 1, 2)])
def test_micro_batches_give_each_device_one_context_unless_told(accumulate, share, parts):
    """16 examples over four devices."""
    config = Config(
        train=Train(batch_size=16, share_context=share), optimizer=Optimizer(accumulate=accumulate), mesh=Mesh(4, 1, 1)
    )
    assert sharding.micro_batches(config, sharding.make_mesh(config.mesh)) == parts


def test_contexts_that_do_not_divide_over_micro_batches_and_devices_are_refused():
    """10 contexts on 4 devices would make 2 micro-batches of 4 and leave 2."""
    config = Config(train=Train(batch_size=10), optimizer=Optimizer(accumulate=0))
    with pytest.raises(ConfigError, match="10 contexts do not divide over 2 micro-batches .* on 4 devices"):
        sharding.micro_batches(config, sharding.make_mesh(Mesh()))


MESH = Mesh(data=1, fsdp=2, tensor=2)


@pytest.mark.parametrize(
    "shape, axes, expected",
    [
        ((3, 8, 4, 6), ("layers", "embed", "heads", "head"), (None, "fsdp", "tensor", None)),
        ((10, 8), ("vocab", "embed"), ("tensor", "fsdp")),
        ((9, 8), ("vocab", "embed"), (None, "fsdp")),  # 9 rows do not divide over 2 devices
        ((8,), ("norm",), (None,)),
        ((), (), ()),
    ],
)
def test_parameters_go_where_their_axes_say(shape, axes, expected):
    spec = sharding.partition_spec(ParamSpec(shape, axes, 0.0), sharding.make_mesh(MESH))
    assert spec == PartitionSpec(*expected)


def test_weights_are_split_over_the_context_axis_too_where_it_divides_them():
    mesh = sharding.make_mesh(Mesh(data=1, fsdp=2, context=2))
    for size, expected in ((8, ("context", "fsdp")), (6, "context"), (5, None)):
        spec = sharding.partition_spec(ParamSpec((size, 3), ("embed", "mlp"), 0.0), mesh)
        assert spec == PartitionSpec(expected, None)


@pytest.mark.parametrize(
    "mesh, message",
    [
        (
            Mesh(data=1, context=4),
            "6 attention heads per device (of 6, mesh.tensor 1) do not divide by mesh.context = 4",
        ),
        (
            Mesh(data=1, tensor=2, context=2),
            "3 attention heads per device (of 6, mesh.tensor 2) do not divide by mesh.context = 2",
        ),
    ],
)
def test_heads_that_the_context_axis_cannot_share_out_are_refused(mesh, message):
    backbone = dataclasses.replace(ARCH.backbone, num_attention_heads=6, num_key_value_heads=2)
    sharding.check_heads(backbone, sharding.make_mesh(Mesh(data=2, context=2)))
    with pytest.raises(ConfigError, match=re.escape(message)):
        sharding.check_heads(backbone, sharding.make_mesh(mesh))


def test_a_mesh_axis_is_not_used_twice_in_one_array():
    with pytest.raises(ValueError, match="used twice.*heads.*mlp"):
        sharding.partition_spec(ParamSpec((4, 4), ("heads", "mlp"), 0.0), sharding.make_mesh(MESH))


# --- the step ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def start():
    """Parameters with no neutral values, and a plan of eight examples: one or two segments, answers of 2 to 9 tokens,
    so that micro-batches have different shapes."""
    params = train_fixtures.tiny_models.shaken(architecture.specs(ARCH))
    facts = ("the red box holds a silver coin .",) * 3
    things = ["key", "gold ring", "the old brass lamp holds a key in the box"]
    records = [Record(facts[i % 3 :], "what does it hold ?", (things[i % 3],)) for i in range(8)]
    examples, _ = encode.encode(records, train_fixtures.tokenizer(), Data())
    assert len({len(e.answer) for e in examples}) == 3
    plan = batches.Plan.of(examples, batches.Shapes.of(examples, Data(), ARCH.compression), 8, seed=0)
    shapes = [rows.context.shape for rows in dataclasses.replace(plan, micro_batches=2).batch(0, (2, 4) * 4)]
    assert sorted(shapes) == [(4, 16), (4, 32)]
    return params, plan


def one_device():
    axes = (AxisType.Auto,) * 4
    return jax.make_mesh((1, 1, 1, 1), sharding.AXES, axis_types=axes, devices=jax.devices()[:1])


def step(start, mesh, accumulate):
    """Loss and accuracy of one step, and its gradients."""
    params, plan = start
    batch = dataclasses.replace(plan, micro_batches=accumulate).batch(0, (2, 4) * 4)
    placed = sharding.parameters(architecture.specs(ARCH), mesh)
    trained, frozen = (
        {path: jax.device_put(np.array(x), placed[path]) for path, x in part.items()}  # the step uses them up
        for part in partition(params, lambda path: architecture.is_trained(path, ARCH))
    )
    update = optax.trace(1.0)  # whose state is the gradient, and whose update adds it
    number = jax.device_put(jnp.int32(0), NamedSharding(mesh, PartitionSpec()))
    state = TrainState(number, trained, update.init(trained))
    function = CompiledStep(ARCH.on(mesh), update)
    new, metrics = function(state, frozen, sharding.put_batch(batch, mesh), jax.random.key(0))
    gradients = {path: np.asarray(x) for path, x in new.optimizer.trace.items()}
    return {name: float(value) for name, value in metrics.items()}, gradients


def check_step(start, alone, mesh, accumulate):
    """The loss and every gradient to 1e-5, relative."""
    metrics, gradients = step(start, mesh, accumulate)
    assert metrics == pytest.approx(alone[0], rel=1e-5)
    for path, expected in alone[1].items():
        assert np.linalg.norm(gradients[path] - expected) <= 1e-5 * np.linalg.norm(expected), path
    assert max(np.abs(x).max() for x in gradients.values()) > 1e-2


@pytest.fixture(scope="module")
def alone(start):
    return step(start, one_device(), 1)


@pytest.mark.parametrize(
    "mesh, accumulate",
    [
        pytest.param(Mesh(), 2, id="4 data, 2 micro"),
        pytest.param(MESH, 4, id="2 fsdp x 2 tensor, 4 micro", marks=pytest.mark.slow),
        pytest.param(Mesh(data=1, fsdp=2, context=2), 1, id="2 fsdp x 2 context"),
        pytest.param(Mesh(data=1, tensor=2, context=2), 1, id="2 tensor x 2 context"),
    ],
)
def test_a_step_is_the_same_on_any_mesh_and_in_any_number_of_micro_batches(start, alone, mesh, accumulate, capfd):
    check_step(start, alone, sharding.make_mesh(mesh, jax.devices()[:4]), accumulate)
    # XLA says so where it gets from one division to another only by way of everything on every device.
    assert "full rematerialization" not in capfd.readouterr().err


def meshes():
    """Every way to lay 1, 2, 4 or 8 devices along the axes that 4 heads over 2 kv heads allow."""
    for sizes in itertools.product((1, 2, 4, 8), repeat=4):
        heads = 4 // sizes[2] if sizes[2] <= 2 else 4
        if math.prod(sizes) <= 8 and heads % sizes[3] == 0:
            yield pytest.param(sizes, id="x".join(map(str, sizes)))


@pytest.mark.slow
@pytest.mark.parametrize("sizes", list(meshes()))
def test_a_step_is_the_same_on_every_mesh_of_up_to_eight_devices(start, alone, sizes):
    """COMI_TEST_DEVICES=8 python -m pytest -m slow tests/test_sharding.py"""
    if math.prod(sizes) > jax.device_count():
        pytest.skip("set COMI_TEST_DEVICES=8")
    check_step(start, alone, sharding.make_mesh(Mesh(*sizes), jax.devices()[: math.prod(sizes)]), 1)
