"""Which checkpoint of a run is meant: the newest, a number, or the best by the evaluations on the way."""

import os
from collections.abc import Mapping, Sequence
from typing import Any

from comi_jax.runs import journal
from comi_jax.runs.checksums import CheckpointError
from comi_jax.runs.description import read_run
from comi_jax.runs.folder import Folder


def newest(folder: str | os.PathLike) -> int | None:
    """The number of updates in the newest complete checkpoint of ``folder``, if it has one."""
    folder = Folder(folder)
    return max(folder.steps(), default=None) if folder.frozen.is_dir() else None


def existing(folder: str | os.PathLike, step: int | None = None) -> int:
    """``step`` if ``folder`` has that checkpoint, for None the newest. Raises CheckpointError if it has none."""
    found = Folder(folder).steps()
    if newest(folder) is None:
        raise CheckpointError(f"{folder} has no complete checkpoint yet")
    if step is not None and step not in found:
        raise CheckpointError(f"{folder} has no checkpoint of step {step}; it has {', '.join(map(str, found))}")
    return found[-1] if step is None else step


def choose_step(folder: str | os.PathLike, text: str) -> int:
    """The checkpoint that ``text`` names: "newest", "best" (on the held-out records) or a number."""
    metric = read_run(folder).config.train.best_by
    if text == "newest":
        return existing(folder)
    if text == "best":
        best = best_step(folder, metric)
        if best is None:
            raise CheckpointError(
                f"{folder} has no best checkpoint: nothing was evaluated on the way (train.eval_every)"
            )
        return existing(folder, best)
    if not text.isdecimal():
        raise CheckpointError(f'--step={text} is not a step; it can be a number, "newest" or "best"')
    return existing(folder, int(text))


def evaluations(folder: str | os.PathLike) -> list[dict[str, Any]]:
    """What was measured on the way, a line a step."""
    return journal.rows(Folder(folder).evaluations)


def best_step(folder: str | os.PathLike, metric: str) -> int | None:
    """The checkpoint in ``folder`` that ``best_of`` the evaluations of those that are there is."""
    there = Folder(folder).steps()  # a save may have failed
    return best_of([row for row in evaluations(folder) if row["step"] in there], metric)


def best_of(rows: Sequence[Mapping[str, Any]], metric: str) -> int | None:
    """The step whose evaluation has the highest mean of ``metric``, the first of equals; of those that were measured
    as the newest was, on the same records."""
    alike = [[row.get(name) for name in ("records", "rate", "decoding")] for row in rows]
    measured = {
        row["step"]: row["metrics"][metric]["mean"] for row, how in zip(rows, alike, strict=True) if how == alike[-1]
    }
    return max(measured, key=lambda step: (measured[step], -step), default=None)
