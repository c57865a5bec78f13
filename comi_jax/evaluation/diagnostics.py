"""What compression did with single examples: the groups of a context with their scores, sizes, weights and vectors.

The values come from the functions that answer questions: ``encode_pairs`` and ``compress_segments``. A context of
several segments has the groups of all of them, in order; scores and shares are within a segment.
"""

import functools
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, SupportsIndex, no_type_check

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from comi_jax.config import max_groups
from comi_jax.data import encode
from comi_jax.data.encode import Example
from comi_jax.data.records import Record
from comi_jax.errors import ConfigError, UserError
from comi_jax.evaluation import answer_spans
from comi_jax.model import mig
from comi_jax.model.architecture import Architecture
from comi_jax.model.batch import Batch
from comi_jax.model.comi_memory import compress_segments
from comi_jax.model.compress import Aux, Representatives, representatives
from comi_jax.model.encoder import encode_pairs, segments
from comi_jax.serving import batching
from comi_jax.serving.compressor import Comi
from comi_jax.serving.examined import SCORES, without_padding
from comi_jax.serving.explanation import check_system

NOT_COMPARABLE = "not comparable with ours: other data and model"
RESAMPLES = 1000  # of the bootstrap, for intervals
REASONS = {  # why an example is left out
    "absent": "without an answer in the context",
    "cut": "with the answers only in what was truncated",
    "single": "of a single group",
    "all": "with an answer in every group",
}
ADVICE = "give records whose answers are in their contexts, or a lower --rate"


class DiagnosisError(UserError):
    """Records or a model that a diagnostic cannot be computed for; the message says what to pass instead."""


@dataclass
class Table:
    """A table to print and to store: each row has the same columns. ``notes`` say how to read it, and what was left
    out; ``more`` is stored only."""

    name: str
    title: str
    rows: list[dict[str, Any]]
    notes: list[str] = field(default_factory=list)
    more: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Subject:
    """One record to diagnose: its tokens, and which of them stand for an answer."""

    number: int  # of the record, from 0
    record: Record
    example: Example
    spans: list[tuple[int, int]]  # the characters of the context that each token stands for
    answer: Bool[np.ndarray, " N"]  # of the context's tokens: whether it is part of an occurrence of an answer
    status: str  # "found"; "absent": no answer in the context; "cut": only in what was truncated

    def text(self, tokens: range) -> str:
        """The text of some consecutive tokens of the context."""
        first, end = self.spans[tokens.start][0], self.spans[tokens.stop - 1][1]
        return self.record.context_text()[first:end]


def subjects(records: Sequence[Record], model: Comi) -> list[Subject]:
    """``records`` tokenised as the model reads them. Raises LengthError for those that are too long, TextError for a
    tokenizer that does not tell which characters its tokens stand for."""
    examples, _ = encode.encode(records, model.tokenizer, model.run.config.data, targets=False)
    made = []
    for number, (record, example) in enumerate(zip(records, examples, strict=True)):
        text = record.context_text()
        spans = encode.token_spans(model.tokenizer, text)
        inside = answer_spans.tokens_in(spans, answer_spans.occurrences(text, record.answers))
        kept = inside[: len(example.context)]
        status = "found" if kept.any() else "cut" if inside.any() else "absent"
        made.append(Subject(number, record, example, spans[: len(example.context)], kept, status))
    return made


def check_answers(statuses: Sequence[str]) -> Counter[str]:
    """The number of examples by the reason why they have no answer in their context. Raises DiagnosisError if none has
    one."""
    reasons = Counter(status for status in statuses if status != "found")
    if reasons.total() == len(statuses):
        raise DiagnosisError(f"no example has an answer in its context: {counts(reasons)}; {ADVICE}")
    return reasons


def counts(reasons: Counter[str]) -> str:
    """How many examples were left out, and why, in words."""
    total = sum(reasons.values())
    texts = (f"{reasons[why]} {text}" for why, text in REASONS.items() if reasons[why])
    return f"{total} left out: {', '.join(texts)}"


@dataclass(frozen=True)
class Groups:
    """The groups of one context, and the scores of their representatives."""

    sizes: Int[np.ndarray, " M"]  # tokens; never 0
    relevance: Float[np.ndarray, " M"]
    redundancy: Float[np.ndarray, " M"]
    mig: Float[np.ndarray, " M"]

    def holding(self, tokens: Bool[np.ndarray, " N"]) -> Bool[np.ndarray, " M"]:
        """Which groups hold any of the marked ``tokens``."""
        return np.add.reduceat(tokens, np.cumsum(self.sizes) - self.sizes, dtype=np.int64) > 0


@dataclass(frozen=True)
class Anatomy:
    """What compression made of one context for its question."""

    subject: Subject
    initial: Groups  # of `rate` consecutive tokens, as the coarse stage scores them
    final: Groups  # after re-allocation; scored as the initial ones are, by representatives of their own
    segment: Int[np.ndarray, " M"]  # of each initial group
    share: Float[np.ndarray, " M"]  # (5), of each initial group
    allocated: Int[np.ndarray, " M"]  # tokens of each initial group after re-allocation; 0: it has no memory vector
    weights: Float[np.ndarray, " N"]  # of the merge, one for each token
    token_relevance: Float[np.ndarray, " N"]
    token_redundancy: Float[np.ndarray, " N"]  # within the token's final group
    representatives: Float[np.ndarray, "M D"]  # encoder states of the initial groups' representatives
    merged: Float[np.ndarray, "K D"]  # (7), of the final groups, before the LSA
    scalars: dict[str, float]  # alpha_coarse, beta_coarse, alpha_fine, beta_fine
    fine: bool  # compression.fine


