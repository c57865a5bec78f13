"""A run's folder: its config, tokenizer, frozen weights (written once) and checkpoints of what changes (Orbax).

config.json        resolved config, backbone and stop tokens; which settings were changed on the way, and when
tokenizer/         as transformers saves it
frozen/            weights that are not trained, by flat path
checkpoints/N/     after step N: trained weights, optimizer state, position in the data, counters
examples.*         the tokenised training examples (data.tokens)
metrics.jsonl      the numbers of each logged step, for TensorBoard in tensorboard/
evaluations.jsonl  what was measured on the held-out records on the way; the answers are in evaluations/
results.json       the closing table; its answers are in predictions*.jsonl
bad_batches/       batches whose loss or gradient was not finite when the run gave up
lock               while a run is in the folder

There is no random state to keep: the key of a step is made of train.seed and the step's number. Every folder of weights
and the tokenizer's has a checksums.json; what was written before there were checksums is read all the same.
"""

import contextlib
import dataclasses
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from comi_jax.config import Backbone, Config, ConfigError
from comi_jax.devices import sharding
from comi_jax.model.architecture import Architecture, frozen_dtype, is_trained, specs
from comi_jax.overrides import from_dict, override, to_dict
from comi_jax.params import Placement, as_stored, flatten, partition, unflatten
from comi_jax.runs import checkpoints, checksums, journal, lock
from comi_jax.runs.checkpoints import restore_arrays, stored
from comi_jax.runs.checksums import CheckpointError, DamageError

FORMAT = 1
# Settings that a trained model can be used with in another way than it was trained with.
CHANGEABLE = (
    "data.max_context", "data.max_query", "data.on_long", "data.buckets", "model.attention", "model.kernels",
    "model.dtype",
    "compression.rates", "compression.segment_size", "compression.coarse", "compression.fine",
    "compression.coarse_redundancy", "compression.fine_redundancy", "generation.max_new_tokens",
    "generation.repetition_penalty",
)  # fmt: skip
# Settings that a run may go on with in another way than it began with: they leave the trained weights as they are.
HARMLESS = (
    "train.output", "train.log_every", "train.eval_every", "train.checkpoint_every", "train.keep_checkpoints",
    "train.best_by", "train.max_skipped", "train.compare_mean_pooling", "mesh.", "data.eval", "data.eval_examples",
    "generation.", "model.attention", "model.kernels", "model.remat", "data.examples_per_source",
)  # fmt: skip
DRAFT = "config.json.draft"
EXAMPLES = "examples."  # what the names of the files of data.tokens begin with
BEFORE = "; with that folder removed, the checkpoint before it is used"


@dataclass(frozen=True)
class Run:
    """What config.json of a run's folder says."""

    config: Config
    backbone: Backbone
    stop: tuple[int, ...]
    imported: bool = False  # converted, not trained here: weights are stored in the dtypes they came in

    def __post_init__(self):
        self.config.compression.check(self.backbone)

    @property
    def architecture(self) -> Architecture:
        return Architecture.of(self.backbone, self.config)


def is_run(folder: str | Path) -> bool:
    """Whether ``folder`` has the description of a COMI run, as opposed to a language model's config.json."""
    try:
        return "format" in json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError):
        return False


def read_run(folder: str | Path) -> Run:
    """The description of the run in ``folder``. Raises CheckpointError if it holds none."""
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise CheckpointError(f"{folder} is not a COMI checkpoint: it has no config.json")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if values.get("format") != FORMAT:
            form = values.get("format")
            newer = isinstance(form, int) and form > FORMAT
            advice = "; a later version of comi_jax wrote it, install that" if newer else ""
            raise CheckpointError(
                f"{path} is not a COMI checkpoint of format {FORMAT} (its format is {form!r}){advice}"
            )
        config, backbone = from_dict(Config, values["config"]), from_dict(Backbone, values["backbone"], "backbone")
        return Run(config, backbone, tuple(values["stop"]), bool(values.get("imported", False)))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{path} does not describe a COMI checkpoint: {error}") from None


