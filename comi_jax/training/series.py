"""The training runs of a comparison: every system with every seed, in a folder of its own.

Each is the run that ``python -m comi_jax.train`` with the same settings makes, without its closing table: the
comparison answers its own questions. One that reached its last step is taken over, one that was stopped or killed is
resumed.
"""

import dataclasses
import shlex
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
from rich.console import Console

from comi_jax import config
from comi_jax.config import Config
from comi_jax.data.encode import LengthError, check_positions
from comi_jax.errors import ConfigError
from comi_jax.overrides import load, override
from comi_jax.runs.description import Run, check_folder, is_run, read_run
from comi_jax.runs.folder import Folder
from comi_jax.runs.selection import newest
from comi_jax.training.dataset import read_examples
from comi_jax.training.run import check, devices, run
from comi_jax.weights.starting_model import StartingModel


class Variant(NamedTuple):
    """A row of the table of trained systems: its title, and the settings that make it of the base config."""

    title: str
    settings: tuple[str, ...] = ()


SYSTEMS = {
    "comi": Variant("COMI"),
    "mean_pooling": Variant("mean-pooling", ("compression.coarse=false", "compression.fine=false")),
    **{name: Variant(title, (f"system={name}",)) for name, title in config.SYSTEMS.items() if name != "comi"},
}
# COMI's steps switched off, as in the paper's table 2: trained without them, or without them on one checkpoint.
ABLATIONS = {
    "without_coarse": Variant("without coarse", ("compression.coarse=false",)),
    "without_fine": Variant("without fine", ("compression.fine=false",)),
    "without_coarse_redundancy": Variant("without coarse redundancy", ("compression.coarse_redundancy=false",)),
    "without_fine_redundancy": Variant("without fine redundancy", ("compression.fine_redundancy=false",)),
    "relevance_only": Variant(
        "relevance only", ("compression.coarse_redundancy=false", "compression.fine_redundancy=false")
    ),
}
# The scalars are parameters of a checkpoint, so these can only be trained.
ALPHAS = {
    "alpha_fine_1": Variant("alpha_fine 1", ("compression.alpha_fine=1",)),
    "alpha_fine_4": Variant("alpha_fine 4", ("compression.alpha_fine=4",)),
    "alpha_learned": Variant("alphas and betas learned", ("compression.learn_mig=true",)),
}
TRAINED = SYSTEMS | ABLATIONS | ALPHAS
OWN = {  # settings that the comparison gives to its runs, and what to pass instead
    "system": "--systems",
    "train.output": "--output",
    "train.compare_mean_pooling": "--systems=mean_pooling",
}
SAVES = 4  # checkpoints of a run whose config has none before its end: a killed run loses a quarter at most


@dataclasses.dataclass(frozen=True)
class Member:
    """One training run of a comparison."""

    name: str  # of TRAINED
    config: Config
    words: tuple[str, ...]  # the settings of ``config``, as words of comi_jax.train

    @property
    def title(self) -> str:
        return TRAINED[self.name].title

    @property
    def seed(self) -> int:
        return self.config.train.seed

    @property
    def folder(self) -> Folder:
        return Folder(self.config.train.output)

    @property
    def command(self) -> str:
        return shlex.join(["python", "-m", "comi_jax.train", f"--config={self.config.name}", *self.words])

    @property
    def finished(self) -> bool:
        return newest(self.folder) == self.config.train.steps


