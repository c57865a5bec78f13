"""A harder generated set: several documents in a context, facts that are stated twice, questions that need two facts.

The facts, people and splits are those of ``synthetic``. A two-hop question names a person by another fact, which stands
in another document:

    Where does Mara Quell live?                               one hop
    What is the pet of the person who lives in Oslo?          two: "Mara Quell lives in Oslo", then her pet
"""

import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from comi_jax.data import synthetic
from comi_jax.data.records import Record
from comi_jax.data.synthetic import OPENINGS, RELATIONS, VALUES

DESCRIBED = "the person who"  # before the clause of a fact: stands for a name in two-hop questions


class Fact(NamedTuple):
    person: str
    relation: str
    value: str


class Question(NamedTuple):
    """A question, its answer, and the facts that it needs: one, or two of one person from different documents, of which
    the second holds the answer."""

    text: str
    answer: str
    needs: tuple[Fact, ...]


class Example(NamedTuple):
    """The documents of a context, the facts that each states (one that is stated twice: twice), and its questions."""

    documents: tuple[str, ...]
    facts: tuple[tuple[Fact, ...], ...]
    one_hop: tuple[Question, ...]
    two_hop: tuple[Question, ...]


@dataclass(frozen=True)
class Difficulty:
    """What a context has; with the defaults, about 700 tokens of the bundled tokenizer.

    Raises:
        ValueError: a value out of its range.
    """

    facts: int = 64  # different ones; each person has a fact of each relation
    relations: int = 4
    documents: int = 4
    distractors: int = 1  # of the documents: about people of their own, whom no question is about
    repeated: int = 16  # facts that their document states a second time, in other words
    two_hop: float = 0.5  # fraction of two-hop questions

    def __post_init__(self) -> None:
        _require(2 <= self.relations <= len(RELATIONS), "relations", self.relations, f"between 2 and {len(RELATIONS)}")
        _require(
            self.facts % self.relations == 0 and 1 <= self.people <= VALUES, "facts", self.facts,
            f"a multiple of relations={self.relations} from {self.relations} to {VALUES * self.relations}",
        )  # fmt: skip
        _require(1 <= self.documents <= self.people, "documents", self.documents, f"between 1 and {self.people} people")
        _require(
            0 <= self.distractors < self.documents, "distractors", self.distractors, f"from 0 to {self.documents - 1}"
        )
        _require(0 <= self.repeated <= self.facts, "repeated", self.repeated, f"from 0 to facts={self.facts}")
        _require(0.0 <= self.two_hop <= 1.0, "two_hop", self.two_hop, "between 0 and 1")
        _require(
            self.two_hop == 0.0 or self.documents - self.distractors >= 2, "two_hop", self.two_hop,
            "0, as its two facts need two documents that are no distractors",
        )  # fmt: skip

    @property
    def people(self) -> int:
        return self.facts // self.relations

    @property
    def others(self) -> int:
        """The number of people whom no question is about: their documents are as long as the others."""
        return max(1, round(self.people * self.distractors / self.documents)) if self.distractors else 0


def _require(condition: bool, name: str, value: int | float, valid: str) -> None:
    if not condition:
        raise ValueError(f"synthetic-documents: {name}={value} must be {valid}")


def examples(split: str, seed: int, difficulty: Difficulty) -> Iterator[Example]:
    """An endless stream of contexts, a pure function of its arguments.

    Within a relation all values of a context differ, so that a question has one answer and a fact describes one person.
    The facts of a person are dealt to the documents in turn, so that everyone is in at least two of them (but those of
    the distractors, which are dealt to the distractors), and documents have equally many facts, give or take one.

    Raises:
        ValueError: an unknown split.
    """
    if split not in ("train", "eval"):
        raise ValueError(f"synthetic-documents: split {split!r} is unknown: use 'train' or 'eval'")
    rng = np.random.default_rng([seed, zlib.crc32(split.encode()), 2])
    asked = difficulty.documents - difficulty.distractors
    while True:
        cast = synthetic.cast_of(rng, split, difficulty.people)
        cast = [cast[i] for i in rng.permutation(len(cast))]
        kinds = [list(RELATIONS)[i] for i in rng.permutation(len(RELATIONS))[: difficulty.relations]]
        values = {kind: rng.permutation(VALUES)[: len(cast)] for kind in kinds}
        facts = [
            [Fact(who, kind, RELATIONS[kind].values[values[kind][n]]) for kind in rng.permutation(kinds).tolist()]
            for n, who in enumerate(cast)
        ]
        near, far = facts[difficulty.others :], facts[: difficulty.others]
        dealt = _deal(near, asked) + _deal(far, difficulty.distractors)
        twice = set(rng.permutation(difficulty.facts)[: difficulty.repeated].tolist())
        number, stated = 0, []
        for document in dealt:
            stated.append([(fact, number + i in twice) for i, fact in enumerate(document)])
            number += len(document)
        texts = [_document(rng, document) for document in stated]
        where = {fact: n for n, document in enumerate(dealt) for fact in document}
        one = tuple(_question(rng, (fact,)) for person in near for fact in person)
        two = tuple(
            _question(rng, (bridge, fact))
            for person in near for bridge in person for fact in person if where[bridge] != where[fact]
        )  # fmt: skip
        order = rng.permutation(len(texts))
        told = [tuple(fact for fact, again in document for _ in range(1 + again)) for document in stated]
        yield Example(tuple(texts[i] for i in order), tuple(told[i] for i in order), one, two)


