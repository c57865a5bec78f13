"""What smaller documents cost: ``python -m comi_jax.benchmarks.documents --checkpoint=DIR``.

The held-out questions of a run are asked of its contexts, kept in each dtype, with the encoder's keys and values and
without them. For each: bytes per token, exact match with its 95 % interval, and the error of the memory,
‖m − m₀‖ / ‖m₀‖ with m₀ of the exact document, over the questions that got as many vectors.
"""

import itertools
from collections.abc import Sequence

import jax
import numpy as np
from rich.console import Console
from rich.table import Table

from comi_jax import cli
from comi_jax.data.records import Record
from comi_jax.errors import ConfigError
from comi_jax.evaluation import metrics
from comi_jax.serving.compressor import Comi
from comi_jax.serving.segments import DTYPES
from comi_jax.training.dataset import read_held_out

COLUMNS = ("kept", "bytes a token", "em", "memory error, mean", "largest", "other numbers of vectors")


def measure(model: Comi, records: Sequence[Record]) -> list[tuple[str, ...]]:
    """The rows of the table, the first that of exact documents."""
    texts = list(dict.fromkeys(record.context_text() for record in records))
    questions = [record.prompt for record in records]
    rows, exact = [], None
    for dtype, keep_kv in itertools.product(DTYPES, (True, False)):
        documents = dict(zip(texts, model.encode(texts, dtype=dtype, keep_kv=keep_kv), strict=True))
        asked = [documents[record.context_text()] for record in records]
        memories = [made.vectors for made in model.compress(asked, questions)]
        exact = memories if exact is None else exact
        answers = model.answer(asked, questions)
        pairs = zip(answers, records, strict=True)
        em = metrics.summarize([metrics.score(answer.text, record.answers) for answer, record in pairs])["em"]
        same = [(m, m0) for m, m0 in zip(memories, exact, strict=True) if len(m) == len(m0)]
        errors = [float(np.linalg.norm(m - m0) / np.linalg.norm(m0)) for m, m0 in same]
        size = sum(d.nbytes for d in documents.values()) / sum(d.tokens for d in documents.values())
        rows.append((
            f"{dtype}, {'states, keys and values' if keep_kv else 'states alone'}",
            f"{size:,.0f}",
            f"{em['mean']:.3f} [{em['low']:.3f}, {em['high']:.3f}]",
            f"{np.mean(errors):.1e}" if errors else "-",
            f"{np.max(errors):.1e}" if errors else "-",
            f"{len(memories) - len(same)} of {len(memories)}",
        ))  # fmt: skip
    return rows


def main(arguments: list[str] | None = None) -> None:
    """Print the table."""
    parser = cli.Parser(prog="python -m comi_jax.benchmarks.documents", description="What smaller documents cost.")
    parser.add_argument("--checkpoint", type=cli.path, required=True, help="folder of a training run")
    parser.add_argument("--limit", type=int, help="use only the first LIMIT held-out records")
    parser.add_argument("--batch-size", type=int, default=64)
    options = parser.parse_args(arguments)
    console = Console(width=cli.width(), soft_wrap=True)
    with cli.one_way_out():
        model = Comi.load(options.checkpoint, batch_size=options.batch_size)
        records = read_held_out(model.run.config, console)[0][: options.limit]
        if not records:
            raise ConfigError("the run has no held-out records (data.eval), and they are what is asked")
        rows = measure(model, records)
    table = Table(title=f"{len(records)} questions, {jax.default_backend()}, {model.architecture.dtype}")
    for column in COLUMNS:
        table.add_column(column)
    for row in rows:
        table.add_row(*row)
    console.print(table)


if __name__ == "__main__":
    main()
