"""The time lost by kill -9: ``python -m comi_jax.benchmarks.restart [--config=tiny] [path=value ...]``.

A run in a temporary folder is killed at random moments and restarted at once, as a supervisor would.

    resumed        until the run reports the step from which it resumes
    a new step     until it logs a step beyond those before the kill: Python's start, data, weights, state, compilation,
                   and repeating the steps since the checkpoint
"""

import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

from comi_jax import cli
from comi_jax.cli import at_least
from comi_jax.runs import journal
from comi_jax.runs.folder import Folder

WAIT = 0.02  # seconds between polls of the run's files


class Run:
    """One process of the run in ``folder``."""

    def __init__(self, command: list[str], folder: Path):
        self.metrics, self.log = Folder(folder / "run").metrics, folder / "log"
        with open(self.log, "wb") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)

    def step(self) -> int:
        """The newest logged step."""
        return max((row["step"] for row in journal.rows(self.metrics)), default=0)

    def wait_for_step(self, step: int) -> float:
        """Wait until ``step`` is logged; the time then."""
        while self.step() < step:
            self._look_again()
        return time.monotonic()

    def wait_for_checkpoint(self) -> None:
        """Wait until there is a checkpoint to resume from."""
        while not Folder(self.metrics.parent).steps():
            self._look_again()

    def wait_to_resume(self) -> tuple[float, int]:
        """Wait until the run reports that it resumes; the time then, and the step it resumes from."""
        while not (found := re.search(rb"resuming from step (\d+) ", self.log.read_bytes())):
            self._look_again()
        return time.monotonic(), int(found[1])

    def _look_again(self) -> None:
        """Wait a little. If the run has ended, exit with the last line that it printed."""
        if self.process.poll() is not None:
            lines = self.log.read_text(errors="replace").strip().splitlines() or ["nothing was printed"]
            sys.exit(f"error: the run ended with status {self.process.returncode}: {lines[-1]}")
        time.sleep(WAIT)

    def kill(self) -> float:
        """Kill the run with SIGKILL; the time then."""
        self.process.kill()
        now = time.monotonic()
        self.process.wait()
        return now


def measure(command: list[str], folder: Path, kills: int, every: int, rng: random.Random) -> list[dict[str, float]]:
    """The figures of each kill."""
    run, rows = Run(command, folder), []
    try:
        run.wait_for_checkpoint()
        for _ in range(kills):
            run.wait_for_step(run.step() + every + rng.randrange(every))
            time.sleep(rng.random())
            killed = run.kill()
            reached = run.step()
            run = Run(command, folder)
            resumed, kept = run.wait_to_resume()
            new = run.wait_for_step(reached + 1)
            rows.append(
                {"resumed, s": resumed - killed, "a new step, s": new - killed, "steps repeated": reached - kept}
            )
    finally:
        run.kill()
    return rows


def main(arguments: list[str] | None = None) -> None:
    """Measure and print a table."""
    parser = cli.Parser(prog="python -m comi_jax.benchmarks.restart", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--config", default="tiny", help="a name from comi_jax/configs")
    parser.add_argument("--kills", type=at_least(1), default=5)
    parser.add_argument("--every", type=at_least(1), default=10, help="steps between checkpoints")
    parser.add_argument("overrides", nargs="*", metavar="path=value", help="settings of the run")
    options = parser.parse_intermixed_args(arguments)
    with tempfile.TemporaryDirectory(prefix="comi_jax-") as folder:
        settings = [f"train.output={folder}/run", f"train.checkpoint_every={options.every}", "train.log_every=1"]
        command = [sys.executable, "-m", "comi_jax.train", f"--config={options.config}", *settings, *options.overrides]
        rows = measure(command, Path(folder), options.kills, options.every, random.Random(0))
    table = Table("", "median", "max", title=f"{options.kills} kills, a checkpoint every {options.every} steps")
    for name in rows[0]:
        values = [row[name] for row in rows]
        table.add_row(name, f"{statistics.median(values):.1f}", f"{max(values):.1f}")
    Console(width=cli.width()).print(table)


if __name__ == "__main__":
    main()
