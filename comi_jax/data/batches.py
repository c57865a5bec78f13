"""From records to batches: tokenise once, then a Grain pipeline whose order is a pure function of seed and step.

    records -> encoded -> Examples (a run stores them, see runs/examples.py) -> Plan: the examples of batch i -> Batches

Context, query and answer are tokenised raw and separately: no chat template, no separators, no BOS. The target is the
first answer and the end-of-sequence token.
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
    """The few static shapes that batches are padded to, each compiled once: a bucket for the contexts; the ``narrow``
    or the largest widths for queries and answers."""

    buckets: tuple[int, ...]  # ascending; the last one fits the longest context
    query: int
    answer: int
    narrow: tuple[int, int] | None = None  # (query, answer) widths for the many rows in which both are short

    @classmethod
    def of(cls, examples: Sequence[Example], data: Data, compression: Compression) -> "Shapes":
        """Buckets from ``data``, by default 32, 48, 64, 96, ... below the segment size, extended to the longest context
        (beyond one segment by whole segments); queries and answers are padded to the longest of ``examples``."""
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
        """Shapes for training on ``examples``: the buckets of ``data``, by default up to data.max_buckets buckets with
        the least padding; narrow rows if they save more than 2 % of the tokens."""
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
        """The padded lengths of contexts, queries and answers in a batch of ``examples``."""
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
    """``examples`` as right-padded NumPy arrays. Every ``share`` consecutive examples have the same context, which the
    batch holds once. ``size`` defaults to ``shapes.size(examples)``. ``own`` selects contexts (None: all); for the
    others, and their queries and answers, only the lengths are filled in."""
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
    """Tuples of ``share`` consecutive examples with the same context. Shorter ones are filled up with copies of their
    last example, which have no answer, so that nothing is learnt from them."""
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
    """The batches of training, planned ahead: the examples and the sizes of each.

    A batch is split into ``micro_batches`` micro-batches of examples of similar size, each with its own shape. The
    examples of a batch do not depend on ``micro_batches``."""

    groups: list[tuple[Example, ...]]  # each: the examples that share a context
    shapes: Shapes
    order: Order
    share: int  # examples per context
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
        # Narrow rows by ascending length, then the others by descending: a batch of both kinds has the longest of each.
        narrow = np.all(np.stack(widths, axis=1) == (shapes.narrow or (0, 0)), axis=1)
        order = Order(np.where(narrow, lengths, 2 * max(lengths) - lengths), batch_size // share, seed)
        return cls(groups, shapes, order, share, micro_batches)

    @property
    def contexts_at_once(self) -> int:
        """Contexts per micro-batch."""
        return self.order.batch // self.micro_batches

    def examples(self, number: int) -> list[list[Example]]:
        """The examples of each micro-batch of batch ``number``, sorted by size."""
        return [
            [e for i in part for e in self.groups[i]] for part in self.order[number].reshape(self.micro_batches, -1)
        ]

    def batch(self, number: int, rates: Sequence[int] | np.ndarray, own: range | None = None) -> tuple[Batch, ...]:
        """The micro-batches of batch ``number``; ``rates`` has a rate per example, ``own`` is as in ``collate``."""
        made = []
        for part, drawn in zip(self.examples(number), np.reshape(rates, (self.micro_batches, -1)), strict=True):
            examples = [dataclasses.replace(e, rate=int(rate)) for e, rate in zip(part, drawn, strict=True)]
            made.append(collate(examples, self.shapes, self.share, own=own))
        return tuple(made)

    def forecast(self) -> tuple[float, dict[tuple[int, int, int], int]]:
        """The fraction of padding in the first epoch, and the number of micro-batches of each size; every size is
        compiled once."""
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
    """An endless iterator over the batches of ``plan``: tuples of micro-batches, in which each example has a rate drawn
    from ``rates``.

    Batch i depends only on (seed, i); the iterator's get_state and set_state move it to any step. ``own`` selects the
    contexts of each micro-batch that this process's devices need; the tokens of others are not read. ``put`` places a
    batch on devices: elements are then (batch, put(batch)), and two batches are placed ahead of the one in use.
    ``close`` the iterator when done with it.
    """

    def make(number: int, rng: np.random.Generator) -> tuple[Batch, ...]:
        return plan.batch(number, rng.choice(rates, plan.order.batch * plan.share), own)

    data = grain.MapDataset.range(sys.maxsize).seed(seed).random_map(make).to_iter_dataset(grain.ReadOptions(1, 4))
    if put is not None:
        data = ThreadPrefetchIterDataset(data.map(lambda batch: (batch, put(batch))), prefetch_buffer_size=2)
    return iter(data)
