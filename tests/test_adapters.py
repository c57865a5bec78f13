"""Small records in the published schemas of the paper's five sets become contexts, prompts and answers."""

import json

import pytest

from comi_jax.data import adapters
from comi_jax.data.records import DataError, Record, Refused, numbered_records

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
    "ours": ({"input": ["a", "b"], "prompt": "q", "answer": "x"}, Record(("a", "b"), "q", ("x",))),
}


@pytest.mark.parametrize("name", READ)
def test_a_schema_is_told_from_its_fields(name, tmp_path):
    fields, record = READ[name]
    assert adapters.adapt(fields) == record
    path = tmp_path / "x.jsonl"
    path.write_text("\n" + json.dumps(fields) + "\n")
    assert list(numbered_records(path, adapters.adapt)) == [(2, record)]


@pytest.mark.parametrize("schema", adapters.SCHEMAS)
def test_every_named_schema_reads_its_own_and_refuses_the_others(schema):
    own = {"comi": "ours", "hotpotqa": "hotpotqa as published", "2wikimqa": "2wikimqa as lists"}
    name = own.get(schema, schema.removesuffix("-summary"))
    fields, record = READ[name]
    summary = Record((" Mark hunts.",), "Who is he?", ANSWERS)
    assert adapters.SCHEMAS[schema](fields) == (summary if schema.endswith("-summary") else record)
    family = {"hotpotqa": "wikimqa", "2wikimqa": "hotpotqa"}.get(schema, name)
    others = [other for other in READ if name.split()[0] not in other and family not in other]
    assert len(others) >= 4
    for other in others:
        with pytest.raises(Refused, match="is missing|expected"):
            adapters.SCHEMAS[schema](READ[other][0])


def without(fields, name):
    return {key: value for key, value in fields.items() if key != name}


REFUSED = {
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
