"""Spans of characters whose tokens become memory vectors of their own, within the slots of their segment."""

from collections.abc import Sequence
from typing import Any, SupportsIndex

import numpy as np

from comi_jax.config import max_groups
from comi_jax.errors import ConfigError
from comi_jax.serving.segments import Contents

Spans = Sequence[tuple[SupportsIndex, SupportsIndex]]
ADVICE = "give pairs of whole numbers, the first character of a span and the one behind it"


def listed_spans(spans: Any) -> list[tuple[Any, Any]]:
    """``spans``, an array or anything that holds pairs, as a list of pairs; None holds none. Raises ConfigError for the
    rest."""
    try:
        return [] if spans is None else [(start, end) for start, end in spans]
    except (TypeError, ValueError):
        raise ConfigError(f"keep is {spans!r:.80}; {ADVICE}") from None


def checked_spans(contents: Contents, spans: Any) -> list[tuple[int, int]]:
    """``spans`` in order. Raises ConfigError if they overlap, are empty, or lie outside of the text of ``contents``."""
    try:
        found = sorted((start.__index__(), end.__index__()) for start, end in spans)
    except (TypeError, ValueError, AttributeError):
        raise ConfigError(f"keep is {spans!r:.80}; {ADVICE}") from None
    for start, end in found:
        if not 0 <= start < end <= contents.characters:
            raise ConfigError(
                f"the span ({start}, {end}) of keep is empty or lies outside of the text, which has "
                f"{contents.characters} characters"
            )
    for (start, end), (later, behind) in zip(found, found[1:], strict=False):
        if later < end:
            raise ConfigError(f"the spans ({start}, {end}) and ({later}, {behind}) of keep overlap; join them")
    return found


def kept_tokens(contents: Contents, spans: Sequence[tuple[int, int]], rate: int) -> tuple[np.ndarray | None, ...]:
    """Which tokens of each segment stand for characters in ``spans``; None for a segment without any. Raises
    ConfigError if a span has no token or the tokens of a segment do not fit into its slots at ``rate``."""
    masks = [np.zeros(segment.tokens, bool) for segment in contents.segments]
    for start, end in spans:
        anywhere = False
        for segment, mask in zip(contents.segments, masks, strict=True):
            if segment.characters is None:
                raise ConfigError("this tokenizer does not tell the characters of its tokens; leave keep out")
            inside = (segment.characters[:, 0] < end) & (segment.characters[:, 1] > start)
            mask |= inside
            anywhere |= bool(inside.any())
        if not anywhere:
            raise ConfigError(
                f"the span ({start}, {end}) of keep has no token: it is white space, or the text was cut before it"
            )
    for number, mask in enumerate(masks, start=1):
        slots, needed = max_groups(len(mask), rate), int(mask.sum()) + _runs(~mask)
        if mask.any() and needed > slots:
            where = f"segment {number} of the document" if len(masks) > 1 else "the document"
            raise ConfigError(
                f"keep needs {needed} memory vectors in {where} ({mask.sum()} for its tokens, and one for each stretch "
                f"of text around them), which has {slots} at rate {rate}; lower the rate or keep less"
            )
    return tuple(mask if mask.any() else None for mask in masks)


def rate_of_others(mask: np.ndarray, rate: int) -> int:
    """The rate of the tokens outside of ``mask`` at which all vectors together are at most those of the whole segment
    at ``rate``. A group around kept tokens becomes two, so each stretch of other tokens but one may cost a slot."""
    others = int((~mask).sum())
    slots = max_groups(len(mask), rate) - int(mask.sum()) - max(_runs(~mask) - 1, 0)
    return max_groups(others, slots) if others else 1


def _runs(mask: np.ndarray) -> int:
    """The number of maximal runs of True."""
    return int(np.sum(mask & ~np.concatenate([[False], mask[:-1]])))
