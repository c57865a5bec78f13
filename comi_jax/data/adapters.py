"""The published schemas of the paper's five sets, each made a Record: documents apart, question, reference answers.

A document that has a title begins as in the prompts of lost-in-the-middle: ``Document [3](Title: Marie Curie) ...``.
The schema of an example is told from its fields (``adapt``) or named (``SCHEMAS``). What is missing, empty, of another
type or no valid text is refused with its place, as in our own format.
"""

from collections.abc import Callable, Mapping
from typing import Any

from comi_jax.data.records import Record, Refused, decode, describe, field_names, record_of, text, texts

SUMMARIZE = "Write a summary of these news articles."  # MultiNews has no question
ARTICLES_END = "|||||"


def hotpotqa(fields: Mapping[str, Any]) -> Record:
    """HotpotQA and 2WikiMultihopQA. The context is a list of [title, [sentence, ...]] (the original files), the same as
    JSON in a text (2WikiMultihopQA as parquet), or {"title": [...], "sentences": [[...], ...]} (Hugging Face)."""
    question, answer = _get(fields, "question"), _get(fields, "answer")
    context = _get(fields, "context")
    if isinstance(context, str):
        try:
            context = decode(context.encode("utf-8", "surrogatepass"))
        except Refused as why:
            raise Refused(f'field "context", which is text, as JSON: {why}') from None
    if isinstance(context, dict):
        names = [_list(f'field "context", "{name}",', _get(context, name)) for name in ("title", "sentences")]
        if len(names[0]) != len(names[1]):
            raise Refused(f'field "context" has {len(names[0])} titles for {len(names[1])} lists of sentences')
        context = list(zip(*names, strict=True))
    documents = []
    for number, entry in enumerate(_list('field "context"', context), 1):
        where = f'field "context", document {number},'
        if not isinstance(entry, list | tuple) or len(entry) != 2:
            raise Refused(f"{where} is {describe(entry)}; expected a title and a list of sentences")
        sentences = _list(where, entry[1]) if entry[1] != [] else []
        sentences = [_any_text(f"{where} sentence {i},", s).strip() for i, s in enumerate(sentences, 1)]
        documents.append(_titled(number, _any_text(f"{where} title,", entry[0]), " ".join(filter(None, sentences))))
    return _record(documents, text('field "question"', question), (text('field "answer"', answer),))


def natural_questions(fields: Mapping[str, Any]) -> Record:
    """NaturalQuestions as lost-in-the-middle publishes it: ``ctxs`` with title and text, one of them gold; answers."""
    documents = []
    for number, entry in enumerate(_list('field "ctxs"', _get(fields, "ctxs")), 1):
        where = f'field "ctxs", document {number},'
        entry = _object(where, entry)
        documents.append(
            _titled(number, _any_text(f"{where} title,", entry.get("title")), text(where, _get(entry, "text")))
        )
    answers = _list('field "answers"', _get(fields, "answers"))
    return _record(documents, text('field "question"', _get(fields, "question")), texts('field "answers"', answers))


def narrativeqa(fields: Mapping[str, Any]) -> Record:
    """NarrativeQA: the whole story, or its summary where the example carries no story; two answers."""
    document = _object('field "document"', _get(fields, "document"))
    return _story(fields, document.get("text") or _summary(document))


def narrativeqa_summary(fields: Mapping[str, Any]) -> Record:
    """NarrativeQA with the summary of the story as context."""
    return _story(fields, _summary(_object('field "document"', _get(fields, "document"))))


def multinews(fields: Mapping[str, Any]) -> Record:
    """MultiNews: articles with ``|||||`` between them; the answer is their summary, the prompt always the same."""
    articles = text('field "document"', _get(fields, "document")).replace("NEWLINE_CHAR", "\n").split(ARTICLES_END)
    articles = [article.strip() for article in articles]
    return _record([a for a in articles if a], SUMMARIZE, (text('field "summary"', _get(fields, "summary")).strip(),))


SCHEMAS: dict[str, Callable[[Mapping[str, Any]], Record]] = {
    "comi": record_of,
    "hotpotqa": hotpotqa,
    "2wikimqa": hotpotqa,
    "narrativeqa": narrativeqa,
    "narrativeqa-summary": narrativeqa_summary,
    "multinews": multinews,
    "nq": natural_questions,
}

# Which schema an example has, by the first of these that is among its fields.
_MARKS = {"input": "comi", "ctxs": "nq", "summary": "multinews", "context": "hotpotqa", "document": "narrativeqa"}


def adapt(fields: Mapping[str, Any]) -> Record:
    """The Record of an example in any of the schemas, told from its fields; raises Refused."""
    schema = next((schema for mark, schema in _MARKS.items() if mark in fields), None)
    if schema is None:
        raise Refused(
            f"found {field_names(fields)}; expected input, prompt, answer or the fields of HotpotQA or 2WikiMQA "
            "(question, context, answer), NaturalQuestions (question, ctxs, answers), NarrativeQA (document, question, "
            "answers) or MultiNews (document, summary)"
        )
    return SCHEMAS[schema](fields)


def _story(fields: Mapping[str, Any], story: object) -> Record:
    question = _object('field "question"', _get(fields, "question"))
    answers = []
    for number, entry in enumerate(_list('field "answers"', _get(fields, "answers")), 1):
        where = f'field "answers", item {number},'
        answers.append(text(where, _get(_object(where, entry), "text")))
    return _record(
        [text('field "document", its text,', story)], text('field "question"', _get(question, "text")), answers
    )


def _summary(document: Mapping[str, Any]) -> object:
    return _get(_object('field "document", "summary",', _get(document, "summary")), "text")


def _record(documents: list[str], prompt: str, answers: Any) -> Record:
    return Record(texts("the context", documents), prompt, tuple(answers))


def _titled(number: int, title: str, body: str) -> str:
    head = f"Document [{number}](Title: {title})" if title.strip() else f"Document [{number}]"
    return f"{head} {body}".rstrip()


def _get(fields: Mapping[str, Any], name: str) -> Any:
    if name not in fields:
        raise Refused(f'field "{name}" is missing; found {field_names(fields)}')
    return fields[name]


def _object(where: str, value: object) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise Refused(f"{where} is {describe(value)}; expected an object")
    return value


def _list(where: str, value: object) -> list[Any]:
    if not isinstance(value, list) or not value:
        raise Refused(f"{where} is {'an empty list' if value == [] else describe(value)}; expected a list")
    return value


def _any_text(where: str, value: object) -> str:
    """Valid text that may be empty or nothing at all."""
    return "" if value in (None, "") or (isinstance(value, str) and value.isspace()) else text(where, value)
