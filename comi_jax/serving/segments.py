"""The segments of documents: all that a segment's questions need of it, in memory or storage dtypes.

A segment keeps the encoder's last states, its keys and values, and the norms of the states. None of these depends on a
question, as a causal encoder reads the text before it.
"""

import dataclasses
import functools
from dataclasses import dataclass
from typing import Any, no_type_check

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int

from comi_jax.devices import sharding
from comi_jax.errors import UserError
from comi_jax.model import encoder, mig
from comi_jax.model.architecture import Architecture
from comi_jax.model.cache import KVCache

DTYPES = ("float32", "bfloat16", "int8")


class DocumentError(UserError):
    """A document that cannot be used, stored or read; the message says why."""


@dataclass(frozen=True)
class Origin:
    """What encoded a document. Only the same model, with the same settings, can use it."""

    model: str  # its name in messages: the folder of the run and the step
    weights: str  # a hash of them
    tokenizer: str  # a hash of it
    dtype: str  # of the activations
    segment_size: int

    def check(self, other: "Origin") -> None:
        """Raise DocumentError if a document of ``self`` cannot be used by ``other``."""
        advice = "; encode its text again"
        if self.weights != other.weights:
            raise DocumentError(f"the document was encoded by {self.model}, not by {other.model}{advice} with this one")
        if self.tokenizer != other.tokenizer:
            raise DocumentError(f"the document was encoded with another tokenizer than that of {other.model}{advice}")
        for name in ("model.dtype", "compression.segment_size"):
            ours, theirs = (getattr(origin, name.split(".")[1]) for origin in (self, other))
            if ours != theirs:
                raise DocumentError(
                    f"the document was encoded with {name}={ours}, but the model was loaded with {name}={theirs}; "
                    f"load it with {name}={ours}, or encode the text again"
                )


@no_type_check
@struct.dataclass
class Stored:
    """An array in a dtype of DTYPES; int8 with one scale per vector of the last axis, x ≈ scale · values."""

    values: Any  # an array
    scale: Any = None  # an array, for int8

    @classmethod
    def of(cls, x: Float[Array, "*shape D"], dtype: str) -> "Stored":
        if dtype != "int8":
            return cls(x.astype(dtype))
        wide = x.astype(jnp.float32)
        scale = jnp.maximum(jnp.max(jnp.abs(wide), axis=-1), jnp.finfo(jnp.float32).tiny * 127) / 127
        return cls(jnp.round(wide / scale[..., None]).astype(jnp.int8), scale)

    def restored(self, dtype: Any) -> Float[Array, "*shape D"]:
        if self.scale is None:
            return self.values.astype(dtype)
        return (self.values.astype(jnp.float32) * self.scale[..., None]).astype(dtype)


@no_type_check
@struct.dataclass
class Kept:
    """The arrays of one segment, padded to S tokens; states and norms are 0 beyond its length."""

    states: Stored  # [S, D]
    keys: Stored | None  # [L, S, K, H]; None: questions are encoded without their context
    values: Stored | None
    norms: mig.Norms  # [S], of the states as they are stored


@dataclass(frozen=True)
class Segment:
    """A segment of a document: its token ids, the characters of the text that they stand for, and what is kept."""

    ids: np.ndarray  # [tokens], int32
    characters: np.ndarray | None  # [tokens, 2], first and one past the last; None if the tokenizer does not tell
    kept: Kept  # of jax.Array on a device; of np.ndarray in host memory or in a memory-mapped file

    @property
    def tokens(self) -> int:
        return len(self.ids)

    @property
    def nbytes(self) -> int:
        return sum(x.nbytes for x in jax.tree.leaves(self.kept))

    @property
    def on_device(self) -> bool:
        return all(isinstance(x, jax.Array) for x in jax.tree.leaves(self.kept))

    def to_device(self, mesh: Mesh | None = None) -> "Segment":
        """A copy on the devices of ``mesh`` (None: on one), see ``shardings``."""
        if mesh is None:
            return dataclasses.replace(self, kept=jax.tree.map(jnp.array, self.kept))
        return dataclasses.replace(self, kept=jax.device_put(self.kept, shardings(self.kept, mesh), may_alias=False))

    def to_host(self) -> "Segment":
        return dataclasses.replace(self, kept=jax.tree.map(np.array, self.kept))


def shardings(kept: Kept, mesh: Mesh) -> Kept:
    """The sharding of each array: its tokens are split over all devices, or over the mesh axes that divide them."""

    def split(arrays: Any, axis: int) -> Any:
        def of(x: Any) -> NamedSharding:
            return NamedSharding(mesh, PartitionSpec(*[None] * axis, sharding.dividing(x.shape[axis], mesh)))

        return jax.tree.map(of, arrays)

    return Kept(split(kept.states, 0), split(kept.keys, 1), split(kept.values, 1), split(kept.norms, 0))


def at_hand(kept: Kept, mesh: Mesh | None) -> Kept:
    """``kept`` as the programs of a question take it: whole on every device of ``mesh``, gathered from the devices that
    share its tokens; with None, where it is, unless that is several devices."""
    if mesh is not None:
        return jax.device_put(jax.device_put(kept, shardings(kept, mesh)), NamedSharding(mesh, PartitionSpec()))

    def of(x: Any) -> Any:
        return np.asarray(x) if isinstance(x, jax.Array) and len(x.sharding.device_set) > 1 else x

    return jax.tree.map(of, kept)


@functools.partial(jax.jit, static_argnames=("arch", "dtype", "keep_kv"))
def read_segment(
    params: Any, ids: Int[Array, "1 S"], length: Int[Array, " 1"], arch: Architecture, dtype: str, keep_kv: bool
) -> Kept:
    """Encode one segment. One segment a program: what a document is does not depend on its companions. On several
    devices, each keeps its share of the tokens, see ``shardings``."""
    (part,) = encoder.encode(params, arch, ids, length).segments
    real = jnp.arange(ids.shape[1])[:, None] < length[:, None]
    states = Stored.of(jnp.where(real, part.states[0], 0), dtype)
    norms = mig.norms(states.restored(arch.dtype))
    kept = Kept(states, None, None, norms)
    if keep_kv and part.cache is not None:
        keys, values = (jnp.where(real[None, :, :, None], x[:, 0], 0) for x in (part.cache.k, part.cache.v))
        kept = Kept(states, Stored.of(keys, dtype), Stored.of(values, dtype), norms)
    if (mesh := arch.runtime.mesh) is None:
        return kept
    # First as a whole: else XLA would split the encoder's tokens too, and each device gather all of its weights.
    kept = jax.lax.with_sharding_constraint(kept, NamedSharding(mesh, PartitionSpec()))
    return jax.lax.with_sharding_constraint(kept, shardings(kept, mesh))


def restored(kept: Kept, length: Int[Array, "1 1"], arch: Architecture) -> encoder.EncodedSegments:
    """One segment of ``length`` tokens as the model has it right after encoding."""
    cache = None
    if kept.keys is not None and kept.values is not None:
        cache = KVCache(*(x.restored(arch.dtype)[:, None] for x in (kept.keys, kept.values)))
    norms = jax.tree.map(lambda x: x[None], kept.norms)
    return encoder.EncodedSegments(kept.states.restored(arch.dtype)[None], length, cache, norms)


@dataclass(frozen=True)
class Contents:
    """All of a document at one moment."""

    origin: Origin
    segments: tuple[Segment, ...]
    characters: int  # of the text
    truncated: bool  # whether text was cut off at data.max_context tokens
