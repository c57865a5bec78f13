"""Examples in a file: as they were made, made once, and made again when anything they depend on has changed."""

import dataclasses
import io
import os
import tracemalloc

import numpy as np
import pytest
import train_fixtures
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from comi_jax.data import encode
from comi_jax.data.encode import Example
from comi_jax.overrides import load
from comi_jax.runs import description, examples
from comi_jax.runs.checksums import CheckpointError
from comi_jax.training import dataset

IDS = st.lists(st.integers(0, 2**31 - 1), max_size=9)
EXAMPLE = st.builds(
    Example, *[IDS.map(lambda ids: np.array(ids, np.int32))] * 3, rate=st.just(0), truncated=st.booleans()
)


def same(a, b):
    parts = all(np.array_equal(getattr(a, part), getattr(b, part)) for part in examples.PARTS)
    return parts and (a.truncated, a.rate) == (b.truncated, b.rate)


@settings(max_examples=40, deadline=None)
@given(chunks=st.lists(st.lists(EXAMPLE, min_size=1, max_size=5), max_size=5))
def test_what_is_read_is_what_was_written(chunks, tmp_path_factory):
    folder, said = tmp_path_factory.mktemp("examples"), []
    everything = [example for chunk in chunks for example in chunk]
    made = examples.make(folder, iter(chunks), "origin", lambda: said)
    for got in (made, examples.load(folder), examples.find(folder, "origin")):
        assert len(got) == len(everything) and all(map(same, got, everything))
        assert got.about.fingerprint == examples.fingerprint(everything)
        for slice_ in (slice(1, None, 2), slice(-2, None), slice(None)):
            assert len(got[slice_]) == len(everything[slice_]) and all(map(same, got[slice_], everything[slice_]))
        assert not everything or same(got[-1], everything[-1])
    for outside in (len(everything), -len(everything) - 1):
        with pytest.raises(IndexError):
            made[outside]


def test_equal_ids_differently_divided_have_other_fingerprints():
    one, two = np.arange(3, dtype=np.int32), np.arange(2, dtype=np.int32)
    a, b = Example(one, two, two), Example(two, one, two)
    assert len({examples.fingerprint(rows) for rows in ([a, b], [b, a], [a], [a, a, b])}) == 4


def config_of(data, *words):
    return load("qwen2", [f"data.train={data}", *words])


def read(config, folder, tokenizer=None):
    printed = io.StringIO()
    console = Console(file=printed, soft_wrap=True)
    return dataset.read_examples(config, tokenizer or train_fixtures.tokenizer(), folder, console), printed.getvalue()


@pytest.fixture
def data(tmp_path):
    return train_fixtures.write(tmp_path / "data.jsonl", train_fixtures.records(5))


def test_they_are_made_once_and_the_same_is_said_again(data, tmp_path, monkeypatch):
    folder = tmp_path / "run"
    made, first = read(config_of(data), folder)
    assert sorted(path.name for path in folder.iterdir()) == ["examples.arrow", "examples.json"]
    monkeypatch.setattr(encode, "encoded", lambda *_, **__: pytest.fail("tokenised again"))
    found, again = read(config_of(data), folder)
    assert again.startswith(first) and "reusing the tokenised examples" in again.removeprefix(first)
    assert len(found) == len(made) == 5 and all(map(same, found, made))


@pytest.mark.parametrize("change", ["records", "limit", "tokenizer", "seed", "end"])
def test_they_are_made_again_when_what_they_depend_on_has_changed(change, data, tmp_path):
    config, tokenizer = config_of(data), train_fixtures.tokenizer()
    before, _ = read(config, tmp_path / "run", tokenizer)
    if change == "records":
        text = data.read_text()
        data.write_text(text.replace("holds", "sold."))  # as long as before
    elif change == "limit":
        config = config_of(data, "data.max_context=6", "data.on_long=truncate")
    elif change == "seed":  # of a mixture's drawing
        config = config_of(data, "train.seed=1")
    elif change == "end":
        tokenizer.eos_token = "red"
    else:
        tokenizer.add_tokens("what does")
    after, said = read(config, tmp_path / "run", tokenizer)
    assert "reusing the tokenised" not in said
    assert (change == "seed") == (after.about.fingerprint == before.about.fingerprint)


