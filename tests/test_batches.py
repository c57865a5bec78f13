"""Text to batches: what is tokenised, what is refused or cut, how it is padded, and in which order it comes."""

import dataclasses
import os
import signal
import subprocess
import sys
import time
from itertools import chain, combinations, count, islice

import jax
import numpy as np
import pytest
import train_fixtures
from hypothesis import given, settings
from hypothesis import strategies as st

from comi_jax.config import Compression, Config, Data, Mesh
from comi_jax.data import batches as loader
from comi_jax.data import encode, order
from comi_jax.data.encode import Example, LengthError
from comi_jax.data.records import Record
from comi_jax.devices import sharding
from comi_jax.training.meter import Tally

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
    return Example(*parts, rate=rate)


# --- tokens -----------------------------------------------------------------------------------------------------------


def test_texts_are_tokenised_raw_and_the_first_answer_ends_with_eos():
    assert TOKENIZER("a key")["input_ids"][0] == BOS  # this tokenizer would add one
    (got,), report = encode.encode([RECORD], TOKENIZER, Data())
    assert got.context.tolist() == ids("the red box holds a key . the blue box holds a coin .")
    assert got.query.tolist() == ids("what does the red box hold ?")
    assert got.answer.tolist() == [*ids("a key"), EOS]
    assert not got.truncated and report.context_tokens == 14


def test_without_targets_there_is_no_answer():
    (got,), _ = encode.encode([dataclasses.replace(RECORD, answers=("",))], TOKENIZER, Data(), targets=False)
    assert got.answer.tolist() == []


def test_more_records_than_a_chunk_keep_their_order(monkeypatch):
    monkeypatch.setattr(encode, "CHUNK", 2)
    words = ["key", "coin", "ring", "cup", "pen"]
    got, report = encode.encode([Record((w,), w, (w,)) for w in words], TOKENIZER, Data())
    assert [e.context.tolist() for e in got] == [e.query.tolist() for e in got] == [ids(w) for w in words]
    assert report.examples == 5


LIMITS = {"max_context": 14, "max_query": 7, "max_answer": 3}  # exactly what RECORD needs


@pytest.mark.parametrize("setting", LIMITS)
def test_one_token_too_many_is_refused_with_all_that_is_needed_to_mend_it(setting):
    encode.encode([RECORD], TOKENIZER, Data(**LIMITS))
    tight = LIMITS | {setting: LIMITS[setting] - 1}
    records = [Record(("key",), "key", ("key",)), RECORD]
    with pytest.raises(LengthError) as refused:
        encode.encode(records, TOKENIZER, Data(**tight))
    message = str(refused.value)
    part = {
        "max_context": "14 tokens of context",
        "max_query": "7 tokens of question",
        "max_answer": "2 tokens of answer",
    }
    for word in ("1 of 2 records", "record 2", part[setting], f"data.{setting} ({tight[setting]}", "truncate"):
        assert word in message


@pytest.mark.parametrize("part", ["context", "query", "answer"])
def test_one_token_too_many_is_cut_and_counted(part):
    setting = f"max_{part}"
    whole = encode.encode([RECORD], TOKENIZER, Data(**LIMITS))[0][0]
    data = Data(**(LIMITS | {setting: LIMITS[setting] - 1}), on_long="truncate")
    (got,), report = encode.encode([RECORD], TOKENIZER, data)
    cut = {"context": lambda ids: ids[:-1], "query": lambda ids: ids[1:], "answer": lambda ids: [*ids[:-2], EOS]}
    for name in cut:  # the end of a question asks, and an answer keeps its end-of-sequence token
        expected = getattr(whole, name).tolist()
        assert getattr(got, name).tolist() == (cut[name](expected) if name == part else expected)
    assert got.truncated and got.cut == ("question" if part == "query" else part)
    counts = (report.truncated_contexts, report.truncated_queries, report.truncated_answers)
    assert counts == tuple(int(part == name) for name in ("context", "query", "answer"))
    assert str(report).endswith(f"{counts[0]} contexts, {counts[1]} queries, {counts[2]} answers")


def test_exactly_the_maximum_is_not_called_cut():
    (got,), _ = encode.encode([RECORD], TOKENIZER, Data(**LIMITS, on_long="truncate"))
    assert not got.truncated and got.cut == ""


