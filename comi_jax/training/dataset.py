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
            said: list[str] = []
            found = stored.make(scratch or folder, new_examples(config, tokenizer, said), origin, said)
        for line in said:
            console.print(line, highlight=False, markup=False)
    distributed.meet("the examples are there")
    if not distributed.is_first() and not scratch:
        found = stored.load(folder)
    own = np.frombuffer(bytes.fromhex(found.about.fingerprint), np.uint8)
    if not np.array_equal(own, distributed.agreed(own)):
        raise DataError(
            f"process {jax.process_index()} finds other examples in {scratch or folder} than process 0; all processes "
            "of a run need the same data, and one train.output that every one of them can see"
        )
    return found


def new_examples(config: Config, tokenizer: Any, said: list[str]) -> Iterator[list[Example]]:
    """The examples of data.train, a chunk at a time; when they have ended, ``said`` has what to tell of them."""
    report, data = LengthReport(), config.data
    if data.train == ("synthetic",):
        yield from encode.encoded(synthetic_records("train", config), tokenizer, data, report)
    else:
        mixture = sources.Mixture(data.train, "train", seed=config.train.seed, skip_bad=data.skip_bad_records)
        yield from encode.encoded(mixture, tokenizer, data, report)
        said += told("train", mixture.report)
    said.append(f"training data: {report}")


def read_held_out(config: Config, console: Console) -> list[Record]:
    """The records of data.eval: of JSON Lines files, or generated ones for the name "synthetic"."""
    names, count = config.data.eval, config.data.eval_examples
    if names == ("synthetic",):
        return synthetic_records("eval", config)
    if not names:
        return []
    records, report = sources.read(names, "eval", seed=config.train.seed, skip_bad=config.data.skip_bad_records)
    for line in told("eval", report):
        console.print(line, highlight=False, markup=False)
    return records[: count or None]


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