def test_other_settings_leave_them_as_they_are(data, tmp_path):
    read(config_of(data), tmp_path)
    others = ("train.batch_size=4", "data.buckets=32", f"data.eval={data}", "optimizer.learning_rate=1")
    assert "reusing the tokenised" in read(config_of(data, *others), tmp_path)[1]


@pytest.mark.fault
def test_damage_is_noticed_and_mended(data, tmp_path):
    good, _ = read(config_of(data), tmp_path)
    place, rng = tmp_path / "examples.arrow", np.random.default_rng(0)
    whole = place.read_bytes()
    wrong, mended = 0, 0
    for _ in range(60):
        damaged = bytearray(whole)
        damaged[rng.integers(len(whole))] ^= 1 << rng.integers(8)
        place.write_bytes(damaged)
        found = examples.find(tmp_path, good.about.origin)
        mended += found is None
        wrong += found is not None and not all(map(same, found, train_examples(data)))
    assert wrong == 0 and mended > 20
    for rest in (whole[: len(whole) // 2], b""):
        place.write_bytes(rest)
        assert examples.find(tmp_path, good.about.origin) is None
    again, said = read(config_of(data), tmp_path)
    assert "reusing the tokenised" not in said and again.about.fingerprint == good.about.fingerprint


def train_examples(data):
    config = config_of(data)
    return [e for chunk in dataset.NewExamples(config, train_fixtures.tokenizer()) for e in chunk]


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.jsonl")
    assert examples.origin(config_of(tmp_path / "pipe.jsonl"), train_fixtures.tokenizer()) == ""
    with pytest.raises(ValueError, match="is not a regular file"):
        read(config_of(tmp_path / "pipe.jsonl"), tmp_path / "run")


def test_a_failure_leaves_nothing(data, tmp_path):
    with data.open("a") as end:
        end.write("{}\n")
    with pytest.raises(ValueError, match="line 6"):
        read(config_of(data), tmp_path / "run")
    assert not list((tmp_path / "run").iterdir())


@pytest.mark.fault
def test_what_a_process_left_that_was_killed_as_it_made_them_is_written_over(data, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "examples.part").write_bytes(b"half of")
    config = config_of(data, "compression.encoder_layers=1")
    run = description.Run(config, train_fixtures.backbone(), (2,))
    assert description.check_folder(folder, run) == []  # it can begin there
    made, _ = read(config_of(data), folder)
    assert len(made) == 5 and not list(folder.glob("*.part"))


def test_a_process_that_does_not_see_the_folder_says_so(tmp_path):
    with pytest.raises(CheckpointError, match="must be a folder that all processes of the run share"):
        examples.load(tmp_path / "elsewhere")


def test_the_origin_of_what_comes_from_the_hub_is_not_known(data):
    tokenizer = train_fixtures.tokenizer()
    assert examples.origin(config_of("hf://o/n"), tokenizer) == ""
    assert examples.origin(config_of(data), tokenizer) == examples.origin(config_of(data), train_fixtures.tokenizer())


def test_making_and_mapping_them_takes_no_memory_for_them(tmp_path):
    """64 MB of tokens in 64 chunks."""
    one = Example(*(np.arange(n, dtype=np.int32) for n in (2**16, 4, 4)))
    tracemalloc.start()
    made = examples.make(tmp_path, ([dataclasses.replace(one)] * 4 for _ in range(64)), "origin", list)
    assert len(made) == 256 and len(made[255].context) == 2**16
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (tmp_path / "examples.arrow").stat().st_size > 64e6
    assert peak < 8e6