@pytest.mark.parametrize("part", ["context", "query"])
def test_a_part_of_no_tokens_is_refused(part):
    record = Record(("" if part == "context" else "key",), "" if part == "query" else "key", ("key",))
    with pytest.raises(LengthError, match=f"record 2 has a {part} of no tokens"):
        encode.encode([RECORD, record], TOKENIZER, Data())


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
        ([97, 5], {"segment_size": 40}, (32, 40, 80, 120)),
        ([80], {"segment_size": 40}, (32, 40, 80)),
        ([100], {"buckets": (64, 128, 256)}, (64, 128)),
        ([300], {"buckets": (64, 128)}, (64, 128, 300)),
        ([300], {"buckets": (64, 128), "segment_size": 128}, (64, 128, 256, 384)),
        ([300], {"buckets": (64, 300), "segment_size": 128}, (64, 300)),
        ([300], {"buckets": (64, 144, 400), "segment_size": 128}, (64, 144, 400)),
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
    width = batch.context.shape[1]
    assert width == min(b for b in shapes.buckets if b >= max(lengths))
    assert width <= max(2 * max(lengths), 32) and (width <= segment_size or width % segment_size == 0)
    for row, e in enumerate(examples):
        for name in ("context", "query", "answer"):
            kept = getattr(batch, name)[row, : getattr(batch, f"{name}_length")[row]]
            assert kept.tolist() == getattr(e, name).tolist()
        assert batch.rate[row] == e.rate
    # All ids are positive, so these count what is not padding.
    assert (batch.context > 0).sum() == batch.context_length.sum() == sum(lengths)
    assert (batch.query > 0).sum() == batch.query_length.sum() and (batch.answer > 0).sum() == batch.answer_length.sum()


# --- positions --------------------------------------------------------------------------------------------------------


def check(examples, positions, rate=4, new_tokens=None, segment_size=1024):
    settings = Config(compression=Compression(rates=(4,), segment_size=segment_size))
    backbone = train_fixtures.backbone(max_position_embeddings=positions)
    encode.check_positions(examples, backbone, settings, rate, new_tokens)


def test_rows_of_the_encoder_beyond_the_positions_are_refused():
    fits, long = example(97, query=3), example(98, query=3)
    check([fits], 100)  # though it is padded to 128 + 8
    with pytest.raises(LengthError, match="record 2: .* 98 .* 3 make 101, .*100 positions.*_size to 97"):
        check([fits, long], 100)
    check([long], 100, segment_size=97)


def test_rows_of_the_decoder_beyond_the_positions_are_refused():
    fits = example(40, query=3, answer=7)  # two segments of 20 tokens: 2 x 5 vectors at rate 4, 2 x 7 at rate 3
    check([fits], 23, segment_size=20)
    check([example(20), example(4, query=19, answer=2)], 23)  # neither is long, and they do not add up
    with pytest.raises(LengthError, match="10 memory vectors, a query of 3 and an answer of 11 .* 23 pos"):
        check([fits], 23, segment_size=20, new_tokens=11)
    with pytest.raises(LengthError, match="14 memory vectors.*raise the rate 3"):
        check([fits], 23, segment_size=20, rate=3)


# --- order ------------------------------------------------------------------------------------------------------------

EXAMPLES = [example(i + 1) for i in range(10)]  # the length of its context names an example
RATES = (2, 4)


def batches(seed=0, size=4, rates=RATES):
    return loader.training_batches(plan_of(EXAMPLES, size, seed), rates, seed)


def plan_of(examples, size=4, seed=0, share=1, shapes=None):
    shapes = shapes or loader.Shapes.of(examples, Data(), Compression(rates=RATES))
    return loader.Plan.of(examples, shapes, size, seed, share)


def contents(batch):
    return [pair for rows in batch for pair in zip(rows.context_length.tolist(), rows.rate.tolist(), strict=True)]


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
    assert batch.context_length.tolist() == [5, 5, 6, 5]  # each context once
    assert batch.query[:, 0].tolist() == [1, 2, 3, 3, 4, 4, 5, 5]
    assert batch.answer_length.tolist() == [2, 2, 2, 0, 2, 0, 2, 0]


