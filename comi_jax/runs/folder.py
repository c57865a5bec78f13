"""The layout of a run's folder.

    config.json        resolved config, backbone and stop tokens; which settings changed on resuming, and when
    tokenizer/         as transformers saves it
    frozen/            weights that are not trained, by flat path
    checkpoints/N/     after step N: trained weights, optimizer state, data position, counters
    examples.*         the tokenised training examples (runs.examples)
    metrics.jsonl      the metrics of each logged step; tensorboard/ has them too, in one folder per system
    evaluations.jsonl  evaluations on the held-out records during training, with predictions in evaluations/
    results.json       the closing table, with predictions in predictions*.jsonl
    evaluation/        results of comi_jax.evaluate
    calibration/       what comi_jax.calibrate has found for a checkpoint, with the predictions
    diagnostics/       tables and pictures of comi_jax.diagnose
    bad_batches/       the last batch of a run that stopped on non-finite steps
    lock               present while a run uses the folder

No random state is stored: the key of a step is derived from train.seed and the step's number. Folders of weights and
the tokenizer's have a checksums.json; folders of older versions have none and are read unverified. The digests.N.json
beside arrays are what a save is compared with before it counts (runs.readback).
"""

import os
from dataclasses import dataclass
from pathlib import Path

DAMAGED = ".damaged"  # suffix of a checkpoint that could not be read


@dataclass(frozen=True, init=False)
class Folder(os.PathLike):
    """The folder of a run at ``path``, which need not exist and may begin with ~: the paths of its files, and its
    checkpoints."""

    path: Path

    def __init__(self, path: str | os.PathLike):
        object.__setattr__(self, "path", Path(os.path.expanduser(path)))

    def __fspath__(self) -> str:
        return str(self.path)

    def __str__(self) -> str:
        return str(self.path)

    def exists(self) -> bool:
        """Whether the path exists, other than as an empty folder."""
        return self.path.exists() and (not self.path.is_dir() or any(self.path.iterdir()))

    def of_system(self, title: str) -> "Folder":
        """The folder of the run's system ``title``: a subfolder for mean-pooling beside the run's own system, for that
        one the run's folder."""
        return Folder(self.path / "mean_pooling") if title == "mean-pooling" else self

    # --- description --------------------------------------------------------------------------------------------------

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
        """The path prefix of the files of examples."""
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
        """Tensors of an imported official file that the model does not use."""
        return self.path / "official_unused.safetensors"

    def steps(self) -> list[int]:
        """The steps of the complete checkpoints, ascending."""
        names = (path.name for path in self.checkpoints.iterdir()) if self.checkpoints.is_dir() else ()
        return sorted(int(name) for name in names if name.isdecimal())

    def has_begun(self) -> bool:
        """Whether there is a checkpoint, damaged or not."""
        return bool(self.steps()) or any(self.checkpoints.glob(f"*{DAMAGED}*"))

    # --- measurements -------------------------------------------------------------------------------------------------

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    def tensorboard(self, title: str) -> Path:
        """The TensorBoard folder of the system ``title``, whose folder this is. TensorBoard names curves by folder, so
        those of all systems are side by side in the run's folder, named by title."""
        run = self.path.parent if title == "mean-pooling" else self.path
        return run / "tensorboard" / title

    @property
    def evaluations(self) -> Path:
        return self.path / "evaluations.jsonl"

    def evaluation_at(self, step: int) -> Path:
        """The predictions of the evaluation after ``step``."""
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
        """The default output folder of ``comi_jax.evaluate``."""
        return self.path / "evaluation"

    @property
    def explanations(self) -> Path:
        """The pages of ``comi_jax.evaluate --explain-worst``."""
        return self.path / "explanations"

    @property
    def diagnostics(self) -> Path:
        """The default output folder of ``comi_jax.diagnose``."""
        return self.path / "diagnostics"

    @property
    def calibrations(self) -> Path:
        return self.path / "calibration"

    def calibration(self, step: int) -> Path:
        """The calibration of rate="auto" for the checkpoint of ``step``."""
        return self.calibrations / f"step_{step}.json"

    def bad_batch(self, step: int) -> Path:
        return self.path / "bad_batches" / f"step_{step}.npz"
