"""The examples of training batch i, a pure function of (seed, i): shuffled epochs, similar sizes batched together.

The stream of positions p = 0, 1, ... concatenates shuffled epochs of the n examples: p is example p % n of epoch
p // n. The batches that begin in an epoch belong to it. The positions that they cover are sorted by size and cut into
batches, and the batches are ordered by their last positions. If all sizes are equal, this is the shuffled stream.
"""

from functools import lru_cache

import grain
import numpy as np

STEP, STEP_WIDTH = 32, 8  # fitted context lengths, query and answer widths are multiples of these
MOST_STEPS = 2048  # lengths to consider; for longer contexts, the step is a larger multiple of STEP
ENOUGH = 0.05  # fraction of padding in context tokens below which no bucket is added


class Order:
    """The example indices of every batch; examples of equal, or else similar, ``sizes`` [n] are batched together."""

    def __init__(self, sizes: np.ndarray, batch: int, seed: int):
        self.sizes, self.batch = np.asarray(sizes), batch
        self._shuffled = grain.MapDataset.range(len(sizes)).seed(seed).shuffle().repeat()
        self._epoch = lru_cache(maxsize=2)(self._make_epoch)  # the loader reads ahead into the next epoch

    def __getitem__(self, number: int) -> np.ndarray:
        """The indices of the examples in batch ``number``."""
        epoch = number * self.batch // len(self.sizes)
        return self._epoch(epoch)[number - self.first(epoch)]

    def first(self, epoch: int) -> int:
        """The number of the first batch that begins in ``epoch``; both count from 0."""
        return -(-epoch * len(self.sizes) // self.batch)

    def _make_epoch(self, epoch: int) -> np.ndarray:
        positions = range(self.first(epoch) * self.batch, self.first(epoch + 1) * self.batch)
        stream = np.array([self._shuffled[p] for p in positions])
        places = np.argsort(self.sizes[stream], kind="stable").reshape(-1, self.batch)
        return stream[places[np.argsort(places.max(axis=1))]]


def fit_lengths(lengths: np.ndarray, most: int, segment: int) -> tuple[int, ...]:
    """At most ``most`` buckets that minimise the total padding of ``lengths``; fewer if the padding falls to ENOUGH.
    Buckets are whole segments plus a multiple of STEP. Exact, by dynamic programming."""
    step = STEP * max(1, -(-int(lengths.max()) // (STEP * MOST_STEPS)))
    whole = np.maximum(lengths - 1, 0) // segment * segment
    steps = whole + np.clip(-(-(lengths - whole) // step) * step, min(step, segment), segment)
    values, counts = np.unique(steps, return_counts=True)
    counts = counts.cumsum()
    before = np.concatenate([[0], counts])
    # cost[j]: padded tokens of all lengths up to values[j], with the buckets so far, the last of which is values[j].
    cost, cuts = values * counts, []
    while cost[-1] > lengths.sum() / (1 - ENOUGH) and len(cuts) + 1 < min(most, len(values)):
        # Row i, column j: the cost when the new bucket values[j] takes the lengths of indices i to j.
        options = np.concatenate([[0], cost])[:, None] + values * (counts - before[:, None])
        options = np.where(np.tri(len(values) + 1, len(values), -1, dtype=bool), np.iinfo(np.int64).max, options)
        cuts.append(options.argmin(axis=0))
        cost = options.min(axis=0)
    buckets, end = set(), len(values)
    for cut in reversed([np.zeros(len(values), np.int64), *cuts]):
        if end:
            buckets.add(int(values[end - 1]))
            end = int(cut[end - 1])
    return tuple(sorted(buckets))


def fit_widths(widths: np.ndarray) -> tuple[int, int, int]:
    """The narrow (query, answer) widths that save the most padding of ``widths`` [n, 2], and the tokens saved."""
    longest = widths.max(axis=0)
    steps = [np.unique(np.minimum(-(-widths[:, i] // STEP_WIDTH) * STEP_WIDTH, longest[i])) for i in range(2)]
    best = (0, *map(int, longest))
    for query in steps[0]:
        fitting = np.sort(widths[widths[:, 0] <= query, 1])
        fits = np.searchsorted(fitting, steps[1], side="right")
        saved = fits * (longest.sum() - query - steps[1])
        best = max(best, (int(saved.max()), int(query), int(steps[1][saved.argmax()])))
    return best[1], best[2], best[0]
