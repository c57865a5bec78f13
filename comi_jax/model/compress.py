"""COMI's compression, section 4 of the paper: coarse group sizes by MIG, (4) to (6), and fine merging, (7) and (8).

All shapes are static: group sizes are data, carried as one group id per token. Arithmetic is in float32 at least. Rows
are right-padded segments of S tokens with up to M groups. Of B rows, B / C neighbours ask about the same of the C rows
of states, which are not copied for them. The two operations that read the states themselves, redundancy and merge, are
in ``kernels``.
"""

import dataclasses
import functools
from typing import Any, no_type_check

import jax
import jax.numpy as jnp
from flax import struct
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from comi_jax.config import Compression
from comi_jax.devices.sharding import row_axes
from comi_jax.kernels import dispatch
from comi_jax.kernels.merge import weights
from comi_jax.model import mig
from comi_jax.model.context_parallel import Split, Whole
from comi_jax.params import Tree

PER_TOKEN = ("group", "relevance", "redundancy", "mig", "weights")  # of Aux; the others are of groups
WHOLE = Whole()  # rows that are not split over devices


@no_type_check
@struct.dataclass
class Representatives:
    """The most relevant token of each group, (4), and its scores among the others; undefined where no group exists."""

    token: Int[Array, "B M"]  # index in the row
    exists: Bool[Array, "B M"]
    relevance: Float[Array, "B M"]  # cos to the query vector
    redundancy: Float[Array, "B M"]  # largest cos to another group's representative
    mig: Float[Array, "B M"]  # (1)


@no_type_check
@struct.dataclass
class Aux:
    """The intermediate results behind a memory. Under jit, XLA removes the ones that are not used."""

    group_sizes: Int[Array, "B M"]  # of the m groups in order, some may be empty; 0 after the m-th
    group: Int[Array, "B S"]  # memory slot of every token, -1 for padding
    relevance: Float[Array, "B S"]  # cos to the query vector
    redundancy: Float[Array, "B S"]  # largest cos to another token of the group
    mig: Float[Array, "B S"]  # (1) within the group
    weights: Float[Array, "B S"]  # of the merge; they sum to 1 over each group
    coarse: Representatives | None  # of the groups before re-allocation; this and the next are None with coarse off
    share: Float[Array, "B M"] | None  # (5), the share of the tokens that each group is allocated


@no_type_check
@struct.dataclass
class Compressed:
    """Memory vectors: the first mask.sum() slots of each row are filled, the rest are zero."""

    memory: Float[Array, "B M D"]
    mask: Bool[Array, "B M"]
    aux: Aux


def compress(
    states: Float[Array, "C S D"],
    query: Float[Array, "B D"],
    lengths: Int[Array, " C"],
    rates: Int[Array, " B"],
    scalars: Tree,
    settings: Compression,
    slots: int,
    *,
    norms: mig.Norms | None = None,
    kept: Bool[Array, "B S"] | None = None,
    kernels: str | None = None,
    mesh: Mesh | None = None,
) -> Compressed:
    """Merge the first ``lengths`` states of each row into about lengths / rates memory vectors, in float32 at least.

    ``query`` is the query vector (3); ``scalars`` holds alpha_coarse, beta_coarse, alpha_fine and beta_fine; ``slots``
    is M, at least max_groups(S, smallest rate); ``kernels`` is one of kernels.dispatch.NAMES, or None. Each row has its
    own rate. A row of length 0 gives no memory. B / C queries in a row are about one row of states. ``norms`` of the
    states, if computed already. ``kept`` tokens become vectors of their own, and ``rates`` is that of the others: see
    ``set_apart``.

    With a ``mesh`` of several devices, each computes its own rows (axes data and fsdp; rows that do not divide are
    replicated) and its own shard of every row's tokens (axis context; see ``context_parallel``).
    """
    run = functools.partial(compress_rows, settings=settings, slots=slots, kernels=kernels)
    length = states.shape[1]
    if mesh is None or mesh.size == 1:
        return run(states, query, lengths, rates, scalars, norms=norms, kept=kept)
    shards = mesh.shape["context"]
    split = Split("context", shards, mesh.axis_names) if shards > 1 else WHOLE
    more = ((0, 0), (0, -length % shards))
    states = jnp.pad(states, (*more, (0, 0)))
    norms, kept = jax.tree.map(lambda x: jnp.pad(x, more), (norms, kept))
    rows = row_axes(states.shape[0], mesh)
    by_row, by_token = PartitionSpec(rows), PartitionSpec(rows, "context" if shards > 1 else None)
    names = (field.name for field in dataclasses.fields(Aux))
    places: dict[str, Any] = {name: by_token if name in PER_TOKEN else by_row for name in names}
    on_each = jax.shard_map(
        lambda *own: run(*own[:5], norms=own[5], kept=own[6], sequence=split),
        mesh=mesh,
        in_specs=(by_token, by_row, by_row, by_row, PartitionSpec(), by_token, by_row),
        out_specs=Compressed(**{"memory": by_row, "mask": by_row, "aux": Aux(**places)}),
        check_vma=False,
    )
    out = on_each(states, query, lengths, rates, scalars, norms, kept)
    if states.shape[1] == length:
        return out
    aux = dataclasses.replace(out.aux, **{name: getattr(out.aux, name)[:, :length] for name in PER_TOKEN})
    return dataclasses.replace(out, aux=aux)


