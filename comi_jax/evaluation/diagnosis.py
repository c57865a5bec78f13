"""The diagnostics of one model on one set of records, computed when a table asks for them and shared among tables."""

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, SupportsIndex

import numpy as np
from rich.console import Console
from rich.progress import track

from comi_jax.data.records import Record
from comi_jax.errors import ConfigError
from comi_jax.evaluation import diagnostics_attention as attention
from comi_jax.evaluation import diagnostics_auc as auc
from comi_jax.evaluation import diagnostics_memory, diagnostics_segments, diagnostics_tables, diagnostics_terms
from comi_jax.evaluation.diagnostics import Subject, Table, anatomies, check_answers, subjects
from comi_jax.params import Tree
from comi_jax.serving import batching
from comi_jax.serving.compressor import Comi

TABLES = {  # by name, in the order they are printed
    "1a": "figure 1a, the attention mass of the top context tokens",
    "1b": "figure 1b, the cosines among the top tokens",
    "5": "AUC of MIG and other scores",
    "6": "redundancy of what is kept",
    "8": "the groups of one example",
    "answer-weight": "the merge weight of the answer's tokens",
    "terms": "what each term of the gain changes",
    "segments": "accuracy at several segment sizes",
    "memory": "redundancy of the memory, beside other checkpoints'",
}
# Those over the anatomies of all examples: a measure of each, and a summary of the measures.
MEASURED: dict[str, tuple[Callable[..., Any], Callable[..., Table]]] = {
    "5": (auc.measure_5, auc.summary_5),
    "6": (diagnostics_tables.measure_6, diagnostics_tables.summary_6),
    "answer-weight": (diagnostics_tables.measure_answer_weight, diagnostics_tables.summary_answer_weight),
    "terms": (diagnostics_terms.measure_terms, diagnostics_terms.summary_terms),
}


@dataclass(frozen=True)
class Sweep:
    """What --table=segments needs: the model at another segment size, the sizes (none: by default), a folder for the
    predictions, and a hash of the weights by which those of an earlier attempt are reused."""

    at_size: Callable[[int], Comi]
    sizes: tuple[int, ...]
    folder: str | os.PathLike
    weights: str = ""


@dataclass
class Diagnosis:
    """``records`` read by ``model`` at ``rate`` (None: the first of its rates). ``base`` gives a part ("encoder",
    "decoder") of the model before it was trained; with ``base_encoder``, its states are compressed. ``wanted`` are the
    tables that will be asked for, so that contexts are compressed once for all of them; ``others`` are further models
    for the table of memories, by title. ``example`` is the number of
    the record, from 1, that table 8 and figure 1b show (None: the first with an answer in its context)."""

    model: Comi
    records: Sequence[Record]
    base: Callable[[str], Tree]
    sweep: Sweep
    wanted: Sequence[str] = tuple(TABLES)
    others: Mapping[str, Comi] = field(default_factory=dict)
    rate: SupportsIndex | None = None
    base_encoder: bool = False
    sinks: bool = True
    example: int | None = None
    console: Console | None = None
    _params: Tree | None = field(default=None, init=False)
    _measures: dict[str, list[Any]] = field(default_factory=dict, init=False)
    _masses: list[np.ndarray] = field(default_factory=list, init=False)

    def __post_init__(self):
        """Raises LengthError, TextError or ConfigError for records, a rate or an example that cannot be used."""
        self.subjects: list[Subject] = subjects(self.records, self.model)
        examples = [subject.example for subject in self.subjects]
        self.rate_used = batching.check(self.model.run, examples, self.rate, 1)
        self.shown = next((s.number for s in self.subjects if s.status == "found"), 0)
        if self.example is not None:
            if not 1 <= self.example <= len(self.records):
                raise ConfigError(
                    f"--example={self.example} is not one of the {len(self.records)} records, counted from 1"
                )
            self.shown = self.example - 1

    def table(self, name: str) -> Table:
        """One of TABLES."""
        if name == "1a":
            return attention.summary_1a(self.masses(), self.sinks)
        if name == "1b":
            return attention.summary_1b(self.model, self.params(), self.subjects, self.masses(), self.sinks, self.shown)
        if name == "8":
            one = [self.subjects[self.shown]]
            return diagnostics_tables.table_8(next(anatomies(self.model, one, self.rate_used, self.params())))
        if name == "segments":
            return self.segments()
        if name == "memory":
            models = {diagnostics_memory.title(self.model): self.model, **self.others}
            return diagnostics_memory.memory_redundancy(models, self.records, self.rate_used)
        if name in ("5", "answer-weight"):
            check_answers([subject.status for subject in self.subjects])
        return MEASURED[name][1](self.measures(name))

    def measures(self, name: str) -> list[Any]:
        """The measures of every example for one of MEASURED, in the order of the records."""
        if name not in self._measures:
            wanted = {name, *(other for other in self.wanted if other in MEASURED)}
            found: dict[str, dict[int, Any]] = {name: {} for name in wanted}
            made = anatomies(self.model, self.subjects, self.rate_used, self.params())
            for anatomy in self._track(made, "compressing"):
                for other in wanted:
                    found[other][anatomy.subject.number] = MEASURED[other][0](anatomy)
            self._measures = {other: [rows[number] for number in sorted(rows)] for other, rows in found.items()}
        return self._measures[name]

    def params(self) -> Tree:
        """The model's weights, with the encoder that was asked for."""
        if self._params is None:
            self._params = {**self.model.params, **(self.base("encoder") if self.base_encoder else {})}
        return self._params

    def masses(self) -> list[np.ndarray]:
        """The attention mass of the context tokens of each record, by the language model before training."""
        if not self._masses:
            made = attention.masses(self.model, self.base("decoder")["decoder"], self.subjects)
            found = dict(self._track(made, "reading whole prompts"))
            self._masses = [found[number] for number in range(len(self.subjects))]
        return self._masses

    def segments(self) -> Table:
        """Accuracy, ratio, AUC and answer weight at each segment size."""
        trained, sweep = self.model.run.config.compression.segment_size, self.sweep
        longest = max(len(subject.example.context) for subject in self.subjects)
        sizes = sweep.sizes or diagnostics_segments.default_sizes(trained, longest, self.rate_used)
        if min(sizes) < self.rate_used:
            raise ConfigError(
                f"--segment-sizes has {min(sizes)}, below the rate {self.rate_used}: a segment would be less than one "
                "group; give larger sizes"
            )
        return diagnostics_segments.segment_sizes(
            {size: sweep.at_size(size) for size in sizes}, self.records, self.subjects, self.rate_used, sweep.folder,
            weights=sweep.weights, trained=trained, console=self.console,
        )  # fmt: skip

    def _track(self, steps: Iterable[Any], title: str) -> Iterable[Any]:
        quiet = self.console is None or not self.console.is_terminal
        return track(steps, title, len(self.subjects), console=self.console, disable=quiet, transient=True)
