"""Attention: dense against a loop in numpy, every other implementation against dense, in values and in gradients."""

import functools
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec
from jax.test_util import check_grads

from comi_jax.model import attention as module
from comi_jax.model import attention_blocked
from comi_jax.model.attention import attention

# name: B, T, S, N, K, H, start, lengths, causal. Blocks are cut to 24 rows and 16 keys below.
CASES = {
    "one head to a kv head": (1, 50, 20, 2, 2, 8, None, None, True),
    "two heads": (2, 48, 48, 4, 2, 8, None, None, True),
    "four heads": (1, 37, 37, 4, 1, 8, None, (30,), True),
    "both ways": (3, 21, 45, 2, 1, 8, None, (45, 17, 0), False),
    "cached": (3, 13, 70, 4, 2, 8, (0, 57, 20), None, True),
    "cached, lengths": (3, 13, 70, 4, 2, 8, (5, 57, 20), (9, 70, 32), True),
    "one token": (2, 1, 40, 4, 2, 8, (0, 39), None, True),
    "empty rows": (3, 20, 40, 4, 2, 8, (-7, -20, 3), (40, 40, 0), True),
    "one of everything": (1, 1, 1, 1, 1, 8, None, None, True),
}


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(attention_blocked, "BLOCK_ROWS", 24)
    monkeypatch.setattr(attention_blocked, "BLOCK_KEYS", 16)
    monkeypatch.setattr(attention_blocked, "WIDE", 2)


def inputs(B, T, S, N, K, H, dtype=np.float32):
    """q, k, v and a cotangent."""
    draw = np.random.default_rng(0).standard_normal
    return [draw(shape).astype(dtype) for shape in ((B, T, N, H), (B, S, K, H), (B, S, K, H), (B, T, N, H))]


def options(start, lengths, causal):
    start, lengths = (None if x is None else jnp.array(x, jnp.int32) for x in (start, lengths))
    return {"start": start, "lengths": lengths, "causal": causal}


def with_gradients(function, arrays, dtype=jnp.float32, optimised=False):
    """Output and the gradients to q, k, v, as float32; compiled in half the time unless `optimised`."""

    @functools.partial(jax.jit, compiler_options=None if optimised else {"xla_backend_optimization_level": 0})
    def run(q, k, v, cotangent):
        out, pull = jax.vjp(function, q, k, v)
        return out, *pull(cotangent)

    return [np.asarray(x, np.float32) for x in run(*(jnp.asarray(x, dtype) for x in arrays))]


def assert_same(results, expected, tolerance=1e-5):
    for name, a, b in zip(("out", "dq", "dk", "dv"), results, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance, err_msg=name)


def assert_rounds_like_dense(function, arrays, **kwargs):
    """In bfloat16, no further from dense in float32 than dense in bfloat16 is, give or take a half."""
    dense = functools.partial(attention, implementation="dense", **kwargs)
    rounded = [np.asarray(jnp.asarray(x, jnp.bfloat16), np.float32) for x in arrays]
    exact = with_gradients(dense, rounded)
    theirs, ours = with_gradients(dense, rounded, jnp.bfloat16), with_gradients(function, rounded, jnp.bfloat16)
    for name, want, reference, result in zip(("out", "dq", "dk", "dv"), exact, theirs, ours, strict=True):
        error, allowed = (np.sqrt(np.mean((x - want) ** 2)) for x in (result, reference))
        assert error <= 1.5 * allowed, (name, error, allowed)


def by_loop(q, k, v, start, lengths, causal):
    """The definition, one query at a time, in float64."""
    out = np.zeros(q.shape)
    for b, i, n in np.ndindex(*q.shape[:3]):
        position = i + (0 if start is None else start[b])
        end = k.shape[1] if lengths is None else lengths[b]
        end = min(end, position + 1) if causal else end
        if end > 0:
            kv_head = n // (q.shape[2] // k.shape[2])
            scores = k[b, :end, kv_head].astype(np.float64) @ q[b, i, n] / np.sqrt(q.shape[3])
            weights = np.exp(scores - scores.max())
            out[b, i, n] = weights @ v[b, :end, kv_head] / weights.sum()
    return out


@pytest.mark.parametrize("case", CASES)
def test_dense_is_the_definition_and_blocked_is_dense(case, small_blocks):
    *shape, start, lengths, causal = CASES[case]
    arrays, kwargs = inputs(*shape), options(start, lengths, causal)
    dense, blocked = (
        with_gradients(functools.partial(attention, implementation=name, **kwargs), arrays)
        for name in ("dense", "blocked")
    )
    np.testing.assert_allclose(dense[0], by_loop(*arrays[:3], start, lengths, causal), atol=1e-5)
    assert_same(blocked, dense)


