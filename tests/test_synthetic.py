"""comi_jax.data.synthetic: reproducible, no leak between splits, hard distractors, answers nobody can guess."""

from collections import Counter
from itertools import islice

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from comi_jax.data import synthetic

TRAIN = list(islice(synthetic.examples("train", 0), 400))
EVAL = list(islice(synthetic.examples("eval", 0), 100))


def people(examples):
    return {person for example in examples for person, _, _ in example.facts}


@pytest.fixture(scope="module")
def tokenizer():
    return synthetic.train_tokenizer(synthetic.corpus(0, 300), 1024)


def test_records_are_a_function_of_their_arguments():
    assert synthetic.records("train", 50, 3) == synthetic.records("train", 50, 3)
    assert synthetic.records("train", 50, 3) != synthetic.records("train", 50, 4)
    assert synthetic.corpus(1, 5) == synthetic.corpus(1, 5)


def test_every_possible_person_is_in_one_split_and_the_splits_share_none():
    everyone = {f"{first} {last}" for first in synthetic.FIRST for last in synthetic.LAST}
    held_out = {person for person in everyone if synthetic.split_of(person) == "eval"}
    assert 0.08 < len(held_out) / len(everyone) < 0.17
    assert people(EVAL) <= held_out
    assert people(TRAIN).isdisjoint(held_out)
    assert {name for person in held_out for name in person.split()} == set(synthetic.FIRST + synthetic.LAST)


def test_no_held_out_name_occurs_in_training_text():
    text = " ".join(synthetic.corpus(0, 200) + [r.context[0] + r.prompt for r in synthetic.records("train", 500, 1)])
    assert not [
        f"{f} {s}"
        for f in synthetic.FIRST
        for s in synthetic.LAST
        if synthetic.split_of(f"{f} {s}") == "eval" and f"{f} {s}" in text
    ]


def test_every_fact_has_distractors_of_its_person_and_of_its_relation():
    same_person, same_relation, near_names = [], [], []
    for example in EVAL:
        assert len(example.facts) == len(set(example.facts)) == 16
        for person, relation, _ in example.facts:
            same_person.append(sum(p == person and r != relation for p, r, _ in example.facts))
            same_relation.append(sum(p != person and r == relation for p, r, _ in example.facts))
            near_names.append(any(p != person and set(p.split()) & set(person.split()) for p, _, _ in example.facts))
    assert np.mean(same_person) > 2 and np.mean(np.array(same_person) >= 1) > 0.98
    assert np.mean(same_relation) > 2.5 and np.mean(np.array(same_relation) >= 1) > 0.98
    assert np.mean(near_names) > 0.7


def test_each_question_has_one_answer_stated_once_in_the_context():
    for example in EVAL:
        assert len({question for question, _ in example.pairs}) == 16
        for (question, answer), (person, relation, value) in zip(example.pairs, example.facts, strict=True):
            assert answer == value and person in question
            stated = [s for s in example.context.split(". ") if person in s and s.rstrip(".").split()[-1] == value]
            assert len(stated) == 1
            assert Counter((p, r) for p, r, _ in example.facts)[person, relation] == 1


def test_no_guess_without_the_context_is_right_more_than_once_in_twenty():
    for relation in synthetic.RELATIONS.values():
        assert len(set(relation.values)) == len(relation.values) == synthetic.VALUES == 20
        assert len(set(relation.facts)) >= 2 and len(set(relation.questions)) >= 2
    pairs = [fact[1:] for example in TRAIN for fact in example.facts]
    best = {
        relation: Counter(v for r, v in pairs if r == relation).most_common(1)[0][1] for relation in synthetic.RELATIONS
    }
    held_out = [fact[1:] for example in islice(synthetic.examples("eval", 1), 400) for fact in example.facts]
    assert sum(best.values()) / len(pairs) < 0.08  # the luckiest value of each relation, chosen with hindsight
    common = {r: Counter(v for r2, v in pairs if r2 == r).most_common(1)[0][0] for r in synthetic.RELATIONS}
    assert np.mean([common[r] == v for r, v in held_out]) < 0.06


def test_consecutive_records_share_a_context():
    records = synthetic.records("eval", 40, 0, questions=4)
    assert len(records) == 40 and len({r.context for r in records}) == 10
    assert all(len({r.context for r in records[i : i + 4]}) == 1 for i in range(0, 40, 4))


def test_half_of_the_contexts_have_160_tokens_and_words_are_one_token(tokenizer):
    lengths = [len(tokenizer(example.context).input_ids) for example in EVAL]
    assert np.median(lengths) >= 160 and min(lengths) >= 140
    words = [v for relation in synthetic.RELATIONS.values() for v in relation.values] + synthetic.FIRST + synthetic.LAST
    assert all(len(tokenizer(word).input_ids) == 1 for word in words)
    assert tokenizer("Lisbon").input_ids[0] in tokenizer(EVAL[0].context + " Lisbon").input_ids


def test_tokenizer_round_trips_any_text_and_survives_saving(tokenizer, tmp_path):
    text = "Zoë's 3 cafés — naïve: 東京?\n"
    assert tokenizer.decode(tokenizer(text).input_ids).strip(" ") == text
    tokenizer.save_pretrained(tmp_path)
    again = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    assert again(text).input_ids == tokenizer(text).input_ids
    assert (again.eos_token, again.pad_token) == (synthetic.EOS, synthetic.PAD)
    assert synthetic.train_tokenizer(synthetic.corpus(0, 300), 1024).get_vocab() == tokenizer.get_vocab()


@pytest.mark.parametrize(
    "split, difficulty, message",
    [
        ("test", {}, "'test' is unknown"),
        ("train", {"facts": 30}, "facts=30"),
        ("eval", {"relations": 9}, "relations=9"),
    ],
)
def test_what_cannot_be_made_is_refused(split, difficulty, message):
    with pytest.raises(ValueError, match=message):
        synthetic.records(split, 1, 0, **difficulty)
