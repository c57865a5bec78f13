"""Answers with options, through ``Comi``: streams, seeds, stop strings, log-probabilities; its prompts elsewhere."""

import base64
import dataclasses
import io
import logging

import jax
import numpy as np
import pytest
import torch
import train_fixtures
from transformers import AutoModelForCausalLM

from comi_jax import convert
from comi_jax.errors import ConfigError
from comi_jax.serving import generation
from comi_jax.serving.compressor import Comi

quick_compilation, world = train_fixtures.quick_compilation, train_fixtures.world

PAIRS = zip(train_fixtures.COLOURS[:6], train_fixtures.THINGS[:6], strict=True)
FACTS = [f"the {colour} box holds a {thing} ." for colour, thing in PAIRS]
CONTEXTS = [" ".join(FACTS[:n]) for n in (3, 1, 6, 4)]
QUESTIONS = ["what does the red box hold ?", "what holds a key ?", "what does the blue box hold ?", "what ?"]
DRAWN = {"max_new_tokens": 12, "temperature": 2.0, "top_k": 20, "seed": 1}


@pytest.fixture(scope="module")
def model(world):
    return Comi.load(world.run, batch_size=4)


@pytest.fixture(scope="module")
def drawn(model):
    return model.answer(CONTEXTS, QUESTIONS, logprobs=True, **DRAWN)


@pytest.fixture(scope="module")
def longest(drawn):
    """The question with the answer of most words."""
    row = max(range(4), key=lambda i: len(drawn[i].text.split()))
    assert len(drawn[row].text.split()) > 2
    return row


def test_the_same_seed_gives_the_same_answer_in_any_batch(model, drawn):
    assert len({answer.tokens for answer in drawn}) > 1
    assert model.answer(CONTEXTS[1:][::-1], QUESTIONS[1:][::-1], logprobs=False, **DRAWN) == [
        dataclasses.replace(answer, logprobs=None) for answer in drawn[1:][::-1]
    ]
    others = [model.answer(CONTEXTS[0], QUESTIONS[0], **(DRAWN | {"seed": seed})).tokens for seed in (2, 3, 4)]
    assert len({drawn[0].tokens, *others}) > 2
    for answer in drawn:
        assert len(answer.logprobs) == len(answer.tokens) and max(answer.logprobs) < 0


@pytest.mark.parametrize(
    "options", [{"max_new_tokens": 12}, DRAWN, DRAWN | {"top_k": 30, "top_p": 0.95, "stop_strings": ["ld c", "?"]}]
)
def test_a_stream_joined_is_the_answer(model, options):
    for context, question in zip(CONTEXTS, QUESTIONS, strict=True):
        stream = model.stream(context, question, logprobs=True, **options)
        assert stream.answer is None
        pieces = list(stream)
        assert all(pieces) and list(stream.timings) == ["compressed", "first token", "end"]
        assert sorted(stream.timings.values()) == list(stream.timings.values())
        assert stream.answer == model.answer(context, question, logprobs=True, **options)
        assert "".join(pieces) == stream.answer.text
        with pytest.raises(StopIteration):
            next(stream)


def test_a_stream_comes_piece_by_piece_and_can_be_left(model, drawn, longest):
    stream = model.stream(CONTEXTS[longest], QUESTIONS[longest], **DRAWN)
    first = next(stream)
    assert drawn[longest].text.startswith(first) and first != drawn[longest].text
    stream.close()
    assert list(stream) == [] and stream.answer is None


def test_an_answer_says_why_it_ended(model, drawn):
    stop = model.run.stop
    for answer in drawn:
        assert answer.finish_reason == ("stop" if answer.tokens[-1] in stop else "length")
    assert model.answer(CONTEXTS[0], QUESTIONS[0], max_new_tokens=1).finish_reason == "length"


def test_stop_strings_end_the_answers_of_a_batch_one_by_one(model, drawn, longest):
    words = drawn[longest].text.split()
    stop = f"{words[1][-1]} {words[2][:1]}"  # from one token into the next
    cut = model.answer(CONTEXTS, QUESTIONS, logprobs=True, **DRAWN, stop_strings=stop)
    for answer, whole in zip(cut, drawn, strict=True):
        ends = stop in whole.text
        assert answer.text == (whole.text[: whole.text.index(stop)].strip() if ends else whole.text)
        assert answer.tokens == whole.tokens[: len(answer.tokens)]
        assert answer.logprobs == pytest.approx(whole.logprobs[: len(answer.tokens)], abs=1e-5)
        assert answer.finish_reason == ("stop" if ends else whole.finish_reason)
    assert len(cut[longest].tokens) < len(drawn[longest].tokens)


def test_a_batch_that_shrinks_while_it_is_decoded_gives_the_same_answers(model, drawn, longest, monkeypatch):
    """Rows that are done leave it; the others do not notice."""
    sizes = []
    take = generation.batching.take_rows

    def taking(decoding, rules, rows):
        sizes.append(len(rows))
        return take(decoding, rules, rows)

    monkeypatch.setattr(generation.batching, "take_rows", taking)
    monkeypatch.setattr(generation, "CHUNK", 1)
    assert model.answer(CONTEXTS, QUESTIONS, logprobs=False, **DRAWN) == [
        dataclasses.replace(answer, logprobs=None) for answer in drawn
    ]
    stop = drawn[longest].text.split()[2]
    few = model.answer(CONTEXTS, QUESTIONS, **DRAWN, stop_strings=stop)
    monkeypatch.setattr(generation, "CHUNK", 100)
    assert few == model.answer(CONTEXTS, QUESTIONS, **DRAWN, stop_strings=stop)
    assert sizes and set(sizes) <= {1, 2}


