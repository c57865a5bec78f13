"""Questions in decode slots: each answer is bit for bit what it is alone, whoever comes and goes beside it."""

import dataclasses
import functools
import logging

import jax
import numpy as np
import pytest
import test_detokenizer
import tiny_models

from comi_jax.config import Generation, Mesh
from comi_jax.data.encode import LengthError
from comi_jax.devices import sharding
from comi_jax.errors import ConfigError
from comi_jax.model import architecture, generate, sampling
from comi_jax.params import unflatten
from comi_jax.planning import hlo
from comi_jax.serving import batching
from comi_jax.serving import slots as serving_slots
from comi_jax.serving.slots import BusyError, SlotDecoder

ARCH = tiny_models.architecture("qwen3", lora=2)
END, LENGTH = 60, 48
TOKENIZER = test_detokenizer.byte_level()
OPTIONS = (  # of four questions
    Generation(max_new_tokens=9),
    Generation(max_new_tokens=5, temperature=1.2, seed=3),
    Generation(max_new_tokens=14, temperature=0.9, top_k=20, top_p=0.9, seed=2**40, repetition_penalty=1.2),
    Generation(max_new_tokens=1),
)


@pytest.fixture(scope="module")
def params():
    specs = architecture.specs(ARCH)
    return tiny_models.shaken({"decoder": specs["decoder"], "lora": specs["lora"]}, seed=2)


@pytest.fixture(scope="module")
def prompts():
    rng = np.random.default_rng(0)
    return [rng.standard_normal((length, 32)).astype(np.float32) for length in (9, 3, 20, 1)]


def decoder(params, slots=3, length=LENGTH, waiting=8, stop=(END,)):
    return SlotDecoder(params, ARCH, stop, TOKENIZER, Generation(), slots=slots, length=length, waiting=waiting)


def finish(loop):
    """All events until nothing is left to do."""
    events = []
    while loop.live or loop.waiting:
        events += loop.step()
    return events


def state_of(handle):
    """What must not depend on the others; the floats to the last bit."""
    return handle.tokens, handle.text, handle.logprobs, handle.finish_reason


@pytest.fixture(scope="module")
def alone(params, prompts):
    """Each of the four questions in slots that hold nothing else."""
    states = []
    for vectors, options in zip(prompts, OPTIONS, strict=True):
        loop = decoder(params)
        handle = loop.submit(vectors, options)
        finish(loop)
        states.append(state_of(handle))
    return states


def test_an_answer_is_the_same_whoever_decodes_beside_it(params, prompts, alone):
    """In other slots, beside other questions, before and behind others in the same slot."""
    for order in ((0, 1, 2, 3), (3, 2, 1, 0), (2, 0, 3, 1)):
        loop, handles = decoder(params), {}
        for i in order:  # the fourth waits for a slot
            handles[i] = loop.submit(prompts[i], OPTIONS[i])
        events = finish(loop)
        assert [state_of(handles[i]) for i in range(4)] == alone
        for handle in handles.values():
            mine = [event for event in events if event.handle is handle]
            assert tuple(event.token for event in mine) == handle.tokens
            assert [event.logprob for event in mine] == handle.logprobs
            assert "".join(event.text for event in mine) == handle.text
            assert [event.finish_reason for event in mine] == [None] * (len(mine) - 1) + [handle.finish_reason]


def test_a_question_comes_while_others_decode_and_takes_the_slot_that_one_left(params, prompts, alone):
    loop = decoder(params, slots=2)
    first = loop.submit(prompts[0], OPTIONS[0])
    loop.step()
    second = loop.submit(prompts[1], OPTIONS[1])  # ends before the first
    loop.step()
    assert (first.slot, second.slot) == (0, 1) and len(first.tokens) == 2 and len(second.tokens) == 1
    third = loop.submit(prompts[2], OPTIONS[2])
    while second.finish_reason is None:
        assert third.slot is None and loop.waiting == 1
        loop.step()
    assert third.slot == 1 and loop.live == 2  # in the very step that freed it
    finish(loop)
    assert [state_of(handle)[0] for handle in (first, second, third)] == [state[0] for state in alone[:3]]


def test_slots_are_filled_before_half_of_them_decode(params, prompts):
    """A step costs the same however many slots are live."""
    loop = decoder(params)
    handles = [loop.submit(prompts[0], OPTIONS[2]) for _ in range(5)]
    counts = []
    for _ in range(4):
        loop.step()
        counts.append([len(handle.tokens) for handle in handles])
    assert counts == [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [2, 2, 1, 0, 0], [3, 3, 2, 0, 0]]


