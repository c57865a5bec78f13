"""From records to batches: tokenise once, then a Grain pipeline whose order is a pure function of seed and step.

    records -> encoded -> Example (of a run: in a file, see ``tokens``) -> Plan: which examples make batch i -> Batches

Context, query and answer are tokenised raw and apart: no chat template, no separators, no BOS. The target is the first
answer and the end-of-sequence token.
"""

import dataclasses
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import grain
import numpy as np
from grain.experimental import ThreadPrefetchIterDataset

from comi_jax.config import Compression, Data
from comi_jax.data.encode import Example
from comi_jax.data.order import Order, fit_lengths, fit_widths
from comi_jax.model.batch import Batch


@dataclass(frozen=True)
class Shapes:
    """The few static shapes that batches are padded to, one compilation each: a bucket for the contexts, with
    ``narrow`` or the longest widths for queries and answers."""

    buckets: tuple[int, ...]  # rising; the last holds the longest context
    query: int
    answer: int
    narrow: tuple[int, int] | None = None  # query and answer width for the many rows that are short in both

    @classmethod
    def of(cls, examples: Sequence[Example], data: Data, compression: Compression) -> "Shapes":
        """Buckets from ``data`` or, if it has none, powers of two and their halves, and whole segments beyond; queries
        and answers are padded to the longest of ``examples``."""
        longest, segment = max(1, max(len(example.context) for example in examples)), compression.segment_size
        steps = data.buckets or [base * 2**k for k in range(40) for base in (32, 48) if base * 2**k < segment]
        largest = max(steps, default=0)
        if data.buckets and largest < longest <= segment:
            steps = (*steps, longest)
        elif largest < longest:
            steps = (*steps, *range(largest // segment * segment + segment, longest + segment, segment))
        last = min(b for b in steps if b >= longest)
        query, answer = (max(len(getattr(e, name)) for e in examples) for name in ("query", "answer"))
        return cls(tuple(sorted({*(b for b in steps if b < longest), last})), query, max(answer, 1))

    @classmethod
    def fit(cls, examples: Sequence[Example], data: Data, compression: Compression) -> "Shapes":
        """Shapes for training on ``examples``: the buckets of ``data``, or else at most data.max_buckets that leave the
        least padding, and narrow rows where those save 2 % of the tokens or more."""
        shapes = cls.of(examples, data, compression)
        lengths = np.array([len(e.context) for e in examples])
        widths = np.array([(len(e.query), max(len(e.answer), 1)) for e in examples])
        query, answer, saved = fit_widths(widths)
        if saved > 0.02 * (lengths.sum() + widths.sum()):
            shapes = dataclasses.replace(shapes, narrow=(query, answer))
        if not data.buckets:
            fitted = fit_lengths(lengths, data.max_buckets, compression.segment_size)
            shapes = dataclasses.replace(shapes, buckets=fitted)
        return shapes

    def size(self, examples: Sequence[Example]) -> tuple[int, int, int]:
        """The widths of contexts, queries and answers in a batch of ``examples``."""
        context, query, answer = (max(len(getattr(e, n)) for e in examples) for n in ("context", "query", "answer"))
        widths, bucket = (self.query, self.answer), next(b for b in self.buckets if b >= context)
        if self.narrow is not None and query <= self.narrow[0] and answer <= self.narrow[1]:
            widths = self.narrow
        return bucket, *widths


def collate(
    examples: Sequence[Example],
    shapes: Shapes,
    share: int = 1,
    *,
    size: tuple[int, int, int] | None = None,
    own: range | None = None,
) -> Batch:
    """Right-padded numpy arrays of ``examples``. Every ``share`` examples in a row have one context, which the batch
    holds once. ``size`` is that of ``examples`` unless given. Contexts that are not in ``own`` (None: all are) and
    their queries and answers get their lengths alone."""
    owners = examples[::share]
    own = range(len(owners)) if own is None else own
    rows = range(own.start * share, own.stop * share)
    context_width, query_width, answer_width = size or shapes.size(examples)
    context, context_length = _pad([e.context for e in owners], context_width, own)
    query, query_length = _pad([e.query for e in examples], query_width, rows)
    answer, answer_length = _pad([e.answer for e in examples], answer_width, rows)
    rate = np.array([e.rate for e in examples], np.int32)
    arrays = context, context_length, query, query_length, answer, answer_length, rate
    return Batch(*arrays)  # pyright: ignore[reportArgumentType] (NumPy's until they are put on devices)


def _pad(ids: Sequence[np.ndarray], width: int, rows: range) -> tuple[np.ndarray, np.ndarray]:
    padded = np.zeros((len(ids), width), np.int32)
    for i in rows:
        padded[i, : len(ids[i])] = ids[i]
    return padded, np.array([len(row) for row in ids], np.int32)


def share_contexts(examples: Sequence[Example], share: int) -> list[tuple[Example, ...]]:
    """Neighbours with the same context in groups of ``share``; a group that is not full repeats its last example,
    without an answer, so that nothing is learnt from the repetition."""
    groups: list[list[Example]] = []
    for example in examples:
        if groups and len(groups[-1]) < share and np.array_equal(groups[-1][0].context, example.context):
            groups[-1].append(example)
        else:
            groups.append([example])
    blank = np.zeros(0, np.int32)
    return [tuple(g + [dataclasses.replace(g[-1], answer=blank)] * (share - len(g))) for g in groups]


@dataclass(frozen=True)
class Plan:
    """The batches of training: which examples each holds and how large it is, known before any is made.

    A batch comes in ``micro_batches`` parts, examples of like size together, each of which has a shape of its own.
    Which examples make a batch does not depend on ``micro_batches``."""

    groups: list[tuple[Example, ...]]  # examples about one context
    shapes: Shapes
    order: Order
    share: int  # examples in a group
    micro_batches: int

    @classmethod
    def of(
        cls,
        examples: Sequence[Example],
        shapes: Shapes,
        batch_size: int,
        seed: int,
        share: int = 1,
        micro_batches: int = 1,
    ) -> "Plan":
        groups = share_contexts(examples, share)
        lengths, *widths = np.array([shapes.size(group) for group in groups]).T
        # Narrow rows rise and the others fall: where they meet, the longest of both share a batch.
        narrow = np.all(np.stack(widths, axis=1) == (shapes.narrow or (0, 0)), axis=1)
        order = Order(np.where(narrow, lengths, 2 * max(lengths) - lengths), batch_size // share, seed)
        return cls(groups, shapes, order, share, micro_batches)

    @property
    def contexts_at_once(self) -> int:
        """How many contexts a micro-batch has."""
        return self.order.batch // self.micro_batches

    def examples(self, number: int) -> list[list[Example]]:
        """The examples of the micro-batches of batch ``number``, which the order has sorted by size."""
        return [
            [e for i in part for e in self.groups[i]] for part in self.order[number].reshape(self.micro_batches, -1)
        ]

    def batch(self, number: int, rates: Sequence[int] | np.ndarray, own: range | None = None) -> tuple[Batch, ...]:
        """The micro-batches of batch ``number``, its examples at ``rates``; ``own`` of each as in ``collate``."""
        made = []
        for part, drawn in zip(self.examples(number), np.reshape(rates, (self.micro_batches, -1)), strict=True):
            examples = [dataclasses.replace(e, rate=int(rate)) for e, rate in zip(part, drawn, strict=True)]
            made.append(collate(examples, self.shapes, self.share, own=own))
        return tuple(made)

    def forecast(self) -> tuple[float, dict[tuple[int, int, int], int]]:
        """Share of padding over the first epoch, and how many micro-batches have each size: every one is compiled
        once."""
        real, padded, sizes = 0, 0, Counter()
        for examples in (part for number in range(max(self.order.first(1), 1)) for part in self.examples(number)):
            context, query, answer = self.shapes.size(examples)
            real += sum(len(e.context) for e in examples[:: self.share])
            real += sum(len(e.query) + len(e.answer) for e in examples)
            padded += self.contexts_at_once * context + len(examples) * (query + answer)
            sizes[context, query, answer] += 1
        return 1.0 - real / padded, dict(sizes)


def training_batches(
    plan: Plan,
    rates: tuple[int, ...],
    seed: int,
    *,
    own: range | None = None,
    put: Callable[[tuple[Batch, ...]], Any] | None = None,
) -> grain.DatasetIterator:
    """The batches of ``plan``, endless, each a tuple of micro-batches and each example with a rate drawn from
    ``rates``.

    Batch i depends on (seed, i) alone; the iterator's get_state and set_state move it to any step. A process whose
    devices need a part of every micro-batch's contexts names it as ``own``: no other tokens are read. With ``put``,
    which places a batch on devices, elements are (batch, put(batch)), and two are placed ahead of the one in use;
    ``close`` the iterator when done with it.
    """

    def make(number: int, rng: np.random.Generator) -> tuple[Batch, ...]:
        return plan.batch(number, rng.choice(rates, plan.order.batch * plan.share), own)

    data = grain.MapDataset.range(sys.maxsize).seed(seed).random_map(make).to_iter_dataset(grain.ReadOptions(1, 4))
    if put is not None:
        data = ThreadPrefetchIterDataset(data.map(lambda batch: (batch, put(batch))), prefetch_buffer_size=2)
    return iter(data)
