"""LLMLingua-2 (Pan et al. 2024): a trained token classifier drops words. Its own package computes it, not this one.

The package lives in an environment of its own: ``llmlingua2_program.py``, run by that environment's Python, takes
requests and writes texts, as JSON Lines.

    request  {"key": hash, "context": text, "keep": share of the tokens, in (0, 1)}
    text     {"key": hash, "text": compressed text}

The decoder reads a compressed text as it comes; the achieved ratio is counted by the decoder's tokenizer.
"""

import functools
import json
import os
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from comi_jax.data.encode import token_ids
from comi_jax.errors import UserError
from comi_jax.evaluation.systems.protocol import Question
from comi_jax.evaluation.systems.texts import TextSystem
from comi_jax.serving.language_model import LanguageModel

PROGRAM = Path(__file__).with_name("llmlingua2_program.py")


class CompressedTextError(UserError):
    """A file of compressed texts that cannot be read, or a program that did not write one."""


@dataclass(frozen=True)
class LLMLingua2(TextSystem):
    """``texts``: the file of compressed texts; ``content``: a hash of it."""

    texts: str = ""
    content: str = ""

    @classmethod
    def open(cls, texts: str | os.PathLike) -> "LLMLingua2":
        try:
            return cls(str(texts), xxhash.xxh3_128(Path(texts).read_bytes()).hexdigest())
        except OSError as error:
            raise CompressedTextError(f"{texts} cannot be read: {error.strerror}") from None

    def text(self, question: Question, budget: int) -> str | None:
        """The compressed text of ``question``'s context; None if there is none."""
        return read_texts(self.texts, self.content).get(key(question, budget)) if self.texts else None

    def refusal(self, question: Question, budget: int) -> str:
        text = self.text(question, budget)
        if text is None:
            return "there is no compressed text for it; pass --llmlingua2=PYTHON of an environment that has llmlingua"
        if not text.strip():
            return "LLMLingua-2 left nothing of it, which it calls a ratio of 1.0; lower the rate"
        return ""

    def select(self, model: LanguageModel, question: Question, budget: int) -> tuple[np.ndarray, float]:
        text = self.text(question, budget) or ""
        return np.array(token_ids(model.tokenizer, [text])[0], np.int32), 0.0

    def longest(self, model: LanguageModel, question: Question, budget: int) -> int:
        return len(self.select(model, question, budget)[0]) + len(question.query)


def key(question: Question, budget: int) -> str:
    """What a compressed text depends on: the context and the share of it that is kept."""
    return xxhash.xxh3_128(f"{budget} {len(question.context)} {question.record.context_text()}".encode()).hexdigest()


def requests(questions: Iterable[Question], budgets: Iterable[int], found: Mapping[str, str]) -> list[dict[str, Any]]:
    """A request for each different context of ``questions`` without a text in ``found``."""
    made = {}
    for question, budget in zip(questions, budgets, strict=True):
        if (name := key(question, budget)) not in found:
            keep = budget / len(question.context)
            made[name] = {"key": name, "context": question.record.context_text(), "keep": keep}
    return list(made.values())


def run(program: Sequence[str], wanted: Sequence[dict[str, Any]], texts: Path) -> None:
    """Have ``program``, a command that reads requests and writes texts, append the texts of ``wanted`` to a file.
    Raises CompressedTextError if it fails or leaves one out."""
    lines = "".join(json.dumps(request) + "\n" for request in wanted)
    try:
        done = subprocess.run(program, input=lines, stdout=subprocess.PIPE, stderr=sys.stderr, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise CompressedTextError(f"the program {' '.join(program)} failed: {error}") from None
    found = _parsed(done.stdout, f"the output of {program[0]}")
    if missing := [request for request in wanted if request["key"] not in found]:
        raise CompressedTextError(f"the program {' '.join(program)} returned no text for {len(missing)} contexts")
    with texts.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps({"key": r["key"], "text": found[r["key"]]}) + "\n" for r in wanted)


@functools.lru_cache(maxsize=4)
def read_texts(texts: str, content: str) -> dict[str, str]:
    """Key -> text of a file, whose hash ``content`` is only a key of the cache."""
    return _parsed(Path(texts).read_text(encoding="utf-8"), texts)


def _parsed(lines: str, where: str) -> dict[str, str]:
    found = {}
    for number, line in enumerate(lines.splitlines(), start=1):
        try:
            row = json.loads(line)
            found[row["key"]] = str(row["text"])
        except (ValueError, KeyError, TypeError):
            raise CompressedTextError(
                f'{where}, line {number}: not a compressed text; expected {{"key": ..., "text": ...}}'
            ) from None
    return found
