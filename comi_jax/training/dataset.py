"""What a run reads: training examples, tokenised once for all its processes and restarts, and held-out records."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console

from comi_jax.config import Backbone, Config, ConfigError
from comi_jax.data import encode, sources, synthetic
from comi_jax.data.encode import Example, LengthError, LengthReport
from comi_jax.data.records import DataError, Record
from comi_jax.devices import distributed
from comi_jax.runs import examples as stored


def read_examples(
    config: Config, tokenizer: Any, folder: str | os.PathLike, console: Console, scratch: Path | None = None
) -> stored.Examples:
    """The training examples, tokenised: those in ``folder`` if they are of the same data, or else made and put there by
    the first process for all; with ``scratch``, by each process there. Raises DataError, LengthError, ConfigError."""
    if distributed.is_first() or scratch:
        origin = stored.origin(config, tokenizer)
        if found := stored.find(folder, origin):
            said = [*found.about.said, f"training data: as it was tokenised before, in {folder}"]
        else:
            new = NewExamples(config, tokenizer)
            found = stored.make(scratch or folder, new, origin, new.report)
            said = new.report()
        for line in said:
            console.print(line, highlight=False, markup=False)
    distributed.meet("the examples are there")
    if not distributed.is_first() and not scratch:
        found = stored.load(folder)
    own = np.frombuffer(bytes.fromhex(found.about.fingerprint), np.uint8)
    if not np.array_equal(own, distributed.agreed(own)):
        raise DataError(
            str(scratch or folder), None,
            f"process {jax.process_index()} finds other examples here than process 0; all processes of a run need the "
            "same data, and one train.output that every one of them can see",
        )  # fmt: skip
    return found


class NewExamples:
    """The examples of data.train, tokenised as they are iterated, a chunk at a time; afterwards ``report`` says what
    was read."""

    def __init__(self, config: Config, tokenizer: Any):
        self._config, self._tokenizer = config, tokenizer
        self._mixture: sources.Mixture | None = None
        self._lengths = LengthReport()

    def __iter__(self) -> Iterator[list[Example]]:
        data = self._config.data
        if data.train == ("synthetic",):
            records = synthetic_records("train", self._config)
        else:
            records = self._mixture = sources.Mixture(
                data.train, "train", fields=data.fields, seed=self._config.train.seed, skip_bad=data.skip_bad_records
            )
        yield from encode.encoded(records, self._tokenizer, data, self._lengths)

    def report(self) -> list[str]:
        """What to tell of the examples."""
        mixed = told("train", self._mixture.report) if self._mixture and self._mixture.report else []
        return [*mixed, f"training data: {self._lengths}"]


def read_held_out(config: Config, console: Console) -> tuple[list[Record], int]:
    """The records of data.eval, which are told of, or generated ones for the name "synthetic"; and how many bad ones
    were left out."""
    names, count = config.data.eval, config.data.eval_examples
    if names == ("synthetic",):
        return synthetic_records("eval", config), 0
    if not names:
        return [], 0
    data = config.data
    records, report = sources.read(
        names, "eval", fields=data.fields, seed=config.train.seed, skip_bad=data.skip_bad_records
    )
    for line in told("eval", report):
        console.print(line, highlight=False, markup=False)
    return records[: count or None], len(report.skipped)


def check_held_out(records: list[Record], tokenizer: Any, config: Config, backbone: Backbone) -> None:
    """Refuse before the training what the closing table could not answer after it."""
    try:
        examples, _ = encode.encode(records, tokenizer, config.data, targets=False)
        rate, new_tokens = config.compression.rates[0], config.generation.max_new_tokens
        encode.check_positions(examples, backbone, config.compression, rate, new_tokens)
    except LengthError as error:
        raise LengthError(f"data.eval: {error}") from None


def synthetic_records(split: str, config: Config) -> list[Record]:
    """As many generated records as the settings say."""
    setting = "synthetic_examples" if split == "train" else "eval_examples"
    made = getattr(config.data, setting)
    if made < 1:
        raise ConfigError(f'data.{setting} is {made}; it says how many records "synthetic" makes')
    return synthetic.records(split, made, seed=config.train.seed)


def told(split: str, report: sources.MixtureReport) -> list[str]:
    """What a user is told of the reading of a mixture."""
    left_out = [f"left out {len(report.skipped)} bad records:", *(f"  {line}" for line in report.skipped)]
    return [f"{split}: {report}", *(left_out if report.skipped else [])]