def test_tokens_are_those_of_a_batch(params, prompts):
    """Greedy and drawn ones, from prompts that are padded to other widths there."""
    loop, rows = decoder(params), np.zeros((3, 20, 32), np.float32)
    greedy = [Generation(max_new_tokens=12, repetition_penalty=1.3)] * 3
    handles = [loop.submit(vectors, options) for vectors, options in zip(prompts[:3], greedy, strict=True)]
    finish(loop)
    for row, vectors in zip(rows, prompts, strict=False):
        row[: len(vectors)] = vectors
    run = jax.jit(generate.greedy, static_argnums=(1, 4, 5))
    out = run(params, ARCH, rows, np.array([9, 3, 20], np.int32), greedy[0], (END,))
    for handle, ids, length in zip(handles, np.asarray(out.ids), np.asarray(out.length), strict=True):
        assert list(handle.tokens) == ids[:length].tolist()


def test_stop_tokens_and_stop_strings_end_an_answer(params, prompts, alone):
    tokens = alone[0][0]
    assert alone[0][3] == "length" and alone[3][3] == "length"
    loop = decoder(params, stop=(tokens[4],))
    handle = loop.submit(prompts[0], OPTIONS[0])
    finish(loop)
    at = tokens.index(tokens[4])
    assert handle.tokens == tokens[: at + 1] and handle.finish_reason == "stop"
    text = alone[2][1]
    stop = text[3:5]  # two tokens
    loop = decoder(params)
    handle = loop.submit(prompts[2], dataclasses.replace(OPTIONS[2], stop_strings=(stop,)))
    finish(loop)
    assert handle.text == text[: text.index(stop)].strip() and handle.finish_reason == "stop"
    assert handle.tokens == alone[2][0][: len(handle.tokens)] and len(handle.tokens) < len(alone[2][0])


def test_cancelling_frees_the_slot_before_the_next_step(params, prompts, alone):
    loop = decoder(params, slots=1)
    first, second = (loop.submit(prompts[i], OPTIONS[i]) for i in (2, 0))
    third = loop.submit(prompts[1], OPTIONS[1])
    loop.step()
    loop.step()
    loop.cancel(first)
    loop.cancel(third)  # while it waits
    assert (loop.live, loop.waiting) == (0, 1) and first.finish_reason == third.finish_reason == "cancelled"
    (event,) = loop.step()
    assert event.handle is second and second.slot == 0
    finish(loop)
    assert second.tokens == alone[0][0] and len(first.tokens) == 2 and third.tokens == ()
    loop.cancel(second)  # too late
    assert second.finish_reason == "length"


def test_nothing_is_left_of_an_answer_that_was_no_number(params, prompts, alone):
    """A prompt of NaN leaves NaN in its slot and in no other, and the next question there is none the worse."""
    loop = decoder(params, slots=2)
    broken, beside = loop.submit(np.full((30, 32), np.nan, np.float32), OPTIONS[0]), loop.submit(prompts[0], OPTIONS[0])
    finish(loop)
    assert not np.isfinite(broken.logprobs).any() and beside.tokens == alone[0][0]
    after = [loop.submit(prompts[i], OPTIONS[i]) for i in (1, 2)]
    finish(loop)
    assert [handle.tokens for handle in after] == [state[0] for state in alone[1:3]]


def test_programs_are_few_and_compiled_beforehand(params):
    """One for each power of two of prompts, and one for a token, whatever the options."""
    compiled = []

    class Count(logging.Handler):
        def emit(self, record):
            compiled.extend(name for name in ("_prefill", "_step") if f"Compiling jit({name})" in record.getMessage())

    handler, logger = Count(), logging.getLogger("jax")
    logger.addHandler(handler)
    try:
        with jax.log_compiles():
            loop = decoder(params, slots=2, length=40, waiting=40)
            loop.compile()
            assert sorted(compiled) == ["_prefill"] * 3 + ["_step"]  # 16, 32 and 40
            for length in range(1, 38):
                loop.submit(
                    np.ones((length, 32), np.float32),
                    Generation(
                        max_new_tokens=1 + length % 3, temperature=length % 2 / 2, top_k=length % 5, seed=length
                    ),
                )
            finish(loop)
    finally:
        logger.removeHandler(handler)
    assert len(compiled) == 4


