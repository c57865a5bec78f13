"""Question answering in plain English, generated from a seed: similar facts about people, unseen people in evaluation.

A context states `facts` facts from a small grid of people x relations, so that several others are about the same
person and several about the same relation; people share first or last names. Each person belongs to one split
permanently, and a context has people of one split only:

    split = "eval" if crc32(name) % 8 == 0 else "train"
"""

import zlib
from collections.abc import Iterator, Sequence
from functools import cache
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from comi_jax.data.records import Record

EOS, PAD = "<|endoftext|>", "<|pad|>"
EVAL_SHARE = 8  # one person in EVAL_SHARE is reserved for evaluation
VALUES = 20  # per relation

FIRST = (
    "Mara Anna Boris Carla David Elena Felix Greta Hugo Irene Jonas Karen Laura Martin Nadia Oscar Paula Rosa Simon "
    "Tanya Victor Wanda Yusuf Zelda"
).split()
LAST = (
    "Quell Adler Bauer Costa Duval Engel Fabre Garner Holt Ibsen Jensen Keller Lund Moreau Novak Olsen Parker Reyes "
    "Santos Torres Vogel Weber Yates Zeller"
).split()
OPENINGS = ("We know that", "It seems that", "I heard that", "Everyone says that", "They told me that")


class Relation(NamedTuple):
    """One kind of fact about a person: its values, clauses that state a value, questions that ask for it."""

    values: tuple[str, ...]
    facts: tuple[str, ...]
    questions: tuple[str, ...]


def _relation(values: str, facts: Sequence[str], questions: Sequence[str]) -> Relation:
    return Relation(tuple(values.split()), tuple(facts), tuple(questions))


RELATIONS = {
    "town": _relation(
        "Lisbon Paris London Berlin Madrid Vienna Prague Dublin Athens Warsaw Oslo Rome Zurich Geneva Boston Denver "
        "Cairo Tokyo Delhi Lima",
        ("the home town of {p} is {v}.", "{p} lives in {v}."),
        ("What is the home town of {p}?", "Where does {p} live?"),
    ),
    "job": _relation(
        "baker doctor farmer lawyer nurse pilot plumber sailor soldier tailor teacher waiter writer painter dentist "
        "butcher barber chemist judge miner",
        ("the job of {p} is {v}.", "{p} became a {v}."),
        ("What is the job of {p}?", "What did {p} become?"),
    ),
    "colour": _relation(
        "red blue green yellow orange purple black white brown grey pink golden silver violet crimson scarlet amber "
        "olive beige indigo",
        ("the favourite colour of {p} is {v}.", "{p} always wears {v}."),
        ("What is the favourite colour of {p}?", "What does {p} wear?"),
    ),
    "pet": _relation(
        "cat dog horse rabbit parrot hamster turtle goat pony lizard snake spider canary goose duck sheep donkey "
        "ferret mouse pigeon",
        ("the pet of {p} is a {v}.", "{p} keeps a {v}."),
        ("What is the pet of {p}?", "What does {p} keep?"),
    ),
    "instrument": _relation(
        "piano violin guitar flute trumpet drum harp cello organ banjo clarinet oboe tuba lute bassoon trombone viola "
        "fiddle horn bugle",
        ("the instrument of {p} is the {v}.", "{p} plays the {v}."),
        ("What is the instrument of {p}?", "What does {p} play?"),
    ),
    "employer": _relation(
        "Siemens Philips Nokia Toyota Sony Boeing Shell Bayer Pfizer Google Intel Oracle Amazon Nestle Danone Lego "
        "Adidas Volvo Fiat Renault",
        ("the employer of {p} is {v}.", "{p} works for {v}."),
        ("What is the employer of {p}?", "Who does {p} work for?"),
    ),
    "sport": _relation(
        "tennis football rugby golf hockey cricket boxing rowing sailing skiing judo karate chess polo squash cycling "
        "running swimming fencing archery",
        ("the favourite sport of {p} is {v}.", "{p} really enjoys {v}."),
        ("What is the favourite sport of {p}?", "What does {p} enjoy?"),
    ),
    "language": _relation(
        "English French German Spanish Italian Russian Polish Czech Dutch Danish Swedish Greek Turkish Arabic Hebrew "
        "Hindi Chinese Japanese Korean Latin",
        ("the mother tongue of {p} is {v}.", "{p} speaks {v}."),
        ("What is the mother tongue of {p}?", "What does {p} speak?"),
    ),
}


class Example(NamedTuple):
    """One context and, for each fact in order, its (question, answer) and (person, relation, value)."""

    context: str
    pairs: tuple[tuple[str, str], ...]
    facts: tuple[tuple[str, str, str], ...]


def split_of(person: str) -> str:
    """The split of a person, "train" or "eval"; a fixed function of the name."""
    return "eval" if zlib.crc32(person.encode()) % EVAL_SHARE == 0 else "train"


@cache
def _people(split: str) -> tuple[tuple[str, str], ...]:
    return tuple((f, s) for f in FIRST for s in LAST if split_of(f"{f} {s}") == split)


@cache
def _namesakes(split: str, person: tuple[str, str], place: int) -> tuple[tuple[str, str], ...]:
    return tuple(other for other in _people(split) if other[place] == person[place])


