"""The tokenised examples of a run, written once into its folder and memory-mapped by all processes.

    examples.arrow   lists of token ids, one record batch per chunk of examples; pages are read from disk on access
    examples.json    the cache key (``origin``), the fingerprint of the examples, and the messages of their tokenisation

The first process writes them; the others, and every restart, reuse them. They are rewritten if data, tokenizer or
settings change, or if their content does not match the fingerprint.
"""

import bisect
import dataclasses
import itertools
import json
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

import numpy as np
import pyarrow as pa
import xxhash

from comi_jax.config import Config
from comi_jax.data import generated, sources
from comi_jax.data.encode import FORMAT, Example
from comi_jax.data.records import DataError
from comi_jax.runs.checksums import CheckpointError, checksum
from comi_jax.runs.folder import Folder

PARTS = ("context", "query", "answer")
SCHEMA = pa.schema([*((part, pa.list_(pa.int32())) for part in PARTS), ("truncated", pa.bool_())])


@dataclass(frozen=True)
class About:
    """The content of examples.json: cache key, fingerprint and messages."""

    origin: str
    fingerprint: str
    said: tuple[str, ...]


class Examples(Sequence[Example]):
    """The examples of a memory-mapped file; their arrays are views of it."""

    def __init__(self, path: Path, about: About):
        self.about = about
        with pa.memory_map(str(path)) as mapped, pa.ipc.open_file(mapped) as reader:
            batches = [reader.get_batch(i) for i in range(reader.num_record_batches)]
        self._chunks = [_arrays(batch) for batch in batches]
        self._ends = list(itertools.accumulate(batch.num_rows for batch in batches))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    @overload
    def __getitem__(self, index: int) -> Example: ...

    @overload
    def __getitem__(self, index: slice) -> list[Example]: ...

    def __getitem__(self, index: int | slice) -> Example | list[Example]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if index < 0:
            index += len(self)
        if not 0 <= index < len(self):
            raise IndexError(index)
        chunk = bisect.bisect_right(self._ends, index)
        lists, truncated = self._chunks[chunk]
        row = index - (self._ends[chunk - 1] if chunk else 0)
        ids = (values[first[row] : first[row + 1]] for first, values in lists)
        return Example(*ids, truncated=bool(truncated[row]))


def _arrays(batch: pa.RecordBatch) -> tuple[list[tuple[np.ndarray, np.ndarray]], np.ndarray]:
    """(offsets, values) of context, query and answer, and which examples were truncated."""
    lists = [batch.column(part) for part in PARTS]
    return [(x.offsets.to_numpy(), x.values.to_numpy()) for x in lists], batch.column("truncated").to_numpy(False)


def origin(config: Config, tokenizer: Any) -> str:
    """The cache key of the training examples: a hash of the data files, tokenizer and settings that they depend on.

    Empty, which means no caching, if data comes from the hub or an unreadable file, or if the tokenizer cannot be
    serialised. Reads every file of data.train."""
    words = config.data.train
    parsed = [] if generated.is_generated(words) else [sources.parse(word) for word in words]
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or any(source.place.startswith(sources.HUB) for source in parsed):
        return ""
    settings = dataclasses.replace(config.data, eval=(), eval_examples=0, buckets=(), max_buckets=1)
    key = xxhash.xxh3_128(repr((FORMAT, settings, config.train.seed, tokenizer.eos_token_id)).encode())
    key.update(backend.to_str().encode())
    try:
        for source in parsed:
            for path in sources.files(source, "train"):
                if not Path(path).is_file():  # reading a pipe would block
                    return ""
                key.update(checksum(Path(path)).encode())
    except (OSError, DataError):  # reported by whoever reads the records
        return ""
    return key.hexdigest()


def _file(folder: str | os.PathLike, kind: str) -> Path:
    return Folder(folder).examples.with_suffix(f".{kind}")


def find(folder: str | os.PathLike, made_from: str) -> Examples | None:
    """The examples in ``folder`` if their cache key is ``made_from`` and their content matches the fingerprint."""
    if not made_from or not _file(folder, "json").is_file():
        return None
    try:
        found = load(folder)
    except CheckpointError:
        return None
    return found if found.about.origin == made_from and fingerprint(found) == found.about.fingerprint else None


def load(folder: str | os.PathLike) -> Examples:
    """The examples in ``folder``, unverified. Raises CheckpointError if they cannot be read."""
    try:
        values = json.loads(_file(folder, "json").read_text(encoding="utf-8"))
        about = About(str(values["origin"]), str(values["fingerprint"]), tuple(map(str, values["said"])))
        return Examples(_file(folder, "arrow"), about)
    except (OSError, ValueError, KeyError, TypeError, pa.ArrowException) as error:
        raise CheckpointError(
            f"cannot read the examples that process 0 wrote to {folder}: {error}; train.output must be a folder that "
            "all processes of the run share"
        ) from None


def make(
    folder: str | os.PathLike, chunks: Iterable[list[Example]], made_from: str, report: Callable[[], Sequence[str]]
) -> Examples:
    """Write ``chunks`` as the examples of ``folder``, then the messages of ``report``. Leaves no partial file if
    ``chunks`` raises."""
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
    """An incremental hash of examples in order."""

    def __init__(self):
        self._hash = xxhash.xxh3_128()

    def add(self, example: Example) -> None:
        for part in PARTS:
            ids = getattr(example, part)
            self._hash.update(len(ids).to_bytes(4, "little") + ids.tobytes())

    def __str__(self) -> str:
        return self._hash.hexdigest()


def fingerprint(examples: Iterable[Example]) -> str:
    """A hash of the examples in order."""
    whole = ExamplesHash()
    for example in examples:
        whole.add(example)
    return str(whole)
