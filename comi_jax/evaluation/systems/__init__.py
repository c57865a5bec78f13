"""The systems of the paper's table that need no training, by name.

A new one is a file beside these, with the methods of ``protocol.System``, and a row in ``SYSTEMS``; docs/extending.md
walks through one.
"""

import difflib
from collections.abc import Sequence
from typing import NamedTuple

from comi_jax.errors import ConfigError
from comi_jax.evaluation.systems.bm25 import BM25
from comi_jax.evaluation.systems.llmlingua2 import LLMLingua2
from comi_jax.evaluation.systems.longllmlingua import LongLLMLingua
from comi_jax.evaluation.systems.original import ClosedBook, Original
from comi_jax.evaluation.systems.protocol import System
from comi_jax.evaluation.systems.snapkv import SnapKV
from comi_jax.evaluation.systems.streaming import Streaming
from comi_jax.evaluation.systems.truncation import Truncation


class Row(NamedTuple):
    """A row of the table."""

    title: str
    system: System


SYSTEMS: dict[str, Row] = {
    "closed_book": Row("Closed book", ClosedBook()),
    "original": Row("Original prompt", Original()),
    "truncation_head": Row("Truncation, head", Truncation("head")),
    "truncation_tail": Row("Truncation, tail", Truncation("tail")),
    "truncation_both": Row("Truncation, both", Truncation("both")),
    "bm25": Row("BM25", BM25()),
    "longllmlingua": Row("LongLLMLingua", LongLLMLingua()),
    "longllmlingua_ranking": Row("LongLLMLingua, ranking only", LongLLMLingua(token_stage=False)),
    "llmlingua2": Row("LLMLingua-2", LLMLingua2()),
    "streaming": Row("StreamingLLM, positions unshifted", Streaming(rerotate=False)),
    "streaming_rerotated": Row("StreamingLLM", Streaming()),
    "snapkv": Row("SnapKV", SnapKV()),
    "snapkv_published": Row("SnapKV, window as published", SnapKV(narrow=False)),
    "snapkv_reread": Row("SnapKV, question read again", SnapKV(reread=True)),
    "snapkv_agnostic": Row("SnapKV, without the question", SnapKV(query_aware=False, reread=True)),
}


def check_names(names: Sequence[str], known: Sequence[str]) -> None:
    """Raise ConfigError for a name that is not ``known``, with the nearest ones."""
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
            rest = f"the nearest are {', '.join(near)}" if near else f"there are {', '.join(known)}"
            raise ConfigError(f"there is no system {name!r}; {rest}")
