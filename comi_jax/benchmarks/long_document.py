"""A document larger than device memory: ``python -m comi_jax.benchmarks.long_document --checkpoint=DIR``.

A long text is encoded and asked, with its segments in host memory and with all of them on the device. For each: the
bytes of the document, and what JAX's arrays on the device have of it at most, between two segments; how far the memory
of the process grew meanwhile, and how much of that is not the document, which on a CPU is in the same memory; seconds.
"""

import ctypes
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import jax
from rich.console import Console
from rich.table import Table

from comi_jax import cli
from comi_jax.benchmarks.speed import peak_memory
from comi_jax.data.encode import token_ids
from comi_jax.serving.compressor import Comi
from comi_jax.serving.encoding import PLACES, encoded_in_steps

WORDS = "On the second day we met her by the river and went home. "
QUESTION = "Who was met there?"
COLUMNS = (
    "segments in", "segments", "document", "largest segment", "on the device", "memory grew by", "without the document",
    "by a question", "encoding", "a question",
)  # fmt: skip


@dataclass(frozen=True)
class Measured:
    """A document of ``segments`` segments, and what it took: bytes and seconds."""

    place: str
    segments: int
    nbytes: int
    largest: int  # of its segments
    on_device: int
    grew_encoding: int
    grew_asking: int
    encoding: float
    question: float

    @property
    def row(self) -> tuple[str, ...]:
        """Its row of the table."""
        grew = (self.grew_encoding, self.grew_encoding - self.nbytes, self.grew_asking)
        sizes = (f"{size / 1e6:,.1f} MB" for size in (self.nbytes, self.largest, self.on_device, *grew))
        return self.place, f"{self.segments:,}", *sizes, f"{self.encoding:.1f} s", f"{self.question:.1f} s"


def measure(model: Comi, text: str, place: str) -> Measured:
    """Encode ``text`` and ask it once, both with programs that are compiled before."""
    rate = model.architecture.compression.segment_size  # a vector for each segment, which the decoder has room for
    model.compress(model.encode(text[: len(text) // 50], place=place), QUESTION, rate=rate)
    before, on_device = _held(), 0
    steps = encoded_in_steps(model, text, "the text", place=place)
    next(steps)  # tokenises all of it, and encodes the first segment
    base, since, document = _reset_peak(), time.perf_counter(), None
    while document is None:
        on_device = max(on_device, _held() - before)
        try:
            next(steps)
        except StopIteration as end:
            document = end.value
    encoding, grew_encoding = time.perf_counter() - since, int(peak_memory() * 1e9) - base
    base, since = _reset_peak(), time.perf_counter()
    model.compress(document, QUESTION, rate=rate)
    question, grew_asking = time.perf_counter() - since, int(peak_memory() * 1e9) - base
    sizes = [segment.nbytes for segment in document.segments]
    return Measured(
        place, len(sizes), sum(sizes), max(sizes), on_device, grew_encoding, grew_asking, encoding, question
    )


def _held() -> int:
    """The bytes of all arrays that JAX has on the device."""
    return sum(x.nbytes for x in jax.live_arrays())


def _reset_peak() -> int:
    """Begin to count the peak of the process's memory anew (Linux, glibc). Returns its bytes now."""
    ctypes.CDLL(None).malloc_trim(0)  # what is free, and would be taken without growing
    Path("/proc/self/clear_refs").write_text("5")
    return int(peak_memory() * 1e9)


def text_of(model: Comi, tokens: int) -> str:
    """A text of at least ``tokens`` tokens and not many more."""
    return WORDS * (100 * tokens // len(token_ids(model.tokenizer, [WORDS * 100])[0]) + 1)


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table."""
    parser = cli.Parser(
        prog="python -m comi_jax.benchmarks.long_document", description="A document larger than device memory."
    )
    parser.add_argument("--checkpoint", type=cli.path, required=True, help="folder of a training run")
    parser.add_argument("--tokens", type=cli.at_least(1), default=262_144, help="of the document")
    parser.add_argument("--set", action="append", default=[], metavar="path=value", help="override a setting")
    parser.add_argument("--places", nargs="+", choices=PLACES, default=["host", "device"])
    options = parser.parse_args(arguments)
    console = Console(width=cli.width(), soft_wrap=True)
    with cli.one_way_out():
        room = f"data.max_context={2 * options.tokens + 1000}"
        model = Comi.load(options.checkpoint, overrides=[room, *options.set], batch_size=1)
        text = text_of(model, options.tokens)
        rows = [measure(model, text, place).row for place in options.places]
    title = f"{options.tokens:,} tokens in segments of {model.architecture.compression.segment_size}"
    table = Table(title=f"{title}, {jax.default_backend()}, {model.architecture.dtype}")
    for column in COLUMNS:
        table.add_column(column)
    for row in rows:
        table.add_row(*row)
    console.print(table)


if __name__ == "__main__":
    main()
