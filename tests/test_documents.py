"""A document is asked as its text would be: in any company and order, after append, after save and load. What cannot be
asked or read is refused in one sentence, with nothing changed."""

import dataclasses
import errno
import logging
import os

import jax
import numpy as np
import pytest
import train_fixtures

from comi_jax.config import Mesh
from comi_jax.data.encode import LengthError, token_ids
from comi_jax.devices import sharding
from comi_jax.errors import ConfigError
from comi_jax.runs.checksums import DamageError
from comi_jax.serving import batching, document_files
from comi_jax.serving.compressor import Comi
from comi_jax.serving.documents import Document
from comi_jax.serving.segments import DocumentError, Stored
from comi_jax.serving.spans import checked_spans, listed_spans

quick_compilation, world = train_fixtures.quick_compilation, train_fixtures.world

FACTS = [f"the {c} box holds a {t} ." for c, t in zip(train_fixtures.COLOURS, train_fixtures.THINGS, strict=False)]
TEXTS = [" ".join(FACTS[:n]) for n in (3, 1, 6, 4)]  # segments of 32 tokens: the third has two, of 32 and 10
QUESTIONS = ["what does the red box hold ?", "what holds a key ?", "what holds a pen ? " * 2, "what ?"]


@pytest.fixture(scope="module")
def model(world):
    return Comi.load(world.run, batch_size=2)


@pytest.fixture(scope="module")
def documents(model):
    return model.encode(TEXTS)


@pytest.fixture(scope="module")
def memories(model, documents):
    """The memory of each document for the question of the same index, asked alone."""
    return [model.compress(d, q).vectors for d, q in zip(documents, QUESTIONS, strict=True)]


# --- the result of the unsplit computation ----------------------------------------------------------------------------


def test_a_document_is_its_text(model, documents, memories):
    together = model.compress(TEXTS, QUESTIONS)
    assert [d.tokens for d in documents] == [m.context_tokens for m in together] == [21, 7, 42, 28]
    assert [[s.tokens for s in d.segments] for d in documents] == [[21], [7], [32, 10], [28]]
    for got, want in zip(memories, together, strict=True):
        np.testing.assert_allclose(got, want.vectors, atol=1e-5)
    answers = model.answer(documents, QUESTIONS)
    assert answers == model.answer(TEXTS, QUESTIONS)
    assert len({a.tokens for a in answers}) > 1


def test_a_question_has_the_same_bits_alone_and_in_any_company(model, documents, memories):
    for order in ([0, 1, 2, 3], [3, 2, 2, 0, 1]):
        asked = [documents[i] for i in order], [QUESTIONS[i] for i in order]
        for i, memory in zip(order, model.compress(*asked), strict=True):
            np.testing.assert_array_equal(memory.vectors, memories[i])
    alone = [model.answer(d, q) for d, q in zip(documents, QUESTIONS, strict=True)]
    assert alone == model.answer(documents, QUESTIONS)
    assert [model.answer(documents[0], q) for q in QUESTIONS] == model.answer(documents[0], QUESTIONS)


def test_a_document_has_the_same_bits_alone_and_in_a_list(model, documents):
    for text, among in zip(TEXTS, documents, strict=True):
        for a, b in zip(leaves(model.encode(text)), leaves(among), strict=True):
            np.testing.assert_array_equal(a, b)


def leaves(document):
    return [x for segment in document.segments for x in jax.tree.leaves(segment.kept)]


def test_appended_text_is_a_new_segment_and_leaves_the_others_alone(model, documents):
    document = model.encode(TEXTS[0])
    before = document.segments[0], model.compress(document, QUESTIONS[0]).vectors
    document.append(TEXTS[2])
    assert [s.tokens for s in document.segments] == [21, 32, 10] and document.segments[0] is before[0]
    assert document.nbytes == sum(d.nbytes for d in (documents[0], documents[2]))
    memory = model.compress(document, QUESTIONS[0])
    later = model.compress(documents[2], QUESTIONS[0]).vectors
    np.testing.assert_array_equal(memory.vectors, np.concatenate([before[1], later]))
    assert memory.context_tokens == 63 and model.answer(document, QUESTIONS[0]).context_tokens == 63
    assert document.segments[2].characters[-1, 1] == document.contents.characters == len(TEXTS[0]) + len(TEXTS[2])