def _deal(people: list[list[Fact]], documents: int) -> list[list[Fact]]:
    """The facts, person by person, to the documents in turn."""
    facts = [fact for person in people for fact in person]
    return [facts[n::documents] for n in range(documents)]


def _document(rng: np.random.Generator, facts: list[tuple[Fact, bool]]) -> str:
    """The sentences of a document in random order; a fact with True is stated twice, in different words."""
    sentences = []
    for fact, twice in facts:
        short = rng.random() < 0.5
        wording = 1 if short else int(rng.integers(2))
        sentences.append(_sentence(rng, fact, wording, short))
        if twice:
            sentences.append(_sentence(rng, fact, 1 - wording, short=False))
    return " ".join(sentences[i] for i in rng.permutation(len(sentences)))


def _sentence(rng: np.random.Generator, fact: Fact, wording: int, short: bool) -> str:
    """``fact`` in one of its two wordings, after an opening unless ``short``."""
    clause = RELATIONS[fact.relation].facts[wording].format(p=fact.person, v=fact.value)
    return clause if short else f"{OPENINGS[rng.integers(len(OPENINGS))]} {clause}"


def _question(rng: np.random.Generator, needs: tuple[Fact, ...]) -> Question:
    """A question for the last of ``needs``, whose person is named, or described by the first of two."""
    asked = needs[-1]
    who = asked.person
    if len(needs) == 2:
        who = RELATIONS[needs[0].relation].facts[1].format(p=DESCRIBED, v=needs[0].value).rstrip(".")
    wordings = RELATIONS[asked.relation].questions
    return Question(wordings[rng.integers(len(wordings))].format(p=who), asked.value, needs)


def choose(rng: np.random.Generator, example: Example, count: int, two_hop: float) -> list[Question]:
    """``count`` different questions of ``example`` in random order, or all of the kinds that are wanted if these are
    fewer; each is a two-hop one with probability ``two_hop``, as long as there are some of both."""
    left = [[pool[i] for i in rng.permutation(len(pool))] for pool in (example.one_hop, example.two_hop)]
    chosen: list[Question] = []
    while len(chosen) < count:
        hop = int(rng.random() < two_hop)
        if not left[hop]:
            if not left[1 - hop] or two_hop in (0.0, 1.0):
                break
            hop = 1 - hop
        chosen.append(left[hop].pop())
    return chosen


def records(
    split: str, count: int, seed: int, *, questions: int | None = None, **difficulty: int | float
) -> list[Record]:
    """``count`` records of a split; up to ``questions`` consecutive ones share a context, by default 16 for training,
    where a context is encoded once for all of them, and 4 for evaluation. ``difficulty``: see ``Difficulty``, also for
    the errors."""
    questions = (16 if split == "train" else 4) if questions is None else questions
    if count < 1 or questions < 1:
        raise ValueError(f"synthetic-documents: count={count} and questions={questions} must be at least 1")
    settings = Difficulty(**difficulty)  # pyright: ignore[reportArgumentType] (typed by the caller)
    order = np.random.default_rng([seed, zlib.crc32(split.encode()), 3])
    out: list[Record] = []
    for example in examples(split, seed, settings):
        chosen = choose(order, example, min(questions, count - len(out)), settings.two_hop)
        out += [Record(example.documents, question.text, (question.answer,)) for question in chosen]
        if len(out) == count:
            break
    return out
