"""Generated data: the words of data.train and data.eval whose records are made, not read.

synthetic                                           one document of plain facts (``synthetic``)
synthetic-documents                                 several, with repeated facts and two-hop questions
synthetic-documents:two_hop=1:questions=8           NAME[:OPTION=VALUE]...
"""

import difflib
import inspect
from collections.abc import Callable, Sequence

from comi_jax.checks import shown
from comi_jax.data import synthetic, synthetic_documents
from comi_jax.data.records import Record
from comi_jax.errors import ConfigError

GENERATORS: dict[str, Callable[..., list[Record]]] = {
    "synthetic": synthetic.records,
    "synthetic-documents": synthetic_documents.records,
}


def _options(generator: Callable[..., object]) -> dict[str, type]:
    """The keyword parameters of a function that are numbers, with their types; an int | None is an int."""
    named = inspect.signature(generator).parameters.values()
    types = {int: int, float: float, int | None: int}
    return {p.name: types[p.annotation] for p in named if p.kind is p.KEYWORD_ONLY and p.annotation in types}


# The options of each word and their types.
OPTIONS: dict[str, dict[str, type]] = {
    "synthetic": {"questions": int} | _options(synthetic.examples),
    "synthetic-documents": {"questions": int} | inspect.get_annotations(synthetic_documents.Difficulty),
}


def is_generated(words: Sequence[str]) -> bool:
    """Whether ``words``, the entries of data.train or data.eval, name generated data. Raises ConfigError if only some
    of them do."""
    named = [word.partition(":")[0] in GENERATORS for word in words]
    if any(named) and len(words) > 1:
        raise ConfigError(
            f"{shown(words[named.index(True)])} cannot be mixed with other data; let data.train or data.eval name it "
            "alone"
        )
    return any(named)


def records(word: str, split: str, count: int, seed: int) -> list[Record]:
    """``count`` records of ``split``, "train" or "eval", that ``word`` names. Raises ConfigError for an option that is
    unknown or out of its range."""
    name, *options = word.split(":")
    known, values = OPTIONS[name], {}
    for option in options:
        key, _, text = option.partition("=")
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            nearest = f"; the nearest is {near[0]}" if near else ""
            raise ConfigError(f"{word} has the unknown option {shown(key)}{nearest}; there are: {', '.join(known)}")
        try:
            values[key] = known[key](text)
        except ValueError:
            kind = "a whole number" if known[key] is int else "a number"
            raise ConfigError(f"{word}: {key} is {shown(text)}; it must be {kind}") from None
    try:
        return GENERATORS[name](split, count, seed, **values)
    except ValueError as error:
        raise ConfigError(str(error)) from None
