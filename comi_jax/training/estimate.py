"""The memory of a train step, estimated from shapes alone, before anything is compiled, and model.remat=auto.

Depending on model.remat, a block keeps for each token its input (D), the attention output (N H), the projections
(N H + 2 K H), the other products (D + 2 F) or everything.
"""

import dataclasses
import math
import os
from typing import Any

import jax

from comi_jax.config import Config
from comi_jax.devices import chips
from comi_jax.errors import ConfigError
from comi_jax.model import flops
from comi_jax.model.architecture import Architecture
from comi_jax.training.state import TrainState

USABLE = 0.92  # fraction of a GPU's memory that JAX allocates (launch/one_node.sh); on TPU the compiler decides
# What model.remat=auto chooses from, beginning with the least recomputation. Not "offload": it needs host memory, and
# its speed depends on the way there.
REMATS = ("off", "products", "projections", "attention", "full")


@dataclasses.dataclass(frozen=True)
class Held:
    """Bytes on one device."""

    trained: int  # float32
    optimizer: int
    frozen: int
    gradients: int  # float32
    kept: int  # activations of one micro-batch, kept for the backward pass
    working: int  # temporaries: the largest of a block, the compression in float32 and the logits

    @property
    def total(self) -> int:
        return sum(dataclasses.astuple(self))


def longest(config: Config) -> flops.Lengths:
    """The largest lengths that ``config`` allows."""
    data = config.data
    return flops.Lengths(data.max_context, data.max_query, data.max_answer, min(config.compression.rates))


def on_one_device(tree: Any) -> int:
    """Bytes per device of the arrays in ``tree``."""
    leaves = jax.tree.leaves(tree)
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in leaves)


def held(
    arch: Architecture,
    state: TrainState,
    frozen: Any,
    lengths: flops.Lengths,
    rows: int,
    share: int,
    mesh: jax.sharding.Mesh,
) -> Held:
    """The memory per device of a step on ``rows`` contexts per device with ``share`` questions each; heads,
    feed-forward and tokens are split as ``mesh`` says."""
    tensor, context = mesh.shape["tensor"], mesh.shape["context"]
    backbone, trained = arch.backbone, on_one_device(state.trained)
    width = 2 if arch.dtype == "bfloat16" else 4
    segments = arch.compression.segments(lengths.context)
    encoded = -(-(sum(segments) + len(segments) * lengths.query) // context)
    memory = flops.memory_length(arch, lengths)
    decoded = -(-(memory + lengths.query + lengths.answer) // context)
    layers = (
        arch.compression.encoder_layers * encoded
        + share * arch.compression.lsa_layers * -(-memory // context)
        + share * backbone.num_hidden_layers * decoded
    )
    heads, keys = (n * backbone.head_dim for n in (backbone.num_attention_heads, backbone.num_key_value_heads))
    wide = 3 * backbone.intermediate_size // tensor
    projections = (heads + 2 * keys) // tensor
    extra = {
        "full": 0,
        "offload": 0,
        "attention": heads // tensor,
        "projections": heads // tensor + projections,
        "products": heads // tensor + projections + backbone.hidden_size + 2 * wide // 3,
        # Norms and rotary embeddings also keep float32 copies.
        "off": heads // tensor + 2 * projections + 5 * wide // 3 + 16 * backbone.hidden_size,
    }[arch.runtime.remat]
    stays = 0 if arch.runtime.remat == "offload" else backbone.hidden_size
    block = (2 * wide + 2 * projections + 4 * backbone.hidden_size) * width * encoded
    compression = 4 * backbone.hidden_size * (5 * encoded + 3 * share * memory)
    logits = share * 4 * 4 * lengths.answer * backbone.vocab_size
    return Held(
        trained=trained,
        optimizer=on_one_device(state.optimizer),
        frozen=on_one_device(frozen),
        gradients=trained,
        kept=rows * layers * (stays + extra) * width,
        working=rows * max(block, compression, logits),
    )


def resolve_remat(
    arch: Architecture,
    state: TrainState,
    frozen: Any,
    lengths: flops.Lengths,
    rows: int,
    share: int,
    mesh: jax.sharding.Mesh,
    available: int,
) -> tuple[Architecture, str]:
    """``arch`` with the least recomputation with which a step (as in ``held``) fits into ``available`` bytes per device
    by estimate, in place of "auto", and a sentence about it, "" if model.remat is not "auto". Other systems than COMI,
    whose memory is not estimated, get "attention".

    Raises ConfigError if nothing fits."""
    if arch.runtime.remat != "auto":
        return arch, ""

    def with_remat(name: str) -> Architecture:
        return dataclasses.replace(arch, runtime=dataclasses.replace(arch.runtime, remat=name))

    if arch.system != "comi":
        return with_remat("attention"), f"model.remat=auto: attention, as the memory of system={arch.system} is unknown"
    needed: dict[str, int] = {}
    for name in REMATS:
        needed[name] = held(with_remat(name), state, frozen, lengths, rows, share, mesh).total
        if needed[name] <= available:
            others = "".join(f", {other} would need {size / 1e9:.1f} GB" for other, size in [*needed.items()][:-1])
            share_of_memory = f"an estimated {needed[name] / 1e9:.1f} of {available / 1e9:.1f} GB per device"
            return with_remat(name), f"model.remat=auto: {name}, {share_of_memory}{others}"
    raise ConfigError(
        f"a train step needs an estimated {needed['full'] / 1e9:.1f} GB per device even if everything is recomputed, "
        f"and there are {available / 1e9:.1f} GB; split it over more devices (mesh.fsdp, mesh.context), make "
        "micro-batches smaller (optimizer.accumulate) or contexts shorter (data.max_context), or name "
        "model.remat=full to try it"
    )


def available_bytes(device: Any) -> int:
    """The memory that arrays can take on the JAX ``device``: what it reports, else by its data sheet; of a CPU its part
    of the machine's."""
    reported = device.memory_stats() or {}
    if "bytes_limit" in reported:
        return int(reported["bytes_limit"])
    chip = chips.find(device.device_kind)
    if chip is not None:
        return int(chip.memory)
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // jax.local_device_count()
