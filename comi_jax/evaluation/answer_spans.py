"""Where the answers of a record stand in its context: characters, and the tokens that stand for them.

Contexts and answers are compared under SQuAD's normalisation, as the metrics do, and whole words only: the answer "cat"
is not in "category". In scripts without spaces between words any letter may be a word's first or last.
"""

import re
import string
from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Int

from comi_jax.evaluation.metrics import ARTICLES, UNSPACED

_LETTER_OF_ITS_OWN = re.compile(f"[{UNSPACED}]")


def normalize_with_origins(text: str) -> tuple[str, Int[np.ndarray, " N"]]:
    """``metrics.normalize`` of ``text``, and for each of its characters the index in ``text`` of the one it came from
    (for the space between two words, of the last character before it)."""
    lowered = text.lower()
    origin = np.repeat(np.arange(len(text)), [len(letter.lower()) for letter in text])
    kept = [i for i, letter in enumerate(lowered) if letter not in string.punctuation]
    bare = ARTICLES.sub(lambda article: " " * len(article[0]), "".join(lowered[i] for i in kept))
    words = [range(word.start(), word.end()) for word in re.finditer(r"\S+", bare)]
    letters, origins = [], []
    for word in words:
        if letters:
            letters.append(" ")
            origins.append(origins[-1])
        letters.extend(bare[i] for i in word)
        origins.extend(origin[kept[i]] for i in word)
    return "".join(letters), np.asarray(origins, np.int64)


def occurrences(text: str, answers: Sequence[str]) -> list[tuple[int, int]]:
    """The characters [first, end) of every occurrence of every answer in ``text``, ascending. An answer that normalises
    to the empty string ("The", "?") occurs nowhere."""
    inside, origin = normalize_with_origins(text)
    found = set()
    for answer in {normalize_with_origins(answer)[0] for answer in answers} - {""}:
        at = inside.find(answer)
        while at >= 0:
            end = at + len(answer)
            if _is_boundary(inside, at) and _is_boundary(inside, end):
                found.add((int(origin[at]), int(origin[end - 1]) + 1))
            at = inside.find(answer, at + 1)
    return sorted(found)


def _is_boundary(text: str, at: int) -> bool:
    """Whether a word may begin or end between the characters ``at`` - 1 and ``at``."""
    if at in (0, len(text)):
        return True
    return any(letter == " " or _LETTER_OF_ITS_OWN.match(letter) for letter in text[at - 1 : at + 1])


def tokens_in(spans: Sequence[tuple[int, int]], places: Sequence[tuple[int, int]]) -> Bool[np.ndarray, " N"]:
    """For each token, with the characters ``spans``, whether it shares a character with one of ``places``."""
    first, end = np.asarray(spans, np.int64).reshape(-1, 2).T
    inside = np.zeros(len(spans), bool)
    for begin, behind in places:
        inside |= (first < behind) & (end > begin)
    return inside
