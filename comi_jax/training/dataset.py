"""The data of a run: training examples, tokenised once for all processes and restarts, and held-out records."""

import dataclasses
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console

from comi_jax.backbone import Backbone
from comi_jax.config import Config
from comi_jax.data import encode, generated, sources
from comi_jax.data.encode import Example, LengthError, LengthReport
from comi_jax.data.records import DataError, Record
from comi_jax.devices import distributed
from comi_jax.errors import ConfigError
from comi_jax.runs import examples as stored


def read_examples(
    config: Config, tokenizer: Any, folder: str | os.PathLike, console: Console, scratch: Path | None = None
) -> stored.Examples:
    """The tokenised training examples: those in ``folder`` if their cache key matches, otherwise tokenised and written
    there by the first process, or, with ``scratch``, into that folder by each process. Raises DataError, LengthError or
    ConfigError."""
    found: stored.Examples | None = None
    if distributed.is_first() or scratch:
        origin = stored.origin(config, tokenizer)
        if found := stored.find(folder, origin):
            messages = [*found.about.said, f"training data: reusing the tokenised examples in {folder}"]
        else:
            new = NewExamples(config, tokenizer)
            found = stored.make(scratch or folder, new, origin, new.report)
            messages = new.report()
        for line in messages:
            console.print(line, highlight=False, markup=False)
    distributed.meet("the examples are written")
    if found is None:
        found = stored.load(folder)
    own = np.frombuffer(bytes.fromhex(found.about.fingerprint), np.uint8)
    if not np.array_equal(own, distributed.agreed(own)):
        raise DataError(
            str(scratch or folder), None,
            f"process {jax.process_index()} finds other examples here than process 0; all processes of a run need the "
            "same data and must share the folder train.output",
        )  # fmt: skip
    return found


class NewExamples:
    """The examples of data.train, tokenised in chunks during iteration; ``report`` has the messages afterwards."""

    def __init__(self, config: Config, tokenizer: Any):
        self._config, self._tokenizer = config, tokenizer
        self._mixture: sources.Mixture | None = None
        self._lengths = LengthReport()

    def __iter__(self) -> Iterator[list[Example]]:
        data = self._config.data
        if generated.is_generated(data.train):
            records = generated_records("train", self._config)
        else:
            records = self._mixture = sources.Mixture(
                data.train, "train", fields=data.fields, seed=self._config.train.seed, skip_bad=data.skip_bad_records
            )
        yield from encode.encoded(records, self._tokenizer, data, self._lengths)

    def report(self) -> list[str]:
        """The messages about the data that was read."""
        mixed = mixture_messages("train", self._mixture.report) if self._mixture and self._mixture.report else []
        return [*mixed, f"training data: {self._lengths}"]


def read_held_out(config: Config, console: Console) -> tuple[list[Record], int]:
    """The records of data.eval, read or generated, and the number of skipped bad records. Prints what was read."""
    names, count = config.data.eval, config.data.eval_examples
    if generated.is_generated(names):
        return generated_records("eval", config), 0
    if not names:
        return [], 0
    data = config.data
    records, report = sources.read(
        names, "eval", fields=data.fields, seed=config.train.seed, skip_bad=data.skip_bad_records
    )
    for line in mixture_messages("eval", report):
        console.print(line, highlight=False, markup=False)
    return records[: count or None], len(report.skipped)


def of_data(config: Config, words: Sequence[str], skip_bad: bool) -> Config:
    """``config`` with ``words`` as its held-out data: every record, or of generated data as many as the config says."""
    count = config.data.eval_examples if generated.is_generated(words) else 0
    data = dataclasses.replace(config.data, eval=tuple(words), eval_examples=count, skip_bad_records=skip_bad)
    return dataclasses.replace(config, data=data)


def check_held_out(records: list[Record], tokenizer: Any, config: Config, backbone: Backbone) -> None:
    """Raises LengthError before training for records that the closing table could not answer after it."""
    try:
        examples, _ = encode.encode(records, tokenizer, config.data, targets=False)
        rate, new_tokens = config.compression.rates[0], config.generation.max_new_tokens
        encode.check_positions(examples, backbone, config, rate, new_tokens)
    except LengthError as error:
        raise LengthError(f"data.eval: {error}") from None


def generated_records(split: str, config: Config) -> list[Record]:
    """Generated records, as many as data.synthetic_examples or data.eval_examples says. Raises ConfigError."""
    setting, words = (
        ("synthetic_examples", config.data.train) if split == "train" else ("eval_examples", config.data.eval)
    )
    made = getattr(config.data, setting)
    if made < 1:
        raise ConfigError(f"data.{setting} is {made}; set the number of records that {words[0]!r} generates")
    return generated.records(words[0], split, made, config.train.seed)


def mixture_messages(split: str, report: sources.MixtureReport) -> list[str]:
    """The messages about a mixture that was read."""
    skipped = [f"skipped {len(report.skipped)} bad records:", *(f"  {line}" for line in report.skipped)]
    return [f"{split}: {report}", *(skipped if report.skipped else [])]
