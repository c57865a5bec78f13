"""Text to batches: what is tokenised, what is refused or cut, how it is padded, and in which order it comes."""

import dataclasses
from itertools import islice

import numpy as np
import pytest
import train_fixtures
from hypothesis import given, settings
from hypothesis import strategies as st

from comi_jax.config import Compression, Data
from comi_jax.data import loader
from comi_jax.data.records import Record

TOKENIZER = train_fixtures.tokenizer()
BOS, EOS = TOKENIZER.bos_token_id, TOKENIZER.eos_token_id
RECORD = Record(
    context=("the red box holds a key .", "the blue box holds a coin ."),
    prompt="what does the red box hold ?",
    answers=("a key", "a coin"),
)


def ids(text):
    return [TOKENIZER.get_vocab()[word] for word in text.split()]


def example(context, query=3, answer=2, rate=2):
    """Token ids that tell where they belong."""
    parts = (np.arange(start, start + n, dtype=np.int32) for start, n in ((1, context), (1001, query), (2001, answer)))
    return loader.Example(*parts, rate=rate)


# --- tokens -----------------------------------------------------------------------------------------------------------


def test_texts_are_tokenised_raw_and_the_first_answer_ends_with_eos():
    assert TOKENIZER("a key")["input_ids"][0] == BOS  # this tokenizer would add one
    (got,), report = loader.encode([RECORD], TOKENIZER, Data())
    assert got.context.tolist() == ids("the red box holds a key . the blue box holds a coin .")
    assert got.query.tolist() == ids("what does the red box hold ?")
    assert got.answer.tolist() == [*ids("a key"), EOS]
    assert not got.truncated and report.context_tokens == 14


def test_without_targets_there_is_no_answer():
    (got,), _ = loader.encode([dataclasses.replace(RECORD, answers=("",))], TOKENIZER, Data(), targets=False)
    assert got.answer.tolist() == []


def test_more_records_than_a_chunk_keep_their_order(monkeypatch):
    monkeypatch.setattr(loader, "CHUNK", 2)
    words = ["key", "coin", "ring", "cup", "pen"]
    got, report = loader.encode([Record((w,), w, (w,)) for w in words], TOKENIZER, Data())
    assert [e.context.tolist() for e in got] == [e.query.tolist() for e in got] == [ids(w) for w in words]
    assert report.examples == 5


LIMITS = {"max_context": 14, "max_query": 7, "max_answer": 3}  # exactly what RECORD needs


@pytest.mark.parametrize("setting", LIMITS)
def test_one_token_too_many_is_refused_with_all_that_is_needed_to_mend_it(setting):
    loader.encode([RECORD], TOKENIZER, Data(**LIMITS))
    tight = LIMITS | {setting: LIMITS[setting] - 1}
    records = [Record(("key",), "key", ("key",)), RECORD]
    with pytest.raises(loader.LengthError) as refused:
        loader.encode(records, TOKENIZER, Data(**tight))
    message = str(refused.value)
    for word in ("1 of 2 records", "record 2", "14, 7 and 2 tokens", f"data.{setting} ({tight[setting]}", "truncate"):
        assert word in message


@pytest.mark.parametrize("part", ["context", "query", "answer"])
def test_one_token_too_many_is_cut_and_counted(part):
    setting = f"max_{part}"
    whole = loader.encode([RECORD], TOKENIZER, Data(**LIMITS))[0][0]
    data = Data(**(LIMITS | {setting: LIMITS[setting] - 1}), on_long="truncate")
    (got,), report = loader.encode([RECORD], TOKENIZER, data)
    for name in ("context", "query", "answer"):
        expected = getattr(whole, name).tolist()
        if name == part:  # the end goes, but not the end-of-sequence token
            expected = [*expected[:-2], EOS] if name == "answer" else expected[:-1]
        assert getattr(got, name).tolist() == expected
    assert got.truncated
    counts = (report.truncated_contexts, report.truncated_queries, report.truncated_answers)
    assert counts == tuple(int(part == name) for name in ("context", "query", "answer"))
    assert str(report).endswith(f"{counts[0]} contexts, {counts[1]} queries, {counts[2]} answers")


def test_exactly_the_maximum_is_not_called_cut():
    (got,), _ = loader.encode([RECORD], TOKENIZER, Data(**LIMITS, on_long="truncate"))
    assert not got.truncated


