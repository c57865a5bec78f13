"""What compression did with a document, as arrays of NumPy without padding: its tokens, and its groups."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

SCORES = ("relevance", "redundancy", "mig")


@dataclass(frozen=True)
class Kept:
    """What compression kept of a document for a question."""

    tokens: dict[str, np.ndarray]  # by name, a value of each of the X tokens; see ``without_padding``
    groups: dict[str, np.ndarray]  # of the M memory slots: segment, first token, number of tokens
    initial: dict[str, np.ndarray] | None  # of the groups before re-allocation; None with compression.coarse off


def without_padding(aux: Any, length: int, rate: int, number: int) -> dict[str, dict[str, np.ndarray]]:
    """The ``Aux`` of segment ``number``, one row without its batch axis, cut to its ``length`` tokens and its groups.

    - "tokens": group (the memory slot within the segment), weights, relevance, redundancy and mig of each token.
    - "initial", with compression.coarse on: of each group of ``rate`` tokens before re-allocation, its segment, first
      token, size, representative (a token of the segment) with its scores, share (5) and the allocated size; 0: it has
      no memory vector.
    """
    tokens = {name: np.asarray(getattr(aux, name))[:length] for name in ("group", "weights", *SCORES)}
    if aux.coarse is None:
        return {"tokens": tokens}
    coarse, count = aux.coarse, int(aux.coarse.exists.sum())
    first = rate * np.arange(count)
    initial = {"segment": np.full(count, number), "first": first, "size": np.minimum(rate, length - first)}
    initial |= {name: np.asarray(getattr(coarse, name))[:count] for name in ("token", *SCORES)}
    initial |= {"share": np.asarray(aux.share)[:count], "allocated": np.asarray(aux.group_sizes)[:count]}
    return {"tokens": tokens, "initial": initial}


def joined(parts: Sequence[dict[str, dict[str, np.ndarray]]]) -> Kept:
    """What was kept of a document from what was kept of its segments; slots and tokens are counted through
    the document."""
    lengths = [len(part["tokens"]["group"]) for part in parts]
    before = np.cumsum([0, *lengths[:-1]])
    slots = [int(part["tokens"]["group"][-1]) + 1 for part in parts]
    slots_before = np.cumsum([0, *slots[:-1]])
    tokens = {name: np.concatenate([part["tokens"][name] for part in parts]) for name in parts[0]["tokens"]}
    tokens["group"] = tokens["group"] + np.repeat(slots_before, lengths)
    size = np.bincount(tokens["group"])
    groups = {"segment": np.repeat(np.arange(len(parts)), slots), "first": np.cumsum(size) - size, "size": size}
    if "initial" not in parts[0]:
        return Kept(tokens, groups, None)
    initial = {name: np.concatenate([part["initial"][name] for part in parts]) for name in parts[0]["initial"]}
    for name in ("first", "token"):
        initial[name] = initial[name] + before[initial["segment"]]
    return Kept(tokens, groups, initial)
