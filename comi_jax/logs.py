"""What a run tells: metrics as JSON Lines and TensorBoard, a progress bar on a terminal, plain lines in a log."""

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from tensorboardX import SummaryWriter


class RunLog:
    """Metrics of one run, written into its folder as they come and shown on the way."""

    def __init__(self, folder: str | Path, title: str, steps: int, start: int, console: Console):
        self._title, self._steps, self._console = title, steps, console
        path = Path(folder) / "metrics.jsonl"
        path.write_text(_until(path, start), encoding="utf-8")
        self._lines = path.open("a", encoding="utf-8")
        logging.getLogger("tensorboardX").setLevel(logging.ERROR)
        self._board = SummaryWriter(str(Path(folder) / "tensorboard"), purge_step=start + 1)
        self._bar: Progress | None = None
        if console.is_terminal:
            columns = (
                TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[shown]}"),
                TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(),
            )  # fmt: skip
            self._bar = Progress(*columns, console=console)
            self._task = self._bar.add_task(title, total=steps, completed=start, shown="compiling")

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
        """Move the bar to ``step``."""
        if self._bar:
            self._bar.update(self._task, completed=step)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Record ``values`` of ``step`` and show the ones a person watches."""
        self._lines.write(json.dumps({"step": step, **values}) + "\n")
        self._lines.flush()
        for name, value in values.items():
            self._board.add_scalar(name, value, step)
        shown = (
            f"loss {values['loss']:.4f}  accuracy {values['accuracy']:.3f}  {values['tokens_per_second']:,.0f} tokens/s"
        )
        if self._bar:
            self._bar.update(self._task, completed=step, shown=shown)
        else:
            self._console.print(f"{self._title}  step {step}/{self._steps}  {shown}", highlight=False)


def _until(path: Path, start: int) -> str:
    """The whole lines of an earlier attempt up to step ``start``; what came after its last checkpoint is run again."""
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.is_file() else []
    return "".join(line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= start)
