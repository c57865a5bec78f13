"""comi_jax.data.synthetic_documents and the words of generated data: answers need what they claim to need."""

from collections import Counter
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

from comi_jax import pretrain
from comi_jax.data import generated, synthetic
from comi_jax.data import synthetic_documents as documents
from comi_jax.data.synthetic_documents import Difficulty, examples
from comi_jax.errors import ConfigError
from comi_jax.weights.tokenizer import load_tokenizer

DEFAULT = Difficulty()
TRAIN = list(islice(examples("train", 0, DEFAULT), 150))
EVAL = list(islice(examples("eval", 0, DEFAULT), 60))


def states(document, fact):
    """The sentences of a document that state a fact."""
    clauses = {wording.format(p=fact.person, v=fact.value) for wording in synthetic.RELATIONS[fact.relation].facts}
    sentences = [f"{sentence.rstrip('.')}." for sentence in document.split(". ")]
    return [s for s in sentences if s in clauses or s.partition(" that ")[2] in clauses]


def test_records_are_a_function_of_their_arguments():
    once, again = (documents.records("train", 40, 3) for _ in range(2))
    assert once == again != documents.records("train", 40, 4)
    assert len(once) == 40 and [len({r.context for r in once[i : i + 16]}) for i in (0, 16)] == [1, 1]
    shared = documents.records("eval", 40, 0)
    assert len(shared) == 40 and len({r.context for r in shared}) == 10


def test_a_context_has_the_documents_facts_and_repetitions_that_were_asked_for():
    for example in TRAIN[:40] + EVAL[:20]:
        told = Counter(fact for stated in example.facts for fact in stated)
        assert len(told) == 64 and sum(told.values()) == 80 and max(told.values()) == 2
        assert len(example.documents) == len(example.facts) == 4
        assert all(len(set(stated)) == 16 for stated in example.facts)
        for document, stated in zip(example.documents, example.facts, strict=True):
            count = Counter(stated)
            assert len(document.split(". ")) == len(stated)
            for fact, times in count.items():
                found = states(document, fact)
                assert len(found) == len(set(found)) == times  # repetitions are in other words
                assert not any(states(other, fact) for other in example.documents if other != document)


def test_every_answer_is_in_the_context_and_in_one_fact_alone():
    for example in EVAL:
        stated = {fact for facts in example.facts for fact in facts}
        values = Counter((fact.relation, fact.value) for fact in stated)
        for question in example.one_hop + example.two_hop:
            assert set(question.needs) <= stated and question.answer == question.needs[-1].value
            assert all(values[fact.relation, fact.value] == 1 for fact in question.needs)
            assert any(states(document, question.needs[-1]) for document in example.documents)
        for question in example.one_hop:
            assert question.needs[0].person in question.text


def test_a_two_hop_question_needs_two_facts_that_no_document_has_both():
    for example in TRAIN[:40] + EVAL[:20]:
        for question in example.two_hop:
            bridge, fact = question.needs
            assert bridge.person == fact.person and bridge.relation != fact.relation
            assert bridge.value in question.text and bridge.person not in question.text
            assert question.answer not in question.text
            assert not any(bridge in stated and fact in stated for stated in example.facts)
    assert min(len(example.two_hop) for example in TRAIN) >= 96


def test_no_question_is_about_the_people_of_a_distractor():
    for example in EVAL:
        asked = {fact for question in example.one_hop + example.two_hop for fact in question.needs}
        people = {fact.person for fact in asked}
        unasked = [stated for stated in example.facts if not asked & set(stated)]
        assert len(unasked) == 1 and len(asked) == 48
        assert people.isdisjoint(fact.person for fact in unasked[0])


def test_the_splits_share_no_person():
    for split, made in (("train", TRAIN), ("eval", EVAL)):
        people = {fact.person for example in made for stated in example.facts for fact in stated}
        assert {synthetic.split_of(person) for person in people} == {split}


def test_contexts_have_about_700_tokens_and_fit_into_800():
    tokenizer = load_tokenizer(Path(pretrain.__file__).parent / "tiny_lm")
    lengths = [len(tokenizer("\n".join(example.documents)).input_ids) for example in TRAIN + EVAL]
    assert 690 < np.mean(lengths) < 730 and min(lengths) > 600 and max(lengths) <= 800
    questions = [q.text for example in EVAL for q in example.one_hop + example.two_hop]
    assert max(map(len, tokenizer(questions).input_ids)) <= 20