@pytest.mark.parametrize(
    "options, message",
    [
        ({"temperature": -1}, "generation.temperature is -1.0"),
        ({"temperature": "hot"}, "temperature is 'hot'; give a number"),
        ({"top_p": 0}, "generation.top_p is 0.0"),
        ({"top_k": 2.5}, "top_k is 2.5; give a whole number"),
        ({"seed": True}, "seed is True; give a whole number"),
        ({"stop_strings": 7}, "stop_strings is 7; give a text or a list of texts"),
        ({"stop_strings": [""]}, "generation.stop_strings holds an empty text"),
        ({"stop_strings": ["a"] * 17}, "generation.stop_strings holds 17 texts"),
        ({"beams": 4}, "there is no decoding option beams; there are: max_new_tokens, "),
    ],
)
def test_options_that_mean_nothing_are_refused(model, options, message):
    for call in (model.answer, model.stream):
        with pytest.raises(ConfigError, match=message):
            call(CONTEXTS[0], QUESTIONS[0], **options)


def test_whole_numbers_of_numpy_are_numbers(model, drawn):
    options = {"max_new_tokens": np.int64(12), "temperature": np.float32(2), "top_k": np.int8(20), "seed": np.uint32(1)}
    assert model.answer(CONTEXTS[0], QUESTIONS[0], **options).tokens == drawn[0].tokens


def test_other_values_of_the_options_compile_nothing(model):
    """Nor do other lengths, as there are few widths."""
    compiled = []

    class Count(logging.Handler):
        def emit(self, record):
            compiled.append(record.getMessage())

    def ask(new, **options):
        for i in (0, 3):
            model.answer(CONTEXTS[i], QUESTIONS[i], max_new_tokens=new, **options)
            list(model.stream(CONTEXTS[i], QUESTIONS[i], max_new_tokens=new, **options))

    ask(16)
    ask(16, temperature=1.0)
    handler, logger = Count(), logging.getLogger("jax")
    logger.addHandler(handler)
    try:
        with jax.log_compiles():
            for new in (9, 12, 15):
                ask(new, temperature=new / 10, top_k=new, top_p=1 / new, seed=new, repetition_penalty=new / 9)
                ask(new, repetition_penalty=new / 9)
    finally:
        logger.removeHandler(handler)
    assert [message for message in compiled if "Compiling jit(begin)" in message or "jit(proceed)" in message] == []


# --- prompts for others -----------------------------------------------------------------------------------------------


def test_a_prompt_in_a_slot_gives_the_answer(model, drawn):
    loop = model.slots(slots=3, length=64)
    options = generation.chosen(model.run.config.generation, DRAWN)
    prompts = [model.prompt_embeddings(c, q) for c, q in zip(CONTEXTS, QUESTIONS, strict=True)]
    handles = [loop.submit(prompt, options) for prompt in prompts]
    while loop.live or loop.waiting:
        loop.step()
    assert [(h.text, h.tokens, h.finish_reason) for h in handles] == [
        (answer.text, answer.tokens, answer.finish_reason) for answer in drawn
    ]
    for prompt, answer in zip(prompts, drawn, strict=True):
        assert (prompt.context_tokens, prompt.memory_vectors) == (answer.context_tokens, answer.memory_vectors)


def test_a_prompt_of_other_software_is_answered_by_the_exported_decoder(model, world, tmp_path):
    """As transformers reads it, and vLLM (its ``prompt_embeds``): from the file and from base64, token for token."""
    convert.main(["export-hf", f"--checkpoint={world.run}", f"--output={tmp_path / 'out'}", "--dtype=float32"])
    decoder = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "decoder", dtype="float32").eval()
    for context, question in zip(CONTEXTS, QUESTIONS, strict=True):
        prompt = model.prompt_embeddings(context, question)
        prompt.save(tmp_path / "prompt.pt")
        rows = torch.load(tmp_path / "prompt.pt", weights_only=True)
        sent = torch.load(io.BytesIO(base64.b64decode(prompt.base64())), weights_only=True)
        assert torch.equal(rows, sent) and rows.ndim == 2 and rows.dtype == torch.float32
        with torch.no_grad():
            ids = decoder.generate(inputs_embeds=rows[None], max_new_tokens=12, do_sample=False)[0].tolist()
        assert tuple(ids) == model.answer(context, question, max_new_tokens=12).tokens


def test_a_prompt_has_the_dtype_of_the_decoder(world):
    prompt = Comi.load(world.run, overrides=["model.dtype=bfloat16"]).prompt_embeddings(CONTEXTS[0], QUESTIONS[0])
    sent = torch.load(io.BytesIO(base64.b64decode(prompt.base64())), weights_only=True)
    assert sent.dtype == torch.bfloat16
    np.testing.assert_array_equal(sent.float().numpy(), prompt.vectors.astype(np.float32))