def cast_of(rng: np.random.Generator, split: str, count: int) -> list[str]:
    """`count` people of a split; after the first, about 3 in 4 share a first or last name with an earlier one."""
    chosen: list[tuple[str, str]] = []
    while len(chosen) < count:
        pool = _people(split)
        if chosen and rng.random() < 0.75:
            pool = _namesakes(split, chosen[rng.integers(len(chosen))], int(rng.integers(2)))
        person = pool[rng.integers(len(pool))]
        if person not in chosen:
            chosen.append(person)
    return [" ".join(person) for person in chosen]


def _check(split: str, facts: int, people: int, relations: int) -> None:
    if split not in ("train", "eval"):
        raise ValueError(f"synthetic split {split!r} is unknown: use 'train' or 'eval'")
    if not 1 <= relations <= len(RELATIONS):
        raise ValueError(f"synthetic data: relations={relations} must lie between 1 and {len(RELATIONS)}")
    if not 1 <= people <= VALUES or not 1 <= facts <= people * relations:
        raise ValueError(
            f"synthetic data: facts={facts} must lie between 1 and people x relations = {people} x {relations}, "
            f"and people between 1 and {VALUES}, the number of different values"
        )


def examples(
    split: str, seed: int, *, facts: int = 16, people: int = 5, relations: int = 4, notes: float = 0.0
) -> Iterator[Example]:
    """An endless stream of contexts, a pure function of its arguments.

    Each context states `facts` of the `people` x `relations` pairs, in random order. Within a relation all values
    differ, so each question has one correct answer, and a guess from the relation alone is correct one time in VALUES.
    Facts and questions are written as short notes ("town Mara Quell Lisbon.") with probability `notes`.

    Raises:
        ValueError: an unknown split, `people` or `relations` out of range, or more facts than people x relations.
    """
    _check(split, facts, people, relations)
    rng = np.random.default_rng([seed, zlib.crc32(split.encode())])

    def pick(choices: Sequence[str], note: str) -> str:
        return note if rng.random() < notes else choices[int(rng.integers(len(choices)))]

    while True:
        cast = cast_of(rng, split, people)
        kinds = [list(RELATIONS)[i] for i in rng.permutation(len(RELATIONS))[:relations]]
        values = {kind: rng.permutation(VALUES)[:people] for kind in kinds}
        sentences, pairs, triples = [], [], []
        for cell in rng.permutation(people * relations)[:facts]:
            who, kind = int(cell) // relations, kinds[int(cell) % relations]
            relation, person = RELATIONS[kind], cast[who]
            value = relation.values[values[kind][who]]
            clause = f"{OPENINGS[rng.integers(len(OPENINGS))]} {relation.facts[rng.integers(len(relation.facts))]}"
            sentences.append(pick((clause,), f"{kind} {{p}} {{v}}.").format(p=person, v=value))
            pairs.append((pick(relation.questions, f"{kind} {{p}}?").format(p=person), value))
            triples.append((person, kind, value))
        yield Example(" ".join(sentences), tuple(pairs), tuple(triples))


def records(split: str, count: int, seed: int, *, questions: int | None = None, **difficulty: int) -> list[Record]:
    """`count` records of a split; up to `questions` consecutive ones, with the facts in random order, share a context.

    `questions` defaults to 16 for training, where a context is encoded once for all of them, and to 4 for evaluation,
    where more contexts measure better. `difficulty`: facts, people, relations; see `examples`, also for the errors.
    """
    questions = (16 if split == "train" else 4) if questions is None else questions
    if count < 1 or questions < 1:
        raise ValueError(f"synthetic data: count={count} and questions={questions} must be at least 1")
    order = np.random.default_rng([seed, zlib.crc32(split.encode()), 1])
    out: list[Record] = []
    for example in examples(split, seed, **difficulty):
        for i in order.permutation(len(example.pairs))[: min(questions, count - len(out))]:
            question, answer = example.pairs[i]
            out.append(Record(context=(example.context,), prompt=question, answers=(answer,)))
        if len(out) == count:
            break
    return out


def corpus(seed: int, count: int, **difficulty: Any) -> list[str]:
    """`count` texts of the training split: a context, then a question, its answer and EOS for each fact."""
    return [
        example.context + "".join(f" {question} {answer}{EOS}" for question, answer in example.pairs)
        for example in islice(examples("train", seed, **difficulty), count)
    ]


def train_tokenizer(texts: Sequence[str], vocab_size: int) -> Any:
    """A byte-level BPE of `vocab_size` entries including end-of-sequence and padding tokens; it can encode any text.

    A space is prepended to every text, so that a word is the same token at the start of an answer as within a
    sentence: context, question and answer are tokenised separately.
    """
    from transformers import PreTrainedTokenizerFast  # slow to import, and only needed for pretraining

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(
        (t.replace(EOS, "") for t in texts),
        trainers.BpeTrainer(
            vocab_size=vocab_size, special_tokens=[EOS, PAD], initial_alphabet=alphabet, show_progress=False
        ),
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=EOS, pad_token=PAD, model_max_length=2048)
