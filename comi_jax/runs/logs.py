"""The logs of a run: metrics as JSON Lines and for TensorBoard, a progress bar on a terminal, plain lines otherwise."""

import datetime
import json
import logging
import math
import os
import time
from collections.abc import Mapping
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from tensorboardX import SummaryWriter

from comi_jax.runs import journal
from comi_jax.runs.folder import Folder


class RunConsole(Console):
    """The console of a run. If its output is a pipe whose reader is gone, the run continues silently and still writes
    its files."""

    def on_broken_pipe(self) -> None:
        self.quiet = True
        os.dup2(os.open(os.devnull, os.O_WRONLY), self.file.fileno())  # for buffered output and other writers


class RunLog:
    """Writes the metrics of one run into its folder, and shows them."""

    def __init__(self, folder: str | os.PathLike, title: str, steps: int, start: int, console: Console):
        self._title, self._steps, self._start, self._console = title, steps, start, console
        self._since = time.monotonic()
        folder = Folder(folder)
        journal.keep_until(folder.metrics, start)
        self._lines = folder.metrics.open("a", encoding="utf-8")
        logging.getLogger("tensorboardX").setLevel(logging.ERROR)
        self._board = SummaryWriter(str(folder.tensorboard(title)), purge_step=start + 1)
        self._bar: Progress | None = None
        if console.is_terminal:
            columns = (
                TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[shown]}"),
                TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(),
            )  # fmt: skip
            self._bar = Progress(*columns, console=console)
            self._task = self._bar.add_task(title, total=steps, completed=start, shown="")

    def __enter__(self) -> "RunLog":
        if self._bar:
            self._bar.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._bar:
            self._bar.stop()
        self._board.close()
        self._lines.close()

    def advance(self, step: int) -> None:
        """Move the progress bar to ``step``."""
        if self._bar:
            self._bar.update(self._task, completed=step)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Record the ``values`` of ``step`` and show the most important ones. Non-finite values become null in the
        file, as JSON has no NaN."""
        finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
        self._lines.write(json.dumps({"step": step, **finite}) + "\n")
        self._lines.flush()
        for name, value in values.items():
            self._board.add_scalar(name, value, step)
        if self._bar:
            self._bar.update(self._task, completed=step, shown=shown(values))
        else:
            left = (time.monotonic() - self._since) / max(step - self._start, 1) * (self._steps - step)
            text = f"{self._title}  step {step}/{self._steps}  {shown(values)}"
            self._console.print(f"{text}  left {datetime.timedelta(seconds=round(left))}", highlight=False)

    def measured(self, step: int, values: Mapping[str, float]) -> None:
        """Show the means of an evaluation, and record them for TensorBoard."""
        for name, value in values.items():
            self._board.add_scalar(f"evaluation/{name}", value, step)
        means = "  ".join(f"{name} {value:.3f}" for name, value in values.items())
        self._console.print(f"{self._title}  step {step}/{self._steps}  evaluation: {means}", highlight=False)

    def sync(self) -> None:
        """Flush metrics to disk: a checkpoint must not exist without the lines before it."""
        os.fsync(self._lines.fileno())


def shown(values: Mapping[str, float]) -> str:
    """The most important metrics of a step, on one line."""
    words = [f"loss {values['loss']:.4f}", f"accuracy {values['accuracy']:.3f}"]
    if "tokens_per_second" in values:
        words.append(f"{values['tokens_per_second']:,.0f} tokens/s")
    if "mfu" in values:
        words.append(f"MFU {values['mfu']:.1%}")
    words += [f"lr {values['learning_rate']:.2e}", f"gradient {values['gradient_norm']:.3g}"]
    words += [f"memory {values['memory_gb']:.2f} GB"]
    if values["skipped"]:
        words.append(f"skipped {values['skipped']:.0f}")
    return "  ".join(words)


class SilentLog:
    """A RunLog that does nothing, for all processes but the first."""

    def __init__(self, *_: Any):
        pass

    def __enter__(self) -> "SilentLog":
        return self

    def __exit__(self, *_: Any) -> None:
        pass

    def advance(self, step: int) -> None:
        pass

    def write(self, step: int, values: Mapping[str, float]) -> None:
        pass

    def measured(self, step: int, values: Mapping[str, float]) -> None:
        pass

    def sync(self) -> None:
        pass
