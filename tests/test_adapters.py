"""Small records in the schemas of published sets become contexts, prompts and answers."""

import datetime
import json

import pytest

from comi_jax import overrides
from comi_jax.config import Config
from comi_jax.data import adapters
from comi_jax.data.records import DataError, Record, Refused, numbered_records
from comi_jax.errors import ConfigError

TITLES = ["Ed Wood (film)", "Scott Derrickson", "Nothing Said"]
SENTENCES = [["Ed Wood is a film.", " It was made in 1994."], ["Scott Derrickson is American.", "He directs."], []]
HOTPOT = {
    "id": "5a", "question": "Were they of one nationality?", "answer": "yes", "type": "comparison", "level": "hard",
    "supporting_facts": {"title": TITLES[:2], "sent_id": [0, 0]},
    "context": {"title": TITLES, "sentences": SENTENCES},
}  # fmt: skip
PAIRS = [list(pair) for pair in zip(TITLES, SENTENCES, strict=True)]
HOTPOT_FILE = HOTPOT | {"_id": "5a", "context": PAIRS, "supporting_facts": [[TITLES[0], 0]]}
TWO_WIKI = HOTPOT_FILE | {"evidences": [["Ed Wood", "director", "Tim Burton"]]}
HOTPOT_RECORD = Record(
    (
        "Document [1](Title: Ed Wood (film)) Ed Wood is a film. It was made in 1994.",
        "Document [2](Title: Scott Derrickson) Scott Derrickson is American. He directs.",
        "Document [3](Title: Nothing Said)",
    ),
    "Were they of one nationality?",
    ("yes",),
)
NQ = {
    "question": "who got the first nobel prize in physics",
    "answers": ["Wilhelm Conrad Röntgen", "Röntgen"],
    "ctxs": [
        {
            "id": "7",
            "title": "Nobel laureates",
            "text": "The first was W. C. Röntgen.",
            "isgold": True,
            "hasanswer": True,
        },
        {"id": "8", "title": "", "text": "Nothing of it.", "isgold": False, "score": 1.5, "hasanswer": False},
    ],
    "nq_annotated_gold": {"title": "Nobel laureates", "short_answers": ["Wilhelm Conrad Röntgen"]},
}
STORY = {
    "document": {
        "id": "0", "kind": "gutenberg", "url": "u", "word_count": 3, "start": "a", "end": "b",
        "summary": {"text": " Mark hunts.", "tokens": ["Mark"], "url": "u", "title": "T"}, "text": "\nMark went out.\n",
    },
    "question": {"text": "Who is he?", "tokens": ["Who"]},
    "answers": [{"text": "Mark the hunter", "tokens": ["Mark"]}, {"text": "Mark", "tokens": ["Mark"]}],
}  # fmt: skip
MUSIQUE = {
    "id": "2hop", "question": "Who rules it?", "question_decomposition": [], "answer": "Ada", "answerable": True,
    "paragraphs": [
        {"idx": 0, "title": "Isle", "paragraph_text": "It is ruled.", "is_supporting": True},
        {"idx": 1, "title": "Ada", "paragraph_text": "She rules.", "is_supporting": False},
    ],
    "answer_aliases": ["Queen Ada", "Ada"],
}  # fmt: skip
TRIVIA = {
    "question": "Who?", "question_id": "tc_1", "question_source": "s",
    "entity_pages": {"doc_source": ["W"], "filename": ["f"], "title": ["Page"], "wiki_context": ["Wiki text."]},
    "search_results": {"title": ["Found", "Empty"], "rank": [0, 1], "search_context": ["Web text.", ""]},
    "answer": {"value": "Bob", "aliases": ["Bobby", "Bob"], "normalized_value": "bob"},
}  # fmt: skip
LONGBENCH = {"input": "What pet?", "context": "A goat.", "answers": ["goat"], "length": 5, "all_classes": None}
OPTIONS = ["a cat", "a goat"]
QUALITY = {
    "article_id": "1", "set_unique_id": "1_A", "title": "T", "article": "A goat came.",
    "questions": [
        {"question": "What came?", "question_unique_id": "1", "options": OPTIONS, "gold_label": 2},
        {"question": "What did not?", "question_unique_id": "2", "options": OPTIONS, "gold_label": 1},
    ],
}  # fmt: skip
SQUAD = {"id": "1", "title": "T", "context": "A goat.", "question": "What?", "answers": {"text": ["goat", "goat", "A"]}}
QAS = [{"id": "1", "question": "What?", "answers": [{"text": "goat", "answer_start": 2}], "is_impossible": False}]
ARTICLE = {"title": "T", "paragraphs": [{"context": "A goat.", "qas": QAS}, {"context": "B.", "qas": QAS * 2}]}
FLAT = {"document": "Odo had a goat.", "summary": "A miller.", "question": "What?", "answers": ["a goat", "goat"]}
NEWS = {"document": "First one. NEWLINE_CHAR Again. ||||| \n Second one. |||||", "summary": "– Both say it. "}
ANSWERS = ("Mark the hunter", "Mark")

