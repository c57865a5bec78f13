"""The cost of a checkpoint: ``python -m comi_jax.benchmarks.checkpoints [--gb 2]``.

A random state, one third weights and two thirds AdamW moments, is saved and restored in a temporary folder.

    blocked    save() itself, while the run waits; the rest is written in the background
    written    until the checkpoint is complete, including checksums and the comparison with what is read back
    read back  that comparison alone: each array opened again and compared with what was handed to the writer
    restored   with verification of the checksums in parallel, as in a run; and without
    verified   verification alone, in one thread

Files are likely in the page cache, so the figures are those of the processor, not of the disk.
"""

import statistics
import tempfile
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich.console import Console
from rich.table import Table

from comi_jax import cli
from comi_jax.benchmarks.speed import peak_memory
from comi_jax.cli import at_least
from comi_jax.runs import checksums, readback
from comi_jax.runs.checkpoints import Checkpoints, Progress
from comi_jax.training.state import TrainState

GB = 1e9
ARRAY = 1 << 26  # elements of an array: 268 MB


def state(size: float) -> TrainState:
    """About ``size`` bytes of weights and moments."""
    count = max(round(size / 3 / 4 / ARRAY), 1)
    rng = np.random.default_rng(0)
    trained = {f"encoder/layers/{i}": jnp.asarray(rng.random(ARRAY, np.float32)) for i in range(count)}
    return TrainState(jnp.int32(1), trained, optax.scale_by_adam().init(trained))


def measure(folder: Path, given: TrainState, step: int) -> dict[str, float]:
    """Seconds of each phase, measured once."""
    seconds: dict[str, float] = {}

    def lap(name: str, since: float) -> float:
        now = time.perf_counter()
        seconds[name] = now - since
        return now

    checkpoints = Checkpoints(folder, keep=1)
    since = time.perf_counter()
    checkpoints.save(given, Progress(step, {"next_index": step}))
    lap("blocked", since)
    if not checkpoints.settle():
        raise OSError(f"{folder} cannot take the checkpoint")
    lap("written", since)
    checkpoints.close()
    place = checkpoints.folder / str(step)
    since = time.perf_counter()
    for part in ("trained", "optimizer"):
        readback.compare(place / part)
    since = lap("read back", since)
    checksums.verify(place)
    since = lap("verified", since)
    reader = Checkpoints(folder, read_only=True)
    reader.restore_newest(given)
    since = lap("restored", since)
    reader.restore(step, given)
    lap("restored without checksums", since)
    reader.close()
    return seconds


def main() -> None:
    """Measure and print a table."""
    parser = cli.Parser(
        prog="python -m comi_jax.benchmarks.checkpoints", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--gb", type=float, default=2.0, help="size of the state, at least 0.8")
    parser.add_argument("--runs", type=at_least(1), default=3, help="number of runs; the table shows medians")
    options = parser.parse_args()
    given = state(options.gb * GB)
    size = sum(x.nbytes for x in jax.tree.leaves(given))
    with tempfile.TemporaryDirectory(prefix="comi_jax-") as folder:
        rows = [measure(Path(folder), given, step) for step in range(1, options.runs + 1)]
    table = Table(title=f"a state of {size / GB:.2f} GB, median of {options.runs}; peak {peak_memory():.2f} GB")
    table.add_column("")
    table.add_column("seconds", justify="right")
    table.add_column("seconds/GB", justify="right")
    for name in rows[0]:
        median = statistics.median(row[name] for row in rows)
        table.add_row(name, f"{median:.2f}", f"{median / size * GB:.2f}")
    Console(width=cli.width()).print(table)


if __name__ == "__main__":
    main()
