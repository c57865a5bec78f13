"""What a user holds: the same answer and memory alone or in any batch, and one clear sentence for what cannot be."""

import io

import numpy as np
import pytest
import train_fixtures

import comi_jax
from comi_jax import answer
from comi_jax.config import Mesh
from comi_jax.data.encode import LengthError
from comi_jax.devices import sharding
from comi_jax.errors import ConfigError
from comi_jax.runs.checksums import CheckpointError
from comi_jax.serving.compressor import Comi

quick_compilation, world = train_fixtures.quick_compilation, train_fixtures.world

PAIRS = zip(train_fixtures.COLOURS[:6], train_fixtures.THINGS[:6], strict=True)
FACTS = [f"the {colour} box holds a {thing} ." for colour, thing in PAIRS]
CONTEXTS = [" ".join(FACTS[:n]) for n in (3, 1, 6, 4)]  # not by length; the third has two segments
QUESTIONS = ["what does the red box hold ?", "what holds a key ?", "what does the blue box hold ?", "what ?"]
TOKENS = [21, 7, 42, 28]


@pytest.fixture(scope="module")
def model(world):
    return Comi.load(world.run, batch_size=4)


@pytest.fixture(scope="module")
def one_at_a_time(world):
    return Comi.load(world.run, batch_size=1)


@pytest.fixture(scope="module")
def together(model):
    return model.answer(CONTEXTS, QUESTIONS), model.compress(CONTEXTS, QUESTIONS)


def close(a, b):
    np.testing.assert_allclose(a.vectors, b.vectors, atol=1e-5)
    return (a.context_tokens, a.truncated) == (b.context_tokens, b.truncated)


def test_the_package_offers_it_by_name():
    assert comi_jax.Comi is Comi and comi_jax.Document.__name__ == "Document"
    with pytest.raises(AttributeError, match="no attribute 'Como'"):
        comi_jax.Como  # noqa: B018


# --- the same in any company ------------------------------------------------------------------------------------------


def test_an_example_is_the_same_in_any_batch_and_in_its_place(together, one_at_a_time):
    answers, memories = together
    assert [a.context_tokens for a in answers] == [m.context_tokens for m in memories] == TOKENS
    assert len({a.tokens for a in answers}) > 1  # they could be told apart
    assert one_at_a_time.answer(CONTEXTS, QUESTIONS) == answers
    for alone, memory in zip(one_at_a_time.compress(CONTEXTS, QUESTIONS), memories, strict=True):
        assert close(alone, memory)


def test_one_text_gives_one_result(together, one_at_a_time):
    answers, memories = together
    assert one_at_a_time.answer(CONTEXTS[0], QUESTIONS[0]) == answers[0]
    assert close(one_at_a_time.compress(CONTEXTS[0], QUESTIONS[0]), memories[0])


def test_other_companions_in_another_order_change_nothing(together, model):
    order = [3, 2, 2, 0]
    answers = model.answer([CONTEXTS[i] for i in order], [QUESTIONS[i] for i in order])
    assert answers == [together[0][i] for i in order]
    memories = model.compress([CONTEXTS[i] for i in order], [QUESTIONS[i] for i in order])
    assert all(close(memory, together[1][i]) for memory, i in zip(memories, order, strict=True))


@pytest.mark.parametrize(
    "axes",
    [
        {"data": 1, "fsdp": 2, "context": 2},
        pytest.param({"data": 2, "fsdp": 2}, marks=pytest.mark.slow),
        pytest.param({"data": 1, "fsdp": 2, "tensor": 2}, marks=pytest.mark.slow),
    ],
)
def test_weights_and_examples_split_over_devices_change_nothing(axes, together, world):
    """Five questions, where only an even number divides over the devices."""
    mesh = sharding.make_mesh(Mesh(**axes))
    split = Comi.load(world.run, batch_size=3, mesh=mesh)
    assert split.batch_size == 4 and len(split.params["encoder"]["layers"]["q"].sharding.device_set) == 4
    assert split.answer([*CONTEXTS, CONTEXTS[0]], [*QUESTIONS, QUESTIONS[0]]) == [*together[0], together[0][0]]
    memories = split.compress(CONTEXTS[:3], QUESTIONS[:3])
    assert all(close(memory, one) for memory, one in zip(memories, together[1][:3], strict=True))