def test_shared_contexts_come_once_an_epoch_with_a_rate_for_each_question():
    asked = [e for e in EXAMPLES for _ in range(4)]
    drawn = list(islice(loader.training_batches(plan_of(asked, 8, share=4), RATES, seed=0), 10))
    seen = [int(n) for (rows,) in drawn for n in rows.context_length]
    assert sorted(seen[:10]) == sorted(seen[10:]) == list(range(1, 11)) and seen[:10] != seen[10:]
    assert all(rows.query.shape[0] == 8 for (rows,) in drawn)
    assert any(len(set(rows.rate[:4].tolist())) == 2 for (rows,) in drawn)


# --- like lengths together, hosts, devices ----------------------------------------------------------------------------

RNG = np.random.default_rng(7)
MIXED = [
    dataclasses.replace(example(int(n), query=int(q), answer=int(a)), rate=0)
    for n, q, a in zip(
        RNG.lognormal(6.8, 0.5, 600).clip(20, 6000), RNG.integers(5, 30, 600), RNG.choice([2, 5, 90], 600), strict=True
    )
]
FITTED = loader.Shapes.fit(MIXED, Data(), Compression(rates=RATES, segment_size=4096))


def row_lengths(rows):
    share = len(rows.query) // len(rows.context)
    context = np.repeat(rows.context_length, share)
    return list(zip(context.tolist(), rows.query_length.tolist(), rows.answer_length.tolist(), strict=True))


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(0, 700), min_size=1, max_size=12), st.integers(1, 4), st.integers(20, 700))
def test_fitted_buckets_are_the_cheapest_there_are(lengths, most, segment):
    lengths = np.array(lengths)
    fitted = order.fit_lengths(lengths, most, segment)
    assert len(fitted) <= most and fitted == tuple(sorted(set(fitted))) and fitted[-1] >= lengths.max()

    def cost(buckets):
        return sum(min(b for b in buckets if b >= n) for n in lengths)

    steps = sorted({wide(n, segment) for n in map(int, lengths)})
    cheapest = {
        k: min(cost(c) for c in combinations(steps, k) if c[-1] >= lengths.max())
        for k in range(1, min(most, len(steps)) + 1)
    }
    enough = [k for k in cheapest if cheapest[k] <= lengths.sum() / 0.95]
    assert cost(fitted) == cheapest[min([*enough, max(cheapest)])]


def wide(length, segment):
    """The least width for a context: whole segments, and a multiple of 32 behind them unless that makes one more."""
    return next(
        width for width in count(1) if width >= length and (width % segment == 0 or (width % segment) % 32 == 0)
    )


def test_the_given_buckets_are_obeyed_and_narrow_rows_come_where_they_pay():
    settings = Compression(rates=RATES, segment_size=4096)
    given = loader.Shapes.fit(MIXED, Data(buckets=(512, 4096)), settings)
    assert given.buckets == (512, 4096)
    assert FITTED.narrow == (29, 8) and (FITTED.query, FITTED.answer) == (29, 90)
    assert loader.Shapes.fit([example(500), example(400)], Data(), settings).narrow is None
    assert len(loader.Shapes.fit(MIXED, Data(max_buckets=3), settings).buckets) == 3


@pytest.mark.parametrize("share", [1, 4])
def test_like_lengths_share_a_batch_and_every_example_comes_once_an_epoch(share):
    examples = [e for e in MIXED for _ in range(share)]
    plan = loader.Plan.of(examples, FITTED, 8 * share, seed=3, share=share)
    padding, sizes = plan.forecast()
    drawn = [rows for (rows,) in islice(loader.training_batches(plan, RATES, 3), 150)]
    for epoch in (drawn[:75], drawn[75:]):
        seen = sorted(lengths for rows in epoch for lengths in row_lengths(rows))
        assert seen == sorted((len(e.context), len(e.query), len(e.answer)) for e in examples)
    parts = ("context", "query", "answer")
    real = sum(int(getattr(b, f"{name}_length").sum()) for b in drawn[:75] for name in parts)
    total = sum(getattr(b, name).size for b in drawn[:75] for name in parts)
    assert padding == pytest.approx(1 - real / total)
    assert sum(sizes.values()) == 75 and len(sizes) <= 2 * (len(FITTED.buckets) + 1)
    assert {tuple(getattr(b, name).shape[1] for name in parts) for b in drawn[:75]} == set(sizes)
    one, rows = drawn[0], np.array(row_lengths(drawn[0]))
    real, total = rows[::share, 0].sum() + rows[:, 1:].sum(), sum(getattr(one, name).size for name in parts)
    assert Tally.of((one,)).padding == pytest.approx(1 - real / total)
    # Long and short ones come in any order, in each epoch in another; shuffled alone half of it would be padding.
    means = [float(np.mean(b.context_length)) for b in drawn]
    assert means[:75] != sorted(means[:75]) and means[:75] != means[75:]
    shuffled = dataclasses.replace(plan, order=order.Order(np.zeros(len(MIXED)), 8, 3)).forecast()[0]
    assert padding < 0.15 and shuffled > 0.4


