"""The model on a batch of mixed lengths, rates and segments: nothing depends on padding or companions."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_models

from comi_jax import backbone as lm
from comi_jax import comi
from comi_jax.compress import max_groups
from comi_jax.params import flatten

ARCH = tiny_models.architecture("qwen2", lora=2, learn_mig=True)
SEGMENTS, LENGTH, QUERY, ANSWER, MIN_RATE = 2, 12, 5, 4, 2
SLOTS = max_groups(LENGTH, MIN_RATE)


@pytest.fixture(scope="module")
def params():
    return tiny_models.shaken(comi.specs(ARCH))


@pytest.fixture(scope="module")
def batch():
    """Two full segments, a short last one, a single one, and no context at all."""
    rng = np.random.default_rng(0)
    return comi.Batch(
        context=rng.integers(0, 61, (4, SEGMENTS, LENGTH), np.int32),
        context_length=np.array([[12, 12], [12, 3], [7, 0], [0, 0]], np.int32),
        query=rng.integers(0, 61, (4, QUERY), np.int32),
        query_length=np.array([3, 5, 1, 4], np.int32),
        answer=rng.integers(0, 61, (4, ANSWER), np.int32),
        answer_length=np.array([4, 1, 3, 2], np.int32),
        rate=np.array([2, 4, 3, 2], np.int32),
    )


@jax.jit
def answer(params, batch):
    memory = comi.remember(params, ARCH, batch, MIN_RATE)
    logits = comi.answer_logits(params, ARCH, memory, batch)
    return memory, logits


def change(batch, **fields):
    """``batch`` with some token ids replaced by others, where ``fields`` masks are true."""
    return batch.replace(
        **{
            name: np.where(mask, (getattr(batch, name) + 17) % 61, getattr(batch, name))
            for name, mask in fields.items()
        }
    )


def real_tokens(batch):
    """Masks of the real tokens of context, query and answer."""

    def inside(ids, length):
        return np.arange(ids.shape[-1]) < length[..., None]

    return {
        "context": inside(batch.context, batch.context_length),
        "query": inside(batch.query, batch.query_length),
        "answer": inside(batch.answer, batch.answer_length),
    }


def test_padding_changes_nothing(params, batch):
    """Other ids at every padded position: the same bits."""
    memory, logits = answer(params, batch)
    other_memory, other_logits = answer(params, change(batch, **{k: ~m for k, m in real_tokens(batch).items()}))
    np.testing.assert_array_equal(memory.length, other_memory.length)
    for row, n in enumerate(memory.length):
        np.testing.assert_array_equal(memory.vectors[row, :n], other_memory.vectors[row, :n])
    real = real_tokens(batch)["answer"]
    np.testing.assert_array_equal(logits[real], other_logits[real])


def test_every_real_token_matters(params, batch):
    """What the last test leaves alone: a change of one real token of context or query reaches the answer."""
    _, logits = answer(params, batch)
    for field, at in (("context", (0, 1, 11)), ("context", (1, 1, 2)), ("query", (1, 4)), ("query", (3, 0))):
        mask = np.zeros(getattr(batch, field).shape, bool)
        mask[at] = True
        _, other = answer(params, change(batch, **{field: mask}))
        changed = np.abs(other - logits).max((1, 2)) > 1e-4
        np.testing.assert_array_equal(changed, np.arange(4) == at[0])


def test_a_prediction_does_not_see_the_token_it_predicts_or_later_ones(params, batch):
    _, logits = answer(params, batch)
    for t in range(ANSWER - 1):
        mask = np.broadcast_to(np.arange(ANSWER) == t, batch.answer.shape)
        _, other = answer(params, change(batch, answer=mask))
        np.testing.assert_array_equal(other[:, : t + 1], logits[:, : t + 1])
        longer = batch.answer_length > t + 1
        assert (np.abs(other - logits)[longer, t + 1].max(1) > 1e-4).all()


def trimmed(batch, row):
    """One row of ``batch`` alone, without any padding."""
    segments = max(1, int((batch.context_length[row] > 0).sum()))
    length = int(batch.context_length[row].max())
    one = jax.tree.map(lambda x: x[row : row + 1], batch)
    return one.replace(
        context=one.context[:, :segments, :length],
        context_length=one.context_length[:, :segments],
        query=one.query[:, : batch.query_length[row]],
        answer=one.answer[:, : batch.answer_length[row]],
    )


def test_the_loss_of_a_batch_is_the_sum_of_its_examples(params, batch):
    loss = jax.jit(lambda params, batch: comi.loss(params, ARCH, batch, MIN_RATE))
    _, logits = answer(params, batch)
    whole = comi.sum_loss(logits, jnp.asarray(batch.answer), jnp.asarray(batch.answer_length))
    # Every row alone: as four copies of itself, which the same program computes.
    copies = [
        answer(params, jax.tree.map(lambda x, row=row: np.repeat(x[row : row + 1], 4, axis=0), batch))[1]
        for row in range(4)
    ]
    singles = [
        comi.sum_loss(logits[:1], jnp.asarray(batch.answer[i : i + 1]), jnp.asarray(batch.answer_length[i : i + 1]))
        for i, logits in enumerate(copies)
    ]
    total = jax.tree.map(lambda *x: sum(x), *singles)
    np.testing.assert_allclose(whole.loss, total.loss, rtol=1e-6)
    assert float(whole.tokens) == float(total.tokens) == batch.answer_length.sum() and whole.correct == total.correct
    one = loss(params, trimmed(batch, 2))
    np.testing.assert_allclose(one.loss, singles[2].loss, rtol=1e-5)
    assert one.tokens == 3


def test_loss_is_cross_entropy_over_the_real_answer_tokens():
    rng = np.random.default_rng(1)
    scores, ids = rng.standard_normal((2, 3, 7)).astype(np.float32), np.array([[6, 0, 2], [1, 1, 5]], np.int32)
    scores[1, 0, 1] = 9.0
    out = comi.sum_loss(jnp.asarray(scores), jnp.asarray(ids), jnp.array([3, 1], jnp.int32))
    rows = [(0, 0), (0, 1), (0, 2), (1, 0)]
    want = sum(np.log(np.exp(scores[r]).sum()) - scores[r][ids[r]] for r in rows)
    np.testing.assert_allclose(out.loss, want, rtol=1e-5)
    assert float(out.tokens) == 4 and float(out.correct) == sum(scores[r].argmax() == ids[r] for r in rows) >= 1


def test_segments_are_what_each_would_be_alone(params, batch):
    """The memory of a context is that of its segments, one after another: appending text changes no earlier vector."""
    memory, _ = answer(params, batch)
    alone = comi.Batch(
        context=batch.context.reshape(8, 1, LENGTH),
        context_length=batch.context_length.reshape(8, 1),
        query=np.repeat(batch.query, 2, axis=0),
        query_length=np.repeat(batch.query_length, 2),
        answer=np.repeat(batch.answer, 2, axis=0),
        answer_length=np.repeat(batch.answer_length, 2),
        rate=np.repeat(batch.rate, 2),
    )
    parts = jax.jit(lambda params, batch: comi.remember(params, ARCH, batch, MIN_RATE))(params, alone)
    for row in range(4):
        pieces = [np.asarray(parts.vectors[i, : parts.length[i]]) for i in (2 * row, 2 * row + 1)]
        want = np.concatenate(pieces)
        assert memory.length[row] == len(want)
        np.testing.assert_allclose(memory.vectors[row, : len(want)], want, atol=1e-5)
    np.testing.assert_array_equal(parts.length > 0, batch.context_length.reshape(-1) > 0)
    sizes = np.asarray(memory.aux.group_sizes)
    np.testing.assert_array_equal(sizes.sum(1), batch.context_length.reshape(-1))
    np.testing.assert_array_equal((sizes > 0).sum(1).reshape(4, 2).sum(1), memory.length)


def test_encoding_the_context_once_is_encoding_it_with_the_query(params, batch):
    """Exact, not an approximation: H does not depend on the query, and q̄ from the cache is q̄ from one pass."""

    @jax.jit
    def both(params, context, length, query, query_length):
        states, cache = comi.encode_context(params, ARCH, context, QUERY)
        cached = comi.encode_query(params, ARCH, cache, length, query, query_length)
        return comi.encode(params, ARCH, context, length, query, query_length), (states, cached)

    length = np.array([12, 9, 7, 0], np.int32)
    inputs = params, batch.context[:, 0], length
    (states, vector), (alone, cached) = both(*inputs, batch.query, batch.query_length)
    (again, other), _ = both(*inputs, (batch.query + 5) % 61, batch.query_length)
    real = np.arange(LENGTH) < length[:, None]
    np.testing.assert_array_equal(states[real], again[real])
    np.testing.assert_allclose(states[real], alone[real], atol=1e-5)
    np.testing.assert_allclose(vector, cached, atol=1e-5)
    assert (np.abs(vector - other).max(1) > 1e-3).all()


def test_query_vector_is_the_mean_of_the_real_query_states():
    states = jnp.asarray(np.random.default_rng(2).standard_normal((3, 6, 4)), jnp.float32)
    states = states.at[:, 5].set(jnp.nan)  # padding
    first, count = jnp.array([0, 2, 4], jnp.int32), jnp.array([5, 3, 0], jnp.int32)
    got = comi.masked_mean(states, first, count)
    want = [np.mean(states[0, :5], 0), np.mean(states[1, 2:5], 0), np.zeros(4)]
    np.testing.assert_allclose(got, want, atol=1e-6)


@pytest.mark.parametrize("width", [(), (3,)])
def test_rows_are_joined_without_a_gap(width):
    """Ids and vectors, for every pair of lengths."""
    x, y = 4, 3
    lengths = np.array([(i, j) for i in range(x + 1) for j in range(y + 1)], np.int32)
    first = np.arange(x * len(lengths) * np.prod(width, dtype=int)).reshape(len(lengths), x, *width).astype(np.int32)
    second = -1 - np.arange(y * len(lengths) * np.prod(width, dtype=int)).reshape(len(lengths), y, *width).astype(
        np.int32
    )
    rows, length = comi.join_rows(*map(jnp.asarray, (first, lengths[:, 0], second, lengths[:, 1])))
    assert rows.shape == (len(lengths), x + y, *width)
    for row, (i, j) in enumerate(lengths):
        assert length[row] == i + j
        np.testing.assert_array_equal(rows[row, : i + j], np.concatenate([first[row, :i], second[row, :j]]))


def test_segments_are_joined_without_a_gap():
    """For every filling of three segments of two slots."""
    count = np.stack(np.meshgrid(*[np.arange(3)] * 3, indexing="ij"), -1).reshape(-1, 3).astype(np.int32)
    memory = np.random.default_rng(3).standard_normal((len(count), 3, 2, 5)).astype(np.float32)
    joined, length = comi.join_segments(jnp.asarray(memory), jnp.asarray(count))
    assert joined.shape == (len(count), 6, 5)
    for row, counts in enumerate(count):
        want = np.concatenate([memory[row, g, :n] for g, n in enumerate(counts)])
        assert length[row] == len(want)
        np.testing.assert_array_equal(joined[row, : len(want)], want)


def test_every_parameter_reaches_the_loss_but_the_coarse_scalars(params, batch):
    """Group sizes are integers: α and β of the coarse stage get a gradient of exactly zero, all else does not."""
    grads = jax.jit(jax.grad(lambda params, batch: comi.loss(params, ARCH, batch, MIN_RATE).loss))(params, batch)
    for path, grad in flatten(grads).items():
        assert np.isfinite(grad).all(), path
        assert (np.abs(grad).max() == 0) == (path in ("mig/alpha_coarse", "mig/beta_coarse")), path


ENCODER_AND_LSA = {p for p in flatten(comi.specs(ARCH)) if p.split("/")[0] in ("encoder", "lsa")}
LSA = {p for p in ENCODER_AND_LSA if p.startswith("lsa/")}
DECODER = {f"decoder/layers/{name}" for name in ("q", "k", "v", "o", "q_bias", "k_bias", "v_bias")}
ADAPTERS = {f"lora/{target}/{part}" for target in "qkvo" for part in "ab"}
SCALARS = {f"mig/{name}" for name in ("alpha_coarse", "beta_coarse", "alpha_fine", "beta_fine")}


@pytest.mark.parametrize(
    "kind, lora, options, want",
    [
        ("qwen2", 0, {}, ENCODER_AND_LSA | DECODER),
        ("qwen2", 2, {}, ENCODER_AND_LSA | ADAPTERS),
        ("qwen2", 0, {"lsa": False}, (ENCODER_AND_LSA | DECODER) - LSA),
        ("qwen2", 2, {"learn_mig": True}, ENCODER_AND_LSA | ADAPTERS | SCALARS),
    ],
)
def test_what_is_trained(kind, lora, options, want):
    arch = tiny_models.architecture(kind, lora=lora, **options)
    assert {path for path in flatten(comi.specs(arch)) if comi.is_trained(path, arch)} == want


def test_per_head_norms_and_tied_embeddings_of_the_decoder_stay_frozen():
    arch = tiny_models.architecture("qwen3")
    trained = {p for p in flatten(comi.specs(arch)) if p.startswith("decoder/") and comi.is_trained(p, arch)}
    assert trained == {f"decoder/layers/{name}" for name in "qkvo"}


@pytest.mark.parametrize("kind", tiny_models.BACKBONES)
def test_a_fresh_model_is_cut_from_one_language_model(kind):
    arch = tiny_models.architecture(kind)
    weights = tiny_models.shaken(lm.specs(arch.backbone, 3, embed=True, head=True))
    fresh = flatten(comi.from_backbone(weights, arch))
    want = flatten(comi.specs(arch))
    assert {p: np.shape(x) for p, x in fresh.items()} == {p: spec.shape for p, spec in want.items()}
    np.testing.assert_array_equal(fresh["encoder/layers/down"], weights["layers"]["down"][:2])
    np.testing.assert_array_equal(fresh["lsa/layers/o"], weights["layers"]["o"][:1])
    np.testing.assert_array_equal(fresh["decoder/layers/q"], weights["layers"]["q"])
    np.testing.assert_array_equal(fresh["encoder/embed"], weights["embed"])
    assert fresh["mig/beta_fine"] == arch.compression.beta_fine


def test_without_the_lsa_memory_is_what_was_merged(params):
    arch = dataclasses.replace(ARCH, compression=dataclasses.replace(ARCH.compression, lsa=False))
    memory = jnp.asarray(np.random.default_rng(4).standard_normal((1, 3, 32)), jnp.float32)
    np.testing.assert_array_equal(comi.align(params, arch, memory), memory)
    assert np.abs(jax.jit(lambda m: comi.align(params, ARCH, m))(memory) - memory).max() > 0.1


def test_only_a_key_and_adapters_bring_dropout(params):
    assert comi.adapters(params, ARCH).keys is None
    assert comi.adapters(params, ARCH, jax.random.key(0)).keys is not None
    assert comi.adapters(params, tiny_models.architecture("qwen2"), jax.random.key(0)) is None


def test_a_bfloat16_model_compresses_and_sums_its_loss_in_float32(params, batch):
    arch = dataclasses.replace(ARCH, dtype="bfloat16")
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), {k: v for k, v in params.items() if k != "mig"})
    inputs = half | {"mig": params["mig"]}, jax.tree.map(jnp.asarray, batch)
    memory = jax.eval_shape(lambda p, b: comi.remember(p, arch, b, MIN_RATE), *inputs)
    assert memory.vectors.dtype == jnp.bfloat16 and memory.aux.weights.dtype == jnp.float32
    sums = jax.eval_shape(lambda p, b: comi.loss(p, arch, b, MIN_RATE), *inputs)
    assert {x.dtype for x in jax.tree.leaves(sums)} == {jnp.dtype("float32")}


def test_answers_are_scored_at_answer_positions_only(params, batch):
    """No array of vocabulary width longer than the answer: the jaxpr has none, forward or backward."""
    jaxpr = jax.make_jaxpr(jax.grad(lambda p, b: comi.loss(p, ARCH, b, MIN_RATE).loss))(
        params, jax.tree.map(jnp.asarray, batch)
    )
    shapes = set()

    def walk(jaxpr):
        for equation in jaxpr.eqns:
            shapes.update(v.aval.shape for v in equation.outvars if hasattr(v.aval, "shape"))
            for inner in jax.tree.leaves(
                list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")
            ):
                if hasattr(inner, "eqns") or hasattr(inner, "jaxpr"):
                    walk(getattr(inner, "jaxpr", inner))

    walk(jaxpr.jaxpr)
    wide = {shape for shape in shapes if shape[-1:] == (61,) and len(shape) == 3}
    assert wide == {(4, ANSWER, 61)}
