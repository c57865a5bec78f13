"""The latencies of a comparison's systems: of runs, or with fresh weights, which take as long."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console

from comi_jax.config import Config, Mesh
from comi_jax.data import encode
from comi_jax.data.encode import Example, LengthError
from comi_jax.data.records import Record
from comi_jax.devices import sharding
from comi_jax.errors import ConfigError
from comi_jax.evaluation import latency, latency_tables
from comi_jax.evaluation.diagnostics import Table
from comi_jax.evaluation.latency import Timed
from comi_jax.evaluation.systems import SYSTEMS
from comi_jax.evaluation.systems.answerer import SystemAnswerer
from comi_jax.evaluation.systems.protocol import Question
from comi_jax.model.architecture import frozen_dtype
from comi_jax.params import unflatten
from comi_jax.runs.description import Run
from comi_jax.serving import batching
from comi_jax.serving.compressor import Comi
from comi_jax.serving.language_model import LanguageModel
from comi_jax.training.series import TRAINED
from comi_jax.weights.starting_model import StartingModel

KEPT = ("original_kept", "Original prompt, KV cache kept")
LONGEST = 8192  # the longest context of the default lengths: longer ones take minutes on a CPU
Found = tuple[str, str, int | None, Timed]  # name, title, rate, latency


def machine() -> str:
    """The device that is timed."""
    device = jax.devices()[0]
    return f"{os.cpu_count()} CPU cores" if device.platform == "cpu" else f"one {device.device_kind}"


def fresh(config: Config) -> Comi:
    """The model that a run with ``config`` starts from, on one device."""
    start = StartingModel.open(config)
    start.check()
    run = Run(config, start.backbone, start.stop)
    flat = start.load(run, sharding.make_mesh(Mesh(), jax.devices()[:1]))
    params = unflatten({path: x.astype(frozen_dtype(path, run.architecture)) for path, x in flat.items()})
    return Comi(run, params, start.tokenizer, batch_size=1)


def typical(records: Sequence[Record], tokenizer: Any, config: Config) -> Record:
    """The record whose context has the median length."""
    examples, _ = encode.encode(records, tokenizer, config.data, targets=False)
    order = sorted(range(len(examples)), key=lambda i: (len(examples[i].context), i))
    return records[order[len(order) // 2]]


def of_systems(
    trained: Mapping[str, Comi], untrained: Sequence[str], model: LanguageModel, config: Config, record: Record,
    rates: Sequence[int], tokens: int, repeat: int, console: Console,
) -> tuple[list[Found], list[str]]:  # fmt: skip
    """The latency of each system at each rate for the question of ``record``, and why some have none."""
    found: list[Found] = []
    refused = []

    def add(name: str, title: str, rate: int | None, stages: Mapping[str, latency.Stage], entries: int) -> None:
        found.append((name, title, rate, latency.measure(stages, entries, repeat)))
        console.print(f"{title} at {rate or '-'}: {1e3 * found[-1][3].median('total'):.1f} ms", highlight=False)

    for name, comi in trained.items():
        examples, _ = encode.encode([record], comi.tokenizer, comi.run.config.data, targets=False)
        for rate in (None,) if comi.run.config.system == "full_prompt" else rates:
            batching.check(comi.run, examples, rate, tokens)
            add(name, TRAINED[name].title, rate, *latency.of_trained(comi, examples[0], rate or 1, tokens))
    for name in untrained:
        system = SYSTEMS[name].system
        for rate in rates if system.needs_budget else (None,):
            answerer = SystemAnswerer(name, system, model, config.data, config.generation, rate)
            try:
                answerer.encode([record])
            except LengthError as error:
                refused.append(f"{SYSTEMS[name].title} at {rate}: {error}")
                continue
            (question,), _ = answerer.questions([record])
            add(name, SYSTEMS[name].title, rate, *latency.of_untrained(system, model, question, rate, tokens))
            if name == "original":
                add(*KEPT, None, *latency.of_kept_cache(model, question, tokens))
    return found, refused


def lengths_of(given: Sequence[int] | None, model: LanguageModel, query: int, tokens: int) -> list[int]:
    """The ``given`` context lengths, or powers of two. Raises ConfigError for one that the model has no positions
    for."""
    room = model.backbone.max_position_embeddings - query - tokens
    if given and max(given) > room:
        raise ConfigError(
            f"--bins={','.join(map(str, given))} holds {max(given)}, but a question of {query} tokens and {tokens} new "
            f"ones leave {room} of the language model's positions; lower it"
        )
    return sorted(given or [2**k for k in range(7, 40) if 2**k <= min(room, LONGEST)] or [room])


def of_lengths(
    comi: Comi, model: LanguageModel, record: Record, rate: int, lengths: Sequence[int], tokens: int, repeat: int,
    console: Console,
) -> dict[int, dict[str, Timed]]:  # fmt: skip
    """The latencies of COMI at ``rate``, of the original prompt, and of it with a kept KV cache, for contexts of
    ``lengths`` tokens: those of ``record``, repeated."""
    context, query = (
        np.array(encode.token_ids(model.tokenizer, [text])[0], np.int32)
        for text in (record.context_text(), record.prompt)
    )
    found: dict[int, dict[str, Timed]] = {}
    for length in lengths:
        example = Example(np.resize(context, length), query, np.zeros(0, np.int32))
        batching.check(comi.run, [example], rate, tokens)
        question = Question(example.context, query, example.answer, record=record)
        original = SYSTEMS["original"].system
        stages = {
            "comi": latency.of_trained(comi, example, rate, tokens),
            "original": latency.of_untrained(original, model, question, None, tokens),
            "kept": latency.of_kept_cache(model, question, tokens),
        }
        found[length] = {name: latency.measure(*parts, repeat) for name, parts in stages.items()}
        seen = ", ".join(f"{name} {1e3 * timed.median('total'):.1f} ms" for name, timed in found[length].items())
        console.print(f"{length} tokens: {seen}", highlight=False)
    return found


def table(
    trained: Mapping[str, Comi], untrained: Sequence[str], config: Config, records: Sequence[Record],
    rates: Sequence[int], lengths: Sequence[int] | None, tokens: int, repeat: int, picture: Path, console: Console,
) -> Table:  # fmt: skip
    """Table 3 of the systems, and where compression pays if COMI and the original prompt are among them; draws both
    into ``picture``."""
    model = LanguageModel.open(config, batch_size=1)
    record = typical(records, model.tokenizer, config)
    context, query = (len(ids) for ids in encode.token_ids(model.tokenizer, [record.context_text(), record.prompt]))
    both = "comi" in trained and "original" in untrained
    sizes = lengths_of(lengths, model, query, tokens) if both else []
    found, refused = of_systems(trained, untrained, model, config, record, rates, tokens, repeat, console)
    if not found:
        raise ConfigError(f"there is no latency to measure: {'; '.join(refused)}")
    made = latency_tables.table_3(found, min(context, config.data.max_context), tokens, machine())
    made.notes.extend(refused)
    by_length = {}
    if both:
        by_length = of_lengths(trained["comi"], model, record, rates[0], sizes, tokens, repeat, console)
        rows, notes = latency_tables.break_even(by_length, rates[0])
        made.more.update({"break_even": rows, "break_even_notes": notes})
    latency_tables.plot(found, by_length, picture)
    return made
