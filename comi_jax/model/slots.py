"""Decoding in slots: S answers in one KV cache, each at its own position, which begin and end independently.

``prefill_into_slot`` puts a prompt into a free slot, ``decode_step`` chooses the next token of every live slot. Both
always compute in the same shapes: a slot's tokens are a function of its own prompt and rules, bit for bit, whatever the
other slots hold.
"""

import dataclasses
from typing import no_type_check

import jax
import jax.numpy as jnp
from flax import struct
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from comi_jax.devices import sharding
from comi_jax.model import backbone as lm
from comi_jax.model import sampling
from comi_jax.model.architecture import Architecture
from comi_jax.model.cache import ContextKV, KVCache, continued, empty_cache
from comi_jax.model.comi import adapters
from comi_jax.model.sampling import Rules
from comi_jax.params import Tree


@no_type_check
@struct.dataclass
class Slots:
    """The state of S decode slots; B of the shapes is S here, and T the length of a slot."""

    cache: KVCache
    position: Int[Array, " B"]  # where the last chosen token goes in the cache
    token: Int[Array, " B"]  # the last one chosen
    step: Int[Array, " B"]  # tokens chosen so far
    seen: Bool[Array, "B V"]  # these tokens
    rules: Rules


@no_type_check
@struct.dataclass
class Chosen:
    """The chosen token of each slot and its log-probability under the model; of live slots only."""

    token: Int[Array, " B"]
    logprob: Float[Array, " B"]


def empty_slots(arch: Architecture, slots: int, length: int) -> Slots:
    """``slots`` free slots for ``length`` positions each, prompt and answer together."""
    numbers = jnp.zeros((slots,), jnp.int32)
    ones = jnp.ones((slots,), jnp.float32)
    return Slots(
        cache=empty_cache(arch.backbone, arch.backbone.num_hidden_layers, slots, length, arch.dtype),
        position=numbers,
        token=numbers,
        step=numbers,
        seen=jnp.zeros((slots, arch.backbone.vocab_size), bool),
        rules=Rules(ones, jnp.zeros_like(ones), numbers, ones, jnp.zeros((slots, 2), jnp.uint32)),
    )


def shardings(slots: Slots, mesh: Mesh) -> Slots:
    """The sharding of each array on ``mesh``: the cache as attention splits it, by slots and by heads where they
    divide; all else whole on every device."""
    whole, (_, rows, _, heads, _) = NamedSharding(mesh, PartitionSpec()), slots.cache.k.shape
    by_heads = "tensor" if heads % mesh.shape["tensor"] == 0 else None
    split = NamedSharding(mesh, PartitionSpec(None, sharding.row_axes(rows, mesh), None, by_heads))
    cache = jax.tree.map(lambda _: split, slots.cache)
    return dataclasses.replace(jax.tree.map(lambda _: whole, slots), cache=cache)


def in_place(slots: Slots, arch: Architecture) -> Slots:
    """``slots`` with its ``shardings``, which every program takes and gives, so that each is compiled once."""
    mesh = arch.runtime.mesh
    return slots if mesh is None else jax.lax.with_sharding_constraint(slots, shardings(slots, mesh))


def prefill_into_slot(
    params: Tree,
    arch: Architecture,
    slots: Slots,
    slot: Int[Array, ""],
    prompt: Float[Array, "1 T D"],
    prompt_length: Int[Array, " 1"],
    rules: Rules,
    before: ContextKV | None = None,
) -> tuple[Slots, Chosen]:
    """``slots`` with ``slot`` holding a prompt and the first token of its answer, chosen by ``rules`` (of one row). The
    prompt follows the keys and values ``before``, if any; both fit into a slot without their padding, and each with
    it."""
    decoder, width, length = params["decoder"], prompt.shape[1], slots.cache.k.shape[2]
    with jax.named_scope("prefill"):
        start = None
        cache = empty_cache(arch.backbone, arch.backbone.num_hidden_layers, 1, width, arch.dtype)
        if before is not None:
            cache, start = continued(before, 1, width)
        states, cache = lm.forward(
            decoder, prompt, arch.backbone, cache=cache, start=start, lora=adapters(params, arch), runtime=arch.runtime
        )
        last = jnp.take_along_axis(states, (prompt_length - 1)[:, None, None], axis=1)[:, 0]
    nothing = jnp.zeros((1, arch.backbone.vocab_size), bool)
    token, logprob = sampling.choose(
        lm.next_logits(decoder, last, arch.runtime), nothing, jnp.zeros((1,), jnp.int32), rules, sampled=True
    )

    def put(whole, row):
        return jax.lax.dynamic_update_slice(whole, row, (slot, *(0,) * (whole.ndim - 1)))

    def put_cache(whole, row):  # the rest of the slot becomes 0, so that nothing of the answer before is left in it
        row = row[:, :, :length]  # what is beyond is padding
        row = jnp.pad(row, ((0, 0), (0, 0), (0, length - row.shape[2]), (0, 0), (0, 0)))
        return jax.lax.dynamic_update_slice(whole, row.astype(whole.dtype), (0, slot, 0, 0, 0))

    return Slots(
        cache=jax.tree.map(put_cache, slots.cache, cache),
        position=put(slots.position, prompt_length if start is None else start + prompt_length),
        token=put(slots.token, token),
        step=put(slots.step, jnp.ones((1,), jnp.int32)),
        seen=put(slots.seen, nothing.at[0, token[0]].set(True)),
        rules=jax.tree.map(put, slots.rules, rules),
    ), Chosen(token, logprob.astype(jnp.float32))


def decode_step(params: Tree, arch: Architecture, slots: Slots, live: Bool[Array, " B"]) -> tuple[Slots, Chosen]:
    """``slots`` with one more token in each ``live`` slot; the others stay as they are."""
    decoder, length = params["decoder"], slots.cache.k.shape[2]
    with jax.named_scope("decode"):
        x = lm.embed_tokens(decoder, slots.token[:, None], arch.dtype)
        at = jnp.where(live, slots.position, length)  # a write beyond the end is dropped
        states, cache = lm.forward(
            decoder, x, arch.backbone, cache=slots.cache, start=at, lora=adapters(params, arch), runtime=arch.runtime
        )
        assert cache is not None  # forward returns the one it was given
        # A slot that is not live draws nothing, so that a forgotten temperature costs no sort of the vocabulary.
        drawing = jnp.where(live, slots.rules.temperature, 0.0)
        rules = dataclasses.replace(slots.rules, temperature=drawing)
        token, logprob = sampling.choose(
            lm.next_logits(decoder, states[:, 0], arch.runtime), slots.seen, slots.step, rules, sampled=True
        )
    rows, one = jnp.arange(live.shape[0]), live.astype(jnp.int32)
    return Slots(
        cache=cache,
        position=slots.position + one,
        token=jnp.where(live, token, slots.token),
        step=slots.step + one,
        seen=slots.seen.at[rows, token].max(live),
        rules=slots.rules,
    ), Chosen(token, logprob.astype(jnp.float32))
