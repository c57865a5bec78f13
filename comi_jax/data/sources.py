"""The sources of examples: the entries of data.train and data.eval, a weighted mixture of files and hub data sets.

An entry is [SCHEMA:]PLACE[@WEIGHT]. PLACE is a file that ``records`` reads, a glob of such files, a folder made by
``python -m comi_jax.prepare``, or hf://OWNER/NAME[/CONFIG][#SPLIT], a data set on the Hugging Face hub. SCHEMA is a
name in ``adapters.SCHEMAS``; by default, data.fields or each example's fields decide. WEIGHT is the number of times
that an epoch has the source's examples: 2 is twice, 0.5 a random half chosen by the seed; the default is 1.
"""

import glob
import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from comi_jax.checks import shown
from comi_jax.data import adapters
from comi_jax.data.fingerprint import Fingerprint
from comi_jax.data.records import Adapt, DataError, Record, Skipped, adapted, numbered_records
from comi_jax.errors import ConfigError

HUB = "hf://"
MOST = 100  # maximum copies of an example in an epoch
REPORT = "report.json"  # written by comi_jax.prepare beside the records in a folder


@dataclass(frozen=True)
class Source:
    """A parsed entry: a place, its schema and its weight."""

    word: str
    place: str
    schema: str = ""  # empty: recognised by the fields
    weight: float = 1.0
    fields: tuple[str, ...] = ()  # data.fields

    @property
    def adapt(self) -> Adapt:
        if self.schema:
            return adapters.SCHEMAS[self.schema]
        return adapters.Fields(self.fields).adapt if self.fields else adapters.adapt


def parse_all(words: Sequence[str], fields: Sequence[str] = ()) -> list[Source]:
    """The sources that ``words`` name, with data.fields. Raises ConfigError, also for an unescaped comma in a path."""
    parsed = [parse(word, fields) for word in words]
    for first in range(len(words)):
        if not _exists(parsed[first]):
            for end in range(first + 2, len(words) + 1):
                if _exists(parse(",".join(words[first:end]))):
                    meant = "\\,".join(words[first:end])
                    meant = meant if meant.isprintable() else ascii(meant)
                    raise ConfigError(f"a comma separates entries; escape a comma in a path with a backslash: {meant}")
    return parsed


def _exists(source: Source) -> bool:
    return source.place.startswith(HUB) or os.path.exists(source.place)


def parse(word: str, fields: Sequence[str] = ()) -> Source:
    """The source that ``word`` names; ~ is the home folder. A path whose colon or @ would be misread is written with
    ./ before it and @1 after it. Raises ConfigError."""
    place, weight = word, 1.0
    if found := re.search(r"@(\d{1,9}(?:\.\d{1,9})?)$", word):
        place, weight = word[: found.start()], float(found[1])
        if not 0 < weight <= MOST:
            raise ConfigError(f"the source {shown(word)} has weight {found[1]}; it must be above 0 and at most {MOST}")
    schema, colon, rest = place.partition(":")
    if not colon or place.startswith(HUB) or not re.fullmatch(r"[\w-]+", schema):
        schema, rest = "", place
    elif schema not in adapters.SCHEMAS:
        raise ConfigError(
            f"the source {shown(word)} has an unknown schema; known schemas: {', '.join(adapters.SCHEMAS)}"
        )
    if not rest:
        raise ConfigError(f"the source {shown(word)} has no file, folder or data set")
    return Source(word, rest if rest.startswith(HUB) else os.path.expanduser(rest), schema, weight, tuple(fields))


def files(source: Source, split: str) -> tuple[str, ...]:
    """The files of a local source; for a prepared folder, the file of ``split``, "train" or "eval". Raises DataError if
    a pattern matches no file."""
    if os.path.isfile(os.path.join(source.place, REPORT)):
        return (os.path.join(source.place, f"{split}.jsonl.gz"),)
    if os.path.exists(source.place) or not glob.has_magic(source.place):
        return (source.place,)
    matching = [os.path.join(os.sep, "") if os.path.isabs(source.place) else ""]
    for part in filter(None, source.place.split(os.sep)):
        matching = [path for folder in matching for path in _matching(folder, part)]
    if not matching:
        raise DataError(source.place, None, "matches no file")
    return tuple(sorted(set(matching)))


def _matching(folder: str, part: str) -> list[str]:
    """The paths in ``folder`` that match ``part``: the path with exactly that name if it exists, otherwise by glob."""
    path = os.path.join(folder, part)
    return [path] if os.path.lexists(path) else glob.glob(os.path.join(glob.escape(folder), part), recursive=True)


def examples(source: Source, split: str, skipped: list[Skipped] | None = None) -> Iterator[tuple[str, int, Record]]:
    """(file or data set, line or row from 1, record) of each example of ``source``, streamed in order.

    If ``skipped`` is given, bad lines and rows are appended to it instead of raised. Raises DataError.
    """
    if source.place.startswith(HUB):
        yield from _hub_examples(source, split, skipped)
        return
    for path in files(source, split):
        for line, record in numbered_records(path, source.adapt, skipped=skipped):
            yield path, line, record


def _hub_examples(source: Source, split: str, skipped: list[Skipped] | None) -> Iterator[tuple[str, int, Record]]:
    address, _, wanted = source.place.removeprefix(HUB).partition("#")
    owner, _, rest = address.partition("/")
    name, _, config = rest.partition("/")
    rows = _load_dataset("/".join(filter(None, (owner, name))), config, wanted or _HUB_SPLITS[split], source.place)
    kept = 0
    for row, fields in enumerate(rows, 1):
        for record in adapted(fields, source.adapt):
            if isinstance(record, Record):
                kept += 1
                yield source.place, row, record
            elif skipped is None:
                raise DataError(source.place, row, str(record))
            else:
                skipped.append(Skipped(source.place, row, str(record)))
    if not kept:
        raise DataError(source.place, None, "has no readable example")