def compress_rows(
    states: Float[Array, "C S D"],
    query: Float[Array, "B D"],
    lengths: Int[Array, " C"],
    rates: Int[Array, " B"],
    scalars: Tree,
    *,
    settings: Compression,
    slots: int,
    norms: mig.Norms | None = None,
    kept: Bool[Array, "B T"] | None = None,
    kernels: str | None = None,
    sequence: Whole | Split = WHOLE,
) -> Compressed:
    """Section 4 of the paper on one device: ``compress`` of the device's own rows and tokens (``sequence``). ``kept``
    covers all T tokens of a row."""
    # Padding may hold infinities, whose gradient would be 0 * inf = NaN, so it is zeroed; the merge ignores it.
    position = sequence.position(states.shape[1])
    real = (position[None, :] < lengths[:, None])[:, :, None]
    directions, inverse = mig.directions(jnp.where(real, states, 0), norms)
    relevance, lengths = mig.relevance(directions, inverse, query), dispatch.for_rows(lengths, query.shape[0])
    coarse = share = None
    with jax.named_scope("coarse"):
        if settings.coarse:
            sizes, share, coarse = coarse_sizes(
                *jax.lax.stop_gradient((directions, inverse, relevance)),
                lengths, rates, scalars, settings, slots, kernels, sequence, kept,
            )  # fmt: skip
        else:
            sizes = (exact_sizes if settings.exact_groups else equal_sizes)(others(lengths, kept), rates, slots)
        all_groups, mask = assign(sizes, lengths, states.shape[1] * sequence.devices)
        if kept is not None:
            sizes, all_groups, mask = set_apart(sizes, lengths, kept, slots)
        group = sequence.own(all_groups)
    with jax.named_scope("fine"):
        redundancy = jnp.zeros_like(relevance)
        if settings.fine_redundancy:
            redundancy = sequence.redundancy(directions, inverse, all_groups, kernels)
        gain = mig.gain(relevance, redundancy, scalars["alpha_fine"], scalars["beta_fine"])
        merged_by = gain if settings.fine else jnp.zeros_like(gain)
        memory, normalizer = sequence.merge(states, merged_by, all_groups, slots, kernels)  # (7), (8)
        weight = weights(merged_by, normalizer, group)
    aux = Aux(sizes, group, relevance, redundancy, gain, weight, coarse, share)
    return Compressed(memory, mask, aux)


