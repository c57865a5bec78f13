"""The tokenised examples of a run, in files of its folder: made once, and mapped into memory by whoever needs them.

    examples.arrow   lists of token ids, CHUNK examples a record batch; only what is looked at is read from the disk
    examples.json    what they were made from (``origin``), their fingerprint, and what was said when they were made

One process of a run makes them; the others, and every later start, find them there. They are made again when data,
tokenizer or settings are others, or when their content is not what the fingerprint says.
"""

import bisect
import dataclasses
import itertools
import json
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import xxhash

from comi_jax.config import Config
from comi_jax.data import sources
from comi_jax.data.encode import FORMAT, Example
from comi_jax.data.records import DataError
from comi_jax.runs.checksums import CheckpointError, checksum
from comi_jax.runs.folder import Folder

PARTS = ("context", "query", "answer")
SCHEMA = pa.schema([*((part, pa.list_(pa.int32())) for part in PARTS), ("truncated", pa.bool_())])


@dataclass(frozen=True)
class About:
    """What is known of a file of examples without looking into it."""

    origin: str
    fingerprint: str
    said: tuple[str, ...]


class Examples(Sequence[Example]):
    """Examples in a file. Their arrays are views of it."""

    def __init__(self, path: Path, about: About):
        self.about = about
        with pa.memory_map(str(path)) as mapped, pa.ipc.open_file(mapped) as reader:
            batches = [reader.get_batch(i) for i in range(reader.num_record_batches)]
        self._chunks = [_arrays(batch) for batch in batches]
        self._ends = list(itertools.accumulate(batch.num_rows for batch in batches))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, index: int) -> Example:
        if not 0 <= index < len(self):
            raise IndexError(index)
        chunk = bisect.bisect_right(self._ends, index)
        lists, truncated = self._chunks[chunk]
        row = index - (self._ends[chunk - 1] if chunk else 0)
        ids = (values[first[row] : first[row + 1]] for first, values in lists)
        return Example(*ids, truncated=bool(truncated[row]))


def _arrays(batch: pa.RecordBatch) -> tuple[list[tuple[np.ndarray, np.ndarray]], np.ndarray]:
    """(offsets, values) of each part, and which were cut."""
    lists = [batch.column(part) for part in PARTS]
    return [(x.offsets.to_numpy(), x.values.to_numpy()) for x in lists], batch.column("truncated").to_numpy(False)


def origin(config: Config, tokenizer: Any) -> str:
    """A short name for all that the training examples of ``config`` depend on; empty if that cannot be known without
    making them: they come from the hub or a file that cannot be read, or the tokenizer does not say what it does. Reads
    every file of data.train."""
    words = config.data.train
    parsed = [] if words == ("synthetic",) else [sources.parse(word) for word in words]
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or any(source.place.startswith(sources.HUB) for source in parsed):
        return ""
    settings = dataclasses.replace(config.data, eval=(), eval_examples=0, buckets=(), max_buckets=1)
    of = xxhash.xxh3_128(repr((FORMAT, settings, config.train.seed, tokenizer.eos_token_id)).encode())
    of.update(backend.to_str().encode())
    try:
        for source in parsed:
            for path in sources.files(source, "train"):
                if not Path(path).is_file():  # a pipe would be waited for
                    return ""
                of.update(checksum(Path(path)).encode())
    except (OSError, DataError):  # whoever reads the records says it better
        return ""
    return of.hexdigest()


def _file(folder: str | os.PathLike, kind: str) -> Path:
    return Folder(folder).examples.with_suffix(f".{kind}")


def find(folder: str | os.PathLike, made_from: str) -> Examples | None:
    """The examples in ``folder``, if they were made from ``made_from`` and are what they were then."""
    if not made_from or not _file(folder, "json").is_file():
        return None
    try:
        found = load(folder)
    except CheckpointError:
        return None
    return found if found.about.origin == made_from and fingerprint(found) == found.about.fingerprint else None


def load(folder: str | os.PathLike) -> Examples:
    """The examples in ``folder``, as they are. Raises CheckpointError if there are none that can be read."""
    try:
        values = json.loads(_file(folder, "json").read_text(encoding="utf-8"))
        about = About(str(values["origin"]), str(values["fingerprint"]), tuple(map(str, values["said"])))
        return Examples(_file(folder, "arrow"), about)
    except (OSError, ValueError, KeyError, TypeError, pa.ArrowException) as error:
        raise CheckpointError(
            f"the examples that process 0 has made cannot be read from {folder}: {error}; all processes of a run need "
            "one train.output that every one of them can see"
        ) from None


def make(
    folder: str | os.PathLike, chunks: Iterable[list[Example]], made_from: str, report: Callable[[], Sequence[str]]
) -> Examples:
    """Write ``chunks`` as the examples of ``folder``, and what ``report`` says of them when they have ended. If they
    fail, nothing is left."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    place, draft = _file(folder, "arrow"), _file(folder, "part")
    whole = ExamplesHash()
    try:
        with pa.OSFile(str(draft), "wb") as file, pa.ipc.new_file(file, SCHEMA) as writer:
            for chunk in chunks:
                for example in chunk:
                    whole.add(example)
                columns = [_lists([getattr(example, part) for example in chunk]) for part in PARTS]
                truncated = pa.array([example.truncated for example in chunk], pa.bool_())
                writer.write_batch(pa.record_batch([*columns, truncated], schema=SCHEMA))
        os.replace(draft, place)
        about = About(made_from, str(whole), tuple(report()))
        draft.write_text(json.dumps(dataclasses.asdict(about), indent=2) + "\n", encoding="utf-8")
        os.replace(draft, _file(folder, "json"))
    finally:
        draft.unlink(missing_ok=True)
    return Examples(place, about)


def _lists(rows: Sequence[np.ndarray]) -> pa.ListArray:
    offsets = np.cumsum([0, *map(len, rows)], dtype=np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(np.concatenate(rows), pa.int32()))


class ExamplesHash:
    """A hash of examples in their order."""

    def __init__(self):
        self._hash = xxhash.xxh3_128()

    def add(self, example: Example) -> None:
        for part in PARTS:
            ids = getattr(example, part)
            self._hash.update(len(ids).to_bytes(4, "little") + ids.tobytes())

    def __str__(self) -> str:
        return self._hash.hexdigest()


def fingerprint(examples: Iterable[Example]) -> str:
    """A short name for what the examples hold, in their order."""
    whole = ExamplesHash()
    for example in examples:
        whole.add(example)
    return str(whole)