@pytest.mark.parametrize("share", [1, 4])
def test_micro_batches_split_a_batch_by_size_and_change_nothing_else(share):
    """The same examples at the same rates, however many the parts; each part in a shape of its own."""
    whole = loader.Plan.of([e for e in MIXED for _ in range(share)], FITTED, 120 * share, seed=3, share=share)
    split = dataclasses.replace(whole, micro_batches=6)
    assert (whole.contexts_at_once, split.contexts_at_once) == (120, 20)
    batches_of = [islice(loader.training_batches(plan, RATES, 3), 10) for plan in (whole, split)]
    for (one,), many in zip(*batches_of, strict=True):
        assert len(many) == 6 and {len(rows.context) for rows in many} == {20}
        assert row_lengths(one) == [lengths for rows in many for lengths in row_lengths(rows)]
        assert one.rate.tolist() == [rate for rows in many for rate in rows.rate.tolist()]
        assert len({rows.context.shape for rows in many}) >= 3
    (padding, _), (less, sizes) = whole.forecast(), split.forecast()
    assert sum(sizes.values()) == 30 and less < padding / 2


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(0, 3), min_size=1, max_size=40), st.integers(1, 9), st.integers(0, 5))
def test_any_number_of_batches_has_every_example_as_often_as_it_should(sizes, batch, seed):
    made = order.Order(np.array(sizes), batch, seed)
    end = made.first(3)
    seen = np.bincount(np.concatenate([made[i] for i in range(end)]), minlength=len(sizes)) if end else np.zeros(1)
    assert seen.sum() == end * batch and seen.max() - seen.min() <= 1 + batch // len(sizes)
    again = order.Order(np.array(sizes), batch, seed)
    for i in reversed(range(end)):  # in any order, whatever was asked before
        assert (again[i] == made[i]).all()
    mixed = sum(len({sizes[j] for j in made[i]}) > 1 for i in range(end))
    assert mixed <= 3 * (len(set(sizes)) - 1)  # of an epoch at most as many batches as there are borders between sizes