def test_an_answer_says_what_it_was_made_of(together):
    for said, memory in zip(*together, strict=True):
        assert said.memory_vectors == len(memory.vectors) and memory.vectors.shape[1] == 32
        assert said.ratio == memory.ratio == said.context_tokens / said.memory_vectors
        assert 1 <= len(said.tokens) <= 4 and not said.truncated
    words = train_fixtures.SPECIAL + train_fixtures.WORDS
    assert together[0][0].text == " ".join(words[t] for t in together[0][0].tokens if words[t] != "<eos>")


def test_a_control_token_in_a_question_or_a_context_is_so_many_letters(model, one_at_a_time):
    """To this tokenizer, whose letters are words: "<" and "eos>"."""
    said = model.answer([CONTEXTS[0] + " <eos>", CONTEXTS[0]], [QUESTIONS[0], QUESTIONS[0] + " <eos> <bos>"])
    letters = [(CONTEXTS[0] + " < eos>", QUESTIONS[0]), (CONTEXTS[0], QUESTIONS[0] + " < eos> < bos>")]
    assert said == [one_at_a_time.answer(*pair) for pair in letters]
    assert said[0].context_tokens == TOKENS[0] + 2


# --- options ----------------------------------------------------------------------------------------------------------


def test_the_rate_sets_the_number_of_vectors(together, one_at_a_time):
    for rate, most in ((2, 14), (4, 7), (40, 1)):  # the default is the first rate it was trained for
        memory = one_at_a_time.compress(CONTEXTS[3], QUESTIONS[3], rate=rate)
        assert most - 2 <= len(memory.vectors) <= most and memory.vectors.any(axis=1).all()
    assert len(together[1][3].vectors) == len(one_at_a_time.compress(CONTEXTS[3], QUESTIONS[3], rate=2).vectors)


def test_fewer_new_tokens_cut_the_answer(together, one_at_a_time):
    short = one_at_a_time.answer(CONTEXTS[0], QUESTIONS[0], max_new_tokens=1)
    assert short.tokens == together[0][0].tokens[:1]


def test_settings_of_a_trained_model_can_be_changed(world):
    cut = Comi.load(world.run, batch_size=1, overrides=["data.on_long=truncate", "data.max_context=7"])
    memory = cut.compress([CONTEXTS[0], CONTEXTS[1]], [QUESTIONS[0], QUESTIONS[1]])
    assert [(m.context_tokens, m.truncated) for m in memory] == [(7, True), (7, False)]
    assert close(memory[1], Comi.load(world.run, batch_size=1).compress(CONTEXTS[1], QUESTIONS[1]))
    with pytest.raises(ConfigError, match="compression.encoder_layers=2 cannot be set for a trained model"):
        Comi.load(world.run, overrides=["compression.encoder_layers=2"])


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "context, question, message",
    [
        (["a", "the"], ["what ?"], "not a list of 2 and a list of 1; repeat a context"),
        ("a", ["what ?"], "not a text and a list of 1"),
        (["a"], "what ?", "not a list of 1 and a text"),
    ],
)
def test_lists_that_do_not_match_are_refused(model, context, question, message):
    for method in (model.answer, model.compress):
        with pytest.raises(ValueError, match=message):
            method(context, question)


def test_no_questions_have_no_answers(model):
    assert model.answer([], []) == model.compress([], []) == []


@pytest.mark.parametrize(
    "context, question, message",
    [
        ("", "what ?", "record 1 has a context of no tokens"),
        ("a", "", "record 1 has a query of no tokens"),
        ("a " * 65, "what ?", "record 1 with 65 tokens of context, more than .* data.on_long=truncate"),
    ],
)
def test_a_context_or_a_question_of_no_or_too_many_tokens_is_refused(model, context, question, message):
    with pytest.raises(LengthError, match=message):
        model.answer(context, question)


def test_more_than_the_model_has_positions_for_is_refused(world):
    model = Comi.load(world.run, overrides=["data.max_context=400"])
    with pytest.raises(LengthError, match="record 1: 128 memory vectors, a query of 2 and an answer of 4"):
        model.answer("a " * 256, "what ?")