def check_folder(folder: str | Path, run: Run, allow_change: bool = False) -> list[str]:
    """Whether ``run`` can begin or go on in ``folder``; returns the settings with which it would go on otherwise than
    it began, "name old -> new", HARMLESS ones first.

    Raises CheckpointError if the folder holds files that belong to no run, or checkpoints of a run with other settings,
    unless they are HARMLESS or ``allow_change`` is given.
    """
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        ours = (lock.NAME, DRAFT, EXAMPLES)  # all that is left of a run that was killed as it began
        if folder.exists() and not (folder.is_dir() and all(p.name.startswith(ours) for p in folder.iterdir())):
            raise CheckpointError(f"{folder} exists and is not a COMI run; choose another train.output")
        return []
    before = read_run(folder)
    if before.imported:
        raise CheckpointError(
            f"{folder} holds an imported model; choose another train.output, and model.path={folder} to train it"
        )
    if not checkpoints.begun(folder / "checkpoints"):
        return []
    harmless, differences = _differences(before, run)
    if differences and not allow_change:
        raise CheckpointError(
            f"{folder} already holds another run, with {'; '.join(differences)}; choose another train.output, the same "
            "settings to go on with it, or --allow-config-change to go on with the new ones"
        )
    return harmless + differences


def open_run(folder: str | Path, run: Run, tokenizer: Any, allow_change: bool = False) -> list[str]:
    """Make ``folder`` the folder of ``run``, or check that it already is; returns and raises as ``check_folder``."""
    folder = Path(folder)
    changes = check_folder(folder, run, allow_change)
    if not checkpoints.begun(folder / "checkpoints"):
        write_run(folder, run, tokenizer)
    elif changes:
        values = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        after = max(checkpoints.steps_in(folder / "checkpoints"), default=0)
        history = [*values.get("changes", []), {"after_step": after, "settings": changes}]
        _write_config(folder, run, changes=history)
    return changes


def write_run(folder: str | Path, run: Run, tokenizer: Any) -> None:
    """The description of ``run`` and its tokenizer, as files in ``folder``."""
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _write_config(folder, run)
        tokenizer.save_pretrained(folder / "tokenizer")
        checksums.seal(folder / "tokenizer")
    except OSError as error:
        raise CheckpointError(f"{folder} cannot be written: {error}") from None


def _write_config(folder: Path, run: Run, **more: Any) -> None:
    values = {"format": FORMAT, "config": to_dict(run.config), "backbone": to_dict(run.backbone), "stop": run.stop}
    if run.imported:
        values["imported"] = True
    (folder / DRAFT).write_text(json.dumps(values | more, indent=2) + "\n", encoding="utf-8")
    os.replace(folder / DRAFT, folder / "config.json")


def _differences(old: Run, new: Run) -> tuple[list[str], list[str]]:
    """What differs: the HARMLESS settings, but for the place of the run, and the others."""
    harmless, others = [], []
    for part in ("config", "backbone"):
        a, b = (flatten({part: to_dict(getattr(run, part))}) for run in (old, new))
        for path in sorted(set(a) | set(b)):
            name = path.replace("/", ".").removeprefix("config.")
            if a.get(path) != b.get(path) and name != "train.output":
                fine = any(name == h or h.endswith(".") and name.startswith(h) for h in HARMLESS)
                (harmless if fine else others).append(f"{name} {a.get(path)!r} -> {b.get(path)!r}")
    return harmless, others