def coarse_sizes(
    directions: Float[Array, "C S D"],
    inverse: Float[Array, "C S"],
    relevance: Float[Array, "B S"],
    lengths: Int[Array, " B"],
    rates: Int[Array, " B"],
    scalars: Tree,
    settings: Compression,
    slots: int,
    kernels: str | None = None,
    sequence: Whole | Split = WHOLE,
    kept: Bool[Array, "B T"] | None = None,
) -> tuple[Int[Array, "B M"], Float[Array, "B M"], Representatives]:
    """Group sizes by the MIG of one representative per group of ``rates`` consecutive tokens, (4) to (6); also the
    shares (5) and the representatives. Of the tokens that are not ``kept``, as if there were no others."""
    inverse, relevance = sequence.all(inverse), sequence.all(relevance)
    position = jnp.arange(relevance.shape[1], dtype=jnp.int32)[None, :]
    group = jnp.where(position < lengths[:, None], position // rates[:, None], -1)
    if kept is not None:
        group = jnp.where(kept | (group < 0), -1, (jnp.cumsum(~kept, axis=1, dtype=jnp.int32) - 1) // rates[:, None])
    found = representatives(directions, inverse, relevance, group, scalars, settings, slots, kernels, sequence)
    share = shares(found.mig, found.exists)
    return reallocate(found.mig, found.exists, others(lengths, kept)), share, found


def representatives(
    directions: Float[Array, "C S D"],
    inverse: Float[Array, "C T"],
    relevance: Float[Array, "B T"],
    group: Int[Array, "B T"],
    scalars: Tree,
    settings: Compression,
    slots: int,
    kernels: str | None = None,
    sequence: Whole | Split = WHOLE,
) -> Representatives:
    """(4), and (1) among the representatives of the groups. Of ``directions``, a device has its own S tokens, of the
    scalars all T tokens of the row."""
    token, exists = most_relevant(relevance, group, slots)
    chosen = sequence.vectors(directions, token)
    redundancy = jnp.zeros(token.shape, relevance.dtype)
    if settings.coarse_redundancy:
        chosen_inverse = dispatch.of_contexts(inverse, token)
        redundancy = mig.redundancy(chosen, chosen_inverse, jnp.where(exists, 0, -1), kernels)
    chosen_relevance = jnp.take_along_axis(relevance, token, axis=1)
    gain = mig.gain(chosen_relevance, redundancy, scalars["alpha_coarse"], scalars["beta_coarse"])
    return Representatives(token, exists, chosen_relevance, redundancy, gain)


def most_relevant(
    relevance: Float[Array, "B S"], group: Int[Array, "B S"], slots: int
) -> tuple[Int[Array, "B M"], Bool[Array, "B M"]]:
    """(4): the index of the most relevant token of each group (ties: the first), and whether the group exists."""
    length = relevance.shape[1]
    position = jnp.arange(length, dtype=jnp.int32)

    def row(relevance, group):
        best = jax.ops.segment_max(relevance, group, slots)
        is_best = (group >= 0) & (relevance == best[group])
        return jax.ops.segment_min(jnp.where(is_best, position, length), group, slots)

    index = jax.vmap(row)(relevance, group)
    exists = index < length
    return jnp.where(exists, index, 0), exists


def shares(gain: Float[Array, "B M"], exists: Bool[Array, "B M"]) -> Float[Array, "B M"]:
    """(5): softmax(−G) over the groups that exist."""
    return jax.nn.softmax(jnp.where(exists, -gain, jnp.finfo(gain.dtype).min), axis=1)


def reallocate(gain: Float[Array, "B M"], exists: Bool[Array, "B M"], lengths: Int[Array, " B"]) -> Int[Array, "B M"]:
    """(5), (6): size_i = floor(n · softmax(−G)_i); the remaining tokens go one each to the groups with the largest
    fractional parts (ties: the first). The sizes of a row sum to its length exactly.
    """
    share = shares(gain, exists)
    quota = jnp.where(exists, lengths.astype(gain.dtype)[:, None] * share, 0.0)  # (6)
    size = jnp.floor(quota).astype(jnp.int32)
    left = lengths - jnp.sum(size, axis=1, dtype=jnp.int32)
    fraction = jnp.where(exists, quota - size.astype(quota.dtype), -1.0)
    rank = jnp.argsort(jnp.argsort(-fraction, axis=1, stable=True), axis=1, stable=True).astype(jnp.int32)
    return size + (rank < left[:, None]).astype(jnp.int32)


def equal_sizes(lengths: Int[Array, " B"], rates: Int[Array, " B"], slots: int) -> Int[Array, "B M"]:
    """Sizes with coarse off: m = max(1, round(n / r)) groups, halves rounded to even, the first n mod m one larger."""
    whole, rest = lengths // rates, lengths % rates
    up = (2 * rest > rates) | ((2 * rest == rates) & (whole % 2 == 1))
    groups = jnp.maximum(1, whole + up.astype(lengths.dtype))[:, None]
    slot = jnp.arange(slots, dtype=lengths.dtype)[None, :]
    size = lengths[:, None] // groups + (slot < lengths[:, None] % groups).astype(lengths.dtype)
    return jnp.where(slot < groups, size, 0)


def exact_sizes(lengths: Int[Array, " B"], rates: Int[Array, " B"], slots: int) -> Int[Array, "B M"]:
    """Sizes of ceil(n / r) groups of exactly r tokens, but for a shorter last one."""
    before = jnp.arange(slots, dtype=lengths.dtype)[None, :] * rates[:, None]
    return jnp.clip(lengths[:, None] - before, 0, rates[:, None])


def assign(
    sizes: Int[Array, "B M"], lengths: Int[Array, " B"], length: int
) -> tuple[Int[Array, "B S"], Bool[Array, "B M"]]:
    """Cut tokens left to right into groups of ``sizes``; empty groups take no slot. Returns the slot of each token (-1
    for padding) and which slots are filled."""
    position = jnp.arange(length, dtype=jnp.int32)
    group = jax.vmap(lambda ends: jnp.searchsorted(ends, position, side="right"))(jnp.cumsum(sizes, axis=1))
    slot = jnp.cumsum((sizes > 0).astype(jnp.int32), axis=1) - 1
    group = jnp.take_along_axis(slot, jnp.minimum(group, sizes.shape[1] - 1), axis=1)
    filled = jnp.arange(sizes.shape[1])[None, :] < jnp.sum(sizes > 0, axis=1)[:, None]
    return jnp.where(position[None, :] < lengths[:, None], group, -1), filled


def others(lengths: Int[Array, " B"], kept: Bool[Array, "B S"] | None) -> Int[Array, " B"]:
    """How many tokens of each row are not ``kept``, which are real ones."""
    return lengths if kept is None else lengths - jnp.sum(kept, axis=1, dtype=lengths.dtype)


def set_apart(
    sizes: Int[Array, "B M"], lengths: Int[Array, " B"], kept: Bool[Array, "B S"], slots: int
) -> tuple[Int[Array, "B M"], Int[Array, "B S"], Bool[Array, "B M"]]:
    """Groups with ``kept`` tokens: each is a group, and the others are cut into groups of ``sizes`` as if they stood
    next to each other; a group with kept tokens inside becomes two. Returns the sizes of the groups in order, the slot
    of each token and which slots are filled."""
    position = jnp.arange(kept.shape[1], dtype=jnp.int32)[None, :]
    real = position < lengths[:, None]
    among = jnp.cumsum(~kept, axis=1, dtype=jnp.int32) - 1
    cut = jax.vmap(lambda ends, at: jnp.searchsorted(ends, at, side="right"))(jnp.cumsum(sizes, axis=1), among)
    label = jnp.where(kept, -1 - position, cut)  # a label of its own for each kept token
    begins = jnp.concatenate([jnp.ones_like(kept[:, :1]), label[:, 1:] != label[:, :-1]], axis=1)
    group = jnp.where(real, jnp.cumsum(begins, axis=1, dtype=jnp.int32) - 1, -1)
    slot = jnp.arange(slots, dtype=jnp.int32)
    sizes = jax.vmap(lambda group: jax.ops.segment_sum(jnp.ones_like(group), group, slots))(group)
    return sizes, group, slot[None, :] < jnp.sum(begins & real, axis=1, dtype=jnp.int32)[:, None]
