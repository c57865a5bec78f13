"""The systems of a comparison: trained ones from their runs' folders, and a language model with the untrained ones."""

import functools
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from comi_jax.config import Config
from comi_jax.data.records import Record
from comi_jax.errors import ConfigError
from comi_jax.evaluation.answerers import ComiAnswerer
from comi_jax.evaluation.comparison import Contender
from comi_jax.evaluation.comparison_ablations import OFF
from comi_jax.evaluation.systems import SYSTEMS, llmlingua2
from comi_jax.evaluation.systems.answerer import SystemAnswerer
from comi_jax.runs.description import read_run
from comi_jax.runs.selection import choose_step
from comi_jax.runs.stored_weights import weights_of
from comi_jax.serving.compressor import Comi
from comi_jax.serving.language_model import LanguageModel
from comi_jax.training.series import ABLATIONS, Member

TUNED = "_tuned"  # after the name of an untrained system whose decoder is that of a tuned full prompt
NO_TUNED = (
    "--tuned-decoder takes the decoder of the tuned full prompt; add full_prompt to --systems, or its run to "
    "--checkpoint"
)


def of_run(
    folder: str, batch_size: int, mesh: Any, member: Member | None = None, *, name: str = "", title: str = "",
    switches: Sequence[str] = (),
) -> Contender:  # fmt: skip
    """The system of the run in ``folder``, which is that of ``member``, or a given checkpoint. ``switches``: overrides
    of its settings, with ``name`` and ``title`` for the system that it is with them."""
    step, config = choose_step(folder, "newest"), read_run(folder).config
    weights = weights_of(folder, step)

    def answerer_at():
        model = Comi.load(folder, batch_size=batch_size, step=step, mesh=mesh, overrides=switches)
        return lambda rate: ComiAnswerer(model, weights, rate, step=step)

    name = name or (member.name if member else config.system)
    title = title or (member.title if member else config.title)
    rated, seed = config.system != "full_prompt", member.seed if member else None
    return Contender(name, title, answerer_at, rated, config.compression.rates, seed, str(folder))


def of_runs(places: Sequence[tuple[str, Member | None]], batch_size: int, mesh: Any, switches: bool) -> list[Contender]:
    """The systems of runs in folders; with ``switches``, then COMI's with each step of ABLATIONS switched off in use.
    Raises ConfigError if there is no COMI to switch them off."""
    found = [of_run(folder, batch_size, mesh, member) for folder, member in places]
    whole = [place for place, system in zip(places, found, strict=True) if switches and system.name == "comi"]
    if switches and not whole:
        raise ConfigError("there is no COMI to take a step from; add comi to --systems, or its run to --checkpoint")
    return found + [
        of_run(
            folder, batch_size, mesh, member, name=name + OFF, title=f"COMI, {variant.title}, switched off",
            switches=variant.settings,
        )
        for name, variant in ABLATIONS.items() for folder, member in whole
    ]  # fmt: skip


def tuned_decoders(places: Sequence[tuple[str, Member | None]]) -> list[tuple[str, int | None]]:
    """The folders and seeds of the tuned full prompts among the runs. Raises ConfigError if there is none."""
    found = [
        (str(f), member.seed if member else None) for f, member in places if read_run(f).config.system == "full_prompt"
    ]
    if not found:
        raise ConfigError(NO_TUNED)
    return found


def untrained(
    names: Sequence[str], config: Config, batch_size: int, mesh: Any, texts: Path,
    tuned: Sequence[tuple[str, int | None]] = (),
) -> list[Contender]:  # fmt: skip
    """The systems ``names`` of ``evaluation.systems``, with the language model of ``config`` as their decoder, then
    with the decoders of the runs ``tuned``, as (folder, seed). ``texts``: what LLMLingua-2 compressed before."""

    @functools.lru_cache(maxsize=1)
    def model(folder: str) -> LanguageModel:
        if folder:
            return LanguageModel.of_run(folder, batch_size=batch_size, mesh=mesh)
        return LanguageModel.open(config, batch_size=batch_size, mesh=mesh)

    def answerer(name: str, folder: str, rate: int | None) -> SystemAnswerer:
        system = SYSTEMS[name].system
        if name == "llmlingua2" and texts.is_file():
            system = llmlingua2.LLMLingua2.open(texts)
        return SystemAnswerer(name, system, model(folder), config.data, config.generation, rate)

    def open_(name: str, folder: str):
        return functools.partial(answerer, name, folder)

    def contender(name: str, folder: str = "", seed: int | None = None) -> Contender:
        title, system = SYSTEMS[name]
        opening, end = functools.partial(open_, name, folder), TUNED if folder else ""
        title += ", tuned decoder" if folder else ""
        return Contender(name + end, title, opening, system.needs_budget, seed=seed, folder=folder)

    found = [contender(name) for name in names]
    # The original prompt on a tuned decoder is the tuned full prompt itself.
    return found + [contender(name, *run) for name in names if name != "original" for run in tuned]


def compress_texts(asked: Contender, command: str, rates: Sequence[int], records: list[Record], texts: Path) -> None:
    """Have the program ``command``, PYTHON [MODEL], write the compressed texts that are missing in ``texts``."""
    for rate in rates:
        answerer = asked.open()(rate)
        assert isinstance(answerer, SystemAnswerer)
        questions, found = answerer.questions(records)[0], {}
        if texts.is_file():
            before = llmlingua2.LLMLingua2.open(texts)
            found = llmlingua2.read_texts(before.texts, before.content)
        wanted = llmlingua2.requests(questions, [answerer.budget(q) for q in questions], found)
        if wanted:
            python, *model = shlex.split(command)
            llmlingua2.run([python, str(llmlingua2.PROGRAM), *model], wanted, texts)


def check_checkpoints(folders: Sequence[str]) -> Config:
    """The config of the run in the first of ``folders``. Raises ConfigError for runs that do not belong into one
    table: of other language models or data, or twice of one system."""
    runs = [read_run(folder) for folder in folders]
    first = runs[0]
    for folder, run in zip(folders, runs, strict=True):
        if run.backbone != first.backbone or run.config.model.path != first.config.model.path:
            raise ConfigError(
                f"{folder} has another language model than {folders[0]}; compare them in different outputs"
            )
        for name in ("train", "fields", "synthetic_examples", "examples_per_source"):
            here, there = (getattr(each.config.data, name) for each in (run, first))
            if here != there:
                raise ConfigError(
                    f"{folder} was trained on other data than {folders[0]}: data.{name} is {here!r}, not {there!r}; "
                    "compare them in different outputs"
                )
        if [other.config.system for other in runs].count(run.config.system) > 1:
            raise ConfigError(
                f"{folder} is a second run of system={run.config.system}; compare one run of each, or train several "
                "seeds with --config=NAME --seeds=N"
            )
    return first.config
