"""Train a compressor: ``python -m comi_jax.train --config=NAME [path=value ...]``.

The update itself is in ``step``. The order of a run: settings, data, weights, folder, loop, closing table. The same
command goes on where it stopped.
"""

import argparse
import dataclasses
import sys
import time
from pathlib import Path
from typing import Any

import jax
from jaxtyping import Array
from rich.console import Console

from comi_jax import comi, distributed, evaluate, hf, optim, sharding, weights
from comi_jax.answer import Comi
from comi_jax.checkpoint import (
    CheckpointError,
    Checkpoints,
    Run,
    check_folder,
    frozen_dtype,
    is_run,
    load_flat,
    load_params,
    open_run,
    read_run,
    save_frozen,
)
from comi_jax.config import Backbone, Config, ConfigError, load, to_dict
from comi_jax.data import loader, synthetic
from comi_jax.data.records import DataError, Record, read_records
from comi_jax.logs import RunLog
from comi_jax.params import count, flatten
from comi_jax.state import create, own_parameters
from comi_jax.step import CompiledStep, TrainState

# --- what a run starts from -------------------------------------------------------------------------------------------


def backbone_folder(config: Config) -> Path:
    """The folder of the pretrained language model, or ConfigError saying what to download."""
    if config.model.path == "tiny":
        return Path(__file__).parent / "tiny_lm"
    if not config.model.path or not (Path(config.model.path) / "config.json").is_file():
        what = f"{config.model.path} is not one" if config.model.path else "model.path is not set"
        name = config.model.hub or "a LLaMA-2, LLaMA-3, Qwen2 or Qwen3 model"
        fetch = f": hf download {name} --local-dir=DIR" if config.model.hub else ""
        raise ConfigError(
            f"config {config.name!r} starts from the folder of a pretrained language model and {what}; download "
            f"{name}{fetch}, then pass model.path=DIR"
        )
    return Path(config.model.path)


def starting_backbone(folder: Path) -> Backbone:
    """The backbone of the language model, or of the COMI checkpoint, in ``folder``."""
    return read_run(folder).backbone if is_run(folder) else hf.read_config(folder)


def starting_point(config: Config, folder: Path) -> tuple[Backbone, Any, tuple[int, ...]]:
    """Backbone, tokenizer and stop tokens of the language model, or of the COMI checkpoint, in ``folder``."""
    if is_run(folder):
        start = read_run(folder)
        check_same_parts(start, config, folder)
        backbone, words, known = start.backbone, folder / "tokenizer", start.stop
    else:
        backbone, words, known = hf.read_config(folder), folder, hf.stop_tokens(folder)
    tokenizer = hf.load_tokenizer(config.model.tokenizer or words)
    if len(tokenizer) > backbone.vocab_size:
        raise ConfigError(f"the tokenizer has {len(tokenizer)} tokens, the model only {backbone.vocab_size}")
    stop = {tokenizer.eos_token_id} | set(() if config.model.tokenizer else known)
    return backbone, tokenizer, tuple(sorted(stop))


def check_same_parts(start: Run, config: Config, folder: Path) -> None:
    """Refuse to start from a COMI checkpoint whose parts or scalars are not those that ``config`` asks for."""
    names = ["compression.encoder_layers", "compression.lsa_layers", "lora.rank", "lora.alpha", "lora.targets"]
    names += [f"compression.{name}" for name in comi.SCALARS]  # the checkpoint's are the ones that are used
    there, here = (flatten(to_dict(c)) for c in (start.config, config))
    other = [name for name in names if there[name.replace(".", "/")] != here[name.replace(".", "/")]]
    if not start.config.lora.rank and not config.lora.rank:
        other = [name for name in other if not name.startswith("lora.")]
    if other:
        values = (there[name.replace(".", "/")] for name in other)
        texts = (",".join(map(str, value)) if isinstance(value, list) else value for value in values)
        words = (f"{name}={text}" for name, text in zip(other, texts, strict=True))
        raise ConfigError(f"the COMI checkpoint in {folder} has other parts than this run; pass {' '.join(words)}")


def read_data(names: tuple[str, ...], split: str, config: Config, console: Console) -> list[Record]:
    """The records of JSON Lines files, or generated ones for the name "synthetic"."""
    if names == ("synthetic",):
        setting = "synthetic_examples" if split == "train" else "eval_examples"
        made = getattr(config.data, setting)
        if made < 1:
            raise ConfigError(f'data.{setting} is {made}; it says how many records "synthetic" makes')
        return synthetic.records(split, made, seed=config.train.seed)
    records, report = read_records(names, skip_bad=config.data.skip_bad_records)
    if report.skipped:
        lines = [f"left out {len(report.skipped)} bad records:", *map(str, report.skipped)]
        console.print("\n  ".join(lines), highlight=False, markup=False)
    return records if split == "train" or not config.data.eval_examples else records[: config.data.eval_examples]


