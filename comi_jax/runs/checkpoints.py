"""Checkpoints as folders: written by Orbax in the background, sealed with checksums, then renamed into place.

A checkpoint counts from the rename on. So a process may die at any moment: what is found is whole, or is swept away at
the next start. Restoring goes from the newest to the oldest and takes none whose bytes are not those that were written.
"""

import concurrent.futures
import contextlib
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from comi_jax.devices import distributed
from comi_jax.runs import checksums
from comi_jax.runs.arrays import WRITING, Say, SealedWriter, intact, read_json, reason_of, restore_arrays, stored
from comi_jax.runs.checksums import CheckpointError, DamageError
from comi_jax.runs.folder import DAMAGED, Folder
from comi_jax.runs.readback import VerifiedJson, VerifiedSave, VerifyingHandler, VerifyingJson

REMOVING = ".removing"  # ends the name of a checkpoint that is being removed
COUNTERS = ("skipped", "in_a_row", "examples")


@dataclass(frozen=True)
class Progress:
    """What a checkpoint holds besides arrays."""

    step: int  # batches taken; the position in the data, and with the seed the key of the next random numbers
    position: dict[str, Any]  # of the data iterator
    skipped: int = 0  # steps whose update was left out because it was not finite
    in_a_row: int = 0  # of them, those just before
    examples: str = ""  # a short name of the examples that the position is in