def test_a_document_can_be_appended_to_while_an_answer_about_it_is_read(model, documents):
    document = model.encode(TEXTS[2])
    stream = model.stream(document, QUESTIONS[2], logprobs=True)
    first = next(stream, "")
    document.append(TEXTS[0])
    assert first + "".join(stream) == stream.answer.text
    assert stream.answer == model.answer(documents[2], QUESTIONS[2], logprobs=True)
    assert model.answer(document, QUESTIONS[2]).context_tokens == 63


def test_the_prompt_of_a_document_is_its_memory_and_the_question(model, documents, memories):
    prompt = model.prompt_embeddings(documents[2], QUESTIONS[2])
    assert prompt.memory_vectors == len(memories[2]) and prompt.context_tokens == 42
    np.testing.assert_array_equal(prompt.vectors[: len(memories[2])], memories[2])
    (query,) = token_ids(model.tokenizer, [QUESTIONS[2]])
    np.testing.assert_array_equal(
        prompt.vectors[len(memories[2]) :], np.asarray(model.params["decoder"]["embed"])[query]
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("keep_kv", [True, False])
def test_a_saved_document_is_the_same_document(model, tmp_path, dtype, keep_kv):
    document = model.encode(TEXTS[2], dtype=dtype, keep_kv=keep_kv)
    document.append(TEXTS[1])
    document.save(tmp_path / "a.comi")
    loaded = Document.load(tmp_path / "a.comi", model)
    assert all(isinstance(x, np.memmap) for x in leaves(loaded)) and loaded.nbytes == document.nbytes
    assert os.path.getsize(tmp_path / "a.comi") < document.nbytes + 12 * document.tokens + 4096
    for one in (loaded, Document.load(tmp_path / "a.comi"), loaded.to_device(), loaded.to_host()):
        np.testing.assert_array_equal(
            model.compress(one, QUESTIONS[2]).vectors, model.compress(document, QUESTIONS[2]).vectors
        )
    for one in (loaded, document):
        one.append(TEXTS[1])
    assert [s.tokens for s in loaded.segments] == [32, 10, 7, 7]
    for a, b in zip(leaves(loaded), leaves(document), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_document_in_host_memory_is_the_same(model, documents, memories):
    document = model.encode(TEXTS[2], place="host")
    assert not document.on_device and documents[2].on_device
    np.testing.assert_array_equal(model.compress(document, QUESTIONS[2]).vectors, memories[2])


def test_smaller_dtypes_keep_fewer_bytes_and_nearly_the_memory(model, memories):
    sizes, errors = [], []
    for dtype in ("float32", "bfloat16", "int8"):
        document = model.encode(TEXTS[2], dtype=dtype)
        sizes.append(document.nbytes)
        errors.append(np.abs(model.compress(document, QUESTIONS[2]).vectors - memories[2]).max())
    assert errors[0] == 0 < errors[1] < 0.1 and 0 < errors[2] < 0.1
    assert sizes[0] > sizes[1] > sizes[2]


def test_int8_is_within_half_a_step_of_the_largest_entry():
    x = np.random.default_rng(0).standard_normal((3, 5, 8)).astype(np.float32)
    x[0, 0] = 0
    restored = jax.jit(lambda x: Stored.of(x, "int8").restored("float32"))(x)
    assert (np.abs(restored - x) <= np.abs(x).max(2, keepdims=True) / 127 * 0.501).all() and not restored[0, 0].any()


def test_without_keys_and_values_a_question_is_encoded_alone(model, documents):
    """Its query vector is that of an empty context, and the memory another."""
    states = model.encode(TEXTS[0], keep_kv=False)
    assert states.nbytes < documents[0].nbytes / 1.5
    np.testing.assert_array_equal(states.segments[0].kept.states.values, documents[0].segments[0].kept.states.values)
    memory = model.compress(states, QUESTIONS[0]).vectors
    assert np.abs(memory - model.compress(documents[0], QUESTIONS[0]).vectors).max() > 1e-4


# --- several devices --------------------------------------------------------------------------------------------------


@pytest.fixture(
    scope="module",
    params=[{"fsdp": 2, "tensor": 2}]
    + [pytest.param(axes, marks=pytest.mark.slow) for axes in ({"data": 2, "fsdp": 2}, {"fsdp": 2, "context": 2})],
    ids=str,
)
def split(world, request):
    return Comi.load(world.run, batch_size=2, mesh=sharding.make_mesh(Mesh(**{"data": 1} | request.param)))


def test_a_document_on_several_devices_is_that_of_one(model, split, documents, memories):
    document = split.encode(TEXTS[2])
    assert document.origin == documents[2].origin and document.nbytes == documents[2].nbytes
    for a, b in zip(leaves(document), leaves(documents[2]), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5, rtol=1e-5)
        assert [4 * shard.data.nbytes for shard in a.addressable_shards] == [b.nbytes] * 4  # each has its share
    for amount in ({}, {"rate": 1}, {"keep": [(4, 7)]}):
        want = model.compress(documents[2], QUESTIONS[0], **amount).vectors
        np.testing.assert_allclose(split.compress(document, QUESTIONS[0], **amount).vectors, want, atol=1e-5)
    asked = [QUESTIONS[i] for i in (0, 1, 3)]
    assert split.answer(document, asked) == model.answer(documents[2], asked)
    stream = split.stream(document, asked[1])
    assert "".join(stream) == model.answer(documents[2], asked[1]).text
    memory = split.compress(document, asked)[1].vectors
    np.testing.assert_array_equal(memory, split.compress(document, asked[1]).vectors)
    document.append(TEXTS[1])
    later = split.compress(document, QUESTIONS[1]).vectors[len(memory) :]
    np.testing.assert_allclose(later, memories[1], atol=1e-5)


@pytest.mark.parametrize("dtype", ["float32", pytest.param("int8", marks=pytest.mark.slow)])
def test_a_document_goes_from_one_device_to_several_and_back(model, split, documents, tmp_path, dtype):
    """As a file, through host memory, and as it is; what was never moved has the same bits."""
    ours, theirs = split.encode(TEXTS[0], dtype=dtype), model.encode(TEXTS[0], dtype=dtype)
    want = model.compress(theirs, QUESTIONS[0]).vectors
    for document, reader, name in ((ours, model, "a"), (theirs, split, "b")):
        document.save(tmp_path / name)
        loaded = Document.load(tmp_path / name, reader)
        for one in (document, loaded, Document.load(tmp_path / name), loaded.to_device()):
            np.testing.assert_allclose(reader.compress(one, QUESTIONS[0]).vectors, want, atol=1e-3)
    assert all(len(x.sharding.device_set) == 4 for x in leaves(loaded))
    exact = split.compress(ours, QUESTIONS[0]).vectors
    for one in (split.encode(TEXTS[0], dtype=dtype, place="host"), split.encode(TEXTS[0], dtype=dtype).to_host()):
        assert not one.on_device
        np.testing.assert_array_equal(split.compress(one, QUESTIONS[0]).vectors, exact)
        np.testing.assert_array_equal(split.compress(one.to_device(), QUESTIONS[0]).vectors, exact)


# --- how much ---------------------------------------------------------------------------------------------------------


def test_rate_1_is_what_the_decoder_makes_of_the_text(model, documents):
    table = np.asarray(model.params["decoder"]["embed"])
    for i in (0, 2):
        ids = token_ids(model.tokenizer, [TEXTS[i]])[0]
        for context in (documents[i], TEXTS[i]):
            memory = model.compress(context, QUESTIONS[0], rate=1)
            np.testing.assert_array_equal(memory.vectors, table[ids])
            assert memory.ratio == 1
    answer = model.answer(documents[0], QUESTIONS[0], rate=1)
    assert answer == model.answer(TEXTS[0], QUESTIONS[0], rate=1)
    assert answer.account.ingest_flop < model.answer(documents[0], QUESTIONS[0], rate=2).account.ingest_flop


@pytest.mark.parametrize("slots", [2, 3, 5, 7, 20, 42, 100])
def test_max_slots_is_the_smallest_rate_that_gives_no_more(model, documents, slots):
    asked = model.compress(documents[2], QUESTIONS[2], max_slots=np.int64(slots))
    rate = next(r for r in range(1, 43) if -(-32 // r) + -(-10 // r) <= slots)
    np.testing.assert_array_equal(asked.vectors, model.compress(documents[2], QUESTIONS[2], rate=rate).vectors)
    assert len(asked.vectors) <= slots
    if slots == 7:
        np.testing.assert_array_equal(asked.vectors, model.compress(TEXTS[2], QUESTIONS[2], max_slots=7).vectors)


def test_kept_spans_are_vectors_of_their_own_within_the_same_number(world):
    """Without the LSA, which mixes vectors, the state of each kept token is one of the vectors, in order."""
    model = Comi.load(world.run, batch_size=2)
    compression = dataclasses.replace(model.architecture.compression, lsa=False)
    model.architecture = dataclasses.replace(model.architecture, compression=compression)
    document = model.encode(TEXTS[2])
    for word, rate in (("ring .", 4), ("the red", 4), ("cup", 2), ("lamp .", 4)):
        start = TEXTS[2].index(word)
        span = start, start + len(word)
        states = [
            np.asarray(segment.kept.states.values[: segment.tokens])[
                (segment.characters[:, 0] < span[1]) & (segment.characters[:, 1] > span[0])
            ]
            for segment in document.segments
        ]
        wanted = np.concatenate(states)
        assert len(wanted) == len(word.split())
        memory = model.compress(document, QUESTIONS[2], rate=rate, keep=[span]).vectors
        found = [int(np.flatnonzero((np.abs(memory - state) < 1e-5).all(1))[0]) for state in wanted]
        assert found == sorted(set(found))
        most = sum(-(-segment.tokens // rate) for segment in document.segments)
        assert len(wanted) + 1 <= len(memory) <= most
        by_text = model.compress(TEXTS[2], QUESTIONS[2], rate=rate, keep=[span])
        np.testing.assert_array_equal(by_text.vectors, memory)
    whole = model.compress(document, QUESTIONS[2], rate=4).vectors
    start = TEXTS[2].index("lamp")  # in the second segment: the first one is as it was
    later = model.compress(document, QUESTIONS[2], rate=4, keep=[(start, start + 4)]).vectors
    first = len(model.compress(model.encode(" ".join(TEXTS[2].split()[:32])), QUESTIONS[2], rate=4).vectors)
    np.testing.assert_array_equal(later[:first], whole[:first])


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, message",
    [
        ({"rate": 2, "max_slots": 3}, "^both rate and max_slots are given; give one of them$"),
        ({"max_slots": 0}, "max_slots is 0; it is a whole number"),
        ({"max_slots": True}, "max_slots is True; it is a whole number"),
        ({"max_slots": 1}, "max_slots is 1, but the document has 2 segments"),
        ({"keep": [(0, 5), (4, 9)]}, r"spans \(0, 5\) and \(4, 9\) of keep overlap"),
        ({"keep": [(5, 5)]}, r"span \(5, 5\) of keep is empty or lies outside of the text, which has 167 characters"),
        ({"keep": [(160, 168)]}, r"span \(160, 168\) of keep is empty or lies outside"),
        ({"keep": [(-1, 3)]}, r"span \(-1, 3\) of keep is empty or lies outside"),
        ({"keep": [(3, 4)]}, r"span \(3, 4\) of keep has no token"),
        ({"keep": [(0, 100)]}, "keep needs 26 memory vectors in segment 1 of the document .* has 16 at rate 2"),
    ],
)
def test_options_that_cannot_be_are_refused(model, documents, options, message):
    for method in (model.compress, model.answer):
        with pytest.raises(ConfigError, match=message):
            method(documents[2], QUESTIONS[2], **options)


def test_lists_that_do_not_match_are_refused(model, documents):
    for context in (documents[0], TEXTS[0]):
        for method in (model.compress, model.answer):
            with pytest.raises(ConfigError, match="there is no (decoding )?option slots; there are: "):
                method(context, QUESTIONS[0], slots=3)
    with pytest.raises(ConfigError, match="there are 2 documents and 1 questions"):
        model.answer(documents[:2], QUESTIONS[:1])
    with pytest.raises(ConfigError, match="there are 2 documents and 1 questions"):
        model.answer(documents[:2], QUESTIONS[0])
    with pytest.raises(ConfigError, match="keep holds spans of one document"):
        model.compress(documents[:2], QUESTIONS[:2], keep=[(0, 3)])
    for spans in (3, [3], [(0, 1.5)], [(0, 1, 2)], "ab"):
        with pytest.raises(ConfigError, match="give pairs of whole numbers"):
            checked_spans(documents[0].contents, spans)
    assert model.answer(documents[0], []) == model.compress([], []) == []


def test_empty_and_long_texts_and_questions_are_refused_and_nothing_is_changed(model, world):
    for text in ("", " ", "a " * 65):
        with pytest.raises(LengthError, match="^the text has (no|65) tokens"):
            model.encode(text)
    with pytest.raises(LengthError, match="^text 2 has no tokens"):
        model.encode(["a", ""])
    document = model.encode(TEXTS[2])
    for text in ("", "a " * 23):
        with pytest.raises(LengthError, match="^the appended text has (no tokens|23 tokens behind the 42)"):
            document.append(text)
    assert [s.tokens for s in document.segments] == [32, 10]
    with pytest.raises(LengthError, match="^the question has no tokens"):
        model.answer(document, "")
    short = Comi.load(world.run, batch_size=2, overrides=["data.max_query=4"])
    with pytest.raises(LengthError, match=r"^question 2 has 7 tokens, more than data.max_query \(4\)"):
        short.answer(document, ["what ?", QUESTIONS[0]])


def test_what_is_too_long_is_cut_and_told_where_the_setting_says_so(world, model):
    cut = Comi.load(
        world.run, batch_size=2, overrides=["data.on_long=truncate", "data.max_query=4", "data.max_context=7"]
    )
    document = cut.encode(TEXTS[0])
    asked = cut.compress(document, QUESTIONS[0])
    assert (document.tokens, asked.truncated, asked.cut) == (7, True, "context and question")
    whole = model.compress(model.encode(TEXTS[1]), "red box hold ?")
    np.testing.assert_array_equal(asked.vectors, whole.vectors)
    answer = cut.answer(cut.encode(TEXTS[1]), QUESTIONS[0])
    assert (answer.truncated, answer.cut) == (True, "question")
    with pytest.raises(ConfigError, match=r"span \(40, 45\) of keep has no token: .* the text was cut before it"):
        cut.compress(document, QUESTIONS[0], keep=[(40, 45)])


def test_a_document_that_fits_no_positions_is_refused(world):
    model = Comi.load(world.run, overrides=["data.max_context=400"])
    document = model.encode("a " * 256)
    with pytest.raises(LengthError, match="the question: 128 memory vectors, a question of 2 and an answer of 4"):
        model.answer(document, "what ?")


def test_a_rate_that_was_not_trained_is_told_once(model, documents, caplog):
    batching._tell_untrained.cache_clear()
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            model.compress(documents[0], QUESTIONS[0], rate=np.int64(5))
            model.compress(documents[0], QUESTIONS[0], rate=1)
            model.compress(documents[0], QUESTIONS[0], rate=4)
    assert [record.getMessage() for record in caplog.records] == [
        "the rate 5 is used; the model was trained at 2, 4",
        "rate 1 gives the decoder the text uncompressed; the model was trained at 2, 4",
    ]


@pytest.mark.parametrize(
    "change, message",
    [
        ({"weights": "x"}, "was encoded by the other run, not by .*run at step 30; encode its text again"),
        ({"tokenizer": "x"}, "was encoded with another tokenizer than that of .*run at step 30"),
        ({"dtype": "bfloat16"}, "encoded with model.dtype=bfloat16, but the model was loaded with model.dtype=float32"),
        ({"segment_size": 16}, "encoded with compression.segment_size=16, but .* compression.segment_size=32"),
    ],
)
def test_the_document_of_another_model_is_refused_by_name(model, documents, tmp_path, change, message):
    origin = dataclasses.replace(documents[0].origin, model="the other run", **change)
    other = Document(dataclasses.replace(documents[0].contents, origin=origin))
    other.save(tmp_path / "a.comi")
    for ask in (
        lambda: model.answer(other, QUESTIONS[0]),
        lambda: model.compress([documents[0], other], QUESTIONS[:2]),
        lambda: Document.load(tmp_path / "a.comi", model),
    ):
        with pytest.raises(DocumentError, match=message):
            ask()


def test_the_same_weights_elsewhere_are_the_same_model(world, model, documents):
    again = Comi(model.run, model.params, model.tokenizer, batch_size=2)
    third = Comi(model.run, model.params, model.tokenizer)
    assert again.origin.weights == third.origin.weights
    np.testing.assert_array_equal(
        third.compress(again.encode(TEXTS[0]), QUESTIONS[0]).vectors,
        model.compress(documents[0], QUESTIONS[0]).vectors,
    )
    other = Comi(model.run, jax.tree.map(lambda x: x * 1.5, model.params), model.tokenizer)
    with pytest.raises(DocumentError, match="encoded by the model, not by the model"):
        other.answer(again.encode(TEXTS[0]), QUESTIONS[0])


def test_a_document_that_was_loaded_without_a_model_takes_no_text(model, documents, tmp_path):
    documents[0].save(tmp_path / "a.comi")
    with pytest.raises(DocumentError, match="loaded without a model; load it with Document.load"):
        Document.load(tmp_path / "a.comi").append("a box")


def test_documents_are_for_one_process(split, documents, tmp_path, monkeypatch):
    """Also those that another one has encoded."""
    documents[0].save(tmp_path / "a.comi")
    loaded = Document.load(tmp_path / "a.comi", split)
    monkeypatch.setitem(vars(split.mesh), "is_multi_process", True)  # where JAX keeps what it found
    for refused in (
        lambda: split.encode(TEXTS[0]),
        lambda: loaded.append(TEXTS[1]),
        lambda: split.answer(documents[0], QUESTIONS[0]),
        lambda: split.compress(loaded, QUESTIONS[0]),
        lambda: next(split.stream(loaded, QUESTIONS[0])),
        lambda: split.answer(TEXTS[0], QUESTIONS[0], max_slots=4),
    ):
        with pytest.raises(ConfigError, match=r"by one process, and the model is on devices of several; .*local_dev"):
            refused()


def test_what_is_no_text_no_span_and_no_rate_is_refused(model):
    """Where the types of arguments are not checked, as they are in these tests."""
    document = model.encode(TEXTS[0])
    for given in (None, 3, b"a box"):
        with pytest.raises(ConfigError, match=f"^the text is of the type {type(given).__name__}; give a text"):
            batching.listed("text", given)
    with pytest.raises(ConfigError, match="^text 2 is of the type int; give a text"):
        batching.check_texts("text", ["a", 3])
    with pytest.raises(ConfigError, match="^keep is 3; give pairs"):
        listed_spans(3)
    with pytest.raises(ConfigError, match="^the rate is 10{30}; it is at most 2,147,483,647$"):
        model.answer(document, QUESTIONS[0], rate=10**30)
    spans = [(0, 1), (2, 5)]
    kept = model.answer(document, QUESTIONS[0], rate=2, keep=spans)
    assert model.answer(document, QUESTIONS[0], rate=2, keep=np.array(spans)) == kept
    assert model.answer(document, QUESTIONS[0], rate=2, keep=np.zeros((0, 2), int)).rate == 2


@pytest.mark.parametrize("options", [{"dtype": "float16"}, {"place": "disk"}])
def test_unknown_options_of_encode_are_refused(model, options):
    with pytest.raises(ConfigError, match=f"{next(iter(options))} is .*; it can be"):
        model.encode(TEXTS[0], **options)


# --- files ------------------------------------------------------------------------------------------------------------


def test_every_flipped_bit_and_every_missing_end_is_found(model, tmp_path):
    document = model.encode("a box", dtype="int8", keep_kv=False)
    document.save(tmp_path / "a.comi")
    content = (tmp_path / "a.comi").read_bytes()
    bad = tmp_path / "bad.comi"
    for at in [*range(0, 60), *range(60, len(content), 37), len(content) - 1]:
        flipped = bytearray(content)
        flipped[at] ^= 1 << at % 8
        bad.write_bytes(flipped)
        with pytest.raises(DocumentError if at < len(document_files.MAGIC) else DamageError, match=r"bad\.comi is "):
            Document.load(bad)
    for end in (0, 5, len(document_files.MAGIC), 30, 44, 100, len(content) - 1):
        bad.write_bytes(content[:end])
        with pytest.raises((DocumentError, DamageError), match=r"bad\.comi is "):
            Document.load(bad)
    with pytest.raises(DocumentError, match=r"none\.comi cannot be read: No such file"):
        Document.load(tmp_path / "none.comi")


def test_a_failed_save_leaves_the_file_before_it(model, documents, tmp_path, monkeypatch):
    path = tmp_path / "a.comi"
    documents[0].save(path)
    before = path.read_bytes()

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DocumentError, match=r"cannot be written to .*a\.comi: No space left on device"):
        documents[1].save(path)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]
    with pytest.raises(DocumentError, match="cannot be written to .*: No such file or directory"):
        documents[1].save(tmp_path / "none" / "a.comi")
