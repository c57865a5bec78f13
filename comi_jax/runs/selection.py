"""Select a checkpoint of a run: the newest, the best evaluated one, or a step."""

import os
from collections.abc import Mapping, Sequence
from typing import Any

from comi_jax.runs import journal
from comi_jax.runs.checksums import CheckpointError
from comi_jax.runs.description import read_run
from comi_jax.runs.folder import Folder


def newest(folder: str | os.PathLike) -> int | None:
    """The step of the newest complete checkpoint of ``folder``, or None."""
    folder = Folder(folder)
    return max(folder.steps(), default=None) if folder.frozen.is_dir() else None


def existing(folder: str | os.PathLike, step: int | None = None) -> int:
    """``step``, or for None the newest one. Raises CheckpointError if ``folder`` has no such checkpoint."""
    found = Folder(folder).steps()
    if newest(folder) is None:
        raise CheckpointError(f"{folder} has no complete checkpoint yet")
    if step is not None and step not in found:
        raise CheckpointError(f"{folder} has no checkpoint of step {step}; it has {', '.join(map(str, found))}")
    return found[-1] if step is None else step


def choose_step(folder: str | os.PathLike, text: str) -> int:
    """The step that ``text`` names: "newest", "best" (by evaluation on the held-out records) or a number. Raises
    CheckpointError if there is no such checkpoint."""
    metric = read_run(folder).config.train.best_by
    if text == "newest":
        return existing(folder)
    if text == "best":
        best = best_step(folder, metric)
        if best is None:
            raise CheckpointError(
                f"{folder} has no best checkpoint, as nothing was evaluated during training; choose another --step, or "
                "train with train.eval_every"
            )
        return existing(folder, best)
    if not text.isdecimal():
        raise CheckpointError(f'--step={text} is not a step; it can be a number, "newest" or "best"')
    return existing(folder, int(text))


def evaluations(folder: str | os.PathLike) -> list[dict[str, Any]]:
    """The evaluations during training, one per step."""
    return journal.rows(Folder(folder).evaluations)


def best_step(folder: str | os.PathLike, metric: str) -> int | None:
    """The step of the best evaluation whose checkpoint still exists, or None."""
    there = Folder(folder).steps()  # a save may have failed
    return best_of([row for row in evaluations(folder) if row["step"] in there], metric)


def best_of(rows: Sequence[Mapping[str, Any]], metric: str) -> int | None:
    """The step with the highest mean of ``metric`` (ties: the first), or None. Only evaluations with the same records,
    rate and decoding as the newest one are compared."""
    alike = [[row.get(name) for name in ("records", "rate", "decoding")] for row in rows]
    measured = {
        row["step"]: row["metrics"][metric]["mean"] for row, how in zip(rows, alike, strict=True) if how == alike[-1]
    }
    return max(measured, key=lambda step: (measured[step], -step), default=None)
