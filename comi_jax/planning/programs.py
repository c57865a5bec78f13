"""The programs of a step and of serving, compiled ahead of time, and what they need.

The programs of the train step, that of a micro-batch and the update, are compiled ahead of time, from shapes, for the
devices of a topology. What they need comes from XLA's memory analysis; what they do from their text (``hlo``: XLA's own
``cost_analysis`` counts the body of a loop once); how long that takes at least from the chip's peaks:

    seconds >= max(operations / FLOP/s, bytes of main memory / bandwidth, bytes sent / links)

which assumes that all three overlap and that each runs at its peak. Lengths are the largest that the config allows; a
context whose last segment is shorter has two programs of the encoder, one after the other.
"""

import dataclasses
import re
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from comi_jax.config import Backbone, Config
from comi_jax.data import batches
from comi_jax.data.encode import Example
from comi_jax.devices import sharding, topology
from comi_jax.devices.chips import Chip
from comi_jax.model import architecture, comi, flops
from comi_jax.model.architecture import Architecture
from comi_jax.model.batch import Batch
from comi_jax.planning import estimate, hlo
from comi_jax.planning.published_models import BACKBONES
from comi_jax.serving import batching
from comi_jax.training import optim, state
from comi_jax.training.step import CompiledStep, gradients_of
from comi_jax.weights.starting_model import StartingModel

USABLE = 0.92  # share of a GPU's memory that JAX takes (launch/one_node.sh); of a TPU's the compiler decides


@dataclasses.dataclass(frozen=True)
class Program:
    """A compiled program on one device of a topology. Bytes, FLOP and seconds are of one run."""

    name: str
    division: str  # of the work over the devices
    fits: bool
    bytes_needed: int
    bytes_there: int
    memory: dict[str, int] = dataclasses.field(default_factory=dict)  # bytes by kind
    flops: float = 0.0
    own_flops: float = 0.0  # of the model's forward and backward pass, without recomputation
    sent: dict[str, float] = dataclasses.field(default_factory=dict)  # bytes by kind of collective
    seconds: dict[str, float] = dataclasses.field(default_factory=dict)  # at least, by what bounds it
    kernels: tuple[str, ...] = ()
    compile_seconds: float = 0.0
    refusal: str = ""  # the compiler's, where it does not fit

    @property
    def bound(self) -> str:
        return max(self.seconds, key=lambda name: self.seconds[name])

    @property
    def waste(self) -> float:
        """Compiled operations over the model's own."""
        return self.flops / self.own_flops if self.own_flops else 0.0


def backbone_of(config: Config) -> Backbone:
    """The language model of ``config``: of the folder model.path, else as published under the name model.hub."""
    if not config.model.path and config.model.hub in BACKBONES:
        return BACKBONES[config.model.hub]
    return StartingModel.open(config).backbone


def abstract_batch(config: Config, examples: int, share: int, home: Any) -> Batch:
    """``examples`` of the largest lengths, as the loader makes them, without their contents."""
    lengths = estimate.longest(config)
    parts = (np.zeros(n, np.int32) for n in (lengths.context, lengths.query, lengths.answer))
    example = Example(*parts, rate=lengths.rate)
    batch = batches.collate([example] * examples, batches.Shapes.of([example], config.data, config.compression), share)
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=home), batch)


def train_step(config: Config, backbone: Backbone, where: topology.Topology) -> Program:
    """The train step of ``config`` on all devices of ``where``."""
    mesh = sharding.make_mesh(config.mesh, where.devices)
    sharding.check_heads(backbone, mesh)
    parts = sharding.micro_batches(config, mesh)
    arch = Architecture.of(backbone, config).on(mesh)
    update = optim.optimizer(config.optimizer, config.train.steps)
    held, frozen = state.abstract(arch, update, mesh)
    share, examples = config.train.share_context, config.train.batch_size // parts
    batch = abstract_batch(config, examples, share, sharding.rows(mesh))
    key, number = jax.eval_shape(lambda: (jax.random.key(0), jnp.int32(0)))
    key = jax.ShapeDtypeStruct(key.shape, key.dtype, sharding=NamedSharding(mesh, PartitionSpec()))
    step, total = CompiledStep(arch, update), gradients_of(held) if parts > 1 else None
    rows = examples // share // sharding.row_shards(mesh)
    known = estimate.held(arch, held, frozen, estimate.longest(config), rows, share, mesh)
    held_by_both = {"trained parameters": known.trained, "optimizer": known.optimizer}
    gradients = {"gradients": known.gradients}
    own = flops.shared(arch, estimate.longest(config), share).total * examples / len(where.devices)
    sizes = " x ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
    division = f"{sizes}, {parts} micro-batches, remat {config.model.remat}"
    lowered = step.lower_gradients(total, held, frozen, batch, key, number)
    arguments = held_by_both | {"frozen parameters": known.frozen} | (gradients if parts > 1 else {})
    each = measure("train step", division, lowered, where, arguments, own)
    last = measure("train step", division, step.lower_update(held), where, held_by_both | gradients, 0.0)
    return in_turn([(parts, each), (1, last)])


