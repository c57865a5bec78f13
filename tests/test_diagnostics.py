"""Diagnostics against plain counts: AUC, cosines, sizes, weights, attention; each example the same in any batch."""

import dataclasses
import itertools
import json
import string

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_models
import train_fixtures
from hypothesis import given, settings
from hypothesis import strategies as st

from comi_jax import diagnose
from comi_jax.data import encode
from comi_jax.data.records import Record
from comi_jax.evaluation import (
    answer_spans,
    diagnostics_attention,
    diagnostics_auc,
    diagnostics_memory,
    diagnostics_tables,
    metrics,
)
from comi_jax.evaluation.diagnostics import Groups, anatomies, subjects
from comi_jax.model import backbone as lm
from comi_jax.model.batch import Batch
from comi_jax.serving import batching
from comi_jax.serving.compressor import Comi
from comi_jax.weights import hf

quick_compilation, world = train_fixtures.quick_compilation, train_fixtures.world

RATE = 2


def records(rows):
    return [Record(tuple(row["input"]), row["prompt"], tuple(row["answer"])) for row in rows]


# Contexts of 7 to 56 tokens: the longest have two segments.
RECORDS = [r for facts in (4, 1, 8, 3, 6) for r in records(train_fixtures.records(1, seed=facts, facts=facts))]


@pytest.fixture(scope="module")
def model(world):
    return Comi.load(world.run, batch_size=4)


@pytest.fixture(scope="module")
def found(model):
    made = {a.subject.number: a for a in anatomies(model, subjects(RECORDS, model), RATE)}
    return [made[number] for number in range(len(RECORDS))]


# --- the answer in the context ----------------------------------------------------------------------------------------

TEXTS = st.text(st.sampled_from("aAtThHeEn .,-'\n\u00e9\u0130\u03a3\u2014\u4e2d"), max_size=30)


@settings(max_examples=300, deadline=None)
@given(TEXTS)
def test_normalising_with_origins_is_normalising(text):
    inside, origin = answer_spans.normalize_with_origins(text)
    assert inside == metrics.normalize(text) and len(origin) == len(inside)
    assert all(a <= b for a, b in itertools.pairwise(origin))
    sigma = str.maketrans("\u03c2", "\u03c3")  # a sigma at the end of a word has a form of its own
    pairs = zip(inside.translate(sigma), origin, strict=True)
    assert all(letter == " " or letter in text[i].lower().translate(sigma) for letter, i in pairs)


@pytest.mark.parametrize(
    "text, answers, pieces",
    [
        ("A cat, the Cat's category: CAT!", ["the cat"], ["cat", "CAT"]),
        ("He keeps an old, brass lamp.", ["Old brass lamp!", "lamp"], ["old, brass lamp", "lamp"]),
        ("nothing here", ["The", "?", "thing"], []),
        ("it is (well-known)", ["wellknown"], ["well-known"]),
        ("\u4ed6\u4f4f\u5728\u4e1c\u4eac\u3002", ["\u4e1c\u4eac"], ["\u4e1c\u4eac"]),
        ("na na na", ["na na"], ["na na", "na na"]),
    ],
)
def test_occurrences_are_whole_words_under_squads_normalisation(text, answers, pieces):
    assert [text[first:end] for first, end in answer_spans.occurrences(text, answers)] == pieces


def test_the_tokens_of_an_answer_are_marked_and_what_is_cut_is_said(world, model):
    made = subjects(RECORDS, model)
    vocabulary = model.tokenizer.get_vocab()
    for subject in made:
        words, thing = subject.record.context_text().split(), subject.record.answers[0].split()
        inside = np.zeros(len(words), bool)
        for first in range(len(words)):
            if words[first : first + len(thing)] == thing:
                inside[first : first + len(thing)] = True
        assert subject.status == "found" and subject.answer.tolist() == inside.tolist()
        assert subject.example.context.tolist() == [vocabulary[word] for word in words]
        assert subject.text(range(1, 4)) == " ".join(words[1:4])
    cut = Comi.load(world.run, overrides=["data.on_long=truncate", "data.max_context=3"])
    assert {subject.status for subject in subjects(RECORDS, cut)} == {"cut"}
    absent = dataclasses.replace(RECORDS[0], answers=("moon",))
    assert subjects([absent], model)[0].status == "absent"


