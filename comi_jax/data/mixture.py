"""The training mixture, prepared once: files of examples, and a report on them."""

import contextlib
import fcntl
import gzip
import hashlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from comi_jax.config import Config
from comi_jax.data import encode, generated, sources
from comi_jax.data.encode import CHUNK, LengthError
from comi_jax.data.fingerprint import Fingerprint, question_key
from comi_jax.data.records import Record, Skipped
from comi_jax.errors import ConfigError
from comi_jax.overrides import to_dict
from comi_jax.params import flatten

NAMED = 5  # dropped examples that the report names by file and line, per reason
PARTS = ("context", "query", "answer")
PERCENTILES = (1, 50, 90, 99, 100)
SETTINGS = (
    "train",
    "eval",
    "examples_per_source",
    "max_context",
    "max_query",
    "max_answer",
    "on_long",
    "skip_bad_records",
)


@dataclass
class SourceReport:
    """The statistics of one entry of data.train or data.eval. ``dropped``: reason -> [count, the first examples]."""

    source: str
    written: int = 0
    in_context: int = 0  # examples with an answer that occurs in the context, ignoring case and spacing
    # Examples with a part longer than data.max_*, which training truncates.
    longer: dict[str, int] = field(default_factory=lambda: dict.fromkeys(PARTS, 0))
    tokens: dict[str, list[int]] = field(default_factory=dict)  # lengths per part, at PERCENTILES
    dropped: dict[str, list[Any]] = field(default_factory=dict)

    def drop(self, reason: str, example: str, count: int = 1) -> None:
        entry = self.dropped.setdefault(reason, [0])
        entry[0] += count
        if example and len(entry) <= NAMED:
            entry.append(example)


class Mixture:
    """Writes the examples of one split, source by source, and collects their statistics."""

    def __init__(self, config: Config, tokenizer: Any, split: str, held_out: dict[str, str]):
        self.data, self.seed, self.split, self.held_out = config.data, config.train.seed, split, held_out
        self.tokenizer, self.seen, self.fingerprint = tokenizer, {}, Fingerprint()

    def write(self, file: Any, number: int, source: sources.Source) -> SourceReport:
        """Write the examples of ``source``, at index ``number`` in its split, to ``file``."""
        report = SourceReport(source.word)
        copies = self._choose(report, number, source)
        skipped: list[Skipped] | None = [] if self.data.skip_bad_records else None
        lengths: list[np.ndarray] = []
        chunk: list[tuple[str, Record]] = []
        for index, (path, line, record) in enumerate(sources.examples(source, self.split, skipped)):
            for _ in range(copies[index]):
                chunk.append((f"{path}, line {line}", record))
                file.write(sources.to_line(record).encode())
                self.fingerprint.add(record)
                if len(chunk) == CHUNK:
                    lengths.append(self._count(report, chunk))
                    chunk = []
        if chunk:
            lengths.append(self._count(report, chunk))
        if lengths:
            found = np.percentile(np.concatenate(lengths), PERCENTILES, axis=0, method="nearest").T
            report.tokens = {part: row.astype(int).tolist() for part, row in zip(PARTS, found, strict=True)}
        return report

    def _choose(self, report: SourceReport, number: int, source: sources.Source) -> Counter:
        """The number of copies to take of each example of ``source``, by its index."""
        skipped: list[Skipped] = []
        good = []
        for index, (path, line, record) in enumerate(
            sources.examples(source, self.split, skipped if self.data.skip_bad_records else None)
        ):
            place, key = f"{path}, line {line}", question_key(record)
            if key in self.held_out:
                report.drop("is in data.eval", f"{place}: as {self.held_out[key]}")
            elif key in self.seen:
                report.drop("asks again", f"{place}: as {self.seen[key]}")
            else:
                self.seen[key] = place
                good.append(index)
        for line in skipped:
            report.drop("is no record", str(line))
        rng = np.random.default_rng([self.seed, number])
        limit = self.data.examples_per_source if self.split == "train" else 0
        taken = np.sort(rng.permutation(len(good))[: limit or None])
        taken = taken[sources.draw(len(taken), source.weight, rng)]
        if left := len(good) - len(set(taken.tolist())):
            report.drop("was not drawn", "", left)
        return Counter(good[i] for i in taken)

    def _count(self, report: SourceReport, chunk: list[tuple[str, Record]]) -> np.ndarray:
        """Token counts [n, 3] of context, query and answer (with end-of-sequence token). Adds to ``report``."""
        texts = [(r.context_text(), r.prompt, r.answers[0]) for _, r in chunk]
        columns = [encode.token_ids(self.tokenizer, list(column)) for column in zip(*texts, strict=True)]
        lengths = np.array([[len(ids) for ids in column] for column in columns]).T + (0, 0, 1)
        limits = [getattr(self.data, f"max_{part}") for part in PARTS]
        for (place, record), counts in zip(chunk, lengths.tolist(), strict=True):
            longer = [part for part, count, limit in zip(PARTS, counts, limits, strict=True) if count > limit]
            if longer and self.data.on_long == "refuse":
                raise LengthError(
                    f"{place}: {counts[0]}, {counts[1]} and {counts[2]} tokens of context, query and answer are more "
                    f"than data.max_context={limits[0]}, max_query={limits[1]} or max_answer={limits[2]}; raise them, "
                    "or set data.on_long=truncate"
                )
            for part in longer:
                report.longer[part] += 1
            report.written += 1
            context = _plain(record.context_text())
            report.in_context += any(_plain(answer) in context for answer in record.answers)
        return lengths


