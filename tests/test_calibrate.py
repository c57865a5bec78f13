"""rate="auto": what is fitted and tested, what is stored and refused, and the rate that a question gets."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
import train_fixtures

from comi_jax import calibrate, serve
from comi_jax.config import Generation
from comi_jax.errors import ConfigError
from comi_jax.evaluation import calibration
from comi_jax.evaluation.calibration import Outcomes
from comi_jax.runs.folder import Folder
from comi_jax.runs.stored_weights import weights_of
from comi_jax.serving import auto_rate, rates, warm_up
from comi_jax.serving.auto_rate import STATISTICS, Calibration
from comi_jax.serving.compressor import Comi
from comi_jax.serving.contexts import Preparer
from comi_jax.serving.encoding import finished
from comi_jax.serving.engine import Job
from comi_jax.serving.http import api
from comi_jax.serving.http.errors import ApiError
from comi_jax.serving.http.responses import Reply
from comi_jax.serving.settings import Settings
from comi_jax.serving.store import DocumentStore
from comi_jax.serving.telemetry import Telemetry

quick_compilation, world = train_fixtures.quick_compilation, train_fixtures.world

RATES = (2, 4, 8)
TEXT = "\n".join(
    f"the {c} box holds a {t} ." for c, t in zip(train_fixtures.COLOURS[:6], train_fixtures.THINGS[:6], strict=True)
)
QUESTIONS = [f"what does the {c} box hold ?" for c in train_fixtures.COLOURS[:6]] + ["what holds a coin ?"]


def outcomes(count, told, seed=0):
    """Questions of which each is answered up to a rate of its own; the first statistic tells that rate if ``told``, and
    all others are noise. Of each context there are 4."""
    rng = np.random.default_rng(seed)
    hardest = rng.integers(0, len(RATES), count)
    accuracy = (np.arange(len(RATES))[None] <= hardest[:, None]) & (rng.random(count) > 0.02)[:, None]
    statistics = rng.standard_normal((count, len(RATES), len(STATISTICS)))
    if told:
        statistics[:, :, 0] = hardest[:, None] + 0.1 * statistics[:, :, 0]
    vectors = np.stack([np.full(count, 64 // rate) for rate in RATES], axis=1)
    return Outcomes(RATES, statistics, accuracy.astype(float), vectors, np.full(count, 64), np.arange(count) // 4)


def calibrated(found, floor=0.05):
    return calibration.calibrate(found, floor, "em", "weights", {}, {})


def test_the_regression_is_the_minimum_of_its_cost():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((300, 3)) * [1, 10, 0] + [0, 5, 2]  # the last one is constant
    y = (rng.random(300) < 1 / (1 + np.exp(-(x[:, 0] - 0.2 * x[:, 1] + 1)))).astype(float)
    made = calibration.fit(x, y)
    z = (x - made.mean) / made.scale

    def cost(w):
        p = 1 / (1 + np.exp(-(z @ w[:3] + w[3])))
        return -np.sum(y * np.log(p) + (1 - y) * np.log(1 - p)) + (w[:3] @ w[:3] + w[3] ** 2 / 1000) / 2

    best = np.array([*made.weights, made.bias])
    assert all(cost(best + step * unit) > cost(best) for unit in np.eye(4) for step in (1e-3, -1e-3))
    assert made.weights[0] > 0.5 and made.weights[1] < -0.5
    p = made.probability(x)
    np.testing.assert_allclose(p, 1 / (1 + np.exp(-(z @ best[:3] + best[3]))), atol=1e-12)
    certain = calibration.fit(x, np.ones(300)).probability(x)
    assert np.isfinite(certain).all() and certain.min() > 0.99


def test_statistics_that_tell_are_used():
    """The ratio is far above that of the highest fixed rate within the floor, which is the lowest."""
    made, (told, table) = calibrated(outcomes(4000, told=True))
    assert made.price is not None and made.fixed == 2 and "chooses by statistics" in made.said
    auto = table.rows[3]
    assert auto["rates"] == "auto" and auto["within the floor"] and auto["minus random choice"]["low"] > 0.1
    assert auto["ratio"] > 3 and auto["minus the lowest rate's"]["low"] > -0.05
    assert [row["within the floor"] for row in table.rows[:3]] == [True, False, False]
    assert told.rows[0]["rate 4"] > 0.9 and abs(told.rows[1]["rate 4"] - 0.5) < 0.1
    x = np.zeros((3, len(STATISTICS)))
    assert [made.choose(x + hardest * np.eye(len(STATISTICS))[0]) for hardest in (0, 1, 2)] == [2, 4, 8]


def test_statistics_that_do_not_tell_are_not_used():
    made, (_, table) = calibrated(outcomes(4000, told=False), floor=0.5)
    assert made.price is None and "no statistic beat fixed rates" in made.said
    assert made.fixed == 4 and [row["within the floor"] for row in table.rows[:3]] == [True, True, False]
    assert made.choose(np.full((3, len(STATISTICS)), np.nan)) == 4  # they do not matter


def test_nothing_is_to_be_chosen_if_the_highest_rate_is_within_the_floor():
    found = outcomes(400, told=False)
    made, (_, table) = calibrated(dataclasses.replace(found, accuracy=np.ones_like(found.accuracy)))
    assert made.price is None and made.fixed == 8 and "as the highest is itself within 0.05" in made.said
    assert table.rows[3]["ratio"] == 8 and "minus that of a random choice" in table.notes[1]


def test_too_few_questions_show_nothing():
    made, _ = calibrated(outcomes(80, told=False), floor=0.001)
    assert made.price is None and made.fixed == 2 and "give more data or a larger floor" in made.said
    with pytest.raises(ConfigError, match="--data has 3 contexts"):
        calibrated(outcomes(12, told=True))


def test_random_choice_is_the_best_of_two_rates():
    """Beside every mixture of all three rates on a grid, of as many vectors."""
    found = dataclasses.replace(outcomes(40, told=False), accuracy=np.tile([0.9, 0.5, 0.45], (40, 1)))
    cost = np.array([0.5, 0.25, 0.125])
    for share in np.linspace(0, 1, 9):
        for rest in np.linspace(0, 1 - share, 9):
            weights = np.array([share, rest, 1 - share - rest])
            best = np.array(calibration.mixture(found, float(weights @ cost)))
            np.testing.assert_allclose([best.sum(), best @ cost], [1, weights @ cost], atol=1e-9)
            assert best @ [0.9, 0.5, 0.45] >= weights @ [0.9, 0.5, 0.45] - 1e-9


def test_tests_end_with_the_first_that_fails():
    found = outcomes(400, told=True)
    draws = calibration.Resamples.draw(found.context)
    policies = [calibration.measured(str(i), found, draws, np.full(400, i)) for i in (0, 2, 0)]
    last = calibration.last_within(policies, 0.05)
    assert last is policies[0] and calibration.last_within(policies[1:], 0.05) is None
    assert policies[0].lost["low"] == 0 and policies[1].shares == (0, 0, 1) and policies[1].ratio == 8


def test_intervals_are_of_contexts():
    """Questions that repeat others of their context make no mean surer."""
    rng = np.random.default_rng(0)
    values, context = rng.random(100), np.arange(100)
    once = calibration.Resamples.draw(context).interval(values)
    often = calibration.Resamples.draw(np.repeat(context, 9)).interval(np.repeat(values, 9))
    assert once["mean"] == pytest.approx(often["mean"]) and once["low"] == pytest.approx(often["low"])
    assert once["high"] - once["low"] == pytest.approx(2 * 1.96 * values.std() / 10, rel=0.15)


# --- of a run ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(world, tmp_path_factory):
    """A copy of the run, as a calibration is written into it."""
    return shutil.copytree(world.run, tmp_path_factory.mktemp("calibrated") / "run")


@pytest.fixture(scope="module")
def model(run):
    """Its calibration gives some questions about TEXT each of its rates."""
    model = Comi.load(run, batch_size=2)
    document = model.encode(TEXT)
    queries = [np.asarray(model.tokenizer(q, add_special_tokens=False)["input_ids"], np.int32) for q in QUESTIONS]
    found = np.stack([rates.statistics(model, document.contents, query, (2, 4)) for query in queries])
    lead = found[:, 1, STATISTICS.index("best relevance")]
    estimators = (
        calibration.fit(found[:, 0], np.ones(len(found))),
        calibration.fit(found[:, 1], 1.0 * (lead > np.median(lead))),
    )
    settings = auto_rate.settings_of(model.run)
    made = Calibration(model.origin.weights, settings, (2, 4), estimators, 1.0, 2, "said", {})
    place = Folder(run).calibration(train_fixtures.STEPS)
    place.parent.mkdir()
    made.save(place)
    return model


def test_auto_is_the_rate_that_it_chooses(model):
    """Bit by bit, alone and in a batch, of a text and of a document, in all the ways to ask."""
    document = model.encode(TEXT)
    answers = model.answer(document, QUESTIONS, rate="auto", logprobs=True)
    assert {answer.rate for answer in answers} == {2, 4}
    for question, answer in zip(QUESTIONS, answers, strict=True):
        assert model.answer(document, question, rate="auto", logprobs=True) == answer
        assert model.answer(document, question, rate=answer.rate, logprobs=True) == answer
        assert model.answer(TEXT, question, rate="auto", logprobs=True) == answer
        memory = model.compress(document, question, rate="auto")
        assert memory.rate == answer.rate and len(memory.vectors) == answer.memory_vectors
        np.testing.assert_array_equal(memory.vectors, model.compress(document, question, rate=answer.rate).vectors)
        prompt = model.prompt_embeddings(document, question, rate="auto")
        assert prompt.memory_vectors == answer.memory_vectors
    stream = model.stream(document, QUESTIONS[0], rate="auto")
    assert "".join(stream) == answers[0].text and stream.answer.rate == answers[0].rate


def test_a_calibration_is_read_as_it_was_written(run, model):
    place = Folder(run).calibration(train_fixtures.STEPS)
    read = Comi.load(run).calibration()
    assert dataclasses.asdict(read) == dataclasses.asdict(model.calibration())
    assert json.loads(place.read_text())["rates"] == [2, 4]


def test_what_is_no_calibration_of_the_model_is_refused(world, run, model):
    place = Folder(run).calibration(train_fixtures.STEPS)
    written = place.read_text()

    def refusal(text=None, **load):
        place.write_text(written if text is None else text)
        with pytest.raises(ConfigError) as caught:
            Comi.load(run, **load).answer(TEXT, QUESTIONS[0], rate="auto")
        return str(caught.value)

    command = f"run python -m comi_jax.calibrate --checkpoint={run} --data=FILE --floor=0.02"
    values = json.loads(written)
    for text, message in (
        ("{", "is damaged or of another version"),
        ("[]", "is damaged or of another version"),
        (json.dumps(values | {"format": 0}), "its format is not 1"),
        (json.dumps(values | {"rates": [2, 4, 8]}), "its parts do not belong together"),
        (json.dumps(values | {"weights": "others"}), "is the calibration of other weights"),
    ):
        assert message in refusal(text) and command in refusal(text)
    settings = {name: value for name, value in values["settings"].items() if name != "compression.query_reads_context"}
    place.write_text(json.dumps(values | {"settings": settings}))  # of before there was that setting
    assert Comi.load(run).calibration().rates == (2, 4)
    other = refusal(overrides=["compression.coarse_redundancy=false"])
    assert "was calibrated with compression.coarse_redundancy=True, but" in other and command in other
    alone = refusal(overrides=["compression.rates=4"])
    assert "was trained at 4 alone; train with several" in alone and "comi_jax.calibrate" in alone
    place.unlink()
    with pytest.raises(ConfigError, match='rate="auto" needs a calibration, and .* has none; run python -m comi_jax'):
        Comi.load(run).answer(TEXT, QUESTIONS[0], rate="auto")
    place.write_text(written)
    with pytest.raises(ConfigError, match="both rate and max_slots"):
        model.answer(TEXT, QUESTIONS[0], rate="auto", max_slots=8)
    for context in (TEXT, model.encode(TEXT)):
        with pytest.raises(ConfigError, match="the rate is automatic; it is a whole number of at least 1"):
            model.answer(context, QUESTIONS[0], rate="automatic")


def test_the_command(world, tmp_path, capsys):
    """It stores what the library then uses, and a second start reuses its predictions."""
    run = shutil.copytree(world.run, tmp_path / "run")
    data = train_fixtures.write(tmp_path / "data.jsonl", train_fixtures.records(24, seed=3))
    arguments = [f"--checkpoint={run}", f"--data={data}", "--floor=0.5", "--batch-size=8"]
    calibrate.main(arguments)
    printed, place = capsys.readouterr().out, Folder(run).calibration(train_fixtures.STEPS)
    assert "minus the lowest rate's" in printed and "best relevance" in printed and 'rate="auto"' in printed
    stored, made = json.loads(place.read_text()), Comi.load(run)
    assert stored["weights"] == weights_of(run, train_fixtures.STEPS) and stored["report"]["n"] == 24
    assert len(stored["report"]["more"]["curve"]) == len(calibration.PRICES)
    assert place.with_suffix(".png").read_bytes()[:4] == b"\x89PNG"
    assert (place.with_suffix("") / "rate_4.jsonl").is_file()
    answer = made.answer(TEXT, QUESTIONS[0], rate="auto")
    assert answer.rate in (2, 4) and (stored["price"] is not None or answer.rate == stored["fixed"])


def test_a_server_chooses_as_the_library_does(model):
    """What is prepared for a slot, and what the response says; without a calibration, and with rates that a server
    does not have, it is refused."""
    assert serve.why_not_auto(model, (4, 2, 1)) == ""
    assert "also chooses the rate 2, which --rates leaves out" in serve.why_not_auto(model, (4, 1))
    settings = Settings(
        "tiny", rates=(4, 2, 1), slot_length=128, max_context=64, max_question=8, max_tokens=64, auto=True
    )
    store = DocumentStore(10**7, 0)
    preparer, document, seen = Preparer(model, store, settings, Telemetry()), model.encode(TEXT), set()
    plain = Preparer(model, store, dataclasses.replace(settings, auto=False), Telemetry())
    segments, questions = warm_up.shapes(model, settings)
    assert preparer.programs - plain.programs == len(segments) * len(questions)
    for question in QUESTIONS:
        said = [{"role": "user", "content": question}]
        body = {"messages": said, "documents": [{"text": TEXT}], "rate": "auto", "max_tokens": 4}
        request = api.read(api.ChatRequest, json.dumps(body).encode())
        asked = api.ask_of(request, settings, Generation())
        made, want = finished(preparer.ask(asked)), model.prompt_embeddings(document, question, rate="auto")
        np.testing.assert_array_equal(made.prompt, want.vectors)
        account = Reply(True, "tiny", asked, Job(asked, lambda _: None, long=False), made).account("stop")
        assert account["asked_rate"] == "auto" and account["memory_vectors"] == want.memory_vectors
        seen.add(account["chosen_rate"])
        with pytest.raises(ApiError, match='"auto" needs a calibration, which python -m comi_jax.calibrate makes'):
            api.ask_of(request, dataclasses.replace(settings, auto=False), Generation())
    assert seen == {2, 4}


@pytest.mark.parametrize(
    "more, message",
    [
        (["--set", "compression.rates=4"], "was trained at the rate 4 alone"),
        (["--set", "compression.coarse=false"], "has compression.coarse=false, so its groups have no MIG"),
    ],
)
def test_a_model_without_a_choice_is_refused(world, more, message):
    with pytest.raises(SystemExit, match=f"error: .*{message}"):
        calibrate.main([f"--checkpoint={world.run}", f"--data={world.dev}", *more])


@pytest.mark.parametrize("floor", ["0", "1", "-0.1", "x", "nan"])
def test_a_floor_is_an_accuracy(world, floor, capsys):
    with pytest.raises(SystemExit):
        calibrate.main([f"--checkpoint={world.run}", f"--data={world.dev}", f"--floor={floor}"])
    assert f"{floor} is no accuracy between 0 and 1" in capsys.readouterr().err