def save_import(folder: str | Path, run: Run, arrays: Mapping[str, jax.Array], tokenizer: Any) -> None:
    """Make ``folder``, which must be new, the folder of a model that was trained elsewhere or not yet: ``arrays`` by
    flat path, in their own dtypes, as a checkpoint after 0 updates."""
    check_new(folder)
    trained, frozen = partition(arrays, lambda path: is_trained(path, run.architecture))
    write_run(folder, run, tokenizer)
    save_frozen(folder, frozen)
    handler = ocp.CompositeCheckpointHandler(trained=checkpoints.frugal(trained))
    place = Path(folder) / "checkpoints" / "0"
    place.parent.mkdir()
    checkpoints.write_once(place, handler, ocp.args.Composite(trained=ocp.args.PyTreeSave(trained)))


def check_new(folder: str | Path) -> None:
    """Refuse a folder that holds anything."""
    if Path(folder).exists() and (not Path(folder).is_dir() or any(Path(folder).iterdir())):
        raise CheckpointError(f"{folder} exists and is not empty; choose another --output")


def save_frozen(folder: str | Path, frozen: dict[str, Any]) -> None:
    """Write the weights that are not trained; what an earlier start left of them is replaced."""
    place = Path(folder) / "frozen"
    if jax.process_index() == 0:
        for old in (place, place.with_name(place.name + checkpoints.WRITING)):
            if old.exists():
                shutil.rmtree(old)
    checkpoints.write_once(place, checkpoints.frugal(frozen), ocp.args.PyTreeSave(frozen))


def restore_frozen(
    folder: str | Path, like: dict[str, jax.ShapeDtypeStruct], say: checkpoints.Say
) -> dict[str, jax.Array]:
    """The weights of the run in ``folder`` that are not trained, verified, placed as ``like``."""
    place = Path(folder) / "frozen"
    if not place.is_dir():
        raise CheckpointError(f"{place} is missing, and the checkpoints of the run need it; put a copy back")
    if not checksums.verify(place):
        say(f"{place} was written before there were checksums: not verified")
        return restore_arrays(place, like)
    with checkpoints.intact(place):
        return restore_arrays(place, like)


def change(run: Run, overrides: Sequence[str]) -> Run:
    """``run`` with other settings, ``path=value``, than it was trained with. Raises ConfigError for one that is not
    among CHANGEABLE."""
    for word in overrides:
        if word.partition("=")[0] not in CHANGEABLE:
            raise ConfigError(f"{word} cannot be set for a trained model; what can is {', '.join(CHANGEABLE)}")
    return dataclasses.replace(run, config=override(run.config, overrides))


def load_params(
    folder: str | Path, overrides: Sequence[str] = (), step: int | None = None, mesh: jax.sharding.Mesh | None = None
) -> tuple[Run, dict[str, Any]]:
    """The run in ``folder``, its settings changed by ``overrides``, and all its weights after checkpoint ``step``
    (None: the newest), in the model's dtype, split over ``mesh`` (None: on one device).

    Raises CheckpointError if the folder holds no run or no such checkpoint, or if its files are damaged.
    """
    run = change(read_run(folder), overrides)
    arch = run.architecture
    homes = {} if mesh is None else sharding.parameters(specs(arch), mesh)
    return run, unflatten(load_flat(folder, arch, lambda path: (frozen_dtype(path, arch), homes.get(path)), step))


def load_flat(
    folder: str | Path, arch: Architecture, place: Placement = as_stored, step: int | None = None
) -> dict[str, jax.Array]:
    """All weights of the run in ``folder`` after checkpoint ``step`` (None: the newest), by flat path, in the dtypes
    and places that ``place`` gives (None: as stored, on the first device). Raises CheckpointError if there is no such
    checkpoint, or if its files are damaged: nothing is renamed or replaced here."""
    folder = Path(folder)
    step = existing(folder, step)
    place_of_trained = folder / "checkpoints" / str(step)
    sealed = True
    for part, advice in ((place_of_trained, BEFORE), (folder / "frozen", ""), (folder / "tokenizer", "")):
        try:
            sealed &= checksums.verify(part)
        except DamageError as error:
            raise DamageError(f"{error}{advice}") from None
    with checkpoints.intact(folder) if sealed else contextlib.nullcontext():
        return _load_flat(folder, step, arch, place)


