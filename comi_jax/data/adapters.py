"""The schema of an example: recognised by its fields, chosen by name, or given field by field.

    context:passage,question:q,answer:gold        (data.fields) the fields of a custom data set

A single field never decides. An example that fits several schemas is refused, and the message names them; for an
example that fits none, it names the fields.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from comi_jax.data import published
from comi_jax.data.published import SUMMARIZE
from comi_jax.data.records import Adapt, Record, record_of
from comi_jax.data.values import Refused, field_names, quote, text, texts

SCHEMAS: dict[str, Adapt] = {
    "comi": record_of,
    "hotpotqa": published.hotpotqa,
    "2wikimqa": published.hotpotqa,
    "narrativeqa": published.narrativeqa,
    "narrativeqa-summary": published.narrativeqa_summary,
    "multinews": published.multinews,
    "nq": published.natural_questions,
    "musique": published.musique,
    "squad": published.squad,
    "triviaqa": published.triviaqa,
    "longbench": published.longbench,
    "quality": published.quality,
    "flat": published.flat,
}


def _documents(value: object) -> bool:
    """Whether ``value`` holds structured documents: an object, a list of anything but texts, or their JSON."""
    if isinstance(value, str):
        return bool(re.match(r'\s*(\[\s*\[|\{\s*")', value))
    return isinstance(value, dict) or (isinstance(value, list) and not _plain(value))


def _plain(value: object) -> bool:
    """Whether ``value`` is plain text or a list of strings."""
    if isinstance(value, list):
        return bool(value) and all(isinstance(item, str) for item in value)
    return isinstance(value, str) and not _documents(value)


def _spans(value: object) -> bool:
    return isinstance(value, dict) or (isinstance(value, list) and any(isinstance(item, dict) for item in value))


@dataclass(frozen=True)
class Shape:
    """How to recognise an example of a schema: fields that must be present (``has``) or absent (``lacks``), and checks
    of values (``kinds``) for schemas with the same field names."""

    schema: str
    has: tuple[str, ...]
    kinds: Mapping[str, Any] = field(default_factory=dict)
    lacks: tuple[str, ...] = ()

    def names_fit(self, fields: Mapping[str, Any]) -> bool:
        return all(name in fields for name in self.has) and not any(name in fields for name in self.lacks)

    def kinds_fit(self, fields: Mapping[str, Any]) -> bool:
        return all(kind(fields[name]) for name, kind in self.kinds.items())


_ASKED = ("question", "questions", "query", "prompt", "answer", "answers")
SHAPES = (
    Shape("comi", ("input", "prompt", "answer")),
    Shape("nq", ("question", "ctxs", "answers")),
    Shape("hotpotqa", ("question", "context", "answer", "supporting_facts")),
    Shape("hotpotqa", ("question", "context", "answer"), {"context": _documents}),
    Shape("narrativeqa", ("document", "question", "answers"), {"document": lambda value: isinstance(value, dict)}),
    Shape("multinews", ("document", "summary"), lacks=_ASKED),
    Shape("musique", ("paragraphs", "question", "answer")),
    Shape("squad", ("context", "question", "answers"), {"answers": _spans}),
    Shape("squad", ("title", "paragraphs"), lacks=_ASKED),
    Shape("squad", ("version", "data")),
    Shape("triviaqa", ("question", "answer", "entity_pages")),
    Shape("triviaqa", ("question", "answer", "search_results")),
    Shape("longbench", ("input", "context", "answers")),
    Shape("quality", ("article", "questions")),
    Shape("quality", ("article", "question", "options", "answer")),
    *(
        Shape("flat", (context, "question", answer), {context: _plain, answer: lambda value: not _spans(value)})
        for context in ("context", "document")
        for answer in ("answer", "answers")
    ),
)


def adapt(fields: Mapping[str, Any]) -> Record | Sequence[Record | Refused]:
    """The record or records of an example, whose schema is recognised by its fields; raises Refused."""
    by_name = [shape for shape in SHAPES if shape.names_fit(fields)]
    found = [shape for shape in by_name if shape.kinds_fit(fields)] or by_name
    found = [shape for shape in found if not any(set(shape.has) < set(other.has) for other in found)]
    schemas = list(dict.fromkeys(shape.schema for shape in found))
    if len(schemas) == 1:
        return SCHEMAS[schemas[0]](fields)
    if schemas:
        raise Refused(
            f"found {field_names(fields)}, which fit the schemas {' and '.join(schemas)}; name one: "
            f"{' or '.join(f'{schema}:FILE' for schema in schemas)}"
        )
    near = [(shape, set(shape.has) - fields.keys()) for shape in SHAPES]
    near = [(shape, missing.pop()) for shape, missing in near if len(shape.has) > 2 and len(missing) == 1]
    if near and len({name.removesuffix("s") for _, name in near}) == 1:
        schemas = dict.fromkeys(shape.schema for shape, _ in near)
        reason = f'field "{near[0][1]}" is missing; found {field_names(fields)}, as in {", ".join(schemas)}'
        known = {"context", "answer"} <= _likely(fields).keys()
        raise Refused(f"{reason}, or map the fields: {example_of(fields)}" if known else reason)
    raise Refused(
        f"found {field_names(fields)}; expected input, prompt, answer or the fields of a published set "
        f"({', '.join(name for name in SCHEMAS if name != 'comi')}), or map the fields: {example_of(fields)}"
    )


# --- custom fields ----------------------------------------------------------------------------------------------------

# Patterns for the field names that data sets give to each part of an example, the likeliest first.
_LIKE = {
    "answer": "^a$ answ gold target label output response completion reference highlight summary",
    "question": "^q$ quest query prompt instruction input",
    "context": "context passage article document story text content paragraph report source body input",
}
_NAME = re.compile(r"[\w .-]+").fullmatch  # a field name that needs no escaping in a setting


def example_of(fields: Mapping[str, Any]) -> str:
    """A suggested ``data.fields`` setting for an example with these fields."""
    chosen = _likely(fields)
    left = [name for name in filter(_NAME, fields) if name not in chosen.values()]
    for part in ("context", "answer"):
        if part not in chosen and left:
            chosen[part] = left.pop(0)
    if {"context", "answer"} - chosen.keys():
        chosen = {"context": "FIELD", "question": "FIELD", "answer": "FIELD"}
    places = {part: _place(name, fields.get(name)) for part, name in chosen.items()}
    pairs = ",".join(f"{part}:{places[part]}" for part in ("context", "question", "answer") if part in places)
    return f"'data.fields={pairs}'" if " " in pairs else f"data.fields={pairs}"


def _place(name: str, value: object) -> str:
    """The path to the text of a field: its name or, for an object, the path to the first inner field with text."""
    inside = [inner for inner in value if _plain(value[inner])] if isinstance(value, dict) else []
    return f"{name}.{inside[0]}" if inside and _NAME(inside[0]) else name


def _likely(fields: Mapping[str, Any]) -> dict[str, str]:
    """The likeliest field for each part of an example, judged by name."""
    chosen: dict[str, str] = {}
    for part, words in _LIKE.items():
        names = [name for name in filter(_NAME, fields) if name not in chosen.values()]
        likely = (name for word in words.split() for name in names if re.search(word, name.lower()))
        if (name := next(likely, None)) is not None:
            chosen[part] = name
    return chosen


@dataclass(frozen=True)
class Fields:
    """The fields that hold the parts of an example, from ``data.fields``; "answers.text" is the field text of the
    object answers. Without a question, the prompt is the one used for MultiNews."""

    words: tuple[str, ...]

    @property
    def places(self) -> dict[str, str]:
        return dict(word.split(":", 1) for word in self.words)

    def read(self, fields: Mapping[str, Any]) -> Record:
        """The record of an example; raises Refused."""
        places, found = self.places, {}
        for part, place in self.places.items():
            value: Any = fields
            for name in [place] if place in fields else place.split("."):
                if not isinstance(value, dict) or name not in value:
                    raise Refused(
                        f"field {quote(place)}, the {part} of data.fields, is missing; found {field_names(fields)}"
                    )
                value = value[name]
            found[part] = value
        where = {part: f"field {quote(place)}" for part, place in places.items()}
        question = text(where["question"], found["question"]) if "question" in found else SUMMARIZE
        return Record(texts(where["context"], found["context"]), question, texts(where["answer"], found["answer"]))

    def adapt(self, fields: Mapping[str, Any]) -> Record | Sequence[Record | Refused]:
        """As ``read`` if all fields of data.fields are present; otherwise the schema is recognised by the fields."""
        there = [place in fields or place.split(".")[0] in fields for place in self.places.values()]
        if all(there):
            return self.read(fields)
        try:
            return adapt(fields)
        except Refused:
            if any(there):
                return self.read(fields)
            raise