def test_the_fraction_of_two_hop_questions_is_the_one_asked_for():
    rng = np.random.default_rng(0)
    for wanted in (0.0, 0.5, 1.0):
        chosen = [q for example in EVAL for q in documents.choose(rng, example, 16, wanted)]
        assert len(chosen) == 16 * len(EVAL)
        assert abs(np.mean([len(q.needs) == 2 for q in chosen]) - wanted) < 0.05
    everything = documents.choose(rng, EVAL[0], 1000, 0.5)
    assert sorted(everything) == sorted(EVAL[0].one_hop + EVAL[0].two_hop)
    assert len(documents.choose(rng, EVAL[0], 1000, 0.0)) == len(EVAL[0].one_hop)


def test_no_guess_from_the_relation_alone_is_right_more_than_once_in_twelve():
    answers = Counter((q.needs[-1].relation, q.answer) for example in TRAIN for q in example.two_hop)
    best = sum(max(n for (r, _), n in answers.items() if r == relation) for relation in synthetic.RELATIONS)
    assert best / sum(answers.values()) < 0.08


@pytest.mark.parametrize(
    "difficulty",
    [
        {"facts": 8, "relations": 2, "documents": 2, "distractors": 0, "repeated": 8},
        {"facts": 12, "relations": 3, "documents": 4, "distractors": 2, "repeated": 0},
        {"facts": 80, "documents": 20, "distractors": 3, "repeated": 5},
        {"facts": 24, "relations": 8, "documents": 1, "distractors": 0, "two_hop": 0.0},
    ],
)
def test_other_difficulties(difficulty):
    wanted = Difficulty(**difficulty)
    for example in islice(examples("eval", 1, wanted), 10):
        assert len({fact for stated in example.facts for fact in stated}) == wanted.facts
        assert sum(map(len, example.facts)) == wanted.facts + wanted.repeated
        assert len(example.documents) == wanted.documents and all(example.documents)
        assert len(example.two_hop) > 0 or wanted.documents - wanted.distractors == 1
        assert not [q for q in example.two_hop if any(set(q.needs) <= set(stated) for stated in example.facts)]


def test_a_word_names_options():
    assert generated.records("synthetic-documents", "eval", 8, 0) == documents.records("eval", 8, 0)
    word = "synthetic-documents:two_hop=1:facts=32:documents=2:distractors=0:repeated=4:questions=2"
    made = generated.records(word, "eval", 8, 0)
    assert len({r.context for r in made}) == 4 and all(len(r.context) == 2 for r in made)
    assert all(documents.DESCRIBED in r.prompt for r in made)
    assert generated.records("synthetic:facts=8", "train", 3, 5) == synthetic.records("train", 3, 5, facts=8)
    assert generated.is_generated((word,)) and not generated.is_generated(("a.jsonl", "b.jsonl"))


@pytest.mark.parametrize(
    "word, message",
    [
        ("synthetic-documents:fact=64", "unknown option 'fact'; the nearest is facts; there are: questions, facts"),
        ("synthetic-documents:facts=many", "facts is 'many'; it must be a whole number"),
        ("synthetic-documents:two_hop", "two_hop is ''; it must be a number"),
        ("synthetic-documents:two_hop=nan", "two_hop=nan must be between 0 and 1"),
        ("synthetic-documents:facts=62", "facts=62 must be a multiple of relations=4 from 4 to 80"),
        ("synthetic-documents:documents=2", "two_hop=0.5 must be 0, as its two facts need two documents"),
        ("synthetic-documents:distractors=4", "distractors=4 must be from 0 to 3"),
        ("synthetic-documents:repeated=65", "repeated=65 must be from 0 to facts=64"),
        ("synthetic-documents:questions=0", "questions=0 must be at least 1"),
        ("synthetic:facts=30", "facts=30"),
    ],
)
def test_what_cannot_be_made_is_refused_in_one_sentence(word, message):
    with pytest.raises(ConfigError, match=message) as error:
        generated.records(word, "train", 1, 0)
    assert "\n" not in str(error.value)


def test_generated_data_is_not_mixed_with_files():
    with pytest.raises(ConfigError, match="cannot be mixed"):
        generated.is_generated(("a.jsonl", "synthetic-documents:two_hop=1"))