def initial_params(run: Run, folder: Path, mesh: jax.sharding.Mesh) -> dict[str, Array]:
    """A model to start from, by flat path and on its devices: from the COMI checkpoint in ``folder``, or fresh around
    the language model in it, with adapters, if any, at random."""
    arch = run.architecture
    placed = sharding.parameters(comi.specs(arch), mesh)

    def place(path: str) -> tuple[str, Any]:
        return ("float32" if comi.is_trained(path, arch) else frozen_dtype(path, arch)), placed[path]

    if is_run(folder):
        return load_flat(folder, arch, place)
    params = hf.load_parts(folder, run.backbone, comi.parts_of_backbone(arch), place)
    return params | own_parameters(arch, run.config.train.seed, mesh)


# --- the loop ---------------------------------------------------------------------------------------------------------


def plan(run: Run, examples: list[loader.Example]) -> tuple[jax.sharding.Mesh, loader.Shapes]:
    """Devices and batch shapes of a run; refuses what cannot work, before anything is written."""
    config = run.config
    mesh = sharding.make_mesh(config.mesh)
    sharding.check_heads(run.backbone, mesh)
    sharding.micro_batches(config, mesh)
    loader.check_positions(examples, run.backbone, config.compression, min(config.compression.rates))
    return mesh, loader.Shapes.of(examples, config.data, config.compression)


def fit(run: Run, output: Path, params: dict[str, Array], examples: list[loader.Example], title: str, console: Console):
    """Train ``params`` until the run's last step, from its newest checkpoint if it has one; leaves a checkpoint."""
    config, settings = run.config, run.config.train
    mesh, shapes = plan(run, examples)
    update = optim.optimizer(config.optimizer, settings.steps)
    arch = run.architecture.on(mesh)
    state, frozen = create(params, arch, update, mesh)
    batches = loader.training_batches(
        examples, shapes, config.compression.rates, settings.batch_size, settings.seed, settings.share_context
    )
    checkpoints = Checkpoints(output, settings.keep_checkpoints)
    done = checkpoints.latest() or 0
    if done:
        state, position = checkpoints.restore(done, state)
        batches.set_state(position)
        console.print(f"{title}: going on from step {done} of {settings.steps} in {output}")
    else:
        save_frozen(output, frozen)
    describe(state, frozen, config, shapes, title, console)
    step_fn = CompiledStep(arch, update, sharding.micro_batches(config, mesh))
    key, rate = jax.random.key(settings.seed), optim.schedule(config.optimizer, settings.steps)
    meter = Meter()
    log_class = RunLog if distributed.is_first() else SilentLog
    with log_class(output, title, settings.steps, done, console) as log:
        for step in range(done + 1, settings.steps + 1):
            batch = next(batches)
            state, metrics = step_fn(state, frozen, sharding.put_batch(batch, mesh), key)
            # Numbers are read one step late, so that the device never waits for the host.
            before = meter.add(step, metrics, batch)
            if before and before % settings.log_every == 0:
                log.write(before, meter.read(float(rate(before - 1))))
            log.advance(step)
            if step == settings.steps or (settings.checkpoint_every and step % settings.checkpoint_every == 0):
                checkpoints.save(step, state, batches.get_state())
        if done < settings.steps:
            meter.add(settings.steps + 1, {}, None)
            log.write(settings.steps, meter.read(float(rate(settings.steps - 1))))
    checkpoints.close()


class SilentLog:
    """In place of RunLog where another process writes it."""

    def __init__(self, *_: Any):
        pass

    def __enter__(self) -> "SilentLog":
        return self

    def __exit__(self, *_: Any) -> None:
        pass

    def advance(self, step: int) -> None:
        pass

    def write(self, step: int, values: dict[str, float]) -> None:
        pass


class Meter:
    """Numbers of the step before the newest dispatched one, with the tokens a second since the last reading."""

    def __init__(self):
        self._newest: tuple[int, dict[str, Array], int] = (0, {}, 0)
        self._ready: dict[str, Array] = {}
        self._tokens, self._since = 0, 0.0

    def add(self, step: int, metrics: dict[str, Array], batch: comi.Batch | None) -> int:
        """Take in a dispatched step (or the end, None); returns the number of the step before it, 0 at first."""
        before, self._ready, tokens = self._newest
        if not before:  # the first step compiles, which is not counted
            jax.block_until_ready(metrics)
            self._since = time.perf_counter()
        self._tokens += tokens
        lengths = (batch.context_length, batch.query_length, batch.answer_length) if batch and before else ()
        self._newest = (step, metrics, sum(int(x.sum()) for x in lengths))
        return before

    def read(self, learning_rate: float) -> dict[str, float]:
        """The numbers of the step that ``add`` returned."""
        values = {name: float(value) for name, value in self._ready.items()}
        now = time.perf_counter()
        values["learning_rate"] = learning_rate
        values["tokens_per_second"] = self._tokens / (now - self._since)
        self._tokens, self._since = 0, now
        return values


