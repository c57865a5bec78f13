"""The metrics of a run, read one step late so that dispatch never waits for the device.

MFU = model FLOP on real tokens / (seconds · devices · peak FLOP/s of the chip)
"""

import functools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from jaxtyping import Array

from comi_jax.devices import chips
from comi_jax.model import flops
from comi_jax.model.architecture import Architecture, Stage
from comi_jax.model.batch import Batch


class TooManySkipped(RuntimeError):
    """Too many consecutive non-finite steps; ``batch`` is the batch of the last one."""

    def __init__(self, step: int, count: int, batch: Sequence[Batch]):
        super().__init__(f"the loss or a gradient of {count} steps in a row, up to step {step}, is not finite")
        self.step, self.batch = step, batch


@dataclass(frozen=True)
class Tally:
    """Counts over micro-batches: real tokens, positions including padding, context tokens summed over examples."""

    tokens: int
    positions: int
    asked_context: int

    @classmethod
    def of(cls, batch: Sequence[Batch]) -> "Tally":
        tokens = positions = asked = 0
        for rows in batch:
            tokens += sum(int(x.sum()) for x in (rows.context_length, rows.query_length, rows.answer_length))
            positions += sum(x.size for x in (rows.context, rows.query, rows.answer))
            share = len(rows.query) // len(rows.context)
            asked += int(np.repeat(rows.context_length, share)[rows.answer_length > 0].sum())
        return cls(tokens, positions, asked)

    @property
    def padding(self) -> float:
        """The fraction of positions that are padding."""
        return 1 - self.tokens / self.positions


def batch_flops(arch: Architecture, batch: Sequence[Batch], stage: Stage = "answering") -> float:
    """Model FLOP of the loss and gradients of ``batch``, without padding, shared contexts encoded once."""
    total = 0.0
    for rows in batch:
        share, contexts = len(rows.query) // len(rows.context), rows.context_length.tolist()
        lengths = (x.tolist() for x in (rows.query_length, rows.answer_length, rows.rate))
        for row, (query, answer, rate) in enumerate(zip(*lengths, strict=True)):
            total += _example_flops(arch, contexts[row // share], query, answer, rate, row % share > 0, stage)
    return total


@functools.lru_cache(maxsize=1 << 16)
def _example_flops(
    arch: Architecture, context: int, query: int, answer: int, rate: int, encoded: bool, stage: Stage
) -> float:
    if not answer or (encoded and stage == "autoencoding"):  # a context is reconstructed once
        return 0.0
    lengths = flops.Lengths(context, query, answer, rate)
    whole = flops.train_step(arch, lengths, stage)
    return whole - flops.of_context(arch, lengths).total if encoded else whole


class Meter:
    """Takes each step when it is dispatched, reads its metrics one step later and passes those of logged steps
    (``is_logged``) to ``write``.

    ``skipped`` counts the skipped updates, ``in_a_row`` the most recent consecutive ones. The learning rate is that of
    the updates that were applied.
    """

    def __init__(
        self,
        arch: Architecture,
        is_logged: Callable[[int], bool],
        max_skipped: int,
        rate: optax.Schedule,
        write: Callable[[int, dict[str, float]], None],
        skipped: int = 0,
        in_a_row: int = 0,
        stage: Callable[[int], Stage] = lambda _: "answering",
    ):
        self._arch, self._is_logged, self._max_skipped = arch, is_logged, max_skipped
        self._rate, self._write, self._stage = rate, write, stage
        self.skipped, self.in_a_row = skipped, in_a_row
        self._pending: tuple[int, dict[str, Array], Sequence[Batch]] | None = None
        chip = chips.find(jax.devices()[0].device_kind)
        self._peak = chip.flops * jax.device_count() if chip else 0.0
        self._since: float | None = None
        self._tokens, self._flops = 0, 0.0

    def add(self, step: int, metrics: dict[str, Array], batch: Sequence[Batch]) -> None:
        """Record a dispatched step, and read the one before it. Raises TooManySkipped."""
        before, self._pending = self._pending, (step, metrics, batch)
        if before:
            self._read(*before)

    def drain(self) -> None:
        """Wait for the newest step and read it. Raises TooManySkipped."""
        before, self._pending = self._pending, None
        if before:
            self._read(*before)

    def pause(self) -> None:
        """Exclude the time until the end of the next step, as for compilation or evaluation."""
        self._since = None

    def _read(self, step: int, metrics: dict[str, Array], batch: Sequence[Batch]) -> None:
        skipped = int(metrics["skipped"])
        updates = step - 1 - self.skipped
        self.skipped, self.in_a_row = self.skipped + skipped, (self.in_a_row + 1) * skipped
        tally, now = Tally.of(batch), time.perf_counter()
        if self._since is not None:
            self._tokens += tally.tokens
            self._flops += batch_flops(self._arch, batch, self._stage(step)) if self._peak else 0.0
        if self._is_logged(step):
            values = {name: float(metrics[name]) for name in ("loss", "accuracy", "gradient_norm")}
            values["learning_rate"] = float(np.asarray(self._rate(updates)))
            if self._since is not None:
                values["tokens_per_second"] = self._tokens / (now - self._since)
                if self._peak:
                    values["mfu"] = self._flops / (now - self._since) / self._peak
            values["padding"] = tally.padding
            values["ratio"] = tally.asked_context / max(float(metrics["memory_vectors"]), 1.0)
            values["memory_gb"] = memory_in_use() / 1e9
            values["skipped"] = self.skipped
            self._write(step, values)
        if self._since is None or self._is_logged(step):
            self._since, self._tokens, self._flops = now, 0, 0.0
        if self.in_a_row >= self._max_skipped:
            raise TooManySkipped(step, self.in_a_row, batch)


def memory_in_use() -> int:
    """Peak memory of this process's devices in bytes (the largest of them), or the resident memory of the process if
    devices do not report theirs."""
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    most = max((s.get("peak_bytes_in_use", 0) for s in stats), default=0)
    if most:
        return most
    status = Path("/proc/self/status")
    lines = status.read_text(encoding="utf-8").splitlines() if status.exists() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS:")), 0)


def bytes_per_device(tree: Any) -> int:
    """Bytes of the arrays in ``tree`` on the first device of this process."""
    first = jax.local_devices()[0]
    shards = (s for x in jax.tree.leaves(tree) for s in x.addressable_shards)
    return sum(shard.data.nbytes for shard in shards if shard.device == first)