READ = {
    "hotpotqa on the hub": (HOTPOT, HOTPOT_RECORD),
    "hotpotqa as published": (HOTPOT_FILE, HOTPOT_RECORD),
    "2wikimqa as lists": (TWO_WIKI, HOTPOT_RECORD),
    "2wikimqa as JSON in a text": (TWO_WIKI | {"context": json.dumps(PAIRS)}, HOTPOT_RECORD),
    "2wikimqa as an object in a text": (TWO_WIKI | {"context": json.dumps(HOTPOT["context"])}, HOTPOT_RECORD),
    "nq": (
        NQ,
        Record(
            ("Document [1](Title: Nobel laureates) The first was W. C. Röntgen.", "Document [2] Nothing of it."),
            "who got the first nobel prize in physics",
            ("Wilhelm Conrad Röntgen", "Röntgen"),
        ),
    ),
    "narrativeqa": (STORY, Record(("\nMark went out.\n",), "Who is he?", ANSWERS)),
    "narrativeqa without the story": (
        STORY | {"document": STORY["document"] | {"text": None}},
        Record((" Mark hunts.",), "Who is he?", ANSWERS),
    ),
    "multinews": (NEWS, Record(("First one. \n Again.", "Second one."), adapters.SUMMARIZE, ("– Both say it.",))),
    "musique": (
        MUSIQUE,
        Record(
            ("Document [1](Title: Isle) It is ruled.", "Document [2](Title: Ada) She rules."),
            "Who rules it?",
            ("Ada", "Queen Ada"),
        ),
    ),
    "triviaqa": (
        TRIVIA,
        Record(
            ("Document [1](Title: Page) Wiki text.", "Document [2](Title: Found) Web text."), "Who?", ("Bob", "Bobby")
        ),
    ),
    "triviaqa without pages": (
        TRIVIA | {"entity_pages": {"title": [], "wiki_context": []}},
        Record(("Document [1](Title: Found) Web text.",), "Who?", ("Bob", "Bobby")),
    ),
    "longbench": (LONGBENCH, Record(("A goat.",), "What pet?", ("goat",))),
    "quality on the hub": (
        {"article": "A goat came.", "question": "What came?", "options": OPTIONS, "answer": 1, "hard": False},
        Record(("A goat came.",), "What came?\n(A) a cat\n(B) a goat", ("a goat",)),
    ),
    "squad": (SQUAD, Record(("A goat.",), "What?", ("goat", "A"))),
    "flat narrativeqa": (FLAT, Record(("Odo had a goat.",), "What?", ("a goat", "goat"))),
    "flat": ({"context": "A goat.", "question": "What?", "answer": "goat"}, Record(("A goat.",), "What?", ("goat",))),
    "flat number": ({"context": "1984", "question": "When?", "answer": "x"}, Record(("1984",), "When?", ("x",))),
    "flat list": (
        {"context": ["[1] a", "b"], "question": "q", "answers": "x", "id": 3},
        Record(("[1] a", "b"), "q", ("x",)),
    ),
    "flat with a note": ({"context": PAIRS, "question": "q", "answer": "yes", "summary": "note"}, None),
    "nq with an instruction": (NQ | {"input": "Answer this."}, None),
    "ours": ({"input": ["a", "b"], "prompt": "q", "answer": "x"}, Record(("a", "b"), "q", ("x",))),
}