@no_type_check
@struct.dataclass
class Examined:
    """The intermediate results for all segments of one width, a row for each."""

    length: Int[Array, " BG"]
    aux: Aux
    final: Representatives  # of the groups after re-allocation
    representatives: Float[Array, "BG M D"]
    merged: Float[Array, "BG M D"]


@functools.partial(jax.jit, static_argnames=("arch", "rate"))
def examine(params: Any, batch: Batch, arch: Architecture, rate: int) -> tuple[Examined, ...]:
    """Compress a batch as ``comi.memory_of`` does, and keep what lies between: for the full segments and, if the width
    leaves any, for the shorter last ones."""
    found = []
    for part in segments(batch.context, batch.context_length, arch.compression.segment_size):
        encoded, query_vector = encode_pairs(params, arch, *part, batch.query, batch.query_length)
        slots = max_groups(part[0].shape[2], rate)
        out = compress_segments(params, arch, encoded, query_vector, batch.rate, slots)
        length = encoded.length.reshape(-1)
        real = jnp.arange(encoded.states.shape[1], dtype=jnp.int32)[None, :] < length[:, None]
        directions, inverse = mig.directions(jnp.where(real[:, :, None], encoded.states, 0))
        final = representatives(
            directions, inverse, out.aux.relevance, out.aux.group, params["mig"], arch.compression, slots, "xla"
        )
        coarse: Any = out.aux.coarse  # not None, as compression.coarse is on
        chosen = jnp.take_along_axis(encoded.states, coarse.token[:, :, None], axis=1).astype(jnp.float32)
        found.append(Examined(length, out.aux, final, chosen, out.memory.astype(jnp.float32)))
    return tuple(found)


def anatomies(
    model: Comi, subjects: Sequence[Subject], rate: SupportsIndex | None, params: Any = None
) -> Iterator[Anatomy]:
    """The anatomy of each subject, in batches of similar length; ``params`` (None: the model's) may have another
    encoder. Raises ConfigError if the model allocates its groups without MIG, and LengthError for contexts that are
    longer than its positions."""
    check_system(model)
    if not model.run.config.compression.coarse:
        raise ConfigError(
            "this checkpoint has compression.coarse=false, so its groups have no MIG to diagnose; pass "
            "--set compression.coarse=true, or a checkpoint that allocates by MIG"
        )
    examples = [subject.example for subject in subjects]
    rate = batching.check(model.run, examples, rate, 1)
    params = model.params if params is None else params
    scalars = {name: float(value) for name, value in params["mig"].items()}
    fine = model.run.config.compression.fine
    for rows, batch in batching.batches(model.run, examples, rate, model.batch_size, model.mesh):
        parts = jax.tree.map(batching.fetch, examine(params, batch, model.architecture, rate))
        for row, number in enumerate(rows):
            pieces: list[Examined] = []
            for part in parts:
                count = part.length.shape[0] // batch.rate.shape[0]
                pieces += [jax.tree.map(lambda x, at=at: x[at], part) for at in range(row * count, (row + 1) * count)]
            joined = _joined([piece for piece in pieces if piece.length], rate)
            yield Anatomy(subject=subjects[number], scalars=scalars, fine=fine, **joined)


def _joined(segments: Sequence[Any], rate: int) -> dict[str, Any]:
    """The fields of the anatomy of one context that come from its segments: Examined of one row, with arrays of
    NumPy."""
    pieces = [_without_padding(segment, rate, number) for number, segment in enumerate(segments)]
    joined: dict[str, Any] = {name: np.concatenate([piece[name] for piece in pieces]) for name in pieces[0]}
    for kind in ("initial", "final"):
        joined[kind] = Groups(*(joined.pop(f"{kind}_{name}") for name in ("sizes", "relevance", "redundancy", "mig")))
    return joined


def _without_padding(part: Any, rate: int, number: int) -> dict[str, np.ndarray]:
    """The arrays of segment ``number``, cut to its tokens and groups."""
    found, final = without_padding(part.aux, int(part.length), rate, number), part.final
    initial, kept = found["initial"], int(final.exists.sum())
    made = {
        **{name: initial[name] for name in ("segment", "share", "allocated")},
        "weights": found["tokens"]["weights"],
        **{f"token_{name}": found["tokens"][name] for name in ("relevance", "redundancy")},
        "representatives": part.representatives[: len(initial["size"])],
        "merged": part.merged[:kept],
        "initial_sizes": initial["size"],
        "final_sizes": initial["allocated"][initial["allocated"] > 0],
    }
    for name in SCORES:
        made |= {f"initial_{name}": initial[name], f"final_{name}": getattr(final, name)[:kept]}
    return made
