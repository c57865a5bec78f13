"""Search for the mesh, micro-batches and remat policy that train a config fastest on a topology.

Every mesh over data, fsdp, tensor and context is estimated from shapes (``estimate``). Candidates that do not fit are
dropped, the rest are ranked by an estimated step time of

    max(FLOP / FLOP/s, bytes communicated / link bandwidth)

and the first few are compiled. The best is the one with the smallest compiled lower bound among those that fit.
"""

import dataclasses
import itertools
from collections.abc import Iterator

from rich.console import Console

from comi_jax.backbone import Backbone
from comi_jax.config import Config
from comi_jax.devices import sharding
from comi_jax.devices.topology import Topology
from comi_jax.errors import ConfigError
from comi_jax.model import flops
from comi_jax.model.architecture import Architecture
from comi_jax.planning.programs import Program, train_step
from comi_jax.training import estimate, optim, state

# The fraction of the forward pass that each remat policy recomputes.
RECOMPUTED = {"off": 0.0, "products": 0.0, "projections": 0.7, "attention": 0.8, "offload": 0.8, "full": 1.0}


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A division of the work, with estimates."""

    config: Config
    bytes: int  # per device
    seconds: float  # per update

    def __str__(self) -> str:
        mesh, micro_batches = self.config.mesh, self.config.optimizer.accumulate
        sizes = f"data {mesh.data} x fsdp {mesh.fsdp} x tensor {mesh.tensor} x context {mesh.context}"
        return f"{sizes}, {micro_batches} micro-batches, remat {self.config.model.remat}"


def candidates(config: Config, backbone: Backbone, where: Topology) -> Iterator[Candidate]:
    """Every division without remainder, with its estimates."""
    count, contexts = len(where.devices), config.train.batch_size // config.train.share_context
    heads, keys = backbone.num_attention_heads, backbone.num_key_value_heads
    for tensor, context, fsdp in itertools.product(_divisors(count), repeat=3):
        data = count // (tensor * context * fsdp)
        if data * tensor * context * fsdp != count or keys % tensor or heads // tensor % context:
            continue
        rows = contexts // (data * fsdp)  # contexts per device, over all micro-batches
        if contexts % (data * fsdp):
            continue
        for micro_batches in (n for n in _divisors(rows) if rows // n <= 4):
            for remat in estimate.REMATS:
                yield _estimated(config, backbone, where, (data, fsdp, tensor, context), micro_batches, remat)


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


def _estimated(
    config: Config,
    backbone: Backbone,
    where: Topology,
    sizes: tuple[int, int, int, int],
    micro_batches: int,
    remat: str,
) -> Candidate:
    mesh_sizes = dict(zip(sharding.AXES, sizes, strict=True))
    config = dataclasses.replace(
        config,
        mesh=dataclasses.replace(config.mesh, **mesh_sizes),
        model=dataclasses.replace(config.model, remat=remat),
        optimizer=dataclasses.replace(config.optimizer, accumulate=micro_batches),
    )
    mesh = sharding.make_mesh(config.mesh, where.devices)
    arch = Architecture.of(backbone, config).on(mesh)
    held, frozen = state.abstract(arch, optim.optimizer(config.optimizer, config.train.steps), mesh)
    data, fsdp, tensor, context = sizes
    rows = config.train.batch_size // config.train.share_context // micro_batches // (data * fsdp)
    lengths = estimate.longest(config)
    share = config.train.share_context
    needed = estimate.held(arch, held, frozen, lengths, rows, share, mesh)
    cost = flops.shared(arch, lengths, share)
    work = (cost.total + RECOMPUTED[remat] * cost.forward) * config.train.batch_size
    # Per micro-batch: weights in the model's dtype are all-gathered for the forward and the backward pass, gradients
    # are reduce-scattered and all-reduced over data, and the results of two products per block are all-reduced over
    # tensor, forward and backward.
    others = fsdp * context - 1
    weights = (needed.trained // 2 + needed.frozen) * others * 2 + needed.trained // 2 * others
    tokens = lengths.context * arch.compression.encoder_layers + sum(
        backbone.num_hidden_layers * n for n in (flops.memory_length(arch, lengths), lengths.query, lengths.answer)
    )
    sums = 8 * rows * tokens / context * backbone.hidden_size * 2 * (tensor - 1) / tensor
    # All-to-all between tokens and heads before and after attention: forward, backward and rematerialised.
    heads = 2 * (backbone.num_attention_heads + backbone.num_key_value_heads) * backbone.head_dim // tensor
    exchanged = 3 * rows * tokens / context * heads * 2 * (context - 1) / context
    replicas = 2 * needed.gradients * (data - 1) / data
    sent = (
        micro_batches * weights / _speed(where, fsdp * tensor * context, tensor)
        + micro_batches * sums / _speed(where, tensor * context, context)
        + micro_batches * exchanged / _speed(where, context, 1)
        + micro_batches * replicas / _speed(where, len(where.devices), fsdp * tensor * context)
    )
    return Candidate(config, needed.total, max(work / len(where.devices) / where.chip.flops, sent))


def _speed(where: Topology, span: int, stride: int) -> float:
    """Bytes per second that a device sends in a ring of every ``stride``-th of ``span`` consecutive devices. The ring
    leaves a node once, through the NICs of all its members in the node."""
    if where.per_node is None or span <= where.per_node:
        return where.chip.link
    return min(where.chip.link, where.chip.network * max(where.per_node // stride, 1))


def best(
    config: Config, backbone: Backbone, where: Topology, compiles: int, console: Console
) -> tuple[Config, Program]:
    """The fastest fitting candidate among at most ``compiles`` compiled ones, and its program. Raises ConfigError if
    none fits."""
    if config.system != "comi":
        raise ConfigError(f"a sweep estimates the memory of COMI, not of system={config.system}; leave --sweep out")
    found = sorted(candidates(config, backbone, where), key=lambda c: (c.seconds, c.bytes))
    fitting = [c for c in found if c.bytes < where.chip.memory]
    console.print(f"{len(found)} candidates, {len(fitting)} fit by estimate; compiling {compiles} of them")
    compiled: list[tuple[Candidate, Program]] = []
    for number, candidate in enumerate(fitting[:compiles], 1):
        program = train_step(candidate.config, backbone, where)
        compiled.append((candidate, program))
        verdict = f"{program.seconds[program.bound]:.3f} s ({program.bound})" if program.fits else "does not fit"
        console.print(
            f"{number}. {candidate}: estimated {candidate.bytes / 1e9:.2f} GB and {candidate.seconds:.3f} s, "
            f"compiled {program.bytes_needed / 1e9:.2f} GB and {verdict}",
            highlight=False,
            soft_wrap=True,
        )
    working = [pair for pair in compiled if pair[1].fits]
    if not working:
        raise ConfigError(
            f"none of the {len(compiled)} compiled candidates fits {where.name}; use more devices, shorter contexts "
            "(data.max_context, compression.segment_size) or more --compiles"
        )
    chosen, program = min(working, key=lambda pair: pair[1].seconds[pair[1].bound])
    words = [f"mesh.{axis}={size}" for axis, size in dataclasses.asdict(chosen.config.mesh).items()]
    words += [f"optimizer.accumulate={chosen.config.optimizer.accumulate}", f"model.remat={chosen.config.model.remat}"]
    console.print(f"best: {' '.join(words)}", highlight=False, soft_wrap=True)
    return chosen.config, program