def describe(
    state: TrainState, frozen: Any, config: Config, shapes: loader.Shapes, title: str, console: Console
) -> None:
    """Print the numbers that matter before the first step."""
    parts: dict[str, int] = {}
    for path, leaf in {**state.trained, **frozen}.items():
        parts[path.split("/")[0]] = parts.get(path.split("/")[0], 0) + leaf.size
    by_part = ", ".join(f"{part} {size:,}" for part, size in parts.items() if part != "mig")
    row = f"{shapes.buckets[-1]} + {shapes.query} + {shapes.answer}"
    console.print(
        f"{title}: {sum(parts.values()):,} parameters ({by_part}), {count(state.trained):,} trained on "
        f"{jax.device_count()} {jax.default_backend()} device(s); {config.train.steps} steps of "
        f"{config.train.batch_size} examples, rates {', '.join(map(str, config.compression.rates))}, "
        f"rows up to {row} tokens "
        "(segment + query + answer)",
        highlight=False,
    )


# --- the command ------------------------------------------------------------------------------------------------------


def run(config: Config, console: Console) -> None:
    """All of one training run: data, weights, loop, closing table. Raises the errors that ``main`` reports."""
    if not config.data.train:
        raise ConfigError(
            "data.train is not set; pass data.train=FILE.jsonl (several separated by commas, .gz allowed)"
        )
    folder, output = backbone_folder(config), Path(config.train.output or f"runs/{config.name}")
    backbone, tokenizer, stop = starting_point(config, folder)
    records = read_data(config.data.train, "train", config, console)
    examples, report = loader.encode(records, tokenizer, config.data)
    console.print(f"training data: {report}", highlight=False)
    held_out = read_data(config.data.eval, "eval", config, console) if config.data.eval else []
    check_held_out(held_out, tokenizer, config, backbone)
    variants = {"COMI": (config, output)}
    if config.train.compare_mean_pooling:
        plain = dataclasses.replace(config.compression, coarse=False, fine=False)
        variants["mean-pooling"] = (dataclasses.replace(config, compression=plain), output / "mean_pooling")
    runs = {title: Run(settings, backbone, stop) for title, (settings, _) in variants.items()}
    for title, (_, place) in variants.items():
        mesh, _ = plan(runs[title], examples)
        check_folder(place, runs[title])
    for title, (_, place) in variants.items():
        params = initial_params(runs[title], folder, mesh)
        distributed.meet(f"{title} is checked")
        if distributed.is_first():
            open_run(place, runs[title], tokenizer)
        distributed.meet(f"{title} is open")
        fit(runs[title], place, params, examples, title, console)
        console.print(f"{title}: checkpoint in {place}", highlight=False)
    if held_out:
        closing_table({title: place for title, (_, place) in variants.items()}, held_out, output, console)


def check_held_out(records: list[Record], tokenizer: Any, config: Config, backbone: Backbone) -> None:
    """Refuse before the training what the closing table could not answer after it."""
    try:
        examples, _ = loader.encode(records, tokenizer, config.data, targets=False)
        rate, new_tokens = config.compression.rates[0], config.generation.max_new_tokens
        loader.check_positions(examples, backbone, config.compression, rate, new_tokens)
    except loader.LengthError as error:
        raise loader.LengthError(f"data.eval: {error}") from None


def closing_table(places: dict[str, Path], records: list[Record], output: Path, console: Console) -> None:
    """Evaluate every variant, and COMI's decoder without any context, on the held-out records; print and save the
    table."""
    rows = {}
    for title, place in places.items():
        loaded = load_params(place)  # by all: Orbax waits for every process
        if not distributed.is_first():
            continue
        model = Comi(*loaded, hf.load_tokenizer(place / "tokenizer"))
        rows[title] = evaluate.evaluate(model, records, place / "predictions.jsonl", console=console)
        if title == "COMI":
            path = output / "predictions_closed_book.jsonl"
            closed = evaluate.evaluate(model, records, path, closed_book=True, console=console)
    if distributed.is_first():
        evaluate.save_table({**rows, "closed book": closed}, output / "results.json")
        evaluate.print_table({**rows, "closed book": closed}, console)
    distributed.meet("the table is written")


def main(arguments: list[str] | None = None) -> None:
    """Parse the command line, run, and turn what a user can mend into one sentence and exit status 1."""
    parser = argparse.ArgumentParser(prog="python -m comi_jax.train", description="Train a COMI compressor.")
    parser.add_argument("--config", required=True, help="a name from comi_jax/configs: tiny, qwen2, llama2, qwen3")
    parser.add_argument("--skip-bad-records", action="store_true", help="leave out bad data lines, counted and listed")
    parser.add_argument("overrides", nargs="*", metavar="path=value", help="settings, e.g. train.steps=100")
    options = parser.parse_intermixed_args(arguments)
    overrides = options.overrides + ["data.skip_bad_records=true"] * options.skip_bad_records
    try:
        distributed.start()
        # Paths and data may hold brackets; what all processes know is said once.
        console = Console(soft_wrap=True, markup=False, quiet=not distributed.is_first())
        run(load(options.config, overrides), console)
    except jax.errors.JaxRuntimeError as error:
        sys.exit(f"error: {distributed.failed(error)}")
    except (ConfigError, DataError, loader.LengthError, CheckpointError, weights.WeightsError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
