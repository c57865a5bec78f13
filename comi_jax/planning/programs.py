"""The programs of a train step and of serving, compiled ahead of time for a topology, with their memory and least time.

The train step is two programs, one for a micro-batch and one for the update. Memory comes from XLA's memory analysis,
operations and bytes from the HLO text (``hlo``), and the lower bound on the time from the chip's peaks:

    seconds >= max(FLOP / FLOP/s, bytes of main memory / bandwidth, bytes sent / link bandwidth)

which assumes that all three overlap and run at their peaks. Lengths are the largest that the config allows; if the last
segment of a context is shorter, the encoder runs once for the full segments and once for the last one.
"""

import dataclasses
from collections import Counter
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from comi_jax.backbone import Backbone
from comi_jax.config import Config
from comi_jax.data import batches
from comi_jax.data.encode import Example
from comi_jax.devices import sharding, topology
from comi_jax.model import architecture, comi, flops, generate
from comi_jax.model.architecture import Architecture, Stage, frozen_dtype
from comi_jax.model.batch import Batch
from comi_jax.params import flatten, unflatten
from comi_jax.planning import hlo
from comi_jax.planning.compiled import TOO_LARGE, compiled
from comi_jax.planning.published_models import BACKBONES
from comi_jax.serving import batching
from comi_jax.training import estimate, optim, state
from comi_jax.training.step import CompiledStep, gradients_of
from comi_jax.weights.starting_model import StartingModel


@dataclasses.dataclass(frozen=True)
class Program:
    """A program compiled for a topology. Bytes, FLOP and seconds are per device and execution."""

    name: str
    division: str  # of the work over the devices, for display
    fits: bool
    bytes_needed: int
    bytes_there: int
    memory: dict[str, int] = dataclasses.field(default_factory=dict)  # bytes by kind
    flops: float = 0.0
    own_flops: float = 0.0  # model FLOP: forward and backward pass without rematerialisation
    sent: dict[str, float] = dataclasses.field(default_factory=dict)  # bytes by kind of collective
    seconds: dict[str, float] = dataclasses.field(default_factory=dict)  # lower bounds: compute, memory, link
    kernels: tuple[str, ...] = ()
    compile_seconds: float = 0.0
    refusal: str = ""  # the compiler's error if the program does not fit

    @property
    def bound(self) -> str:
        return max(self.seconds, key=lambda name: self.seconds[name])

    @property
    def waste(self) -> float:
        """Compiled FLOP divided by model FLOP."""
        return self.flops / self.own_flops if self.own_flops else 0.0


def backbone_of(config: Config) -> Backbone:
    """The backbone of ``config``: from the folder model.path, or the published shapes of model.hub."""
    if not config.model.path and config.model.hub in BACKBONES:
        return BACKBONES[config.model.hub]
    return StartingModel.open(config).backbone


def abstract_batch(config: Config, examples: int, share: int, placed: Any) -> Batch:
    """A batch of ``examples`` of the largest lengths as abstract arrays with the sharding ``placed``."""
    lengths = estimate.longest(config)
    ids = (np.zeros(n, np.int32) for n in (lengths.context, lengths.query, lengths.answer))
    example = Example(*ids, rate=lengths.rate)
    batch = batches.collate([example] * examples, batches.Shapes.of([example], config.data, config.compression), share)
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=placed), batch)


def train_step(config: Config, backbone: Backbone, where: topology.Topology, stage: Stage = "answering") -> Program:
    """The train step of ``config`` in ``stage`` on all devices of ``where``."""
    mesh = sharding.make_mesh(config.mesh, where.devices)
    sharding.check_heads(backbone, mesh)
    micro_batches = sharding.micro_batches(config, mesh)
    arch = Architecture.of(backbone, config).on(mesh)
    first = config.autoencoding_steps
    update = optim.optimizer(config.optimizer, config.train.steps, first)
    held, frozen = state.abstract(arch, update, mesh)
    share, examples = config.train.share_context, config.train.batch_size // micro_batches
    batch = abstract_batch(config, examples, share, sharding.rows(mesh))
    key, number = jax.eval_shape(lambda: (jax.random.key(0), jnp.int32(0)))
    key = jax.ShapeDtypeStruct(key.shape, key.dtype, sharding=NamedSharding(mesh, PartitionSpec()))
    rows, lengths = examples // share // sharding.row_shards(mesh), estimate.longest(config)
    arch, _ = estimate.resolve_remat(arch, held, frozen, lengths, rows, share, mesh, usable(where))
    step, total = CompiledStep(arch, update, first), gradients_of(held) if micro_batches > 1 else None
    known = estimate.held(arch, held, frozen, lengths, rows, share, mesh)
    held_by_both = {"trained parameters": known.trained, "optimizer": known.optimizer}
    gradients = {"gradients": known.gradients}
    own = flops.shared(arch, lengths, share, stage).total * examples / len(where.devices)
    sizes = " x ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
    division = f"{sizes}, {micro_batches} micro-batches, remat {arch.runtime.remat}"
    lowered = step.lower_gradients(total, held, frozen, batch, key, number, stage)
    arguments = held_by_both | {"frozen parameters": known.frozen} | (gradients if micro_batches > 1 else {})
    name = f"train step, {stage}" if first else "train step"
    each = measure(name, division, lowered, where, arguments, own)
    last = measure(name, division, step.lower_update(held, stage), where, held_by_both | gradients, 0.0)
    return in_turn([(micro_batches, each), (1, last)])


