"""The schemas of published data sets, each read into Records: separate documents, question, reference answers.

Documents with titles begin as in the prompts of lost-in-the-middle: ``Document [3](Title: Marie Curie) ...``. A value
that is missing, empty, of the wrong type or invalid text is refused with its location, as in our own format.
"""

from collections.abc import Callable, Mapping
from typing import Any

from comi_jax.data.records import Record
from comi_jax.data.values import Refused, decode, describe, field_names, quote, text, texts

SUMMARIZE = "Write a summary of these news articles."  # MultiNews has no question
ARTICLES_END = "|||||"


def hotpotqa(fields: Mapping[str, Any]) -> Record:
    """HotpotQA and 2WikiMultihopQA. The context is a list of [title, [sentence, ...]] (original files), the same list
    as a JSON string (2WikiMultihopQA in Parquet), or {"title": [...], "sentences": [[...], ...]} (Hugging Face)."""
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
    """NaturalQuestions as published by lost-in-the-middle: ``ctxs`` with title and text, one of them gold; answers."""
    documents = []
    for number, entry in enumerate(_list('field "ctxs"', _get(fields, "ctxs")), 1):
        where = f'field "ctxs", document {number},'
        entry = _object(where, entry)
        documents.append(
            _titled(number, _any_text(f"{where} title,", entry.get("title")), text(where, _get(entry, "text")))
        )
    answers = _list('field "answers"', _get(fields, "answers"))
    return _record(documents, _question(fields), texts('field "answers"', answers))


def narrativeqa(fields: Mapping[str, Any]) -> Record:
    """NarrativeQA: the whole story, or its summary if the example has no story; two answers."""
    document = _object('field "document"', _get(fields, "document"))
    return _story(fields, document.get("text") or _summary(document))


def narrativeqa_summary(fields: Mapping[str, Any]) -> Record:
    """NarrativeQA with the summary of the story as context."""
    return _story(fields, _summary(_object('field "document"', _get(fields, "document"))))


def multinews(fields: Mapping[str, Any]) -> Record:
    """MultiNews: articles separated by ``|||||``; the answer is their summary, the prompt is always the same."""
    articles = text('field "document"', _get(fields, "document")).replace("NEWLINE_CHAR", "\n").split(ARTICLES_END)
    articles = [article.strip() for article in articles]
    return _record([a for a in articles if a], SUMMARIZE, (text('field "summary"', _get(fields, "summary")).strip(),))


def musique(fields: Mapping[str, Any]) -> Record:
    """MuSiQue: ``paragraphs`` with title and paragraph_text; the answer, then its aliases."""
    if fields.get("answerable") is False:
        raise Refused('field "answerable" is false: the question has no answer in its paragraphs')
    documents = []
    for number, entry in enumerate(_list('field "paragraphs"', _get(fields, "paragraphs")), 1):
        where = f'field "paragraphs", document {number},'
        entry = _object(where, entry)
        title = _any_text(f"{where} title,", entry.get("title"))
        documents.append(_titled(number, title, text(where, _get(entry, "paragraph_text"))))
    answers = _aliased("answer", _get(fields, "answer"), "answer_aliases", fields.get("answer_aliases"))
    return _record(documents, _question(fields), answers)


def triviaqa(fields: Mapping[str, Any]) -> Record:
    """TriviaQA: the Wikipedia pages, then the search results, if they have text; the answer's value, then its
    aliases."""
    documents = []
    for name, inner in (("entity_pages", "wiki_context"), ("search_results", "search_context")):
        if not (pages := fields.get(name)):
            continue
        where, pages = f'field "{name}"', _object(f'field "{name}"', pages)
        bodies, titles = (
            _list(f'{where}, "{part}",', pages[part]) if pages.get(part) else [] for part in (inner, "title")
        )
        for i, body in enumerate(bodies):
            title = _any_text(f"{where}, title {i + 1},", titles[i] if i < len(titles) else "")
            if body := _any_text(f'{where}, "{inner}", item {i + 1},', body):
                documents.append(_titled(len(documents) + 1, title, body))
    if not documents:
        raise Refused('fields "entity_pages" and "search_results" hold no text; expected at least one')
    answer = _object('field "answer"', _get(fields, "answer"))
    answers = _aliased("answer, value", _get(answer, "value"), "answer, aliases", answer.get("aliases"))
    return _record(documents, _question(fields), answers)


def longbench(fields: Mapping[str, Any]) -> Record:
    """LongBench: ``input`` is the question about ``context``."""
    context = (text('field "context"', _get(fields, "context")),)
    answers = texts('field "answers"', _list('field "answers"', _get(fields, "answers")))
    return Record(context, text('field "input"', _get(fields, "input")), answers)