def serving(config: Config, backbone: Backbone, where: topology.Topology, batch_size: int) -> list[Program]:
    """Compressing and answering ``batch_size`` examples on one device, as ``comi_jax.answer`` does."""
    one = dataclasses.replace(where, devices=where.devices[:1])
    mesh = sharding.make_mesh(dataclasses.replace(config.mesh, data=1, fsdp=1, tensor=1, context=1), one.devices)
    arch = Architecture.of(backbone, config).on(mesh)
    arch = dataclasses.replace(arch, runtime=arch.runtime.replace(remat="off"))
    home = NamedSharding(mesh, PartitionSpec())
    params = jax.tree.map(
        lambda spec: jax.ShapeDtypeStruct(spec.shape, jnp.dtype(arch.dtype), sharding=home), architecture.specs(arch)
    )
    params["mig"] = jax.tree.map(lambda x: jax.ShapeDtypeStruct((), jnp.float32, sharding=home), params["mig"])
    lengths, options = estimate.longest(config), config.generation
    batch = abstract_batch(config, batch_size, 1, home)
    compress = batching.remember.lower(params, batch, arch, lengths.rate)
    memory = jax.eval_shape(lambda p, b: comi.memory_of(p, arch, b, lengths.rate), params, batch)
    memory = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=home), memory)
    reply = batching.reply.lower(params, memory, batch, arch, options, (0,))
    held = {"parameters": estimate.on_one_device(params)}
    division = f"one device, {batch_size} at a time"
    own = batch_size * flops.compress(arch, lengths)
    own_reply = batch_size * flops.answer(arch, lengths, options.max_new_tokens)
    return [
        measure("compress", division, compress, one, held, own),
        measure("answer", division, reply, one, held, own_reply, open_trips=options.max_new_tokens - 1),
    ]


def measure(
    name: str,
    division: str,
    lowered: jax.stages.Lowered,
    where: topology.Topology,
    memory: dict[str, int],
    own_flops: float,
    open_trips: int = 1,
) -> Program:
    """Compile ``lowered`` and read off what it needs; ``memory`` has what is known of its arguments."""
    started, there = time.perf_counter(), int(where.chip.memory)
    try:
        compiled, text = _compile(lowered)
    except jax.errors.JaxRuntimeError as error:
        used = re.search(r"Used ([\d.]+)([KMGT]) of ([\d.]+)([KMGT]) hbm", str(error))
        if used is None:
            raise
        needed, there = (
            int(float(n) * 2.0 ** (10 * (1 + "KMGT".index(u)))) for n, u in (used.groups()[:2], used.groups()[2:])
        )
        return Program(
            name, division, False, needed, there, memory, own_flops=own_flops, refusal=str(error).splitlines()[0]
        )
    seconds = time.perf_counter() - started
    sizes = compiled.memory_analysis()
    arguments = sizes.argument_size_in_bytes
    memory = memory | {
        "batch and other arguments": max(arguments - sum(memory.values()), 0),
        "temporaries": sizes.temp_size_in_bytes,
        "results that are no arguments": sizes.output_size_in_bytes - sizes.alias_size_in_bytes,
        "program": sizes.generated_code_size_in_bytes,
        "on the host": sizes.host_temp_size_in_bytes + sizes.host_argument_size_in_bytes,
    }
    needed = sum(size for kind, size in memory.items() if kind != "on the host")
    counts = hlo.count(text, where.per_node, open_trips)
    return Program(
        name,
        division,
        needed <= (there if where.per_node is None else USABLE * there),
        needed,
        there,
        memory,
        counts.flops,
        own_flops,
        counts.sent,
        lower_bounds(counts, where.chip),
        tuple(sorted(counts.kernels)),
        seconds,
    )


def in_turn(parts: list[tuple[int, Program]]) -> Program:
    """Programs that run one after the other, each so many times, as one: the memory of the one that needs most, the
    work of all. One that was refused stands for all."""
    programs = [program for _, program in parts]
    largest = next((p for p in programs if p.refusal), max(programs, key=lambda p: p.bytes_needed))
    if largest.refusal:
        return dataclasses.replace(largest, own_flops=sum(times * p.own_flops for times, p in parts))

    def sums(name: str) -> dict[str, float]:
        total: Counter[str] = Counter()
        for times, program in parts:
            total.update({key: times * value for key, value in getattr(program, name).items()})
        return dict(total)

    return dataclasses.replace(
        largest,
        flops=sum(times * p.flops for times, p in parts),
        own_flops=sum(times * p.own_flops for times, p in parts),
        sent=sums("sent"),
        seconds=sums("seconds"),
        kernels=tuple(sorted({kernel for p in programs for kernel in p.kernels})),
        compile_seconds=sum(p.compile_seconds for p in programs),
    )


def _compile(lowered: jax.stages.Lowered) -> tuple[Any, str]:
    """The executable and the text of the optimised program. The compiler writes that text itself: what libtpu makes of
    asynchronous calls, JAX's own printer may not understand."""
    with tempfile.TemporaryDirectory() as folder:
        compiled = lowered.compile(compiler_options={"xla_dump_to": folder, "xla_dump_hlo_as_text": True})
        texts = sorted(Path(folder).glob("*after_optimizations.txt"), key=lambda path: path.stat().st_size)
        return compiled, texts[-1].read_text(encoding="utf-8") if texts else compiled.as_text()


def lower_bounds(counts: hlo.Counts, chip: Chip) -> dict[str, float]:
    """Seconds that the operations, the main memory and the links, those between nodes too, take at their peaks."""
    return {
        "compute": counts.flops / chip.flops,
        "memory": counts.traffic / chip.bandwidth,
        "link": max(sum(counts.sent.values()) / chip.link, counts.sent_outside / (chip.network or chip.link)),
    }