_HUB_SPLITS = {"train": "train", "eval": "validation"}


def _load_dataset(name: str, config: str, split: str, place: str) -> Any:
    import datasets  # slow to import, and only needed for hub data sets

    try:
        return datasets.load_dataset(name, config or None, split=split)
    except Exception as error:  # datasets, the hub client and two HTTP libraries share no error class
        reason = (str(error).splitlines() or [type(error).__name__])[0][:300]
        raise DataError(
            place,
            None,
            f"cannot be loaded from the Hugging Face hub ({reason}); check name, split and network, or "
            "download it and name its JSON Lines files",
        ) from error


def to_line(record: Record) -> str:
    """A record as a line in our own format; the inverse of reading it."""
    fields = {"input": list(record.context), "prompt": record.prompt, "answer": list(record.answers)}
    return json.dumps(fields, ensure_ascii=False) + "\n"


def draw(count: int, share: float, rng: np.random.Generator) -> np.ndarray:
    """The indices of the examples to take from ``count`` for a weight of ``share``: all of them floor(share) times,
    then a random fraction of them once more, each time in ascending order."""
    copies, rest = divmod(share, 1.0)
    chosen = np.sort(rng.permutation(count)[: round(rest * count)])
    return np.concatenate([np.tile(np.arange(count), int(copies)), chosen])


@dataclass(frozen=True)
class MixtureReport:
    """The report of ``read``: the numbers of examples found and taken for each entry, every skipped line, and the
    fingerprint of the records taken."""

    words: tuple[str, ...]
    found: tuple[int, ...]
    taken: tuple[int, ...]
    skipped: tuple[Skipped, ...]
    fingerprint: str

    def __str__(self) -> str:
        rows = zip(self.words, self.found, self.taken, strict=True)
        parts = [
            f"{taken} of {found} from {word}" if taken != found else f"{found} from {word}"
            for word, found, taken in rows
        ]
        return f"{sum(self.taken)} records, fingerprint {self.fingerprint}: {', '.join(parts)}"


class Mixture:
    """The records of the sources that ``words`` name, streamed one source after the other; ``report`` is set at the
    end. A pure function of the files, words and seed.

    Args:
        split: "train" or "eval": selects the file of a prepared folder and the default split of a hub data set.
        fields: data.fields.
        skip_bad: as in ``read_records``.

    Iterating raises:
        DataError: as ``read_records``; a prepared folder whose records have changed.
        ConfigError: an entry that names no source; no example at all.
    """

    def __init__(
        self, words: Sequence[str], split: str, *, fields: Sequence[str] = (), seed: int = 0, skip_bad: bool = False
    ):
        self._words, self._fields = tuple(words), tuple(fields)
        self._split, self._seed, self._skip_bad = split, seed, skip_bad
        self.report: MixtureReport | None = None

    def __iter__(self) -> Iterator[Record]:
        skipped: list[Skipped] = []
        found, taken, everything = [], [], Fingerprint()
        parsed = parse_all(self._words, self._fields)
        for number, source in enumerate(parsed):
            own = (record for _, _, record in examples(source, self._split, skipped if self._skip_bad else None))
            own = _counted(_checked(source, self._split, own), found)
            if source.weight != 1:  # drawing needs the number of records, so all are read first
                held = list(own)
                own = (held[i] for i in draw(len(held), source.weight, np.random.default_rng([self._seed, number])))
            for record in _counted(own, taken):
                everything.add(record)
                yield record
        if not sum(taken):
            raise ConfigError(f"the sources {', '.join(self._words)} give no example; raise their weights")
        self.report = MixtureReport(self._words, tuple(found), tuple(taken), tuple(skipped), str(everything))


def read(
    words: Sequence[str], split: str, *, fields: Sequence[str] = (), seed: int = 0, skip_bad: bool = False
) -> tuple[list[Record], MixtureReport]:
    """All records of a ``Mixture``, and its report."""
    mixture = Mixture(words, split, fields=fields, seed=seed, skip_bad=skip_bad)
    records = list(mixture)
    assert mixture.report is not None  # set once all records have been read
    return records, mixture.report


def _counted(records: Iterable[Record], counts: list[int]) -> Iterator[Record]:
    """``records``; at their end, their number is appended to ``counts``."""
    count = 0
    for record in records:
        count += 1
        yield record
    counts.append(count)


def _checked(source: Source, split: str, records: Iterable[Record]) -> Iterator[Record]:
    """``records``; raises DataError at their end if those of a prepared folder have changed since it was written."""
    path = os.path.join(source.place, REPORT)
    if source.place.startswith(HUB) or not os.path.isfile(path):
        yield from records
        return
    got = Fingerprint()
    for record in records:
        got.add(record)
        yield record
    try:
        expected = json.loads(Path(path).read_text(encoding="utf-8"))["splits"][split]["fingerprint"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        raise DataError(
            path, None, f"is not a report of comi_jax.prepare with the split {split!r}; prepare the folder again"
        ) from None
    if str(got) != expected:
        raise DataError(
            path,
            None,
            f"records fingerprint {expected} for {split}.jsonl.gz, but the file has {got}; prepare the folder again",
        )
