"""The numbers of a step: tokens, padding, ratio, operations and utilisation, counted by hand."""

import jax.numpy as jnp
import numpy as np
import pytest
from tiny_models import architecture

from comi_jax.devices import chips
from comi_jax.model import flops
from comi_jax.model.batch import Batch
from comi_jax.training import meter

ARCH = architecture()


def batch(share=1):
    """One micro-batch: two contexts of 30 and 12 tokens in rows of 32, ``share`` questions each, the last without an
    answer."""
    rows = 2 * share
    answers = np.full(rows, 2, np.int32)
    answers[-1] = 0
    arrays = (
        np.zeros((2, 32), np.int32), np.array([30, 12], np.int32), np.zeros((rows, 8), np.int32),
        np.full(rows, 5, np.int32), np.zeros((rows, 4), np.int32), answers, np.full(rows, 4, np.int32),
    )  # fmt: skip
    return (Batch(*arrays),)


def test_tokens_padding_and_contexts_are_counted():
    assert meter.Tally.of(batch()) == meter.Tally(tokens=42 + 10 + 2, positions=64 + 16 + 8, asked_context=30)
    assert meter.Tally.of(batch(2)) == meter.Tally(42 + 20 + 6, 64 + 32 + 16, asked_context=30 + 30 + 12)
    assert meter.Tally.of(batch() + batch(2)) == meter.Tally(54 + 68, 88 + 112, asked_context=30 + 72)


def test_operations_are_those_of_the_examples_and_a_shared_context_is_encoded_once():
    one, two = flops.Lengths(30, 5, 2, 4), flops.Lengths(12, 5, 2, 4)
    assert meter.batch_flops(ARCH, batch()) == flops.train_step(ARCH, one)
    encoded = flops.by_part(ARCH, flops.Lengths(30, 0, 0, 4))["encoder"].total
    shared = 2 * flops.train_step(ARCH, one) - encoded + flops.train_step(ARCH, two)
    assert meter.batch_flops(ARCH, batch(2)) == pytest.approx(shared)
    both = meter.batch_flops(ARCH, batch()) + shared
    assert meter.batch_flops(ARCH, batch() + batch(2)) == pytest.approx(both)


def metrics(skipped=0):
    numbers = {"loss": 2.0, "accuracy": 0.5, "gradient_norm": 1.0, "memory_vectors": 8.0}
    return {name: jnp.float32(value) for name, value in numbers.items()} | {"skipped": jnp.int32(skipped)}


@pytest.fixture
def read(monkeypatch):
    """A meter whose clock moves by 0.5 s at each look, on a chip of 1e9 FLOP/s; and what it writes."""
    now = iter(np.arange(0, 100, 0.5))
    monkeypatch.setattr(meter.time, "perf_counter", lambda: float(next(now)))
    monkeypatch.setattr(meter.chips, "find", lambda kind: chips.Chip("a chip", 1e9, 1.0, 1.0, 1.0, 1.0))
    written = []

    def make(every, most=10):
        def is_logged(step):
            return step % every == 0

        return meter.Meter(ARCH, is_logged, most, lambda n: jnp.float32(n), lambda *row: written.append(row)), written

    return make


def test_numbers_come_one_step_late_with_the_speed_since_the_last_ones(read):
    watch, written = read(every=2)
    for step in range(1, 6):
        watch.add(step, metrics(), batch())
        assert len(written) == (step - 1) // 2
    watch.drain()
    watch.drain()
    assert [step for step, _ in written] == [2, 4]
    values = written[1][1]
    assert values["tokens_per_second"] == 2 * 54 / 1.0
    assert values["mfu"] == pytest.approx(2 * meter.batch_flops(ARCH, batch()) / 1e9 / 4)  # four fake devices
    assert values["padding"] == 1 - 54 / 88 and values["ratio"] == 30 / 8 and values["learning_rate"] == 3


def test_a_pause_is_nobodys_time(read):
    watch, written = read(every=1)
    watch.add(1, metrics(), batch())
    watch.drain()
    assert "tokens_per_second" not in written[0][1]  # the first step compiles
    watch.add(2, metrics(), batch())
    watch.drain()
    assert written[1][1]["tokens_per_second"] == 54 / 0.5
    watch.pause()
    watch.add(3, metrics(), batch())
    watch.drain()
    assert "tokens_per_second" not in written[2][1]


def test_left_out_updates_are_counted_and_do_not_move_the_learning_rate(read):
    watch, written = read(every=1, most=2)
    for step, skipped in enumerate((0, 1, 0, 0, 1), start=1):
        watch.add(step, metrics(skipped), batch())
    watch.drain()
    assert [(values["skipped"], values["learning_rate"]) for _, values in written] == [
        (0, 0), (1, 1), (1, 1), (1, 2), (2, 3),
    ]  # fmt: skip
    watch.add(6, metrics(1), batch())
    with pytest.raises(meter.TooManySkipped, match="2 steps in a row, up to step 6") as stopped:
        watch.add(7, metrics(), batch())
    assert stopped.value.step == 6 and watch.skipped == 3


def test_memory_is_that_of_the_process_where_devices_do_not_say():
    assert 5e7 < meter.memory_in_use() < 5e10