def _load_flat(folder: Path, step: int, arch: Architecture, place: Placement) -> dict[str, jax.Array]:
    """``load_flat`` of files whose checksums, if there are any, are right."""
    place_of_trained = folder / "checkpoints" / str(step)
    trained, frozen = stored_arrays(folder, step)
    shapes = {path: spec.shape for path, spec in flatten(specs(arch)).items()}
    first = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])

    def abstract(path: str, stored: Any) -> jax.ShapeDtypeStruct:
        dtype, sharding = place(path)
        return jax.ShapeDtypeStruct(shapes[path], dtype or stored[path].dtype, sharding=sharding or first)

    with checkpoints.reading(folder):
        # By what is stored, not by what ``arch`` trains: a run may train another part of a model than made it.
        wanted = {path: abstract(path, trained) for path in shapes if path in trained}
        kept = {path: abstract(path, frozen) for path in shapes if path not in trained}
    with checkpoints.reading(place_of_trained, BEFORE):
        arrays = restore_arrays(place_of_trained / "trained", wanted)
    return arrays | restore_arrays(folder / "frozen", kept)


def newest(folder: str | Path) -> int | None:
    """The number of updates in the newest complete checkpoint of ``folder``, if it has one."""
    return (
        max(checkpoints.steps_in(Path(folder) / "checkpoints"), default=None)
        if (Path(folder) / "frozen").is_dir()
        else None
    )


def existing(folder: str | Path, step: int | None = None) -> int:
    """``step`` if ``folder`` has that checkpoint, for None the newest. Raises CheckpointError if it has none."""
    found = checkpoints.steps_in(Path(folder) / "checkpoints")
    if newest(folder) is None:
        raise CheckpointError(f"{folder} has no complete checkpoint yet")
    if step is not None and step not in found:
        raise CheckpointError(f"{folder} has no checkpoint of step {step}; it has {', '.join(map(str, found))}")
    return found[-1] if step is None else step


def choose_step(folder: str | Path, text: str) -> int:
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


def evaluations(folder: str | Path) -> list[dict[str, Any]]:
    """What was measured on the way, a line a step."""
    return journal.rows(Path(folder) / "evaluations.jsonl")


def best_step(folder: str | Path, metric: str) -> int | None:
    """The checkpoint in ``folder`` that ``best_of`` the evaluations of those that are there is."""
    there = checkpoints.steps_in(Path(folder) / "checkpoints")  # a save may have failed
    return best_of([row for row in evaluations(folder) if row["step"] in there], metric)


def best_of(rows: Sequence[Mapping[str, Any]], metric: str) -> int | None:
    """The step whose evaluation has the highest mean of ``metric``, the first of equals; of those that were measured
    as the newest was, on the same records."""
    alike = [[row.get(name) for name in ("records", "rate", "decoding")] for row in rows]
    measured = {
        row["step"]: row["metrics"][metric]["mean"] for row, how in zip(rows, alike, strict=True) if how == alike[-1]
    }
    return max(measured, key=lambda step: (measured[step], -step), default=None)


def weights_of(folder: str | Path, step: int) -> str:
    """A short name for the weights of checkpoint ``step``; empty if they were written without checksums."""
    parts = [checksums.identity(part) for part in (Path(folder) / "checkpoints" / str(step), Path(folder) / "frozen")]
    return "".join(parts) if all(parts) else ""


def stored_arrays(folder: str | Path, step: int) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    """What is on disk, by flat path, with shape and dtype: of checkpoint ``step``, and of the frozen weights."""
    place, frozen = Path(folder) / "checkpoints" / str(step), Path(folder) / "frozen"
    with checkpoints.reading(place, BEFORE):
        return stored(place / "trained"), stored(frozen)
