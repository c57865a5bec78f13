"""The description of a run, config.json: settings, backbone, stop tokens; and which settings may change on resuming."""

import dataclasses
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from comi_jax.backbone import Backbone
from comi_jax.config import SYSTEMS, Config
from comi_jax.errors import ConfigError
from comi_jax.model.architecture import Architecture
from comi_jax.overrides import from_dict, override, to_dict
from comi_jax.params import flatten
from comi_jax.runs import checksums
from comi_jax.runs.checksums import CheckpointError
from comi_jax.runs.folder import Folder

FORMAT = 1
# Settings that may be overridden when a trained model is loaded.
CHANGEABLE = (
    "data.max_context", "data.max_query", "data.on_long", "data.buckets", "model.attention", "model.kernels",
    "model.dtype", "compression.rates", "compression.segment_size", "compression.coarse", "compression.fine",
    "beacon.window", "compression.exact_groups", "compression.coarse_redundancy", "compression.fine_redundancy",
    "generation.max_new_tokens", "generation.repetition_penalty", "generation.temperature", "generation.top_k",
    "generation.top_p", "generation.seed", "generation.stop_strings",
)  # fmt: skip
# Settings that may change when a run is resumed, as they do not affect the trained weights.
HARMLESS = (
    "train.output", "train.log_every", "train.eval_every", "train.checkpoint_every", "train.keep_checkpoints",
    "train.best_by", "train.max_skipped", "train.compare_mean_pooling", "mesh.", "data.eval", "data.eval_examples",
    "generation.", "model.attention", "model.kernels", "model.remat", "data.examples_per_source",
)  # fmt: skip


@dataclass(frozen=True)
class Run:
    """The content of a run's config.json."""

    config: Config
    backbone: Backbone
    stop: tuple[int, ...]
    imported: bool = False  # converted from other software: weights keep the dtypes they came in

    def __post_init__(self):
        self.config.compression.check(self.backbone)

    @property
    def architecture(self) -> Architecture:
        return Architecture.of(self.backbone, self.config)


def is_run(folder: str | os.PathLike) -> bool:
    """Whether config.json of ``folder`` describes a COMI run, as opposed to a language model."""
    try:
        return "format" in json.loads(Folder(folder).config.read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError):
        return False


def read_run(folder: str | os.PathLike) -> Run:
    """The description of the run in ``folder``. Raises CheckpointError if it holds none."""
    path = Folder(folder).config
    if not path.is_file():
        raise CheckpointError(f"{folder} is not a COMI checkpoint: it has no config.json")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if values.get("format") != FORMAT:
            form = values.get("format")
            newer = isinstance(form, int) and form > FORMAT
            advice = "; a later version of comi_jax wrote it: install that version" if newer else ""
            raise CheckpointError(
                f"{path} is not a COMI checkpoint of format {FORMAT} (its format is {form!r}){advice}"
            )
        config, backbone = from_dict(Config, values["config"]), from_dict(Backbone, values["backbone"], "backbone")
        return Run(config, backbone, tuple(values["stop"]), bool(values.get("imported", False)))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{path} does not describe a COMI checkpoint: {error}") from None


def check_folder(folder: str | os.PathLike, run: Run, allow_change: bool = False) -> list[str]:
    """Check that ``run`` can begin or resume in ``folder``. Returns the changed settings as "name old -> new", HARMLESS
    ones first.

    Raises CheckpointError if the folder holds files that belong to no run, or checkpoints of a run with other settings,
    unless these are HARMLESS or ``allow_change`` is set.
    """
    folder = Folder(folder)
    if not folder.config.is_file():
        path = folder.path
        # The files that a run leaves if it is killed at its start.
        ours = (folder.lock.name, folder.config_draft.name, f"{folder.examples.name}.")
        if path.exists() and not (path.is_dir() and all(p.name.startswith(ours) for p in path.iterdir())):
            raise CheckpointError(f"{folder} exists and is not a COMI run; choose another train.output")
        return []
    before = read_run(folder)
    if before.imported:
        raise CheckpointError(
            f"{folder} holds an imported model; to train it, set model.path={folder} and choose another train.output"
        )
    if not folder.has_begun():
        return []
    harmless, differences = _differences(before, run)
    if differences and not allow_change:
        raise CheckpointError(
            f"{folder} already holds another run, with {'; '.join(differences)}; choose another train.output, use the "
            "same settings to resume it, or --allow-config-change to resume it with the new ones"
        )
    return harmless + differences


def open_run(folder: str | os.PathLike, run: Run, tokenizer: Any, allow_change: bool = False) -> list[str]:
    """Write the description of ``run`` into ``folder``, or check the one there and record changed settings. Returns and
    raises as ``check_folder``."""
    folder = Folder(folder)
    changes = check_folder(folder, run, allow_change)
    if not folder.has_begun():
        write_run(folder, run, tokenizer)
    elif changes:
        values = json.loads(folder.config.read_text(encoding="utf-8"))
        after = max(folder.steps(), default=0)
        history = [*values.get("changes", []), {"after_step": after, "settings": changes}]
        _write_config(folder, run, changes=history)
    return changes


def write_run(folder: str | os.PathLike, run: Run, tokenizer: Any) -> None:
    """Write the description of ``run`` and its tokenizer into ``folder``."""
    folder = Folder(folder)
    try:
        folder.path.mkdir(parents=True, exist_ok=True)
        _write_config(folder, run)
        tokenizer.save_pretrained(folder.tokenizer)
        checksums.seal(folder.tokenizer)
    except OSError as error:
        raise CheckpointError(f"{folder} cannot be written: {error}") from None


def _write_config(folder: Folder, run: Run, **more: Any) -> None:
    values = {"format": FORMAT, "config": to_dict(run.config), "backbone": to_dict(run.backbone), "stop": run.stop}
    if run.imported:
        values["imported"] = True
    folder.config_draft.write_text(json.dumps(values | more, indent=2) + "\n", encoding="utf-8")
    os.replace(folder.config_draft, folder.config)


def _differences(old: Run, new: Run) -> tuple[list[str], list[str]]:
    """The changed settings: HARMLESS ones (train.output aside) and those of other systems, and the rest."""
    harmless, others = [], []
    for part in ("config", "backbone"):
        a, b = (flatten({part: to_dict(getattr(run, part))}) for run in (old, new))
        for path in sorted(set(a) | set(b)):
            name = path.replace("/", ".").removeprefix("config.")
            if a.get(path) != b.get(path) and name != "train.output":
                section = name.partition(".")[0]  # "beacon" has settings of that system alone
                fine = section in SYSTEMS and section != new.config.system == old.config.system
                fine |= any(name == h or h.endswith(".") and name.startswith(h) for h in HARMLESS)
                (harmless if fine else others).append(f"{name} {a.get(path)!r} -> {b.get(path)!r}")
    return harmless, others


def check_new(folder: str | os.PathLike) -> None:
    """Raises CheckpointError if ``folder`` exists and is not empty."""
    if Folder(folder).exists():
        raise CheckpointError(f"{folder} exists and is not empty; choose another --output")


def change(run: Run, overrides: Sequence[str]) -> Run:
    """``run`` with ``path=value`` overrides applied. Raises ConfigError for a setting that is not CHANGEABLE."""
    for word in overrides:
        if word.partition("=")[0] not in CHANGEABLE:
            raise ConfigError(f"{word} cannot be set for a trained model; these can: {', '.join(CHANGEABLE)}")
    return dataclasses.replace(run, config=override(run.config, overrides))