@pytest.mark.parametrize("name", READ)
def test_a_schema_is_told_from_its_fields(name, tmp_path):
    fields, record = READ[name]
    if record is None:  # as without the field beside its schema
        record = adapters.adapt({name: value for name, value in fields.items() if name not in ("summary", "input")})
    assert adapters.adapt(fields) == record
    path = tmp_path / "x.jsonl"
    path.write_text("\n" + json.dumps(fields) + "\n")
    assert list(numbered_records(path, adapters.adapt)) == [(2, record)]


@pytest.mark.parametrize("schema", adapters.SCHEMAS)
def test_every_named_schema_reads_its_own_and_refuses_the_others(schema):
    own = {"comi": "ours", "hotpotqa": "hotpotqa as published", "2wikimqa": "2wikimqa as lists"}
    own |= {"quality": "quality on the hub"}
    name = own.get(schema, schema.removesuffix("-summary"))
    fields, record = READ[name]
    summary = Record((" Mark hunts.",), "Who is he?", ANSWERS)
    assert adapters.SCHEMAS[schema](fields) == (summary if schema.endswith("-summary") else record)
    family = {"hotpotqa": "wikimqa", "2wikimqa": "hotpotqa"}.get(schema, name)
    others = [other for other in READ if name.split()[0] not in other and family not in other and READ[other][1]]
    alike = {"flat": ("flat", "in a text"), "multinews": ("flat",)}.get(schema, ())
    others = [other for other in others if not any(word in other for word in alike)]
    assert len(others) >= 4
    for other in others:
        with pytest.raises(Refused, match="is missing|expected"):
            adapters.SCHEMAS[schema](READ[other][0])


def without(fields, name):
    return {key: value for key, value in fields.items() if key != name}