def test_whole_numbers_of_numpy_are_whole_numbers(model, together):
    assert model.answer(CONTEXTS[0], QUESTIONS[0], rate=np.int64(2)) == model.answer(CONTEXTS[0], QUESTIONS[0], rate=2)


@pytest.mark.parametrize("text, half", [("a \ud83d box", "at character 3"), ("\udcff", "at character 1")])
def test_half_a_surrogate_pair_is_refused_in_one_sentence(model, text, half):
    for context, question, name in ((text, "what ?", "the context"), ("a box", text, "the question")):
        with pytest.raises(ConfigError, match=f"^{name} has half a surrogate pair {half}"):
            model.answer(context, question)
    with pytest.raises(ConfigError, match="^context 2 has half"):
        model.compress(["a box", text], ["what ?", "what ?"])


@pytest.mark.parametrize("rate", [0, -1, 2.5, True])
def test_a_rate_that_is_none_is_refused(model, rate):
    with pytest.raises((ConfigError, TypeError), match="rate"):
        model.compress(CONTEXTS[0], QUESTIONS[0], rate=rate)


def test_a_batch_of_nothing_is_refused(world):
    with pytest.raises(ConfigError, match="the batch size is 0"):
        Comi.load(world.run, batch_size=0)


def test_a_folder_that_is_no_run_is_refused(world, tmp_path):
    for folder in (tmp_path, tmp_path / "none", world.lm):
        with pytest.raises(CheckpointError, match="is not a COMI checkpoint"):
            Comi.load(folder)


# --- the command ------------------------------------------------------------------------------------------------------


def arguments(world, context, *more):
    return [f"--checkpoint={world.run}", f"--context={context}", f"--question={QUESTIONS[0]}", *more]


def test_the_command_prints_the_answer_and_the_ratio(world, together, tmp_path, capsys):
    (tmp_path / "context.txt").write_text(CONTEXTS[0], encoding="utf-8")
    answer.main(arguments(world, tmp_path / "context.txt"))
    printed = capsys.readouterr()
    expected = together[0][0]
    assert printed.out == expected.text + "\n"
    vectors, ratio = expected.memory_vectors, expected.ratio
    assert f"[21 context tokens in {vectors} memory vectors at rate 2: ratio {ratio:.1f}]" in printed.err


def test_the_command_reads_standard_input_and_says_what_was_cut(world, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(CONTEXTS[0].encode()), "ascii"))
    answer.main(arguments(world, "-", "--set=data.on_long=truncate", "--set=data.max_context=20"))
    said = capsys.readouterr().err
    assert "[20 context tokens (truncated) in " in said and "question" not in said


def test_the_command_says_that_the_question_lost_its_beginning(world, tmp_path, capsys):
    (tmp_path / "context.txt").write_bytes(b"\xef\xbb\xbf" + CONTEXTS[0].encode())  # with a byte order mark
    answer.main(arguments(world, tmp_path / "context.txt", "--set=data.on_long=truncate", "--set=data.max_query=4"))
    said = capsys.readouterr().err
    assert "[21 context tokens in " in said and said.endswith("; the question lost its beginning]\n")


@pytest.mark.parametrize(
    "text, message",
    [(None, "cannot be read as UTF-8 text"), (b"\xff\xfe", "cannot be read as UTF-8 text"), (b" \n", "is empty")],
)
def test_the_command_says_what_is_wrong_with_a_context(world, tmp_path, text, message):
    if text is not None:
        (tmp_path / "context.txt").write_bytes(text)
    with pytest.raises(SystemExit, match=f"error: --context={tmp_path / 'context.txt'} {message}"):
        answer.main(arguments(world, tmp_path / "context.txt"))


def test_the_command_names_a_folder_that_is_no_run(world, tmp_path):
    (tmp_path / "context.txt").write_text("a", encoding="utf-8")
    with pytest.raises(SystemExit, match=f"error: {tmp_path} is not a COMI checkpoint"):
        answer.main([f"--checkpoint={tmp_path}", f"--context={tmp_path / 'context.txt'}", "--question=what ?"])