@pytest.mark.parametrize(
    "text, pieces",
    [
        ("the red  box", ["the", "red", "box"]),
        ("\ufeffthe <eos> box <bos>", ["the", "<", "eos>", "box", "<", "bos>"]),  # a mark, and what is no control token
    ],
)
def test_spans_are_those_of_the_tokens(model, text, pieces):
    spans = encode.token_spans(model.tokenizer, text)
    assert [text[first:end] for first, end in spans] == pieces
    assert len(encode.token_ids(model.tokenizer, [text])[0]) == len(pieces)


def test_a_tokenizer_without_spans_is_refused():
    class Slow:
        is_fast = False

    with pytest.raises(encode.TextError, match="use one with a tokenizer.json"):
        encode.token_spans(Slow(), "a")


# --- anatomies --------------------------------------------------------------------------------------------------------


def test_they_are_what_answers_questions(model, found):
    """Sizes, weights and merged vectors of ``comi.memory_of``, which aligns and answers."""
    examples = [a.subject.example for a in found]
    for rows, batch in batching.batches(model.run, examples, RATE, 4, None):
        memory = batching.remember(model.params, batch, model.architecture, RATE)
        for row, number in enumerate(rows):
            lengths = model.run.config.compression.segments(len(examples[number].context))
            weights, sizes = [], []
            for part in memory.aux:
                segments = part.weights.shape[0] // batch.rate.shape[0]
                for at in range(row * segments, (row + 1) * segments):
                    tokens = int(part.group_sizes[at].sum())
                    weights += np.asarray(part.weights[at])[:tokens].tolist()
                    sizes += [size for size in part.group_sizes[at].tolist() if size]
            anatomy = found[number]
            np.testing.assert_allclose(anatomy.weights, weights, atol=1e-6)
            assert anatomy.final.sizes.tolist() == sizes and len(sizes) == int(memory.length[row])
            assert np.bincount(anatomy.segment, anatomy.initial.sizes).tolist() == lengths
    assert any(a.segment[-1] == 1 for a in found)  # one with two segments


def test_the_numbers_of_a_group_fit_together(found):
    for a in found:
        n = len(a.subject.example.context)
        assert a.initial.sizes.sum() == a.final.sizes.sum() == a.allocated.sum() == len(a.weights) == n
        assert len(a.merged) == len(a.final.sizes) == (a.allocated > 0).sum()
        np.testing.assert_allclose(a.initial.mig, a.initial.relevance - a.initial.redundancy, atol=1e-6)
        for segment in range(a.segment[-1] + 1):
            here = a.segment == segment
            share = np.exp(-a.initial.mig[here]) / np.exp(-a.initial.mig[here]).sum()
            np.testing.assert_allclose(a.share[here], share, atol=1e-6)
            assert (np.abs(a.allocated[here] - a.initial.sizes[here].sum() * share) < 1).all()
        starts = np.cumsum(a.final.sizes) - a.final.sizes
        np.testing.assert_allclose(np.add.reduceat(a.weights, starts), 1, atol=1e-5)
        assert (a.final.relevance <= 1 + 1e-6).all() and a.final.relevance.max() == a.initial.relevance.max()


