"""The model on a batch of mixed lengths, rates and segments: nothing depends on padding or companions."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_models

from comi_jax.errors import ConfigError
from comi_jax.model import architecture, comi, comi_memory, encoder
from comi_jax.model import memory as memory_module
from comi_jax.model.batch import Batch
from comi_jax.model.cache import KVCache
from comi_jax.overrides import load
from comi_jax.params import flatten
from comi_jax.runs.description import Run
from comi_jax.weights import export_models

SEGMENT, REST, QUERY, ANSWER, MIN_RATE = 12, 7, 5, 4, 2
ARCH = tiny_models.architecture("qwen2", lora=2, learn_mig=True, segment_size=SEGMENT)


@pytest.fixture(scope="module")
def params():
    return tiny_models.shaken(architecture.specs(ARCH))


@pytest.fixture(scope="module")
def batch():
    """Contexts of three segments, all full; of two, one short; of a short one alone; of none."""
    rng = np.random.default_rng(0)
    return Batch(
        context=rng.integers(0, 61, (4, 2 * SEGMENT + REST), np.int32),
        context_length=np.array([31, 15, 7, 0], np.int32),
        query=rng.integers(0, 61, (4, QUERY), np.int32),
        query_length=np.array([3, 5, 1, 4], np.int32),
        answer=rng.integers(0, 61, (4, ANSWER), np.int32),
        answer_length=np.array([4, 1, 3, 2], np.int32),
        rate=np.array([2, 4, 3, 2], np.int32),
    )


@jax.jit
def program(params, batch):
    memory = comi.memory_of(params, ARCH, batch, MIN_RATE)
    return memory, comi.answer_logits(params, ARCH, memory, batch)


gradient = jax.jit(jax.grad(lambda params, batch: comi.loss(params, ARCH, batch, MIN_RATE).loss))


def answer(params, batch):
    """Memory and logits as numpy arrays."""
    return jax.tree.map(np.asarray, program(params, batch))


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
    for field, at in (("context", (0, 30)), ("context", (1, 14)), ("query", (1, 4)), ("query", (3, 0))):
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


def alone(batch, row):
    """One row of ``batch``, as often as ``batch`` has rows: nothing else in the batch, and the same program."""
    return jax.tree.map(lambda x: np.repeat(x[row : row + 1], len(x), axis=0), batch)


sum_loss = jax.jit(comi.sum_loss)


def test_the_loss_of_a_batch_is_the_sum_of_its_examples(params, batch):
    _, logits = answer(params, batch)
    whole = sum_loss(logits, batch.answer, batch.answer_length)
    rows = [alone(batch, row) for row in range(4)]
    singles = [sum_loss(answer(params, one)[1], one.answer, one.answer_length) for one in rows]
    for name in ("loss", "correct", "tokens"):
        want = sum(float(getattr(one, name)) for one in singles) / 4
        np.testing.assert_allclose(float(getattr(whole, name)), want, rtol=1e-6)
    assert float(whole.tokens) == batch.answer_length.sum()


def test_an_example_without_any_padding_is_the_same(params, batch):
    memory, logits = answer(params, batch)
    one = jax.tree.map(lambda x: x[2:3], batch)
    one = one.replace(
        context=one.context[:, :7],
        query=one.query[:, :1],
        answer=one.answer[:, :3],
    )
    own_memory, own_logits = answer(params, one)
    assert own_memory.length == memory.length[2] == own_memory.vectors.shape[1] - 1
    np.testing.assert_allclose(own_memory.vectors[0, :3], memory.vectors[2, :3], atol=1e-5)
    np.testing.assert_allclose(own_logits[0], logits[2, :3], atol=1e-4)


def test_loss_is_cross_entropy_over_the_real_answer_tokens():
    rng = np.random.default_rng(1)
    scores, ids = rng.standard_normal((2, 3, 7)).astype(np.float32), np.array([[6, 0, 2], [1, 1, 5]], np.int32)
    scores[1, 0, 1] = 9.0
    out = sum_loss(scores, ids, np.array([3, 1], np.int32))
    rows = [(0, 0), (0, 1), (0, 2), (1, 0)]
    want = sum(np.log(np.exp(scores[r]).sum()) - scores[r][ids[r]] for r in rows)
    np.testing.assert_allclose(out.loss, want, rtol=1e-5)
    assert float(out.tokens) == 4 and float(out.correct) == sum(scores[r].argmax() == ids[r] for r in rows) >= 1


def test_segments_are_what_each_would_be_alone(params, batch):
    """The memory of a context is that of its segments, one after another: appending text changes no earlier vector."""
    memory, _ = answer(params, batch)
    parts = []
    for first in range(0, 2 * SEGMENT + REST, SEGMENT):
        context, length = np.zeros_like(batch.context), np.clip(batch.context_length - first, 0, SEGMENT)
        context[:, :SEGMENT] = np.pad(batch.context, ((0, 0), (0, SEGMENT)))[:, first : first + SEGMENT]
        parts.append(answer(params, batch.replace(context=context, context_length=length))[0])
    for row, tokens in enumerate(batch.context_length):
        want = np.concatenate([part.vectors[row, : part.length[row]] for part in parts])
        assert memory.length[row] == len(want) == sum(int(part.length[row]) for part in parts)
        np.testing.assert_allclose(memory.vectors[row, : len(want)], want, atol=1e-5)
        assert [int(part.length[row]) > 0 for part in parts] == [tokens > 0, tokens > 12, tokens > 24]
    whole, rest = (np.asarray(aux.group_sizes) for aux in memory.aux)
    np.testing.assert_array_equal(whole.sum(1).reshape(4, 2), [[12, 12], [12, 3], [7, 0], [0, 0]])
    np.testing.assert_array_equal(rest.sum(1), [7, 0, 0, 0])
    np.testing.assert_array_equal((whole > 0).sum(1).reshape(4, 2).sum(1) + (rest > 0).sum(1), memory.length)


@pytest.mark.parametrize("width, lengths", [(5, [[5]]), (12, [[12]]), (24, [[12, 12]]), (13, [[12], [1]])])
def test_contexts_are_cut_into_whole_segments_and_the_rest_of_the_width(batch, width, lengths):
    full = batch.replace(context=batch.context[:, :width], context_length=np.full(4, width, np.int32))
    cut = encoder.segments(jnp.asarray(full.context), jnp.asarray(full.context_length), SEGMENT)
    assert [np.asarray(length[0]).tolist() for _, length in cut] == lengths
    np.testing.assert_array_equal(
        np.concatenate([np.reshape(ids, (4, -1)) for ids, _ in cut], axis=1), batch.context[:, :width]
    )


def test_questions_about_one_context_share_its_encoding(params, batch):
    """Two contexts with two questions each are four examples with their contexts written out."""
    shared = batch.replace(context=batch.context[:2], context_length=batch.context_length[:2])
    pairs = np.array([0, 0, 1, 1])
    memory, logits = answer(params, shared)
    want_memory, want = answer(
        params, batch.replace(context=batch.context[pairs], context_length=batch.context_length[pairs])
    )
    np.testing.assert_array_equal(memory.length, want_memory.length)
    real = np.arange(memory.vectors.shape[1]) < memory.length[:, None]
    np.testing.assert_allclose(memory.vectors[real], want_memory.vectors[real], atol=1e-5)
    np.testing.assert_allclose(logits, want, atol=1e-4)


def test_encoding_the_context_once_is_encoding_it_with_the_query(params, batch):
    """Exact, not an approximation: H does not depend on the query, and q̄ from the cache is q̄ from one pass."""

    @jax.jit
    def both(params, context, length, query, query_length):
        (alone,) = encoder.encode(params, ARCH, context, length).segments
        cached = encoder.query_vectors(params, ARCH, alone, query, query_length)
        pairs = context[:, None], length[:, None], query, query_length
        together, vector = encoder.encode_pairs(params, ARCH, *pairs)
        return (together.states, vector), (alone.states, cached)

    length = np.array([12, 9, 7, 0], np.int32)
    inputs = params, batch.context[:, :SEGMENT], length
    (states, vector), (alone, cached) = both(*inputs, batch.query, batch.query_length)
    (again, other), _ = both(*inputs, (batch.query + 5) % 61, batch.query_length)
    real = np.arange(SEGMENT) < length[:, None]
    np.testing.assert_array_equal(states[real], again[real])
    np.testing.assert_allclose(states[real], alone[real], atol=1e-5)
    np.testing.assert_allclose(vector, cached, atol=1e-5)
    assert (np.abs(vector - other).max(1) > 1e-3).all()


def test_what_is_remembered_of_an_encoded_context_is_what_one_pass_gives(params, batch):
    """Contexts of one and of several segments, encoded once and asked: the memory of [context; query] in one pass."""

    @jax.jit
    def in_turn(params, batch):
        encoded = encoder.encode(params, ARCH, batch.context, batch.context_length)
        return comi_memory.remember(params, ARCH, encoded, batch.query, batch.query_length, batch.rate, MIN_RATE)

    once, (whole, _) = in_turn(params, jax.tree.map(jnp.asarray, batch)), answer(params, batch)
    np.testing.assert_array_equal(once.length, whole.length)
    real = np.arange(whole.vectors.shape[1]) < np.asarray(whole.length)[:, None]
    assert real.sum() > 10
    np.testing.assert_allclose(once.vectors[real], whole.vectors[real], atol=1e-5)


def test_questions_of_a_context_attend_to_one_copy_of_its_keys_and_values(params):
    """Sixteen questions about a long context, forward and backward: less memory than two and four copies of its
    keys and values would take."""
    arch = dataclasses.replace(ARCH, runtime=dataclasses.replace(ARCH.runtime, attention="blocked"))
    context, share = 8192, 16

    def program(params, part, query, query_length):
        return jnp.sum(jnp.sin(encoder.query_vectors(params, arch, part, query, query_length)))

    cache = jax.ShapeDtypeStruct((2, 1, context, 2, 8), jnp.float32)
    states = jax.ShapeDtypeStruct((1, context, 32), jnp.float32)
    part = encoder.EncodedSegments(states, jax.ShapeDtypeStruct((1, 1), jnp.int32), KVCache(cache, cache))
    query = jax.ShapeDtypeStruct((share, QUERY), jnp.int32), jax.ShapeDtypeStruct((share,), jnp.int32)
    copy = 2 * cache.size * 4
    for function, most in ((program, 2), (jax.grad(program, argnums=(0, 1), allow_int=True), 4)):
        memory = jax.jit(function).lower(params, part, *query).compile().memory_analysis()
        assert memory.temp_size_in_bytes < most * copy < share * copy


def test_questions_of_a_context_share_its_states_while_they_are_merged(params):
    """Sixteen questions about a long context of two segments, forward and backward: less memory than three and six
    copies of its states."""
    context, share, width = 4096, 16, 256

    def program(params, states, vectors):
        part = encoder.EncodedSegments(states, jnp.full((1, 2), context // 2, jnp.int32), None)
        rate = jnp.full((share,), 64, jnp.int32)
        return jnp.sum(jnp.sin(comi_memory.compress_segments(params, ARCH, part, vectors, rate, context // 128).memory))

    states, vectors = (jax.ShapeDtypeStruct(s, jnp.float32) for s in ((2, context // 2, width), (2 * share, width)))
    for function, most in ((program, 3), (jax.grad(program, argnums=(1, 2)), 6)):
        memory = jax.jit(function).lower(params, states, vectors).compile().memory_analysis()
        assert memory.temp_size_in_bytes < most * 4 * states.size < share * 4 * states.size


def test_gradients_through_shared_keys_and_values_are_those_of_contexts_written_out(params, batch):
    shared = batch.replace(context=batch.context[:2], context_length=batch.context_length[:2])
    pairs = np.array([0, 0, 1, 1])
    apart = batch.replace(context=batch.context[pairs], context_length=batch.context_length[pairs])
    ours, theirs = flatten(gradient(params, shared)), flatten(gradient(params, apart))
    for path, want in theirs.items():
        np.testing.assert_allclose(ours[path], want, atol=1e-4, rtol=1e-4, err_msg=path)
    assert np.abs(theirs["encoder/layers/k"]).max() > 1e-3


def test_query_vector_is_the_mean_of_the_real_query_states():
    states = jnp.asarray(np.random.default_rng(2).standard_normal((3, 6, 4)), jnp.float32)
    states = states.at[:, 5].set(jnp.nan)  # padding
    first, count = jnp.array([0, 2, 4], jnp.int32), jnp.array([5, 3, 0], jnp.int32)
    got = jax.jit(encoder.masked_mean)(states, first, count)
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
    rows, length = jax.jit(encoder.join_rows)(first, lengths[:, 0], second, lengths[:, 1])
    assert rows.shape == (len(lengths), x + y, *width)
    for row, (i, j) in enumerate(lengths):
        assert length[row] == i + j
        np.testing.assert_array_equal(rows[row, : i + j], np.concatenate([first[row, :i], second[row, :j]]))


def test_segments_are_joined_without_a_gap():
    """For every filling of three segments of two slots."""
    count = np.stack(np.meshgrid(*[np.arange(3)] * 3, indexing="ij"), -1).reshape(-1, 3).astype(np.int32)
    memory = np.random.default_rng(3).standard_normal((len(count), 3, 2, 5)).astype(np.float32)
    joined, length = jax.jit(memory_module.join_segments)(memory, count)
    assert joined.shape == (len(count), 6, 5)
    for row, counts in enumerate(count):
        want = np.concatenate([memory[row, g, :n] for g, n in enumerate(counts)])
        assert length[row] == len(want)
        np.testing.assert_array_equal(joined[row, : len(want)], want)


def test_adapters_and_scalars_learn_but_for_the_coarse_ones(params, batch):
    """Group sizes are integers: α and β of the coarse stage get a gradient of exactly zero. (That encoder, LSA and the
    decoder's own weights get theirs is in test_official.py.)"""
    gradients = gradient(params, batch)
    for path, grad in flatten({part: gradients[part] for part in ("lora", "mig")}).items():
        assert np.isfinite(grad).all(), path
        assert (np.abs(grad).max() == 0) == (path in ("mig/alpha_coarse", "mig/beta_coarse")), path


ENCODER_AND_LSA = {p for p in flatten(architecture.specs(ARCH)) if p.split("/")[0] in ("encoder", "lsa")}
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
    assert {path for path in flatten(architecture.specs(arch)) if architecture.is_trained(path, arch)} == want


def test_per_head_norms_and_tied_embeddings_of_the_decoder_stay_frozen():
    arch = tiny_models.architecture("qwen3")
    trained = {
        p for p in flatten(architecture.specs(arch)) if p.startswith("decoder/") and architecture.is_trained(p, arch)
    }
    assert trained == {f"decoder/layers/{name}" for name in "qkvo"}


def test_without_the_lsa_memory_is_what_was_merged(params):
    arch = dataclasses.replace(ARCH, compression=dataclasses.replace(ARCH.compression, lsa=False))
    memory = jnp.asarray(np.random.default_rng(4).standard_normal((1, 3, 32)), jnp.float32)
    np.testing.assert_array_equal(memory_module.align(params, arch, memory), memory)
    assert np.abs(jax.jit(lambda m: memory_module.align(params, ARCH, m))(memory) - memory).max() > 0.1


def test_only_a_key_and_adapters_bring_dropout(params):
    assert comi.adapters(params, ARCH).keys is None
    assert comi.adapters(params, ARCH, jax.random.key(0)).keys is not None
    assert comi.adapters(params, tiny_models.architecture("qwen2"), jax.random.key(0)) is None


def test_a_bfloat16_model_compresses_and_sums_its_loss_in_float32(params, batch):
    arch = dataclasses.replace(ARCH, dtype="bfloat16")
    half = {part: params["mig"] if part == "mig" else jax.tree.map(jnp.bfloat16, tree) for part, tree in params.items()}

    def run(params, batch):
        memory = comi.memory_of(params, arch, batch, MIN_RATE)
        logits = comi.answer_logits(params, arch, memory, batch)
        return memory, comi.sum_loss(logits, batch.answer, batch.answer_length)

    memory, sums = jax.eval_shape(run, half, jax.tree.map(jnp.asarray, batch))
    assert memory.vectors.dtype == jnp.bfloat16 and memory.aux[0].weights.dtype == jnp.float32
    assert {x.dtype for x in jax.tree.leaves(sums)} == {jnp.dtype("float32")}


def test_the_vocabulary_meets_answer_positions_only(params, batch):
    """The program's arrays as wide as the vocabulary are the tables themselves and the scores of the answer."""
    text = program.lower(params, batch).as_text()
    shapes = {tuple(map(int, found.split("x"))) for found in re.findall(r"tensor<((?:\d+x)*61)xf32>", text)}
    assert {shape for shape in shapes if len(shape) > 2} == {(4, ANSWER, 61)}
    assert {shape for shape in shapes if len(shape) == 2} <= {(32, 61)}  # the head


def test_a_query_that_is_encoded_alone(params, batch):
    """In one pass and of encoded contexts alike; it is what a context without its keys and values gives."""
    alone = dataclasses.replace(ARCH, compression=dataclasses.replace(ARCH.compression, query_reads_context=False))
    batch = jax.tree.map(jnp.asarray, batch)
    numbers = (batch.query, batch.query_length, batch.rate, MIN_RATE)

    def of(arch, *, drop=False):
        encoded = encoder.encode(params, arch, batch.context, batch.context_length)
        parts = tuple(part.replace(cache=None) if drop else part for part in encoded.segments)
        return comi_memory.remember(params, arch, encoder.Encoded(parts), *numbers), parts

    memory, parts = jax.jit(lambda: of(alone))()
    assert all(part.cache is None for part in parts)
    once = jax.jit(lambda: comi.memory_of(params, alone, batch, MIN_RATE))()
    dropped, _ = jax.jit(lambda: of(ARCH, drop=True))()
    read, _ = jax.jit(lambda: of(ARCH))()
    for row, length in enumerate(np.asarray(memory.length)):
        for same in (once, dropped):
            assert same.length[row] == length
            np.testing.assert_allclose(same.vectors[row, :length], memory.vectors[row, :length], atol=1e-5)
    assert np.abs(read.vectors[0] - memory.vectors[0]).max() > 1e-3


def test_queries_that_are_encoded_alone_are_not_exported():
    words = ["compression.query_reads_context=false", "compression.encoder_layers=2"]
    run = Run(load("qwen2", words), ARCH.backbone, (2,))
    with pytest.raises(ConfigError, match="query_reads_context=false, and other software encodes the query behind"):
        export_models.check_exportable("run", run)