@pytest.mark.parametrize("part", ["context", "query"])
def test_a_part_of_no_tokens_is_refused(part):
    record = Record(("" if part == "context" else "key",), "" if part == "query" else "key", ("key",))
    with pytest.raises(loader.LengthError, match=f"record 2 has a {part} of no tokens"):
        loader.encode([RECORD, record], TOKENIZER, Data())


# --- shapes -----------------------------------------------------------------------------------------------------------


def shapes_of(lengths, segment_size=1024, buckets=(), query=3, answer=2):
    examples = [example(n, query, answer) for n in lengths]
    return loader.Shapes.of(examples, Data(buckets=buckets), Compression(rates=(2,), segment_size=segment_size))


@pytest.mark.parametrize(
    "lengths, settings, buckets",
    [
        ([10], {}, (32,)),
        ([100], {}, (32, 48, 64, 96, 128)),
        ([96], {}, (32, 48, 64, 96)),
        ([97, 5], {"segment_size": 40}, (32, 40)),
        ([80], {"segment_size": 40}, (32, 40)),
        ([100], {"buckets": (64, 128, 256)}, (64, 128)),
        ([300], {"buckets": (64, 128)}, (64, 128, 300)),
        ([0], {}, (32,)),  # closed book
    ],
)
def test_buckets(lengths, settings, buckets):
    assert shapes_of(lengths, **settings).buckets == buckets


def test_queries_and_answers_are_padded_to_the_longest():
    shapes = shapes_of([10], query=9, answer=0)
    assert (shapes.query, shapes.answer) == (9, 1)  # an answer axis of nothing would have no place to predict


