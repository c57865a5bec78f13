"""What stands for a context in the decoder: vectors of all segments, aligned by the LSA and joined without gaps, which
it reads; or keys and values, which it continues."""

from collections.abc import Sequence
from typing import no_type_check

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, Int

from comi_jax.model import backbone as lm
from comi_jax.model.cache import ContextKV
from comi_jax.model.compress import Aux
from comi_jax.model.encoder import join_rows
from comi_jax.model.shape import Architecture
from comi_jax.params import Tree


@no_type_check
@struct.dataclass
class Memory:
    """What stands for the context: keys and values ``before``, if any, then ``vectors`` that the decoder reads, in
    order; the first ``length`` of each row are real.

    ``aux`` is empty for other systems than COMI. It has one entry for the full segments, with rows in the order of
    reshape(B * G), and one for the shorter last segments, if the width leaves any. If tokens are split over devices,
    its token axis is that of the encoder's rows, [context; query].
    """

    vectors: Float[Array, "B M D"]
    length: Int[Array, " B"]
    aux: tuple[Aux, ...]
    before: ContextKV | None = None

    @property
    def entries(self) -> Int[Array, " B"]:
        """The entries of the decoder's KV cache that stand for the context of each row."""
        if self.before is None:
            return self.length
        return self.length + jnp.repeat(self.before.length, self.length.shape[0] // self.before.length.shape[0])


def align(params: Tree, arch: Architecture, memory: Float[Array, "B M D"]) -> Float[Array, "B M D"]:
    """The LSA over merged vectors, in the model's dtype; with compression.lsa off, the vectors themselves."""
    memory = memory.astype(arch.dtype)
    if not arch.compression.lsa:
        return memory
    with jax.named_scope("align"):
        states, _ = lm.forward(params["lsa"], memory, arch.backbone, runtime=arch.runtime)
        return lm.split_columns(states, arch.runtime)


def join_segments(
    memory: Float[Array, "B G M D"], count: Int[Array, "B G"]
) -> tuple[Float[Array, "B GM D"], Int[Array, " B"]]:
    """The first count[b, g] vectors of each segment, concatenated without gaps."""
    batch, segments, slots, width = memory.shape
    ends = jnp.cumsum(count, axis=1)
    position = jnp.arange(segments * slots, dtype=jnp.int32)
    segment = jax.vmap(lambda e: jnp.searchsorted(e, position, side="right"))(ends)
    segment = jnp.minimum(segment, segments - 1)
    within = position[None, :] - jnp.take_along_axis(ends - count, segment, axis=1)
    source = segment * slots + jnp.clip(within, 0, slots - 1)
    flat = memory.reshape(batch, segments * slots, width)
    return jnp.take_along_axis(flat, source[:, :, None], axis=1), ends[:, -1]


def join_memories(memories: Sequence[Memory]) -> Memory:
    """Memories of the same rows, concatenated without gaps."""
    memory, *rest = memories
    for last in rest:
        vectors, length = join_rows(memory.vectors, memory.length, last.vectors, last.length)
        memory = Memory(vectors, length, (*memory.aux, *last.aux))
    return memory