@pytest.mark.parametrize("implementation", ["dense", "blocked", None])
def test_rows_after_a_shared_context_are_rows_with_the_context_before_them(implementation, small_blocks):
    """Values and gradients; contexts of every length from none, two rows after each."""
    lengths, C, T, S, N, K, H = (0, 1, 20, 37), 4, 5, 37, 4, 2, 8
    rng = np.random.default_rng(1)
    q, cotangent = rng.standard_normal((2, 2 * C, T, N, H)).astype(np.float32)
    own, context = rng.standard_normal((2, 2 * C, T, K, H)), rng.standard_normal((2, C, S, K, H))
    arrays = [x.astype(np.float32) for x in (q, *own, *context)]

    def shared(q, k, v, context_k, context_v):
        length = jnp.array(lengths, jnp.int32)
        return module.attention_after(q, k, v, context_k, context_v, length, implementation=implementation)

    def written_out(q, k, v, context_k, context_v):
        rows = []
        for row in range(2 * C):
            n = lengths[row // 2]
            joined = [jnp.concatenate([c[row // 2, :n], x[row]])[None] for c, x in ((context_k, k), (context_v, v))]
            rows.append(attention(q[row][None], *joined, start=jnp.array([n], jnp.int32), implementation="dense")[0])
        return jnp.stack(rows)

    @functools.partial(jax.jit, static_argnums=0)
    def run(function, *arrays):
        out, pull = jax.vjp(function, *arrays)
        return out, *pull(jnp.asarray(cotangent))

    for a, b in zip(run(shared, *arrays), run(written_out, *arrays), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5, rtol=1e-5)


def test_blocked_is_dense_at_the_real_block_sizes():
    arrays = inputs(1, 600, 600, 4, 2, 16)
    dense, blocked = (
        with_gradients(functools.partial(attention, implementation=name), arrays, optimised=True)
        for name in ("dense", "blocked")
    )
    assert_same(blocked, dense)


def test_blocked_rounds_like_dense(small_blocks):
    kwargs = options(None, (50, 31), True)
    blocked = functools.partial(attention, implementation="blocked", **kwargs)
    assert_rounds_like_dense(blocked, inputs(2, 50, 50, 4, 2, 8), **kwargs)


def test_blocked_gradients_are_finite_differences(small_blocks):
    with jax.enable_x64(True):
        q, k, v, _ = map(jnp.asarray, inputs(1, 30, 40, 2, 1, 4, np.float64))
        function = functools.partial(attention, implementation="blocked", **options((4,), (33,), True))
        assert jax.eval_shape(function, q, k, v).dtype == jnp.float64
        check_grads(jax.jit(function), (q, k, v), order=1, modes=["rev"], atol=1e-7, rtol=1e-7)


@pytest.mark.parametrize("implementation", ["dense", "blocked"])
def test_rows_that_see_nothing_are_zero_with_zero_gradients(implementation, small_blocks):
    start, lengths = (-7, -20, 3), (40, 40, 0)
    function = functools.partial(attention, implementation=implementation, **options(start, lengths, True))
    out, dq, dk, dv = with_gradients(function, inputs(3, 20, 40, 4, 2, 8))
    for x in (out, dq):
        assert not x[0, :7].any() and not x[1].any() and not x[2].any()
        assert x[0, 7:].any()
    assert not dk[1:].any() and not dv[1:].any() and not dv[0, 13:].any()


@pytest.mark.parametrize("implementation", ["dense", "blocked"])
def test_no_gradient_comes_from_the_future_or_past_the_length(implementation, small_blocks):
    q, k, v, _ = map(jnp.asarray, inputs(1, 40, 60, 2, 1, 8))

    @jax.jit
    def gradients(at):
        def one_query(k, v):
            out = attention(q, k, v, implementation=implementation, **options((10,), (30,), True))
            return jax.lax.dynamic_index_in_dim(out, at, axis=1).sum()

        return jax.grad(one_query, (0, 1))(k, v)

    for at, seen in ((12, 23), (31, 30)):
        for gradient in gradients(at):
            assert gradient[0, :seen].any(axis=(1, 2)).all()
            assert not gradient[0, seen:].any()


def test_blocked_under_scan_and_remat(small_blocks):
    """Start and lengths traced, layers scanned, everything recomputed but what is named: as without all that."""
    q, k, v, cotangent = map(jnp.asarray, inputs(2, 40, 40, 4, 2, 8))

    def model(implementation, transform):
        def layer(x, start):
            return x + attention(x, k, v, start=start, lengths=start + 33, implementation=implementation), None

        def loss(q):
            starts = jnp.array([[0, 3], [2, -5]], jnp.int32)
            return jnp.vdot(jax.lax.scan(transform(layer), q, starts)[0], cotangent)

        return jax.grad(loss)

    names = jax.checkpoint_policies.save_only_these_names("attention")
    saving, recomputing = functools.partial(jax.checkpoint, policy=names), jax.checkpoint
    expected = jax.jit(model("dense", lambda f: f))(q)
    np.testing.assert_allclose(jax.jit(model("blocked", saving))(q), expected, rtol=1e-5, atol=1e-5)
    # What is saved spares the backward pass a second forward, with its two products in each of two loops.
    dots = [
        str(jax.make_jaxpr(model("blocked", transform))(q)).count("= dot_general[")
        for transform in (saving, recomputing)
    ]
    assert dots[1] == dots[0] + 4, dots


def test_power_of_2():
    """Over all magnitudes, to the last digits; exactly 0 for what is masked."""
    x = np.concatenate([np.linspace(-126, 127, 100_001), np.linspace(-0.5, 0.5, 10_001)]).astype(np.float32)
    power = np.asarray(attention_blocked.power_of_2(jnp.asarray(x)), np.float64)
    np.testing.assert_allclose(power, np.exp2(x.astype(np.float64)), rtol=3e-7)
    masked = attention_blocked.power_of_2(jnp.array([-126.5, -1e9, attention_blocked.MASKED, -jnp.inf], jnp.float32))
    assert not masked.any()


def test_blocked_in_shard_map(small_blocks):
    arrays = [jnp.asarray(x) for x in inputs(2, 40, 40, 4, 2, 8)]
    mesh = jax.make_mesh((2, 2), ("data", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    spec = PartitionSpec("data", None, "tensor")
    blocked = functools.partial(attention, implementation="blocked")
    sharded = jax.shard_map(blocked, mesh=mesh, in_specs=(spec,) * 3, out_specs=spec)
    assert_same(with_gradients(sharded, arrays), with_gradients(blocked, arrays), 1e-6)


AXES = ("data", "fsdp", "tensor", "context")
# (1, 1, 4, 1) does not divide 2 kv heads; (1, 1, 1, 4) repeats them
MESHES = [(4, 1, 1, 1), (1, 2, 2, 1), (2, 1, 2, 1), (1, 1, 4, 1), (1, 1, 1, 4), (2, 1, 1, 2), (1, 1, 2, 2)]


@pytest.mark.parametrize("sizes", MESHES)
@pytest.mark.parametrize("implementation, start", [("dense", None), ("blocked", (3, 0, 7, 1))])
def test_a_mesh_changes_nothing(implementation, start, sizes, small_blocks):
    """Rows, heads, starts and lengths of every device; also recomputed but for what is named."""
    arrays = inputs(4, 40, 52, 4, 2, 8)
    mesh = jax.make_mesh(sizes, AXES, axis_types=(jax.sharding.AxisType.Auto,) * 4)
    alone = functools.partial(attention, implementation=implementation, **options(start, (50, 31, 0, 9), True))
    names = jax.checkpoint_policies.save_only_these_names("attention")
    sharded = jax.checkpoint(functools.partial(alone, mesh=mesh), policy=names)
    assert_same(with_gradients(sharded, arrays), with_gradients(alone, arrays), 1e-6)


def test_rows_that_do_not_divide_are_computed_by_all():
    arrays = inputs(3, 10, 10, 4, 2, 8)
    mesh = jax.make_mesh((4, 1, 1, 1), AXES, axis_types=(jax.sharding.AxisType.Auto,) * 4)
    dense = functools.partial(attention, implementation="dense")
    assert_same(with_gradients(functools.partial(dense, mesh=mesh), arrays), with_gradients(dense, arrays), 1e-6)


def test_each_device_holds_its_own_rows_and_heads_alone():
    """Of 4 rows and 2 kv heads, one row and one head: a fused kernel on a chip sees exactly these."""
    mesh = jax.make_mesh((2, 1, 2, 1), AXES, axis_types=(jax.sharding.AxisType.Auto,) * 4)
    q, k, v, _ = map(jnp.asarray, inputs(2, 40, 40, 4, 2, 8))
    text = str(jax.make_jaxpr(functools.partial(attention, implementation="dense", mesh=mesh))(q, k, v))
    assert "f32[1,1,2,40,40]" in text and "f32[2,2,2,40,40]" not in text


def test_blocked_memory_is_linear():
    def temporaries(T):
        q, k = (jax.ShapeDtypeStruct((1, T, heads, 64), jnp.float32) for heads in (8, 2))

        def run(q, k, v, cotangent):
            return jax.vjp(functools.partial(attention, implementation="blocked"), q, k, v)[1](cotangent)

        return jax.jit(run).lower(q, k, k, q).compile().memory_analysis().temp_size_in_bytes

    short, long = temporaries(8192), temporaries(16384)
    assert short < 8 * 8192 * 64 * 4 * 8  # eight times q, where the scores of one head alone would be sixteen
    assert long < 2.05 * short


REFUSALS = {
    "unknown": ({"implementation": "flash"}, "no implementation 'flash'; choose from dense, blocked, cudnn, splash"),
    "cudnn start": ({"implementation": "cudnn", "start": (0, 0)}, "cudnn takes no start"),
    "cudnn float32": ({"implementation": "cudnn"}, "bfloat16 or float16, not float32"),
    "cudnn lengths differ": ({"implementation": "cudnn", "S": 9, "dtype": jnp.bfloat16}, r"as many keys \(9\) as"),
    "splash start": ({"implementation": "splash", "start": (0, 0)}, "splash takes no start"),
    "splash float32": ({"implementation": "splash"}, "bfloat16, not float32"),
    "heads": ({"N": 3}, "2 kv heads do not divide 3 query heads"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_what_cannot_be_done_is_refused(case):
    given, message = REFUSALS[case]
    kwargs = {"N": 4, "S": 8, "dtype": jnp.float32, "start": None, "implementation": None} | given
    q, k, v, _ = inputs(2, 8, kwargs["S"], kwargs["N"], 2, 8)
    q, k, v = (jnp.asarray(x, kwargs["dtype"]) for x in (q, k, v))
    with pytest.raises(ValueError, match=message):
        attention(q, k, v, implementation=kwargs["implementation"], **options(kwargs["start"], None, True))


CHOICES = [  # backend, dtype, T, S, with start, choice
    ("cpu", jnp.float32, 200, 200, False, "dense"),
    ("cpu", jnp.float32, 512, 512, False, "blocked"),
    ("cpu", jnp.bfloat16, 1, 4096, True, "dense"),
    ("cpu", jnp.float32, 64, 4096, True, "blocked"),
    ("gpu", jnp.bfloat16, 4096, 4096, False, "cudnn"),
    ("gpu", jnp.float32, 200, 200, False, "dense"),
    ("gpu", jnp.float32, 32768, 32768, False, "blocked"),
    ("gpu", jnp.bfloat16, 1, 4096, True, "dense"),
    ("tpu", jnp.bfloat16, 4096, 4096, False, "splash"),
    ("tpu", jnp.float32, 32768, 32768, False, "blocked"),
    ("tpu", jnp.bfloat16, 32, 4096, True, "dense"),
]


@pytest.mark.parametrize("backend, dtype, T, S, cached, name", CHOICES)
def test_choice(backend, dtype, T, S, cached, name):
    q, k = (jax.ShapeDtypeStruct((1, *shape, 64), dtype) for shape in ((T, 8), (S, 2)))
    assert module.choose(q, k, jnp.zeros(1, jnp.int32) if cached else None, True, backend) == name


def test_a_choice_is_logged_once(caplog):
    module._log_choice.cache_clear()
    q, k, v, _ = map(jnp.asarray, inputs(1, 3, 3, 2, 1, 8))
    with caplog.at_level(logging.INFO, logger="comi_jax.model.attention"):
        for _ in range(2):
            attention(q, k, v)
    assert [record.getMessage() for record in caplog.records] == ["attention: dense for float32 on cpu"]


@pytest.mark.parametrize("lengths, causal", [(None, True), ((200, 0), False)])
def test_splash_rounds_like_dense(lengths, causal):
    """In Pallas's interpreter; lengths that are no multiple of 128, one row empty."""
    kwargs = options(None, lengths, causal)

    def splash(q, k, v):
        return module._splash(q, k, v, None, kwargs["lengths"], causal, interpret=True)

    assert_rounds_like_dense(splash, inputs(2, 140, 140 if causal else 210, 2, 1, 64), **kwargs)


@pytest.mark.skipif(jax.default_backend() != "gpu", reason="cuDNN needs a GPU, and there is none here")
@pytest.mark.parametrize("lengths, causal", [(None, True), ((141, 0), True), (None, False), ((200, 77), False)])
def test_cudnn_rounds_like_dense(lengths, causal):
    kwargs = options(None, lengths, causal)
    cudnn = functools.partial(attention, implementation="cudnn", **kwargs)
    assert_rounds_like_dense(cudnn, inputs(2, 141, 141 if causal else 211, 4, 2, 64), **kwargs)