def test_an_example_is_the_same_in_any_batch(world, found):
    alone = Comi.load(world.run, batch_size=1)
    for a in found:
        (b,) = anatomies(alone, [a.subject], RATE)
        for field in ("share", "allocated", "weights", "representatives", "merged"):
            np.testing.assert_allclose(getattr(a, field), getattr(b, field), atol=1e-5)
        assert diagnostics_tables.measure_6(a) == pytest.approx(diagnostics_tables.measure_6(b), abs=1e-5)
        mine, others = diagnostics_auc.measure_5(a), diagnostics_auc.measure_5(b)
        np.testing.assert_array_equal(mine["initial"][0]["random"], others["initial"][0]["random"])


# --- table 5 ----------------------------------------------------------------------------------------------------------


def by_pairs(scores, labels):
    pairs = itertools.product(scores[labels], scores[~labels])
    return float(np.mean([1.0 if a > b else 0.5 if a == b else 0.0 for a, b in pairs]))


def columns(rows):
    scores, labels = zip(*rows, strict=True)
    return np.array(scores, float), np.array(labels)


SCORED = st.lists(st.tuples(st.integers(0, 5), st.booleans()), min_size=2, max_size=12).filter(
    lambda rows: len({label for _, label in rows}) == 2
)


@settings(max_examples=100, deadline=None)
@given(SCORED)
def test_auc_is_the_share_of_the_pairs_in_order(rows):
    scores, labels = columns(rows)
    assert diagnostics_auc.auc(scores, labels) == pytest.approx(by_pairs(scores, labels), abs=1e-12)


@settings(max_examples=10, deadline=None)
@given(st.lists(SCORED, min_size=1, max_size=4))
def test_the_pooled_auc_is_that_of_all_examples_together(examples):
    arrays = [columns(rows) for rows in examples]
    together = (np.concatenate([a[k] for a in arrays]) for k in (0, 1))
    pooled = diagnostics_auc.pooled_auc(arrays)
    assert pooled["mean"] == pytest.approx(by_pairs(*together), abs=1e-12)
    assert pooled["low"] <= pooled["high"] and pooled["n"] == len(examples)


def groups_of(scores):
    values = np.asarray(scores, float)
    return Groups(np.ones(len(values), np.int64), values, np.zeros(len(values)), values)


def test_examples_without_both_classes_are_counted_not_dropped(found):
    def measure(status, holding):
        scores = diagnostics_auc.measure_5(found[0])["initial"][0]
        scores = {name: value[: len(holding)] for name, value in scores.items()}
        pair = (scores, np.array(holding))
        return {"number": 0, "status": status, "initial": pair, "re-allocated": pair}

    rows = [
        measure("found", [True, False, False]),
        measure("absent", [False, False]),
        measure("cut", [False, False]),
        measure("found", [True]),
        measure("found", [True, True]),
    ]
    table = diagnostics_auc.summary_5(rows)
    counts = {"absent": 1, "cut": 1, "single": 1, "all": 1}
    assert table.more["initial"] == {"examples": 1, "groups": 3, "base_rate": pytest.approx(1 / 3), "left_out": counts}
    assert "4 left out: 1 without an answer in the context" in table.notes[0]
    with pytest.raises(diagnostics_auc.DiagnosisError, match="no example with groups of both classes: 2 left out"):
        diagnostics_auc.summary_5(rows[1:3])


def test_groups_hold_the_tokens_between_their_ends():
    groups = dataclasses.replace(groups_of([0.0, 0.0, 0.0]), sizes=np.array([2, 1, 3]))
    assert groups.holding(np.array([0, 1, 0, 0, 0, 1], bool)).tolist() == [True, False, True]


# --- tables 6 and 8, the merge weight ---------------------------------------------------------------------------------


def test_the_mean_cosine_is_that_of_all_pairs():
    vectors = np.random.default_rng(0).standard_normal((5, 3)).astype(np.float32)
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    pairs = [unit[i] @ unit[j] for i, j in itertools.permutations(range(5), 2)]
    assert diagnostics_tables.mean_cosine(vectors) == pytest.approx(float(np.mean(pairs)), abs=1e-6)
    assert diagnostics_tables.mean_cosine(vectors[:1]) == diagnostics_tables.mean_cosine(vectors[:0]) == 0.0