def members(
    name: str, overrides: Sequence[str], systems: Sequence[str], seeds: int, output: Folder, earlier: str = ""
) -> list[Member]:
    """The runs of ``systems`` (of TRAINED), each with ``seeds`` seeds from train.seed on, with the config ``name`` and
    ``overrides``. Systems with equal settings share a run. With the output of an ``earlier`` comparison, each goes on
    from its own run there. Raises ConfigError for settings that a system cannot have, or that are the comparison's own,
    and for a run that is not there."""
    own = OWN | ({"model.path": "--start-from"} if earlier else {})
    for word in overrides:
        if (path := word.partition("=")[0]) in own:
            raise ConfigError(f"{word}: a comparison sets {path} itself; leave it out and pass {own[path]}")
    base = load(name, overrides)
    found: list[Member] = []
    for system in systems:
        for seed in range(base.train.seed, base.train.seed + seeds):
            words = [*overrides, *TRAINED[system].settings, f"train.seed={seed}", "train.compare_mean_pooling=false"]
            if not base.train.checkpoint_every:
                words.append(f"train.checkpoint_every={max(base.train.steps // SAVES, 1)}")
            made = override(base, words)
            same = next((m for m in found if _settings(m.config) == _settings(made)), None)
            if earlier:
                words.append(f"model.path={same.config.model.path if same else _finished(earlier, system, seed)}")
            place = same.folder if same else _place(output, system, seed)
            words.append(f"train.output={place}")
            found.append(Member(system, override(base, words), tuple(words)))
    return found


def _place(output: Folder, system: str, seed: int) -> Folder:
    return Folder(output.path / "runs" / f"{system}_seed{seed}")


def _finished(earlier: str, system: str, seed: int) -> Folder:
    """The run of ``system`` with ``seed`` in the output of an ``earlier`` comparison. Raises ConfigError if it has
    none, or one that is not at its end."""
    place = _place(Folder(earlier), system, seed)
    if not is_run(place) or newest(place) != read_run(place).config.train.steps:
        raise ConfigError(
            f"{TRAINED[system].title}, seed {seed}, would start from {place}, which is no finished run; train it "
            f"first, with the command that made {earlier} and --systems={system}"
        )
    return place


def language_model(earlier: str) -> str:
    """The model.path that the runs of an ``earlier`` comparison started from. Raises ConfigError if it has no runs."""
    places = [place for place in sorted(Folder(earlier).path.glob("runs/*")) if is_run(place)]
    if not places:
        raise ConfigError(f"{earlier} has no runs; pass --start-from the output of a comparison with --config=NAME")
    return read_run(places[0]).config.model.path


def check_lengths(runs: Sequence[Member]) -> None:
    """Raises LengthError for a training context that a system of ``runs`` cannot take; all of one seed read the same
    examples, which are tokenised for it once more."""
    of_seeds: dict[int, Any] = {}
    with tempfile.TemporaryDirectory(prefix="comi_jax-") as scratch:
        for member in runs:
            own, start = member.config, StartingModel.open(member.config)
            if member.seed not in of_seeds:
                place = Path(scratch) / str(member.seed)
                of_seeds[member.seed] = read_examples(own, start.tokenizer, member.folder, Console(quiet=True), place)
            try:
                check_positions(of_seeds[member.seed], start.backbone, own, min(own.compression.rates))
            except LengthError as error:
                raise LengthError(f"{member.title}: {error}") from None


def _settings(own: Config) -> Config:
    """``own`` without its folder, and without the model that it starts from."""
    train, model = dataclasses.replace(own.train, output=""), dataclasses.replace(own.model, path="")
    return dataclasses.replace(own, train=train, model=model)


def train(runs: Sequence[Member], console: Console) -> bool:
    """Train ``runs`` that are not finished, one after the other. False if a signal stopped one, after saving. All are
    validated before the first one is trained. Raises UserError."""
    for member in runs:
        check(member.config)
        start = StartingModel.open(member.config)
        start.check()
        own = Run(member.config, start.backbone, start.stop)
        devices(own)
        check_folder(member.folder, own)
    left = list({str(m.folder): m for m in runs if not m.finished}.values())
    check_lengths(left)
    for member in {str(m.folder): m for m in runs if m.finished}.values():
        console.print(f"{member.title}, seed {member.seed}: trained already, in {member.folder}", highlight=False)
    for number, member in enumerate(left, start=1):
        begun = time.monotonic()
        console.print(f"training {number} of {len(left)}: {member.title}, seed {member.seed}", highlight=False)
        console.print(f"  {member.command}", highlight=False)
        if not run(member.config, console, evaluate=False):
            return False
        minutes = (time.monotonic() - begun) / 60
        console.print(f"{member.title}, seed {member.seed}: trained in {minutes:.1f} minutes", highlight=False)
        jax.clear_caches()  # the programs of one run are of no use to the next, which has other settings
    return True
