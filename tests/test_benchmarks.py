"""The measuring commands work, and count what they say."""

import random
import sys

import numpy as np
import pytest
import train_fixtures
from rich.console import Console

from comi_jax.benchmarks import data, documents, long_document, restart
from comi_jax.data import batches
from comi_jax.overrides import load
from comi_jax.runs import examples as stored
from comi_jax.serving.compressor import Comi
from comi_jax.serving.segments import DTYPES
from comi_jax.training.dataset import read_held_out
from comi_jax.training.meter import Tally

quick_compilation, world = train_fixtures.quick_compilation, train_fixtures.world


def settings(world, *more):
    return load("qwen2", train_fixtures.command(world.lm, world.data, "unused", *more)[1:])


def test_the_figures_of_data_are_those_of_the_batches_that_a_run_takes(world, tmp_path):
    config = settings(world)
    title, rows = data.measure(config, tmp_path, count=4, steps=1)
    figures = {name: value for name, value, _ in rows}
    assert list(figures) == ["tokenised", "batches", "trained", "padding", "padding with plain shuffling"]
    examples = stored.load(tmp_path)
    shapes = batches.Shapes.fit(examples, config.data, config.compression)
    drawn = batches.Plan.of(examples, shapes, 8, config.train.seed)
    shares = [Tally.of(drawn.batch(i, np.full(8, 2))).padding for i in range(2)]
    assert figures["padding"] == f"{np.mean(shares):.1%}"  # both batches have one shape
    assert title == "16 examples, micro-batches of 8 in 1 shapes, 2 per epoch"
    assert all(float(value.split()[0].replace(",", "")) > 0 for value in list(figures.values())[:3])
    assert [row[2] for row in data.measure(config, tmp_path, count=1, steps=0)[1]] == [""] * 4


def test_documents_are_measured_against_the_exact_one(world):
    model = Comi.load(world.run, batch_size=4)
    rows = documents.measure(model, read_held_out(model.run.config, Console())[0][:3])
    assert [row[0] for row in rows] == [
        f"{dtype}, {kept}" for dtype in DTYPES for kept in ("states, keys and values", "states alone")
    ]
    sizes = [int(row[1]) for row in rows]
    assert sizes[0] > sizes[2] > sizes[4] and all(a > b for a, b in zip(sizes[::2], sizes[1::2], strict=True))
    assert float(rows[0][3]) == float(rows[0][4]) == 0 and rows[0][5] == "0 of 3"
    assert all(0 < float(row[3]) <= float(row[4]) < 1 for row in rows[2::2])


def test_the_device_holds_one_segment_of_a_document_in_host_memory_at_a_time(world):
    """Of 24 segments, while the document is encoded and asked; on the device it holds all of them."""
    model = Comi.load(world.run, overrides=["data.max_context=500", "compression.segment_size=16"], batch_size=1)
    text = long_document.text_of(model, 370)
    host, device = (long_document.measure(model, text, place) for place in ("host", "device"))
    assert host.segments == device.segments > 20 and host.nbytes == device.nbytes
    assert host.on_device <= host.largest < device.on_device / 20 and device.on_device <= device.nbytes
    assert all(each > 0 for made in (host, device) for each in (made.grew_encoding + made.nbytes, made.question))


def test_what_cannot_be_read_is_said_in_a_sentence(world):
    words = train_fixtures.command(world.lm, "nowhere.jsonl", "unused")
    with pytest.raises(SystemExit, match="^error: .*nowhere.jsonl"):
        data.main(words)


def test_a_run_that_ends_by_itself_is_not_waited_for(tmp_path):
    run = restart.Run([sys.executable, "-c", "raise SystemExit('no such model')"], tmp_path)
    with pytest.raises(SystemExit, match="status 1: no such model"):
        run.wait_for_step(1)


@pytest.mark.slow
def test_a_kill_costs_the_steps_since_the_checkpoint(world, tmp_path):
    words = world.command(tmp_path / "run", "train.steps=500", "train.log_every=1", "train.checkpoint_every=4")
    rows = restart.measure([sys.executable, "-m", "comi_jax.train", *words], tmp_path, 2, 4, random.Random(0))
    for row in rows:
        assert 0 < row["resumed, s"] < row["a new step, s"]
        assert row["steps repeated"] >= 0