@pytest.mark.parametrize("processes", [2, 3])
@pytest.mark.parametrize("share, micro", [(1, 1), (4, 1), (1, 2)])
def test_the_rows_of_all_processes_are_the_batch_of_one(processes, share, micro):
    """Lengths are known to each, tokens to those whose rows they are; of every micro-batch."""
    plan = plan_of([e for e in MIXED[:90] for _ in range(share)], 12 * micro * share, 1, share, FITTED)
    plan = dataclasses.replace(plan, micro_batches=micro)
    whole = loader.training_batches(plan, RATES, 1)
    own = [range(12 * i // processes, 12 * (i + 1) // processes) for i in range(processes)]
    parts = [loader.training_batches(plan, RATES, 1, own=part) for part in own]
    every = (zip(*batch, strict=True) for batch in zip(*(islice(i, 9) for i in (whole, *parts)), strict=True))
    for rows_of_all in chain.from_iterable(every):
        batch, *pieces = map(dataclasses.asdict, rows_of_all)
        for name, array in batch.items():
            if name not in ("context", "query", "answer"):
                assert all(np.array_equal(piece[name], array) for piece in pieces), name
                continue
            rows = len(array) // 12
            for part, piece in zip(own, pieces, strict=True):
                mine = slice(part.start * rows, part.stop * rows)
                assert np.array_equal(piece[name][mine], array[mine]), name
                assert not np.delete(piece[name], np.r_[mine], axis=0).any(), name


@pytest.mark.parametrize(
    "axes, second",  # which of 8 contexts the second half of four devices needs
    [({"data": 2, "fsdp": 2}, range(4, 8)), ({"fsdp": 2, "tensor": 2}, range(4, 8)), ({"context": 4}, range(8))],
)
def test_a_process_reads_the_rows_that_its_devices_need(axes, second, monkeypatch):
    mesh = sharding.make_mesh(Mesh(**{"data": 1, **axes}), jax.devices()[:4])
    assert sharding.own_contexts(mesh, 8) == range(8)  # they are all here
    whole = sharding.rows(mesh).devices_indices_map((8,))
    there = {device: index for device, index in whole.items() if device in jax.devices()[2:4]}
    monkeypatch.setattr(jax.sharding.NamedSharding, "addressable_devices_indices_map", lambda self, shape: there)
    assert sharding.own_contexts(mesh, 8) == second


def test_batches_are_put_on_the_devices_ahead_and_taken_up_again_where_they_were_used():
    placed = []

    def put(batch):
        placed.append(contents(batch))
        return jax.device_put(batch)

    plain = take(batches(), 9)
    iterator = loader.training_batches(plan_of(EXAMPLES), RATES, 0, put=put)
    host, device = next(iterator)
    assert contents(host) == plain[0] and isinstance(device[0].context, jax.Array)
    deadline = time.monotonic() + 5
    while len(placed) < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert placed[:3] == plain[:3]  # two more than were taken
    assert [contents(b) for b, _ in islice(iterator, 3)] == plain[1:4]
    position = iterator.get_state()
    assert [contents(b) for b, _ in islice(iterator, 5)] == plain[4:9]
    iterator.set_state(position)
    assert [contents(b) for b, _ in islice(iterator, 5)] == plain[4:9]
    iterator.close()
    unplaced = batches()
    unplaced.set_state(position)  # one position for both
    assert take(unplaced, 5) == plain[4:9]


@pytest.mark.fault
@pytest.mark.parametrize("where", ["making", "placing"])
def test_a_data_worker_that_dies_is_an_error_at_once_and_loses_no_example(where, monkeypatch):
    """The workers are threads of the training process: they cannot be killed alone, and do not outlive it."""
    plain = take(batches(), 9)
    left = [5]

    def dies(*arguments, **named):
        left[0] -= 1
        if left[0] < 0:
            raise MemoryError("no more")
        return collate(*arguments, **named) if where == "making" else arguments[0]

    collate = loader.collate
    monkeypatch.setattr(loader, "collate", dies if where == "making" else collate)
    put = dies if where == "placing" else lambda batch: batch
    iterator = loader.training_batches(plan_of(EXAMPLES), RATES, 0, put=put)
    done, start = [], time.monotonic()
    with pytest.raises(MemoryError, match="no more"):
        while True:
            done.append(contents(next(iterator)[0]))
    assert time.monotonic() - start < 5 and done == plain[: len(done)] and len(done) >= 3
    left[0] = 1000
    again = loader.training_batches(plan_of(EXAMPLES), RATES, 0, put=put)
    again.set_state({"next_index": len(done)})
    assert [contents(batch) for batch, _ in islice(again, 9 - len(done))] == plain[len(done) :]
    iterator.close()
    again.close()


@pytest.mark.fault
def test_a_killed_process_leaves_no_data_worker_behind():
    code = (
        "import os, signal, sys, numpy as np; from comi_jax.config import Compression, Data; "
        "from comi_jax.data import batches as loader; e = [loader.Example(*[np.arange(1, 9)] * 3)] * 9; "
        "s = loader.Shapes.of(e, Data(), Compression(rates=(2,))); "
        "b = loader.training_batches(loader.Plan.of(e, s, 4, 0), (2,), 0, put=lambda batch: batch); next(b); "
        "print(os.getpid(), flush=True); os.kill(os.getpid(), signal.SIGKILL)"
    )
    start = time.monotonic()
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, start_new_session=True) as killed:
        group = int(killed.stdout.readline())
        assert killed.stdout.read() == b""  # at its end: nothing holds the pipe open
        assert killed.wait(5) == -signal.SIGKILL
    with pytest.raises(ProcessLookupError):
        os.killpg(group, 0)
    assert time.monotonic() - start < 60
