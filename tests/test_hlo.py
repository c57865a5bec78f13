"""What is read from a compiled program's text, against programs whose work is known."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from comi_jax.planning import hlo

L, M, D = 5, 8, 16


def layers(w, x):
    return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)[0]


@pytest.fixture(scope="module")
def compiled():
    """Five layers whose weights are split over four devices, as the rows are."""
    mesh = jax.make_mesh((4,), ("fsdp",), axis_types=(AxisType.Auto,))
    rows, split = NamedSharding(mesh, PartitionSpec("fsdp")), NamedSharding(mesh, PartitionSpec(None, "fsdp"))
    w = jax.ShapeDtypeStruct((L, D, D), jnp.float32, sharding=split)
    x = jax.ShapeDtypeStruct((M, D), jnp.float32, sharding=rows)
    return jax.jit(layers, out_shardings=rows).lower(w, x).compile().as_text()


def test_a_loop_counts_as_often_as_it_runs(compiled):
    counts = hlo.count(compiled)
    assert counts.flops == 2 * L * (M // 4) * D * D
    assert counts.sent == {"all-gather": L * D * D * 4 * 3 / 4} and counts.open_loops == 0
    assert counts.traffic >= L * D * D * 4


def test_trips_are_read_from_the_condition_where_xla_has_not_noted_them(compiled):
    noted = compiled.replace("known_trip_count", "other")
    assert noted != compiled and hlo.count(noted).flops == hlo.count(compiled).flops


def test_a_loop_whose_end_is_data_is_said_to_be_open():
    def until(x):
        return jax.lax.while_loop(lambda x: jnp.sum(x) < 1e6, lambda x: x @ x, x)

    text = jax.jit(until).lower(jax.ShapeDtypeStruct((D, D), jnp.float32)).compile().as_text()
    once, thrice = hlo.count(text), hlo.count(text, open_trips=3)
    assert once.open_loops == 1 and once.flops == 2 * D**3 and thrice.flops == 3 * once.flops


@pytest.mark.parametrize(
    "words, devices",
    [
        ("source_target_pairs={{0,1},{1,0}}, x", [0]),
        ("replica_groups={{0,1,2,3},{4,5,6,7}}, x", [0, 1, 2, 3]),
        ("replica_groups=[2,4]<=[8], x", [0, 1, 2, 3]),
        ("replica_groups=[4,2]<=[2,4]T(1,0), x", [0, 4]),
        ("replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_1'}, x", [0, 1, 2, 3]),
        ("replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_0'}, x", [0, 4]),
        ("replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_0','axis_1':(1)2}, x", [0, 2, 4, 6]),
        ("replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_1':(2)2}, x", [0, 1]),
        ("replica_groups=mesh['a'=4,'b'=1,'c'=2], device_ids=([2,4]T(1,0)) {'a'}, x", [0, 1, 2, 3]),
        ("replica_groups=mesh['a'=4,'b'=1,'c'=2], device_ids=([2,4]T(1,0)) {'c'}, x", [0, 4]),
    ],
)
def test_groups_of_a_collective(words, devices):
    assert hlo.group(words).tolist() == devices


def test_groups_that_cannot_be_read_are_said():
    with pytest.raises(ValueError, match="cannot read the groups.*mystery"):
        hlo.group("replica_groups=mystery<=8, x")


def module(*lines):
    """A module of one computation."""
    return "ENTRY %main (a: f32[1]) -> f32[1] {\n" + "\n".join(f"  {line}" for line in lines) + "\n}\n"


def test_collectives_by_what_a_device_sends():
    text = module(
        "%a = f32[64]{0} parameter(0)",
        "%g = f32[512]{0} all-gather(%a), replica_groups=[1,8]<=[8], dimensions={0}",
        "%r = f32[64]{0} all-reduce(%a), replica_groups=[1,8]<=[8], to_apply=%add",
        "%s = f32[8]{0} reduce-scatter(%a), replica_groups=[1,8]<=[8], dimensions={0}",
        "ROOT %p = f32[64]{0} all-gather-start(%a), replica_groups=[8,2]<=[2,8]T(1,0), dimensions={0}",
    )
    counts = hlo.count(text, devices_per_node=8)
    assert counts.sent == {"all-gather": 256 * 7 + 256, "all-reduce": 2 * 256 * 7 / 8, "reduce-scatter": 256 * 7 / 8}
    assert counts.sent_outside == 256  # the last reaches the other node


def test_the_members_of_a_node_share_its_ways_out():
    """A ring over 16 devices in two nodes leaves each node once; neighbours may be in one node, or not."""
    text = module(
        "%a = f32[64]{0} parameter(0)",
        "%g = f32[1024]{0} all-gather(%a), replica_groups=[1,16]<=[16], dimensions={0}",
        "%i = f32[64]{0} collective-permute(%a), source_target_pairs={{0,1},{1,0},{8,9}}",
        "ROOT %o = f32[64]{0} collective-permute(%a), source_target_pairs={{7,8},{8,7}}",
    )
    assert hlo.count(text, devices_per_node=8).sent_outside == 256 * 15 * 2 / 16 + 256
    assert hlo.count(text, devices_per_node=16).sent_outside == hlo.count(text).sent_outside == 0


def test_of_open_loops_within_each_other_the_outer_one_repeats():
    def until(x):
        return jax.lax.while_loop(lambda x: jnp.sum(x) < 1e6, lambda x: x @ x, x)

    def again(x):
        return jax.lax.while_loop(lambda x: jnp.max(x) < 1e9, until, x)

    text = jax.jit(again).lower(jax.ShapeDtypeStruct((D, D), jnp.float32)).compile().as_text()
    assert hlo.count(text, open_trips=3).flops == 3 * 2 * D**3


def test_a_product_as_a_tpu_has_it():
    """A batch of 8 products of [16, 32] and [32, 64], the batch a spatial dimension that is mostly padding."""
    text = module(
        "%a = bf16[8,16,32]{2,1,0:T(8,128)(2,1)} parameter(0)",
        "%b = bf16[8,32,64]{2,1,0:T(8,128)(2,1)} parameter(1)",
        "ROOT %c = bf16[8,16,64]{2,1,0:T(8,128)(2,1)} convolution(%a, %b), "
        "window={size=8 stride=7 lhs_dilate=8}, dim_labels=0bf_0io->0bf",
    )
    assert hlo.count(text).flops == 8 * 2 * 16 * 32 * 64


def test_an_attention_kernel_counts_by_its_shapes():
    """28 heads over 1,024 tokens of width 128, causal: two products of half the square."""
    text = module(
        "%q = bf16[28,1024,128]{2,1,0} parameter(0)",
        "%k = bf16[4,1024,128]{2,1,0} parameter(1)",
        "%splash_mha_fwd_residuals.4 = (f32[8]{0}, bf16[28,1024,128]{2,1,0}) custom-call(%q, %k, %k), "
        'custom_call_target="tpu_custom_call", frontend_attributes={kernel_metadata={',
        '"a":"b"',
        '}}, metadata={op_name="x"}',
        "ROOT %o = bf16[28,1024,128]{2,1,0} get-tuple-element(%splash_mha_fwd_residuals.4), index=1",
    )
    counts = hlo.count(text)
    assert counts.flops == 2 * 28 * 1024**2 * 128 and counts.kernels == {"splash_mha_fwd"}


def test_memory_beside_the_main_one_is_not_counted():
    text = module("%a = f32[64]{0:S(1)} parameter(0)", "ROOT %b = f32[64]{0} negate(%a)")
    assert hlo.count(text).traffic == 256