def test_table_6_is_equal_where_everything_is_kept_and_differs_where_not(found):
    measures = [diagnostics_tables.measure_6(a) for a in found]
    table = diagnostics_tables.summary_6(measures)
    assert table.more["equal_at_1"] and len(table.rows) == 10
    gaps = [row["MIG minus relevance"] for row in table.rows if row["retention"] < 1]
    assert all(row["MIG minus relevance"]["mean"] == 0 for row in table.rows if row["retention"] == 1)
    assert any(gap["mean"] != 0 for gap in gaps)
    anatomy = found[2]  # by hand: a tenth of its groups by MIG
    kept = np.argsort(-anatomy.initial.mig)[: -(-len(anatomy.initial.mig) // 10)]
    by_hand = diagnostics_tables.mean_cosine(anatomy.representatives[kept])
    assert measures[2]["representatives 10 MIG"] == pytest.approx(by_hand, abs=1e-12)


def test_table_8_has_every_token_once(found):
    for a in found:
        table = diagnostics_tables.table_8(a)
        n = len(a.subject.example.context)
        assert sum(row["final"] for row in table.rows) == sum(row["initial"] for row in table.rows) == n
        assert f"final sizes sum to {n} of n = {n} tokens" in table.notes[1]
        assert " ".join(" ".join(row["text"] for row in table.rows).split()) == " ".join(
            a.subject.record.context_text().split()
        )
        assert sum(row["P"] for row in table.rows) == pytest.approx(a.segment[-1] + 1, abs=1e-5)
        assert any(row["holds answer"] for row in table.rows) and any(row["after"] for row in table.rows)


def test_the_merge_weight_of_everything_is_one_a_group(found):
    for a in found:
        everything = dataclasses.replace(a.subject, answer=np.ones_like(a.subject.answer))
        measure = diagnostics_tables.measure_answer_weight(dataclasses.replace(a, subject=everything))
        assert [measure[name] for name in diagnostics_tables.ANSWER_WEIGHT] == pytest.approx([1, 1, 1], abs=1e-5)
        assert measure["stays"] == 1 and measure["COMI behind"] == measure["COMI"]


def test_the_merge_weight_of_an_answer_by_hand(found):
    a = found[0]
    marked = np.zeros(len(a.weights), bool)
    marked[0] = True
    one = dataclasses.replace(a, subject=dataclasses.replace(a.subject, answer=marked))
    measure = diagnostics_tables.measure_answer_weight(one)
    assert measure["COMI"] == pytest.approx(float(a.weights[0])) and measure["mean"] == 1 / a.final.sizes[0]
    assert measure["equal"] == 1 / RATE and measure["equal behind"] == 1
    assert measure["mean size"] == a.final.sizes[0]


def test_the_largest_cosine_is_that_of_all_pairs(monkeypatch):
    monkeypatch.setattr(diagnostics_memory, "ROWS", 2)
    vectors = np.random.default_rng(0).standard_normal((5, 3)).astype(np.float32)
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    by_hand = np.mean([max(unit[i] @ unit[j] for j in range(5) if j != i) for i in range(5)])
    assert diagnostics_memory.largest_cosine(vectors) == pytest.approx(float(by_hand), abs=1e-6)
    assert diagnostics_memory.largest_cosine(vectors[:1]) == 0.0


def test_memories_are_those_that_the_public_api_gives(model):
    table = diagnostics_memory.memory_redundancy({"COMI": model, "again": model}, RECORDS, RATE)
    texts = [r.context_text() for r in RECORDS], [r.prompt for r in RECORDS]
    given = [diagnostics_memory.measure_memory(c.vectors) for c in model.compress(*texts, rate=RATE)]
    for row in table.rows:
        assert row["mean cosine"]["mean"] == pytest.approx(np.mean([g["mean cosine"] for g in given]), abs=1e-6)
    assert [row["system"] for row in table.rows] == ["COMI", "again"] and 1 < table.rows[0]["ratio"] < RATE + 1


# --- figure 1 ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", tiny_models.BACKBONES)
def test_the_attention_mass_is_that_of_transformers(kind, tmp_path):
    torch = pytest.importorskip("torch")
    twin, shape = tiny_models.transformers_model(kind), tiny_models.BACKBONES[kind]
    twin.save_pretrained(tmp_path)
    params = jax.tree.map(jnp.asarray, hf.load_backbone(tmp_path, shape))
    rng, lengths = np.random.default_rng(0), [(23, 9), (40, 3), (1, 11)]
    context, query = (rng.integers(3, 60, (3, width)).astype(np.int32) for width in (40, 11))
    counts = np.array(lengths, np.int32)
    nothing = np.zeros((3, 1), np.int32)
    arrays = (context, counts[:, 0], query, counts[:, 1], nothing, nothing[:, 0], np.ones(3, np.int32))
    batch = Batch(*map(jnp.asarray, arrays))
    mass = np.asarray(diagnostics_attention.attention_mass(params, batch, shape, "float32", lm.Runtime()))
    for row, (n, k) in enumerate(lengths):
        ids = np.concatenate([context[row, :n], query[row, :k]])
        with torch.no_grad():
            seen = twin(torch.tensor(ids[None], dtype=torch.long), output_attentions=True).attentions
        expected = torch.stack(seen)[:, 0, :, n:, :n].mean(dim=(0, 1, 2)).numpy()
        np.testing.assert_allclose(mass[row, :n], expected, atol=1e-5)
        assert not mass[row, n:].any()


def test_shares_of_the_top_tokens_and_without_sinks():
    mass = np.array([5.0, 0, 0, 0, 1, 3, 1, 0, 0, 0])
    assert diagnostics_attention.shares(mass, True)[0] == 0.5
    assert diagnostics_attention.shares(mass, False).tolist() == [0, 0, 0, 0, 0.2, 0.6, 0.2, 0, 0, 0]
    table = diagnostics_attention.summary_1a([mass, mass[:2]], sinks=False)
    assert table.rows[0]["mass, %"]["mean"] == pytest.approx(60) and table.rows[-1]["max"] == pytest.approx(100)
    assert "1 examples, 1 left out, of at most 4 tokens" in table.notes[0]
    with pytest.raises(diagnostics_attention.DiagnosisError, match="--no-sinks leaves no token"):
        diagnostics_attention.summary_1a([mass[:2]], sinks=False)


# --- the command ------------------------------------------------------------------------------------------------------


def run(world, output, *more):
    diagnose.main([f"--checkpoint={world.run}", "--data", str(world.dev), f"--output={output}", *more])


def test_every_table_is_printed_and_stored(world, tmp_path, capsys):
    beside = f"--beside={world.run / 'mean_pooling'}"
    run(world, tmp_path, "--table=all", "--rate=4", "--segment-sizes=16,32", beside)
    printed = capsys.readouterr().out
    assert "Redundancy of the memory" in printed
    for title in ("Figure 1a", "Figure 1b", "Table 5", "Table 6", "Table 8", "Merge weight", "Sensitivity"):
        assert title in printed
    assert "0.581" in printed and "not comparable with ours: other data and model" in printed
    stored = {path.stem: json.loads(path.read_text()) for path in tmp_path.glob("*.json")}
    assert stored.keys() == {path.stem for path in tmp_path.glob("*.png")} and len(stored) == len(diagnose.TABLES)
    assert all(table["account"]["rate"] == 4 and table["account"]["n"] == 6 for table in stored.values())
    assert [row["segment size"] for row in stored["segment_sizes_rate_4"]["rows"]] == [16, 32]
    assert len(stored["figure_1b"]["more"]["cosines"]) == 18
    mesh = {row["score"]: row["AUC, pooled"] for row in stored["table_5_rate_4"]["rows"] if row["groups"] == "initial"}
    model = Comi.load(world.run, batch_size=2)  # on one device, in other batches
    rows = records(map(json.loads, world.dev.read_text().splitlines()))
    made = sorted(anatomies(model, subjects(rows, model), 4), key=lambda a: a.subject.number)
    table = diagnostics_auc.summary_5([diagnostics_auc.measure_5(a) for a in made])
    for row in table.rows[: len(diagnostics_auc.SCORES)]:
        assert mesh[row["score"]] == pytest.approx(row["AUC, pooled"])


def test_the_base_encoder_is_that_of_the_language_model(world, tmp_path, capsys):
    run(world, tmp_path, "--table", "6", "--encoder=base")
    run(world, tmp_path, "--table", "6")
    base, trained = (
        json.loads((tmp_path / f"table_6{name}.json").read_text())["rows"][1]["by MIG"]["mean"]
        for name in ("_base", "")
    )
    assert base != trained
    model, specs = Comi.load(world.run), lm.specs(train_fixtures.backbone(), 2, embed=True, head=True)
    language_model = tiny_models.shaken(specs)
    encoder = {
        "embed": language_model["embed"],
        "norm": language_model["norm"],
        "layers": jax.tree.map(lambda x: x[:1], language_model["layers"]),
    }
    rows = records(map(json.loads, world.dev.read_text().splitlines()))
    params = model.params | {"encoder": encoder}
    measures = [diagnostics_tables.measure_6(a) for a in anatomies(model, subjects(rows, model), RATE, params)]
    assert base == pytest.approx(np.mean([row["representatives 25 MIG"] for row in measures]), abs=1e-5)
    capsys.readouterr()


@pytest.mark.parametrize(
    "more, message",
    [
        (["--table=7"], "there is no table '7'.*are: 1a, 1b, 5, 6, 8, answer-weight, terms, segments, memory, all"),
        (["--table=terms", "--set=compression.fine=false"], "compression.fine=false, so its merge has no terms"),
        (["--table=answer-wieght"], "there is no table 'answer-wieght'; the nearest are answer-weight"),
        (["--table=5", "--limit=0"], "--limit=0 leaves no records"),
        (["--table=5", "--rate=0"], "the rate is 0"),
        (["--table=8", "--example=7"], "--example=7 is not one of the 6 records"),
        (["--table=5", "--set=compression.coarse=false"], "compression.coarse=false, so its groups have no MIG"),
        (["--table=5", "--rate=32"], "no example with groups of both classes: 6 left out: 6 of a single group"),
        (["--table=segments", "--segment-sizes=2", "--rate=4"], "--segment-sizes has 2, below the rate 4"),
        (["--table=segments", "--segment-sizes=big"], "--segment-sizes=big must be whole numbers"),
        (["--table=1a", "--base=none"], "none is not a model's folder; pass --base=DIR"),
        (["--table=answer-weight", "--set=data.on_long=truncate", "--set=data.max_context=1"],
         "no example has an answer in its context: 6 left out: 6 with the answers only in what was truncated"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_one_sentence(world, tmp_path, more, message):
    with pytest.raises(SystemExit, match=message):
        run(world, tmp_path / "out", *more)
    assert not list((tmp_path / "out").glob("*.json"))


def test_a_folder_that_is_no_checkpoint_is_refused(world, tmp_path):
    for folder in (tmp_path, world.lm):
        with pytest.raises(SystemExit, match="is not a COMI checkpoint"):
            diagnose.main([f"--checkpoint={folder}", f"--data={world.dev}", "--table=5"])


def test_the_letters_that_normalising_removes_are_ascii_punctuation():
    assert answer_spans.normalize_with_origins(string.punctuation)[0] == ""