def test_a_cache_is_never_there_twice(params, prompts):
    """Each token is written into the cache of the one before: it is donated, in slots and in batches."""
    loop = decoder(params)
    loop.submit(prompts[0], OPTIONS[0])
    for _ in range(2):  # prefill, then a token
        before = loop._state.cache.k
        loop.step()
        assert before.is_deleted()
    rules, length = sampling.rules(OPTIONS[0], 1), np.array([9], np.int32)
    begin = jax.jit(functools.partial(generate.begin, sampled=False), static_argnums=(1, 5, 6))
    begun = begin(params, ARCH, prompts[0][None], length, rules, (END,), 9)
    batching.proceed(params, begun, rules, np.zeros(1, bool), np.int32(9), ARCH, (END,), False)
    assert begun.cache.k.is_deleted() and begun.cache.v.is_deleted()


@pytest.mark.parametrize(
    "axes",
    [{"fsdp": 4}, *(pytest.param({name: 2, "fsdp": 2}, marks=pytest.mark.slow) for name in ("tensor", "data"))],
    ids=str,
)
def test_slots_on_several_devices_answer_as_on_one(params, prompts, alone, axes):
    """Each program is compiled once, the cache is split, and no device gathers the weights for a token."""
    mesh = sharding.make_mesh(Mesh(**{"data": 1} | axes))
    arch, specs = ARCH.on(mesh), architecture.specs(ARCH)
    places = unflatten(sharding.parameters({name: specs[name] for name in params}, mesh))
    split = jax.device_put(params, places)
    loop = SlotDecoder(split, arch, (END,), TOKENIZER, Generation(), slots=4, length=24)
    loop.compile()
    programs = [serving_slots._prefill._cache_size(), serving_slots._step._cache_size()]
    asked = (0, 1, 3)
    handles = [loop.submit(prompts[i], OPTIONS[i]) for i in asked]
    finish(loop)
    for handle, (tokens, text, logprobs, reason) in zip(handles, (alone[i] for i in asked), strict=True):
        assert (handle.tokens, handle.text, handle.finish_reason) == (tokens, text, reason)
        np.testing.assert_allclose(handle.logprobs, logprobs, atol=1e-4)
    assert [serving_slots._prefill._cache_size(), serving_slots._step._cache_size()] == programs
    cache = loop._state.cache.k
    assert 4 * cache.addressable_shards[0].data.nbytes == cache.nbytes
    step = serving_slots._step.lower(split, loop._state, np.zeros(4, bool), arch).compile()
    weights = sum(x.nbytes for x in jax.tree.leaves(params))
    assert sum(hlo.count(step.as_text()).sent.values()) < weights / 4


@pytest.mark.parametrize(
    "vectors, new, error, message",
    [
        (
            np.ones((40, 32), np.float32),
            9,
            LengthError,
            "a prompt of 40 vectors and an answer of up to 9 tokens do not",
        ),
        (np.ones((4, 31), np.float32), 9, ConfigError, r"the prompt has shape \(4, 31\)"),
        (np.ones((0, 32), np.float32), 9, ConfigError, r"the prompt has shape \(0, 32\)"),
        (np.ones((32,), np.float32), 9, ConfigError, r"the prompt has shape \(32,\)"),
    ],
)
def test_a_prompt_that_does_not_fit_is_refused(params, vectors, new, error, message):
    with pytest.raises(error, match=message):
        decoder(params).submit(vectors, Generation(max_new_tokens=new))


@pytest.mark.parametrize(
    "values, message",
    [
        ({"slots": 0}, "slots is 0; give a whole number of at least 1"),
        ({"length": 1}, "length is 1"),
        ({"waiting": -1}, "waiting is -1"),
        ({"length": 513}, "length is 513, but the model has 512 positions"),
    ],
)
def test_slots_that_cannot_be_are_refused(params, values, message):
    with pytest.raises(ConfigError, match=message):
        decoder(params, **values)


def test_more_questions_than_may_wait_are_refused(params, prompts):
    loop = decoder(params, slots=1, waiting=1)
    for _ in range(2):
        loop.submit(prompts[0], OPTIONS[0])
    with pytest.raises(
        BusyError, match="all 1 slots are taken and 1 more questions wait, as many as may; ask again later"
    ):
        loop.submit(prompts[0], OPTIONS[0])
    loop.step()
    assert (loop.live, loop.waiting) == (1, 1)
    with pytest.raises(BusyError):
        loop.submit(prompts[0], OPTIONS[0])
    with pytest.raises(ConfigError, match="compile them before"):
        loop.compile()