def _plain(text: str) -> str:
    return " ".join(text.casefold().split())


def prepare(config: Config, tokenizer: Any, output: Path, console: Console) -> dict[str, Any]:
    """Write the mixture of ``config`` to ``output`` and return its report; if ``output`` has it, only return that.

    Raises ConfigError if the folder contains anything else, and the errors of reading the sources; on an error nothing
    is written.
    """
    words = {"eval": config.data.eval, "train": config.data.train}
    if not config.data.train or any(map(generated.is_generated, words.values())):
        raise ConfigError(
            "set data.train, and optionally data.eval, to the files to prepare; example: "
            "data.train=hotpotqa:hotpot.jsonl,nq:nq.jsonl.gz"
        )
    parsed = {split: sources.parse_all(names, config.data.fields) for split, names in words.items() if names}
    settings = {name: to_dict(config)["data"][name] for name in SETTINGS} | {"seed": config.train.seed}
    settings |= {"fields": list(config.data.fields)} if config.data.fields else {}
    settings["bytes"] = _sizes(parsed)
    report = _there_already(output, settings)
    if report:
        console.print(f"{output} has this mixture already", highlight=False)
        return report
    held_out: dict[str, str] = {}
    splits = {}
    with _replacing(output) as folder:
        for split, own in parsed.items():  # eval first: its questions are kept out of train
            mixture = Mixture(config, tokenizer, split, held_out)
            with open(folder / f"{split}.jsonl.gz", "wb") as raw, gzip.GzipFile("", "wb", 6, raw, mtime=0) as file:
                rows = []
                for number, source in enumerate(own):
                    console.print(f"{split}: {source.word}", highlight=False)
                    rows.append(mixture.write(file, number, source))
            if not any(row.written for row in rows):
                raise ConfigError(f"no example is left after filtering data.{split}={','.join(words[split])}")
            held_out |= mixture.seen
            splits[split] = {"fingerprint": str(mixture.fingerprint), "sources": [asdict(row) for row in rows]}
        made = json.dumps([settings, {split: entry["fingerprint"] for split, entry in splits.items()}])
        fingerprint = hashlib.sha256(made.encode()).hexdigest()[:16]
        report = {"fingerprint": fingerprint, "settings": settings, "percentiles": PERCENTILES, "splits": splits}
        (folder / sources.REPORT).write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return report


def _sizes(parsed: dict[str, list[sources.Source]]) -> dict[str, int]:
    """The size of every file in bytes, a fast check for changed files."""
    paths = [
        path
        for split, own in parsed.items()
        for source in own
        if not source.place.startswith(sources.HUB)
        for path in sources.files(source, split)
    ]
    return {path: Path(path).stat().st_size for path in paths if Path(path).is_file()}


def _there_already(output: Path, settings: dict[str, Any]) -> dict[str, Any] | None:
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return None
    try:
        report = json.loads((output / sources.REPORT).read_text(encoding="utf-8"))
        before = flatten(report["settings"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise ConfigError(
            f"{output} exists and is not a mixture of comi_jax.prepare; choose another --output"
        ) from None
    now = flatten(settings)
    other = [name for name in sorted(before | now) if before.get(name) != now.get(name)]
    if other:
        changes = "; ".join(f"{name} {before.get(name)} -> {now.get(name)}" for name in other)
        raise ConfigError(
            f"{output} has a mixture with other settings ({changes}); remove it or choose another --output"
        )
    return report


@contextlib.contextmanager
def _replacing(output: Path) -> Iterator[Path]:
    """A temporary folder beside ``output``, renamed to ``output`` when complete and removed on failure. The folder of a
    killed process is emptied and reused; a second process at the same time is refused."""
    partial = output.parent / f".{output.name}.partial"
    try:
        partial.mkdir(parents=True, exist_ok=True)
        with _alone_in(partial, output):
            try:
                for old in partial.iterdir():
                    old.unlink()
                yield partial
                for path in partial.iterdir():
                    with open(path, "rb") as file:
                        os.fsync(file.fileno())
                partial.rename(output)
            except BaseException:
                shutil.rmtree(partial)
                raise
    except OSError as error:
        raise ConfigError(f"{output} cannot be written: {error.strerror} ({error.filename})") from None


@contextlib.contextmanager
def _alone_in(partial: Path, output: Path) -> Iterator[None]:
    """A lock on the folder ``partial``, which the system releases when the process ends."""
    handle = os.open(partial, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ConfigError(f"another process is preparing {output} in {partial}; wait for it") from None
        yield
    finally:
        os.close(handle)