def quality(fields: Mapping[str, Any]) -> Record | list[Record | Refused]:
    """QuALITY: one line per article with its questions, as published (gold_label counts from 1), or one line per
    question (``answer`` counts from 0). The options follow the question; the answer is the text of the correct one."""
    article = (text('field "article"', _get(fields, "article")),)
    if "questions" not in fields:
        return _chosen(article, fields, "answer", 0)
    questions = _list('field "questions"', fields["questions"])
    return _each(questions, "question", lambda entry: _chosen(article, entry, "gold_label", 1))


def _chosen(article: tuple[str, ...], fields: Mapping[str, Any], name: str, first: int) -> Record:
    options = texts('field "options"', _list('field "options"', _get(fields, "options")))
    right = _get(fields, name)
    if type(right) is not int or not 0 <= right - first < len(options):
        raise Refused(
            f'field "{name}" is {describe(right)}; expected the number of the correct option, counting from {first}'
        )
    shown = "".join(f"\n({chr(ord('A') + i)}) {option}" for i, option in enumerate(options))
    return Record(article, _question(fields) + shown, (options[right - first],))


def squad(fields: Mapping[str, Any]) -> Record | list[Record | Refused]:
    """SQuAD: one question per line (Hugging Face), or as published: an article with its ``paragraphs``, or the whole
    file with its articles under ``data``. Each question without an answer is refused separately."""
    if "data" in fields:
        articles = _list('field "data"', fields["data"])
        return [record for article in articles for record in _article(_object('field "data", an item,', article))]
    return _article(fields) if "paragraphs" in fields else _spans(fields, fields)


def _article(fields: Mapping[str, Any]) -> list[Record | Refused]:
    found = []
    for paragraph in _list('field "paragraphs"', _get(fields, "paragraphs")):
        paragraph = _object('field "paragraphs", an item,', paragraph)
        questions = _list('field "qas"', _get(paragraph, "qas"))
        found += _each(questions, "question", lambda entry, paragraph=paragraph: _spans(paragraph, entry))
    return found


def _spans(paragraph: Mapping[str, Any], fields: Mapping[str, Any]) -> Record:
    answers = _get(fields, "answers")
    if isinstance(answers, list):
        answers = {"text": [_get(_object('field "answers", an item,', answer), "text") for answer in answers]}
    said = _get(_object('field "answers"', answers), "text")
    if said == []:
        raise Refused('field "answers" is empty: the question has no answer')
    answers = texts('field "answers", "text",', _list('field "answers", "text",', said))
    context = (text('field "context"', _get(paragraph, "context")),)
    return Record(context, _question(fields), tuple(dict.fromkeys(answers)))


def flat(fields: Mapping[str, Any]) -> Record:
    """A text or a list of texts in ``context`` or ``document``, a question, and ``answer`` or ``answers``: the form in
    which many data sets are republished, such as NarrativeQA. Multiple choice is refused; other fields are ignored,
    even a summary."""
    if choices := [name for name in fields if name in ("options", "choices") or name.startswith("choice_")]:
        raise Refused(f"field {quote(choices[0])} marks a multiple-choice question; expected free-form answers")
    context, answer = (_one_of(fields, names) for names in (("context", "document"), ("answer", "answers")))
    return Record(
        texts(f'field "{context}"', fields[context]),
        _question(fields),
        texts(f'field "{answer}"', fields[answer]),
    )


def _one_of(fields: Mapping[str, Any], names: tuple[str, str]) -> str:
    found = [name for name in names if name in fields]
    if len(found) == 2:
        raise Refused(f'fields "{names[0]}" and "{names[1]}" are both present; choose one with data.fields')
    return found[0] if found else _get(fields, names[0])


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
    """Valid text, or "" for null and blank text."""
    return "" if value in (None, "") or (isinstance(value, str) and value.isspace()) else text(where, value)


def _question(fields: Mapping[str, Any]) -> str:
    return text('field "question"', _get(fields, "question"))


def _aliased(name: str, answer: object, others: str, aliases: object) -> tuple[str, ...]:
    """The answer and its aliases, without duplicates."""
    aliases = texts(f'field "{others}"', aliases) if aliases else ()
    return tuple(dict.fromkeys((text(f'field "{name}"', answer), *aliases)))


def _each(entries: list[Any], name: str, read: Callable[[Mapping[str, Any]], Record]) -> list[Record | Refused]:
    """The record of each entry, or the reason why it is refused."""
    found: list[Record | Refused] = []
    for number, entry in enumerate(entries, 1):
        try:
            found.append(read(_object(f"{name} {number}", entry)))
        except Refused as why:
            found.append(Refused(f"{name} {number}: {why}"))
    return found