REFUSED = {
    "no answer": (without(HOTPOT_FILE, "answer"), 'field "answer" is missing; found "id", "question", "type"'),
    "not answerable": (MUSIQUE | {"answerable": False}, 'field "answerable" is false: the question has no answer'),
    "no span": (SQUAD | {"answers": {"text": [], "answer_start": []}}, 'field "answers" is empty: the question has no'),
    "no page": (TRIVIA | {"entity_pages": {}, "search_results": {}}, "hold no text"),
    "no option": (READ["quality on the hub"][0] | {"answer": 2}, 'field "answer" is a number (2); expected'),
    "choices": (
        {"context": "a", "question": "q", "choice_A": "b", "answer": "A"},
        'field "choice_A" marks a multiple-choice question',
    ),
    "two contexts": (
        FLAT | {"context": "a"},
        'fields "context" and "document" are both present; choose one with data.fields',
    ),
    "two schemas": (
        READ["ours"][0] | {"context": "c", "question": "d", "answers": ["e"]},
        "fit the schemas comi and longbench and flat; name one: comi:FILE or longbench:FILE or flat:FILE",
    ),
    "null flat": ({"context": None, "question": "q", "answer": "a"}, "fit the schemas hotpotqa and flat"),
    "a question too many": (
        NEWS | {"question": "What?"},
        'field "answers" is missing; found "document", "summary", "question", as in narrativeqa, flat',
    ),
    "another name for answers": (
        without(FLAT, "answers") | {"gold": "a goat"},
        "flat, or map the fields: data.fields=context:document,question:question,answer:gold",
    ),
    "unknown": ({"text": "a", "label": 1}, 'found "text", "label"; expected input, prompt, answer or the'),
    "nothing": ({}, "found no field at all; expected"),
    "no question": (without(HOTPOT, "question"), 'field "question" is missing; found "id", "answer"'),
    "null answer": (HOTPOT | {"answer": None}, 'field "answer" is null; expected text'),
    "titles": (HOTPOT | {"context": {"title": ["a"], "sentences": []}}, '"sentences", is an empty list'),
    "uneven": (HOTPOT | {"context": {"title": ["a"], "sentences": [["b"], ["c"]]}}, "has 1 titles for 2 lists"),
    "no pair": (HOTPOT | {"context": [["a"]]}, 'field "context", document 1, is a list of 1 items; expected a title'),
    "sentence": (HOTPOT | {"context": [["a", ["b", 3]]]}, 'field "context", document 1, sentence 2, is a number (3)'),
    "no documents": (HOTPOT | {"context": []}, 'field "context" is an empty list; expected a list'),
    "plain context": (HOTPOT | {"context": "Ed Wood"}, 'field "context", which is text, as JSON: broken JSON at char'),
    "no list": (HOTPOT | {"context": "3"}, 'field "context" is a number (3); expected a list'),
    "surrogate": (HOTPOT | {"context": [["a", ["\ud83d"]]]}, "sentence 1, has the lone surrogate \\ud83d"),
    "surrogate within": (HOTPOT | {"context": '[["a", ["\ud83d"]]]'}, "as JSON: invalid UTF-8 at byte 10"),
    "ctxs": (NQ | {"ctxs": {"title": "a"}}, 'field "ctxs" is an object of 1 fields; expected a list'),
    "passage": (NQ | {"ctxs": [{"title": "a"}]}, 'field "text" is missing; found "title"'),
    "no answers": (NQ | {"answers": []}, 'field "answers" is an empty list'),
    "story": (STORY | {"document": {"text": ""}}, 'field "summary" is missing; found "text"'),
    "answer": (STORY | {"answers": ["a"]}, 'field "answers", item 1, is text ("a"); expected an object'),
    "question text": (STORY | {"question": "Who?"}, 'field "question" is text ("Who?"); expected an object'),
    "no articles": (NEWS | {"document": " ||||| |||||\n"}, "the context is an empty list; expected text or a list"),
    "no summary": (NEWS | {"summary": " "}, 'field "summary" is blank'),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_fits_no_schema_is_refused_with_file_line_and_what_was_expected(name, tmp_path):
    fields, reason = REFUSED[name]
    path = tmp_path / "x.jsonl"
    path.write_text(json.dumps(HOTPOT) + "\n" + json.dumps(fields) + "\n")
    with pytest.raises(DataError) as raised:
        list(numbered_records(path, adapters.adapt))
    assert str(raised.value).startswith(f"{path}, line 2: ") and reason in str(raised.value)


def test_a_line_of_several_questions_gives_as_many_records_and_refuses_the_bad_ones(tmp_path):
    options = "\n(A) a cat\n(B) a goat"
    quality = [
        Record(("A goat came.",), f"What came?{options}", ("a goat",)),
        Record(("A goat came.",), f"What did not?{options}", ("a cat",)),
    ]
    squad = [Record((text,), "What?", ("goat",)) for text in ("A goat.", "B.", "B.")]
    assert adapters.adapt(QUALITY) == quality and adapters.adapt(ARTICLE) == squad
    assert adapters.adapt({"version": "v2.0", "data": [ARTICLE, ARTICLE]}) == squad * 2
    unanswerable = {"context": "C.", "qas": [QAS[0], {"question": "Why?", "answers": [], "is_impossible": True}]}
    path = tmp_path / "squad.json"
    path.write_text(json.dumps({"version": "v2.0", "data": [ARTICLE, {"paragraphs": [unanswerable]}]}))
    skipped = []
    kept = list(numbered_records(path, adapters.adapt, skipped=skipped))
    assert [number for number, _ in kept] == [1] * 4 and kept[-1][1].context == ("C.",)
    said = 'question 2: field "answers" is empty: the question has no answer'
    assert [line.reason for line in skipped] == [said]
    with pytest.raises(DataError, match=f"line 1: {said}"):
        list(numbered_records(path, adapters.adapt))


OWN = {"passage": ["One.", "Two."], "q": "Which?", "gold": {"text": ["two", "2"]}, "id": 7}
OWN_RECORD = Record(("One.", "Two."), "Which?", ("two", "2"))


def test_fields_of_ones_own_are_read_where_data_fields_says_they_are():
    own = adapters.Fields(("context:passage", "question:q", "answer:gold.text"))
    assert own.adapt(OWN) == OWN_RECORD and own.adapt(HOTPOT) == HOTPOT_RECORD
    dotted = without(OWN, "gold") | {"gold.text": ["two", "2"]}
    assert own.adapt(dotted) == OWN_RECORD
    summary = adapters.Fields(("context:article", "answer:highlights"))
    news = {"article": "An article.", "highlights": "A sum."}
    assert summary.adapt(news) == Record(("An article.",), adapters.SUMMARIZE, ("A sum.",))
    for fields, reason in (
        (without(OWN, "gold"), 'field "gold.text", the answer of data.fields, is missing; found "passage", "q", "id"'),
        (OWN | {"gold": {"text": None}}, 'field "gold.text" is null; expected text or a list of texts'),
        (OWN | {"q": ""}, 'field "q" is empty'),
        ({"a": 1}, 'found "a"; expected input, prompt, answer or the fields'),
    ):
        with pytest.raises(Refused) as raised:
            own.adapt(fields)
        assert reason in str(raised.value)


@pytest.mark.parametrize(
    "fields, record",
    [
        ({"id": "1", "passage": "One.", "q": "Which?", "gold": "one"}, Record(("One.",), "Which?", ("one",))),
        ({"instruction": "Which?", "body text": "One.", "output": "one"}, Record(("One.",), "Which?", ("one",))),
        ({"highlights": "one", "article": "One."}, Record(("One.",), adapters.SUMMARIZE, ("one",))),
        (OWN, OWN_RECORD),
        ({"left": "One.", "right": "one"}, Record(("One.",), adapters.SUMMARIZE, ("one",))),
    ],
)
def test_a_refusal_shows_a_mapping_that_works(fields, record):
    with pytest.raises(Refused) as raised:
        adapters.adapt(fields)
    shown = str(raised.value).partition("or map the fields: ")[2].strip("'")
    setting = overrides.override(Config(), [shown]).data.fields
    assert adapters.Fields(setting).adapt(fields) == record


@pytest.mark.parametrize(
    "word", ["context:a", "context:a,context:b,answer:c", "text:a,answer:b", "context:,answer:b", "a"]
)
def test_a_mapping_that_says_too_little_is_refused(word):
    with pytest.raises(ConfigError, match="data.fields is .*; say once each where context, question and answer stand"):
        overrides.override(Config(), [f"data.fields={word}"])


NASTY = [-1, True, None, " ", "x", "\ud83d", "[[", [], {}, [None]]
DAMAGED = {name: READ[name][0] for name in READ if READ[name][1] and " " not in name}
DAMAGED |= {"json": READ["2wikimqa as JSON in a text"][0], "hub": READ["quality on the hub"][0], "own": OWN}
DAMAGED |= {"quality": QUALITY, "squad file": {"version": "1", "data": [ARTICLE]}}


def damaged(value):
    """``value`` with each of its parts, and itself, replaced by each of NASTY, or missing."""
    yield from NASTY
    parts = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in parts:
        whole = value if isinstance(value, dict) else dict(enumerate(value))
        for other in damaged(part):
            changed = whole | {key: other}
            yield changed if isinstance(value, dict) else list(changed.values())
        left = without(whole, key)
        yield left if isinstance(value, dict) else list(left.values())


def texts_of(made):
    for record in made if isinstance(made, list) else [made]:
        if isinstance(record, Record):
            yield from (*record.context, record.prompt, *record.answers)


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_example_is_read_as_text_or_refused_in_one_sentence(name):
    own = adapters.Fields(("context:passage", "question:q", "answer:gold.text"))
    refused = 0
    for changed in damaged(DAMAGED[name]):
        if isinstance(changed, dict):
            for read in (adapters.adapt, own.adapt):
                try:
                    assert all(text.strip() and "\0" not in text and text.encode() for text in texts_of(read(changed)))
                except Refused as why:
                    refused += 1
                    assert str(why).isprintable() and len(str(why)) < 1000
    assert refused > 20


@pytest.mark.parametrize(
    "value, said",
    [(datetime.date(2026, 1, 1), "a value of type date"), (b"Paris", "a value of type bytes"), (1.5, "a number")],
)
def test_what_a_hub_dataset_has_in_place_of_a_text_is_refused_too(value, said):
    """Its columns may hold what is no JSON."""
    with pytest.raises(Refused, match=f'"answer" is {said}'):
        adapters.adapt({"question": "Where?", "answer": value, "context": [["Paris", ["A city."]]]})