# --- batches ----------------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 130), min_size=1, max_size=5), st.integers(8, 70), st.randoms(use_true_random=False))
def test_a_batch_holds_every_token_in_its_place_and_zeros(lengths, segment_size, random):
    examples = [example(n, random.randint(1, 12), random.randint(1, 12), random.choice((2, 4))) for n in lengths]
    shapes = loader.Shapes.of(examples, Data(), Compression(rates=(2, 4), segment_size=segment_size))
    batch = loader.collate(examples, shapes)
    assert batch.context.shape[2] in shapes.buckets
    for row, e in enumerate(examples):
        segments = [s[:n] for s, n in zip(batch.context[row], batch.context_length[row], strict=True)]
        assert np.concatenate(segments).tolist() == e.context.tolist()
        assert all(len(s) == segment_size for s in segments[: len(e.context) // segment_size])
        for name in ("query", "answer"):
            kept = getattr(batch, name)[row, : getattr(batch, f"{name}_length")[row]]
            assert kept.tolist() == getattr(e, name).tolist()
        assert batch.rate[row] == e.rate
    # All ids are positive, so these count what is not padding.
    assert (batch.context > 0).sum() == batch.context_length.sum() == sum(lengths)
    assert (batch.query > 0).sum() == batch.query_length.sum() and (batch.answer > 0).sum() == batch.answer_length.sum()
    longest = max(min(n, segment_size) for n in lengths)
    assert all(b < longest for b in shapes.buckets if b < batch.context.shape[2])  # the smallest bucket that holds it


# --- positions --------------------------------------------------------------------------------------------------------


def check(examples, positions, rate=4, new_tokens=None, segment_size=1024):
    settings = Compression(rates=(4,), segment_size=segment_size)
    backbone = train_fixtures.backbone(max_position_embeddings=positions)
    loader.check_positions(examples, backbone, settings, rate, new_tokens)


def test_rows_of_the_encoder_beyond_the_positions_are_refused():
    fits, long = example(97, query=3), example(98, query=3)
    check([fits], 100)  # though it is padded to 128 + 8
    with pytest.raises(loader.LengthError, match="record 2: .* 98 .* 3 make 101, .*100 positions.*_size to 97"):
        check([fits, long], 100)
    check([long], 100, segment_size=97)


def test_rows_of_the_decoder_beyond_the_positions_are_refused():
    fits = example(40, query=3, answer=7)  # two segments of 20 tokens: 2 x 5 vectors at rate 4, 2 x 7 at rate 3
    check([fits], 23, segment_size=20)
    check([example(20), example(4, query=19, answer=2)], 23)  # neither is long, and they do not add up
    with pytest.raises(loader.LengthError, match="10 memory vectors, a query of 3 and an answer of 11 .* 23 pos"):
        check([fits], 23, segment_size=20, new_tokens=11)
    with pytest.raises(loader.LengthError, match="14 memory vectors.*raise the rate 3"):
        check([fits], 23, segment_size=20, rate=3)


# --- order ------------------------------------------------------------------------------------------------------------

EXAMPLES = [example(i + 1) for i in range(10)]  # the length of its context names an example
RATES = (2, 4)


def batches(seed=0, size=4, rates=RATES):
    shapes = loader.Shapes.of(EXAMPLES, Data(), Compression(rates=rates))
    return loader.training_batches(EXAMPLES, shapes, rates, size, seed)


def contents(batch):
    return list(zip(batch.context_length.sum(axis=1).tolist(), batch.rate.tolist(), strict=True))


def take(iterator, count):
    return [contents(batch) for batch in islice(iterator, count)]


def test_batches_are_a_function_of_seed_and_step():
    assert take(batches(0), 12) == take(batches(0), 12)
    assert take(batches(0), 12) != take(batches(1), 12)


@pytest.mark.parametrize("step", [0, 1, 3, 7])  # within an epoch, at its end, in a later one
def test_the_position_can_be_taken_up_again(step):
    going = batches()
    take(going, step)
    position = going.get_state()
    rest = take(going, 5)
    again = batches()
    take(again, 2)  # wherever it stood
    again.set_state(position)
    assert take(again, 5) == rest


def test_every_example_comes_once_an_epoch_each_time_in_another_order():
    seen = [length for batch in take(batches(), 10) for length, _ in batch]
    epochs = [seen[i : i + 10] for i in range(0, 40, 10)]
    assert all(sorted(epoch) == list(range(1, 11)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4


def test_a_rate_is_drawn_for_every_example_anew():
    drawn = [pair for batch in take(batches(), 50) for pair in batch]
    share = np.mean([rate == 2 for _, rate in drawn])
    assert {rate for _, rate in drawn} == set(RATES) and 0.4 < share < 0.6
    assert all({rate for length, rate in drawn if length == n} == set(RATES) for n in range(1, 11))
    assert any(len({rate for _, rate in batch}) == 2 for batch in take(batches(), 3))  # one batch mixes them


# --- questions about one context --------------------------------------------------------------------------------------


def test_neighbours_about_one_context_are_grouped_and_groups_filled_up_without_answers():
    def ask(context, query):
        return dataclasses.replace(example(context), query=np.full(2, query, np.int32))

    asked = [ask(5, 1), ask(5, 2), ask(5, 3), ask(6, 4), ask(5, 5)]
    groups = loader.share_contexts(asked, 2)
    assert [[(len(e.context), int(e.query[0]), len(e.answer)) for e in group] for group in groups] == [
        [(5, 1, 2), (5, 2, 2)],
        [(5, 3, 2), (5, 3, 0)],
        [(6, 4, 2), (6, 4, 0)],
        [(5, 5, 2), (5, 5, 0)],  # not a neighbour of the first three
    ]
    shapes = loader.Shapes.of(asked, Data(), Compression(rates=RATES))
    batch = loader.collate([e for group in groups for e in group], shapes, share=2)
    assert batch.context_length[:, 0].tolist() == [5, 5, 6, 5]  # each context once
    assert batch.query[:, 0].tolist() == [1, 2, 3, 3, 4, 4, 5, 5]
    assert batch.answer_length.tolist() == [2, 2, 2, 0, 2, 0, 2, 0]


def test_shared_contexts_come_once_an_epoch_with_a_rate_for_each_question():
    asked = [e for e in EXAMPLES for _ in range(4)]
    shapes = loader.Shapes.of(asked, Data(), Compression(rates=RATES))
    drawn = list(islice(loader.training_batches(asked, shapes, RATES, 8, seed=0, share=4), 10))
    seen = [int(n) for batch in drawn for n in batch.context_length.sum(axis=1)]
    assert sorted(seen[:10]) == sorted(seen[10:]) == list(range(1, 11)) and seen[:10] != seen[10:]
    assert all(batch.query.shape[0] == 8 for batch in drawn)
    assert any(len(set(batch.rate[:4].tolist())) == 2 for batch in drawn)