def serving(config: Config, backbone: Backbone, where: topology.Topology, batch_size: int) -> list[Program]:
    """Compressing and answering ``batch_size`` examples on one device, as ``comi_jax.answer`` does."""
    one = dataclasses.replace(where, devices=where.devices[:1])
    mesh = sharding.make_mesh(dataclasses.replace(config.mesh, data=1, fsdp=1, tensor=1, context=1), one.devices)
    arch = Architecture.of(backbone, config).on(mesh)
    arch = dataclasses.replace(arch, runtime=dataclasses.replace(arch.runtime, remat="off"))
    placed = NamedSharding(mesh, PartitionSpec())
    params = unflatten(
        {
            path: jax.ShapeDtypeStruct(spec.shape, jnp.dtype(frozen_dtype(path, arch)), sharding=placed)
            for path, spec in flatten(architecture.specs(arch)).items()
        }
    )
    lengths, options = estimate.longest(config), config.generation
    batch = abstract_batch(config, batch_size, 1, placed)
    compress = batching.remember.lower(params, batch, arch, lengths.rate)
    memory = jax.eval_shape(lambda p, b: comi.memory_of(p, arch, b, lengths.rate), params, batch)
    memory = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=placed), memory)

    @jax.jit
    def answer(params, memory, batch):
        made = comi.prompt(params, arch, memory, batch)
        before, start = made.cache(0)
        return generate.greedy(params, arch, made.rows, made.length, options, stop=(0,), before=before, start=start)

    reply = answer.lower(params, memory, batch)
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
    """Compile ``lowered`` and analyse it; ``memory`` lists the known sizes of its arguments in bytes."""
    there = int(where.chip.memory)
    found = compiled(lowered, where)
    if used := TOO_LARGE.search(found.refusal):
        needed, there = (
            int(float(n) * 2.0 ** (10 * (1 + "KMGT".index(u)))) for n, u in (used.groups()[:2], used.groups()[2:])
        )
        refusal = found.refusal.splitlines()[0]
        return Program(name, division, False, needed, there, memory, own_flops=own_flops, refusal=refusal)
    sizes = found.sizes
    arguments = sizes["argument_size_in_bytes"]
    memory = memory | {
        "batch and other arguments": max(arguments - sum(memory.values()), 0),
        "temporaries": sizes["temp_size_in_bytes"],
        "results not aliased to arguments": sizes["output_size_in_bytes"] - sizes["alias_size_in_bytes"],
        "program": sizes["generated_code_size_in_bytes"],
        "on the host": sizes["host_temp_size_in_bytes"] + sizes["host_argument_size_in_bytes"],
    }
    needed = sum(size for kind, size in memory.items() if kind != "on the host")
    counts = hlo.count(found.text, where.per_node, open_trips)
    return Program(
        name,
        division,
        needed <= usable(where),
        needed,
        there,
        memory,
        counts.flops,
        own_flops,
        counts.sent,
        hlo.lower_bounds(counts, where.chip),
        tuple(sorted(counts.kernels)),
        found.seconds,
    )


def usable(where: topology.Topology) -> int:
    """Bytes of a device's memory that a program can take."""
    return int(where.chip.memory * (1.0 if where.per_node is None else estimate.USABLE))


def in_turn(executions: list[tuple[int, Program]]) -> Program:
    """Combine (count, program) pairs that run in sequence into one Program: the memory of the largest, the work of all.
    If one does not fit, the result is that one."""
    programs = [program for _, program in executions]
    largest = next((p for p in programs if p.refusal), max(programs, key=lambda p: p.bytes_needed))
    if largest.refusal:
        return dataclasses.replace(largest, own_flops=sum(times * p.own_flops for times, p in executions))

    def sums(name: str) -> dict[str, float]:
        total: Counter[str] = Counter()
        for times, program in executions:
            total.update({key: times * value for key, value in getattr(program, name).items()})
        return dict(total)

    return dataclasses.replace(
        largest,
        flops=sum(times * p.flops for times, p in executions),
        own_flops=sum(times * p.own_flops for times, p in executions),
        sent=sums("sent"),
        seconds=sums("seconds"),
        kernels=tuple(sorted({kernel for p in programs for kernel in p.kernels})),
        compile_seconds=sum(p.compile_seconds for p in programs),
    )
