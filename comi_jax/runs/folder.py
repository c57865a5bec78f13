"""The files of a run's folder, by name.

    config.json        resolved config, backbone and stop tokens; which settings were changed on the way, and when
    tokenizer/         as transformers saves it
    frozen/            weights that are not trained, by flat path
    checkpoints/N/     after step N: trained weights, optimizer state, position in the data, counters
    examples.*         the tokenised training examples (runs.examples)
    metrics.jsonl      the numbers of each logged step; tensorboard/ has them too, in a folder for each system
    evaluations.jsonl  evaluations on the held-out records during training; their answers are in evaluations/
    results.json       the closing table; its answers are in predictions*.jsonl
    evaluation/        what comi_jax.evaluate measured
    bad_batches/       batches whose loss or gradient was not finite when the run gave up
    lock               while a run is in the folder

There is no random state to keep: the key of a step is made of train.seed and the step's number. Every folder of weights
and the tokenizer's has a checksums.json; what was written before there were checksums is read all the same.
"""

import os
from dataclasses import dataclass
from pathlib import Path

DAMAGED = ".damaged"  # ends the name of a checkpoint that could not be read


@dataclass(frozen=True, init=False)
class Folder(os.PathLike):
    """The folder of a run at ``path``, which need not exist: where its files are, and which checkpoints it has."""

    path: Path

    def __init__(self, path: str | os.PathLike):
        object.__setattr__(self, "path", Path(path))

    def __fspath__(self) -> str:
        return str(self.path)

    def __str__(self) -> str:
        return str(self.path)

    def exists(self) -> bool:
        """Whether it holds anything."""
        return self.path.exists() and (not self.path.is_dir() or any(self.path.iterdir()))

    def of_system(self, title: str) -> "Folder":
        """The folder of the system ``title`` that is trained by the same run: COMI's is the run's own."""
        return self if title == "COMI" else Folder(self.path / title.replace("-", "_"))

    # --- what describes the run ---------------------------------------------------------------------------------------

    @property
    def config(self) -> Path:
        return self.path / "config.json"

    @property
    def config_draft(self) -> Path:
        return self.path / "config.json.draft"

    @property
    def tokenizer(self) -> Path:
        return self.path / "tokenizer"

    @property
    def lock(self) -> Path:
        return self.path / "lock"

    @property
    def examples(self) -> Path:
        """The beginning of the names of all files of examples."""
        return self.path / "examples"

    # --- weights ------------------------------------------------------------------------------------------------------

    @property
    def frozen(self) -> Path:
        return self.path / "frozen"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    def checkpoint(self, step: int) -> Path:
        return self.checkpoints / str(step)

    @property
    def official_unused(self) -> Path:
        """Tensors of an imported official file that nothing computes with."""
        return self.path / "official_unused.safetensors"

    def steps(self) -> list[int]:
        """The complete checkpoints, rising."""
        names = (path.name for path in self.checkpoints.iterdir()) if self.checkpoints.is_dir() else ()
        return sorted(int(name) for name in names if name.isdecimal())

    def has_begun(self) -> bool:
        """Whether there is a checkpoint, or was one that is damaged."""
        return bool(self.steps()) or any(self.checkpoints.glob(f"*{DAMAGED}*"))

    # --- what was measured --------------------------------------------------------------------------------------------

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    def tensorboard(self, title: str) -> Path:
        """Where the system ``title``, whose own folder this is, writes for TensorBoard, which names what it shows by
        its folder: all systems of a run stand side by side in the run's folder, each under its title."""
        run = self.path if title == "COMI" else self.path.parent
        return run / "tensorboard" / title

    @property
    def evaluations(self) -> Path:
        return self.path / "evaluations.jsonl"

    def evaluation_at(self, step: int) -> Path:
        """The answers of the evaluation after ``step``."""
        return self.path / "evaluations" / f"step_{step}.jsonl"

    @property
    def results(self) -> Path:
        return self.path / "results.json"

    @property
    def predictions(self) -> Path:
        return self.path / "predictions.jsonl"

    @property
    def closed_book_predictions(self) -> Path:
        return self.path / "predictions_closed_book.jsonl"

    @property
    def evaluation(self) -> Path:
        """The folder of what ``comi_jax.evaluate`` measures, unless it is told another."""
        return self.path / "evaluation"

    def bad_batch(self, step: int) -> Path:
        return self.path / "bad_batches" / f"step_{step}.npz"