class Checkpoints:
    """The checkpoints of a run: the newest ``keep`` and the one that ``best`` names. If ``read_only``, all are left as
    they are, damaged ones too."""

    def __init__(self, folder: str | os.PathLike, keep: int = 2, say: Say = print, read_only: bool = False):
        self._of, self._keep, self._say = Folder(Path(folder).absolute()), keep, say
        self.folder = self._of.checkpoints
        self._writes = not read_only and jax.process_index() == 0
        if self._writes:
            self._sweep()
        # The newest is compared with its checksums from now on, while the caller makes place for what it holds.
        self._thread = concurrent.futures.ThreadPoolExecutor(1, "verify")
        newest = self.latest() if jax.process_index() == 0 else None
        self._ahead = (newest, None if newest is None else self._start_verifying(newest))
        self.best: int | None = None
        self._writer: SealedWriter | None = None
        self._under_way: tuple[int, int] | None = None  # step and bytes
        self._failed = False

    def steps(self) -> list[int]:
        """The checkpoints that there are, rising."""
        return self._of.steps()

    def latest(self) -> int | None:
        """The number of updates in the newest complete checkpoint."""
        return max(self.steps(), default=None)

    def _sweep(self) -> None:
        """Remove what an earlier process left half written or half removed."""
        if self.folder.is_dir():
            for path in self.folder.iterdir():
                if WRITING in path.name or path.name.endswith(REMOVING):
                    shutil.rmtree(path)

    def save(self, state: Any, progress: Progress) -> None:
        """Start writing ``state`` (step.TrainState), whose arrays may be donated once this returns.

        A save that fails is told and the run goes on; when the next one fails too, or where there are several
        processes, CheckpointError is raised.
        """
        self.settle()
        items = {
            "trained": VerifiedSave(state.trained),
            "optimizer": VerifiedSave(state.optimizer),
            "data": VerifiedJson(progress.position),
            "counters": VerifiedJson({name: getattr(progress, name) for name in COUNTERS}),
        }
        size = sum(x.nbytes for x in jax.tree.leaves((state.trained, state.optimizer)))
        try:
            if self._writer is None:
                self._writer = SealedWriter(_handler(self._say))
            self.folder.mkdir(exist_ok=True)
            self._writer.save(self._of.checkpoint(progress.step), ocp.args.Composite(**items))
            self._under_way = (progress.step, size)
        except Exception as error:
            self._missed(progress.step, size, error)

    def settle(self) -> bool:
        """Wait for the save in progress, then delete checkpoints that are no longer kept. False if the save failed."""
        if self._writer is not None and self._under_way is not None:
            (step, size), self._under_way = self._under_way, None
            try:
                self._writer.wait()
                self._failed = False
            except Exception as error:
                self._missed(step, size, error)
        self._prune()
        return not self._failed

    def _missed(self, step: int, size: int, error: Exception) -> None:
        if distributed.of_all(error):
            raise error
        free = shutil.disk_usage(self.folder if self.folder.is_dir() else self.folder.parent).free
        place = f"{self._of.checkpoint(step)} ({size:,} bytes, {free:,} free there)"
        what = f"checkpoint {place} cannot be saved: {reason_of(error)}"
        several = jax.process_count() > 1  # the others would wait for this one's part
        if self._failed or several:
            kept = self.latest()
            held = f"the newest is that of step {kept}" if kept is not None else "there is none yet"
            why = "all processes stop" if several else "it is the second in a row, so the run stops"
            raise CheckpointError(f"{what}; {why}; {held}") from error
        self._failed = True
        shutil.rmtree(self.folder / f"{step}{WRITING}", ignore_errors=True)
        self._say(f"{what}; the run goes on until the next one")

    def _prune(self) -> None:
        if self._writes:
            for step in self.steps()[: -self._keep]:
                if step != self.best:
                    going = self.folder / f"{step}{REMOVING}"
                    self._of.checkpoint(step).rename(going)  # half of a checkpoint never has a checkpoint's name
                    shutil.rmtree(going)

    def restore(self, step: int, state: Any) -> tuple[Any, Progress]:
        """The state after ``step``, placed like the arrays of ``state``. Its checksums are not looked at here.

        Raises CheckpointError with the list of differences if other arrays are stored than ``state`` has."""
        place = self._of.checkpoint(step)
        like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
        differences = [
            f"{part}/{line}"
            for part in ("trained", "optimizer")
            for line in _differences(stored(place / part), getattr(like, part))
        ]
        if differences:
            raise CheckpointError(
                f"{place} is a checkpoint of another model: {'; '.join(differences[:10])}"
                f"{f' and {len(differences) - 10} more' if len(differences) > 10 else ''}"
            )
        changed = {part: restore_arrays(place / part, getattr(like, part)) for part in ("trained", "optimizer")}
        count = jax.device_put(jnp.int32(step), state.step.sharding)
        counters = read_json(place / "counters") if (place / "counters").is_dir() else {}
        return state.replace(step=count, **changed), Progress(step, read_json(place / "data"), **counters)

    def restore_newest(self, state: Any) -> tuple[Any, Progress]:
        """The state of the newest checkpoint that is whole, placed like ``state``, and its progress.

        A damaged one is told, and renamed so that it is neither used nor lost. Raises CheckpointError if none is whole.
        """
        bad: set[int] = set()
        while (step := self._newest_but(bad)) is not None:
            try:
                sealed = self._verify(step)
                with intact(self._of.checkpoint(step)) if sealed else contextlib.nullcontext():
                    restored = self.restore(step, state)
            except DamageError as error:
                self._set_aside(step, error, bad)
                continue
            if not sealed:
                self._say(f"{self._of.checkpoint(step)} was written before there were checksums: not verified")
            return restored
        raise CheckpointError(
            f"none of the checkpoints in {self.folder} can be read, damaged ones are kept as STEP{DAMAGED}; choose "
            "another train.output to begin anew"
        )

    def _verify(self, step: int) -> bool:
        """Whether checkpoint ``step`` has checksums, which the first process compares for all. Raises DamageError."""
        verdict, error = 0, DamageError(f"{self._of.checkpoint(step)} is damaged")
        if jax.process_index() == 0:
            try:
                (ahead, verifying), self._ahead = self._ahead, (None, None)
                if verifying is None or ahead != step:
                    verifying = self._start_verifying(step)
                verdict = int(verifying.result())
            except DamageError as found:
                verdict, error = -1, found
        verdict = int(distributed.agreed(np.int32(verdict)))
        if verdict < 0:
            raise error
        return bool(verdict)

    def _start_verifying(self, step: int) -> concurrent.futures.Future[bool]:
        return self._thread.submit(checksums.verify, self._of.checkpoint(step))

    def _newest_but(self, bad: set[int]) -> int | None:
        """The newest checkpoint that is not in ``bad``, as the first process sees it."""
        step = int(distributed.agreed(np.int32(max((step for step in self.steps() if step not in bad), default=-1))))
        if step >= 0 and not self._of.checkpoint(step).is_dir():
            raise CheckpointError(
                f"process 0 sees {self._of.checkpoint(step)}, process {jax.process_index()} does not; all processes of "
                "a run need one train.output that every one of them can see"
            )
        return step if step >= 0 else None

    def _set_aside(self, step: int, error: DamageError, bad: set[int]) -> None:
        bad.add(step)
        names = (f"{step}{DAMAGED}{number or ''}" for number in range(1000))
        name = next(name for name in names if not (self.folder / name).exists())
        if self._writes:
            self._of.checkpoint(step).rename(self.folder / name)
        self._say(f"{error}; {'kept as ' + name if self._writes else 'left there'}, the checkpoint before it is tried")

    def close(self) -> None:
        """Wait until everything is on disk. Raises CheckpointError if the last save failed."""
        try:
            self.settle()
        finally:
            self._thread.shutdown()
            if self._writer is not None:
                self._writer.close()
                self._writer = None


def _handler(say: Say) -> ocp.CompositeCheckpointHandler:
    arrays = (VerifyingHandler(say, use_compression=False) for _ in range(2))
    names = dict(zip(("trained", "optimizer"), arrays, strict=True))
    return ocp.CompositeCheckpointHandler(**names, data=VerifyingJson(), counters=VerifyingJson())


def _differences(there: Any, here: Any) -> list[str]:
    a, b = _leaves(there), _leaves(here)
    missing = [f"{name} is not there" for name in b if name not in a]
    more = [f"{name} is there alone" for name in a if name not in b]
    other = [f"{name} is {a[name]} there, {b[name]} here" for name in b if name in a and a[name] != b[name]]
    return other + missing + more


def _leaves(tree: Any) -> dict[str, str]:
    """Dtype and shape by path; tuples, lists and named tuples alike."""

    def name(key: Any) -> str:
        return str(next(getattr(key, kind) for kind in ("key", "idx", "name") if hasattr(key, kind)))

    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {"/".join(map(name, path)): f"{leaf.dtype} {list(leaf.shape)}" for path, leaf in leaves}
