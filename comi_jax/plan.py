"""Plan a run without its hardware: ``python -m comi_jax.plan --config=qwen2 --topology=v5e:8x8``."""

import dataclasses
import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from comi_jax import cli
from comi_jax.config import Config
from comi_jax.devices import topology
from comi_jax.devices.chips import Chip
from comi_jax.errors import ConfigError
from comi_jax.model.architecture import Stage
from comi_jax.overrides import load
from comi_jax.planning import serving_counts, sweep
from comi_jax.planning.programs import Program, backbone_of, serving, train_step
from comi_jax.planning.serving_counts import BATCHES, Way

EXAMPLES = 100_000  # the size of the paper's training set


def gigabytes(size: float | int) -> str:
    return f"{size / 1e9:,.2f} GB"


def table(program: Program, where: topology.Topology, config: Config) -> Table:
    """Memory, work and time of ``program``; memory alone if it does not fit."""
    rows = Table("per device", "", show_edge=False)
    for kind, size in program.memory.items():
        if size:
            rows.add_row(kind, gigabytes(size))
    if not program.seconds:
        return rows
    rows.add_section()
    rows.add_row("operations, compiled", f"{program.flops / 1e12:,.1f} TFLOP")
    rows.add_row("operations of the model", f"{program.own_flops / 1e12:,.1f} TFLOP")
    rows.add_row("compiled / model (rematerialisation, waste)", f"{program.waste:.2f}")
    rows.add_row("attention", ", ".join(program.kernels) or "no fused kernel")
    for kind, size in sorted(program.sent.items()):
        rows.add_row(f"sent by {kind}", gigabytes(size))
    rows.add_section()
    least = program.seconds[program.bound]
    for name, seconds in program.seconds.items():
        limits = " (bottleneck)" if name == program.bound else ""
        rows.add_row(f"seconds of {name}, at least", f"{seconds:,.4f}{limits}")
    if program.name == "train step":
        each = least / config.train.batch_size
        rows.add_row("context tokens a second, at most", f"{config.data.max_context / each:,.0f}")
        rows.add_row(f"days for {EXAMPLES:,} examples, at least", f"{EXAMPLES * each / 86_400:.2f}")
    rows.add_row("model FLOP utilisation, at most", f"{program.own_flops / where.chip.flops / least:.0%}")
    rows.add_row("seconds to compile", f"{program.compile_seconds:.0f}")
    return rows


def show(programs: list[Program], where: topology.Topology, config: Config, console: Console) -> None:
    """Print a verdict and a table for each program."""
    for program in programs:
        verdict = "fits" if program.fits else "DOES NOT FIT"
        share = f"{gigabytes(program.bytes_needed)} of {gigabytes(program.bytes_there)}"
        console.print(
            f"{program.name} on {where.name} ({program.division}): {verdict}, {share}", highlight=False, soft_wrap=True
        )
        if program.refusal:
            console.print(program.refusal, markup=False, highlight=False, soft_wrap=True)
        console.print(table(program, where, config))


def counted(ways: list[Way], chip: Chip, config: Config) -> Table:
    """What each way to answer questions about one text takes at least, on one chip."""
    data, single, many = config.data, *BATCHES
    rows = Table(
        "", "first question to first token: TFLOP", "ms", "further question: TFLOP", "ms",
        f"ms a token, batch {single}", f"batch {many}", "kept", show_edge=False,
        title=f"Questions of {data.max_query} tokens about {data.max_context:,}, counted, at least, on one {chip.name}",
    )  # fmt: skip
    for way in ways:
        passes = (_digits(x) for p in (way.first, way.further) for x in (p.flop / 1e12, 1000 * p.seconds(chip)))
        tokens = (_digits(1000 * way.token[batch].seconds(chip)) for batch in BATCHES)
        rows.add_row(way.name, *passes, *tokens, f"{way.kept / 1e6:,.1f} MB" if way.kept else "-")
    return rows


def _digits(value: float) -> str:
    """At least two digits of ``value``, however small."""
    return f"{value:,.2f}" if value >= 0.1 else f"{value:.2g}"


def to_json(programs: list[Program], where: topology.Topology, config: Config) -> dict[str, Any]:
    """Everything that ``show`` prints, with the mesh and the settings it was planned for."""
    rows = [dataclasses.asdict(p) | {"waste": p.waste, "bound": p.bound if p.seconds else None} for p in programs]
    mesh = dataclasses.asdict(config.mesh) | {"accumulate": config.optimizer.accumulate, "remat": config.model.remat}
    return {"config": config.name, "topology": where.name, "devices": len(where.devices), **mesh, "programs": rows}


def main(arguments: list[str] | None = None) -> None:
    """Compile the programs of a run for the named topology and print what they need."""
    parser = cli.Parser(prog="python -m comi_jax.plan", description="Plan a run without its hardware.")
    parser.add_argument("--config", required=True, help="a name from comi_jax/configs: tiny, qwen2, llama2, qwen3")
    parser.add_argument("--topology", required=True, help="v5e:8x8, v5p:2x2x1, v6e:4x4, h100:8, h100:64, ...")
    parser.add_argument(
        "--sweep", action="store_true", help="try meshes, micro-batches and remat, and plan the fastest"
    )
    parser.add_argument("--compiles", type=cli.at_least(1), default=6, help="how many candidates a sweep compiles")
    parser.add_argument("--serve", action="store_true", help="plan compressing and answering on one device")
    parser.add_argument("--batch-size", type=cli.at_least(1), default=1, help="examples served at once")
    parser.add_argument("--json", type=cli.path, metavar="FILE", help="also write the numbers as JSON")
    cli.add_ignore_config(parser)
    parser.add_argument("overrides", nargs="*", metavar="path=value", help="settings, as for comi_jax.train")
    given = parser.parse_intermixed_args(arguments)
    console = Console(width=cli.width())
    with cli.one_way_out():
        if given.json and not Path(given.json).absolute().parent.is_dir():
            raise ConfigError(f"--json={given.json} cannot be written: its folder does not exist; create it")
        config = load(given.config, given.overrides + cli.ignore_config(given))
        backbone, where = backbone_of(config), topology.find(given.topology)
        if given.sweep:
            config, program = sweep.best(config, backbone, where, given.compiles, console)
            programs = [program]
        elif given.serve:
            programs = serving(config, backbone, where, given.batch_size)
        else:
            stages: tuple[Stage, ...] = ("autoencoding", "answering") if config.autoencoding_steps else ("answering",)
            programs = [train_step(config, backbone, where, stage) for stage in stages]
        show(programs, where, config, console)
        report = to_json(programs, where, config)
        if given.serve:
            ways = serving_counts.ways(config, backbone)
            console.print(counted(ways, where.chip, config))
            report["ways"] = [dataclasses.asdict(way) for way in ways]
        if given.json:
            text = json.dumps(report, indent=2)
            Path(given.json).write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
