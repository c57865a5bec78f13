"""From messages and documents to the pieces of a context, in this order: files of the question, documents, then system
and earlier messages."""

import base64
import binascii
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from comi_jax.data.records import BYTE_ORDER_MARK
from comi_jax.serving.http.errors import ApiError

BETWEEN = "\n\n"  # texts of a context that follow each other
INSTRUCTIONS = ("system", "developer")  # roles whose text is context as it is
SPEAKERS = ("user", "assistant")  # roles that are named in the context


@dataclass(frozen=True)
class Piece:
    """A piece of a context: a text, or a stored file."""

    text: str = ""
    file: str = ""  # its id; empty: a text


def question_of(messages: Sequence[dict[str, Any]]) -> tuple[str, list[Piece]]:
    """The text of the last message, which must be a user's, and the files in it."""
    last = len(messages) - 1
    if messages[last].get("role") != "user":
        raise ApiError(400, "the last message must be the user's; it is the question", param=f"messages.{last}.role")
    texts, files = _content(messages[last], last)
    question = "\n".join(texts)
    if not question.strip():
        raise ApiError(400, "the last user message, which is the question, has no text", param=f"messages.{last}")
    return question, files


def pieces_of(messages: Sequence[dict[str, Any]]) -> list[Piece]:
    """The pieces of all messages but the last, in order."""
    pieces: list[Piece] = []
    for number, message in enumerate(messages[:-1]):
        role = message.get("role")
        if role not in INSTRUCTIONS + SPEAKERS:
            raise ApiError(
                400, "a role is system, developer, user or assistant; this server has no tools",
                param=f"messages.{number}.role",
            )  # fmt: skip
        texts, files = _content(message, number)
        pieces += files
        text = "\n".join(texts)
        if text.strip():
            pieces.append(Piece(text if role in INSTRUCTIONS else f"{role}: {text}"))
    return pieces


def document_pieces(documents: Sequence[dict[str, Any]] | None) -> list[Piece]:
    """The pieces of the field ``documents``."""
    pieces = []
    for number, document in enumerate(documents or ()):
        where = f"documents.{number}"
        title, text, file = (_text_of(document, name, where) for name in ("title", "text", "file_id"))
        if bool(text.strip()) == bool(file):
            raise ApiError(400, f"{where}: give a text, with or without a title, or a file_id", param=where)
        pieces.append(Piece(file=file) if file else Piece(f"{title}\n{text}" if title else text))
    return pieces


def merged(pieces: Sequence[Piece]) -> list[Piece]:
    """``pieces`` with texts that follow each other as one."""
    out: list[Piece] = []
    for piece in pieces:
        if out and not piece.file and not out[-1].file:
            out[-1] = Piece(out[-1].text + BETWEEN + piece.text)
        else:
            out.append(piece)
    return out


def text_from(content: bytes, where: str) -> str:
    """The UTF-8 text ``content``. Raises ApiError if it is none or has nothing but white space."""
    try:
        text = content.decode("utf-8").removeprefix(BYTE_ORDER_MARK)
    except UnicodeDecodeError:
        raise ApiError(415, f"{where} is not UTF-8 text; convert it to text first", param=where) from None
    if not text.strip():
        raise ApiError(400, f"{where} is empty; give it some text", param=where)
    return text


def _content(message: dict[str, Any], number: int) -> tuple[list[str], list[Piece]]:
    """The texts and the files of a message's content: a text, or a list of parts."""
    where, content = f"messages.{number}.content", message.get("content")
    for name in ("tool_calls", "function_call"):
        if message.get(name):
            raise ApiError(400, "this server has no tools", param=f"messages.{number}.{name}")
    if content is None and message.get("role") == "assistant":
        return [], []
    if isinstance(content, str):
        return [content], []
    if not isinstance(content, list) or not content:
        raise ApiError(400, f"{where}: give a text or a list of parts", param=where)
    texts: list[str] = []
    files: list[Piece] = []
    for index, part in enumerate(content):
        _part(part, f"{where}.{index}", texts, files)
    return texts, files


def _part(part: Any, where: str, texts: list[str], files: list[Piece]) -> None:
    """Add a part of a content to ``texts`` or ``files``."""
    kind = part.get("type") if isinstance(part, dict) else None
    if kind == "text":
        texts.append(_text_of(part, "text", where, required=True))
    elif kind == "file":
        # OpenAI's form has an object of this name; LangChain's standard block has the fields in the part itself.
        inner = part.get("file", part)
        if not isinstance(inner, dict):
            raise ApiError(400, f"{where}.file: give an object with file_id or file_data", param=where)
        file = _text_of(inner, "file_id", where) or _text_of(inner, "id", where)
        data = _text_of(inner, "file_data", where) or _text_of(inner, "data", where)
        if bool(file) == bool(data):
            raise ApiError(400, f"{where}: give either file_id or file_data", param=where)
        files.append(Piece(file=file) if file else Piece(_decoded(data, where)))
    else:
        raise ApiError(400, f"{where}: a part is of type text or file; this model reads text", param=where)


def _decoded(data: str, where: str) -> str:
    """The text of a file in base64, with or without ``data:...;base64,`` before it."""
    head, comma, rest = data.partition(",")
    if comma and not (head.startswith("data:") and head.endswith(";base64")):
        raise ApiError(400, f"{where}: file_data is no data URL in base64", param=where)
    try:
        return text_from(base64.b64decode(rest if comma else data, validate=True), where)
    except (binascii.Error, ValueError):
        raise ApiError(400, f"{where}: file_data is not base64", param=where) from None


def _text_of(values: dict[str, Any], name: str, where: str, required: bool = False) -> str:
    value = values.get(name)
    if value is None and not required:
        return ""
    if not isinstance(value, str):
        raise ApiError(400, f"{where}.{name}: give a text", param=f"{where}.{name}")
    return value
