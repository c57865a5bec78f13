"""Pages of what was kept for the answers of an evaluation that its references agree with least."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, SupportsIndex

from comi_jax.config import Generation
from comi_jax.data.records import Record
from comi_jax.errors import ConfigError
from comi_jax.serving import batching, explanation
from comi_jax.serving.compressor import Comi
from comi_jax.serving.explanation_page import page
from comi_jax.serving.generation import Options


def check(model: Comi, rate: SupportsIndex | None, closed_book: bool) -> None:
    """Raise ConfigError for an evaluation whose answers cannot be explained."""
    if closed_book:
        raise ConfigError("--explain-worst shows what was kept of contexts, and --closed-book has none; leave one out")
    explanation.check_system(model)
    if batching.whole_rate(model.run, rate) == 1:
        raise ConfigError("--explain-worst: at rate 1 nothing is compressed; give a --rate of at least 2")


def worst(predictions: Path, count: int) -> list[dict[str, Any]]:
    """The ``count`` predictions of a file with the lowest f1_max, then em; ties in the order of the records."""
    with predictions.open(encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    return sorted(rows, key=lambda row: (row["f1_max"], row["em"], row["index"]))[:count]


def write_pages(
    model: Comi,
    records: Sequence[Record],
    rows: Sequence[dict[str, Any]],
    folder: Path,
    *,
    rate: SupportsIndex | None = None,
    decoding: Generation,
    account: dict[str, Any],
) -> list[Path]:
    """A page, ``record_N.html`` with N counted from 1, for each of ``rows``, predictions of ``records``. Those of an
    earlier evaluation are removed from ``folder``. See explanation.as_json for ``account``."""
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("record_*.html"):
        old.unlink()
    options: Options = {
        "max_new_tokens": decoding.max_new_tokens,
        "repetition_penalty": decoding.repetition_penalty,
        "temperature": decoding.temperature,
        "top_k": decoding.top_k,
        "top_p": decoding.top_p,
        "seed": decoding.seed,
        "stop_strings": decoding.stop_strings,
    }
    paths = []
    for row in rows:
        number, record = row["index"] + 1, records[row["index"]]
        source = explanation.encode(model, record.context_text())
        whole = batching.whole_rate(model.run, rate)
        view = explanation.explain(model, source, record.prompt, whole, **options)
        notes = (
            (f"record {number}, references", " | ".join(record.answers)),
            ("answer in the evaluation", row["prediction"]),
            ("f1_max, em", f"{row['f1_max']:.3f}, {row['em']:.0f}"),
        )
        made = explanation.as_json(source, [dataclasses.replace(view, notes=notes)], account)
        paths.append(folder / f"record_{number}.html")
        paths[-1].write_bytes(page(made).encode())
    return paths
