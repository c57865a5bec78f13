"""The model: a context becomes what the decoder reads, and the decoder answers, as functions over one parameter tree.

    X -> encoder -> H, Q after X -> encoder -> q̄ (3)         ``encoder``: once for a context; for every question
    H, q̄ -> compress (4)-(8) -> LSA -> memory                ``comi_memory``; of other systems: ``systems``
    [memory; embed(Q); embed(answer)] -> decoder -> loss on the answer (9)

COMI's tree has the parts "encoder", "lsa", "decoder", "mig" (the four scalars) and, with adapters, "lora".
A context is cut into G segments of at most S tokens; each is encoded, compressed and aligned independently.
"""

import dataclasses
import functools
from typing import no_type_check

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from comi_jax.model import backbone as lm
from comi_jax.model import lora as lora_module
from comi_jax.model.batch import Batch
from comi_jax.model.cache import ContextKV, KVCache, continued
from comi_jax.model.encoder import join_rows
from comi_jax.model.memory import Memory
from comi_jax.model.shape import Architecture
from comi_jax.model.systems import system_of
from comi_jax.params import Tree

RECONSTRUCTED = 512  # tokens of a context whose logits are computed at a time


@no_type_check
@struct.dataclass
class LossSums:
    """Sums over answer tokens, to be divided by ``tokens`` after summing over micro-batches and devices."""

    loss: Float[Array, ""]
    correct: Float[Array, ""]
    tokens: Float[Array, ""]
    vectors: Float[Array, ""] | float = 0.0  # memory vectors, or entries, of the examples that have an answer


@no_type_check
@struct.dataclass
class Prompt:
    """How the decoder begins: keys and values that are there ``before``, and the embedded ``rows`` that it reads next,
    of which the first ``length`` tokens are real."""

    rows: Float[Array, "B T D"]
    length: Int[Array, " B"]
    before: ContextKV | None = None

    def cache(self, room: int) -> tuple[KVCache | None, Int[Array, " B"] | None]:
        """What is before the rows, as a cache with ``room`` more positions, and where the rows start in it; None, None
        if nothing is."""
        return (None, None) if self.before is None else continued(self.before, self.length.shape[0], room)


def memory_of(
    params: Tree, arch: Architecture, batch: Batch, min_rate: int, dropout_key: Array | None = None
) -> Memory:
    """What stands for the contexts in the decoder, for each example of ``batch``, by the system of ``arch``.

    ``min_rate`` is the static lower bound of the rates in the batch; it sets the number of slots of a segment.
    """
    return system_of(arch).memory_of(params, arch, batch, min_rate, dropout_key)


def prompt(params: Tree, arch: Architecture, memory: Memory, batch: Batch) -> Prompt:
    """The decoder's prompt, [memory; embed(Q)]. ICAE has a learned vector between the two."""
    query = lm.embed_tokens(params["decoder"], batch.query, arch.dtype, arch.runtime)
    length = batch.query_length
    if "answering" in params.get("tasks", {}):
        query, length = jnp.concatenate([task(params, arch, "answering", query.shape[0]), query], axis=1), length + 1
    return Prompt(*join_rows(memory.vectors.astype(arch.dtype), memory.length, query, length), memory.before)


def task(params: Tree, arch: Architecture, name: str, rows: int) -> Float[Array, "B 1 D"]:
    """The learned vector of task ``name``, for each row."""
    vector = params["tasks"][name].astype(arch.dtype)
    return jnp.broadcast_to(vector[None, None, :], (rows, 1, vector.shape[0]))


def adapters(params: Tree, arch: Architecture, dropout_key: Array | None = None) -> lora_module.Adapters | None:
    """The decoder's adapters, or None if the model has none."""
    return lora_module.adapters(params["lora"], arch.lora, dropout_key) if arch.lora.rank else None


def answer_logits(
    params: Tree, arch: Architecture, memory: Memory, batch: Batch, dropout_key: Array | None = None
) -> Float[Array, "B A V"]:
    """The logits that predict each answer token from memory, query and the preceding answer tokens."""
    with jax.named_scope("decode"):
        before = prompt(params, arch, memory, batch)
        states = predicting(params, arch, before, batch.answer, batch.answer_length, dropout_key)
        # Where tokens are split, by columns, as the gradient arrives: XLA would hold it whole on every device.
        return lm.logits(params["decoder"], lm.split_columns(states, arch.runtime))


def predicting(
    params: Tree,
    arch: Architecture,
    before: Prompt,
    target: Int[Array, "B A"],
    target_length: Int[Array, " B"],
    dropout_key: Array | None = None,
) -> Float[Array, "B A D"]:
    """The decoder's states from which each token of ``target`` is predicted, which follows the prompt ``before``."""
    embedded = lm.embed_tokens(params["decoder"], target, arch.dtype, arch.runtime)
    rows, _ = join_rows(before.rows, before.length, embedded, target_length)
    rows = jnp.pad(rows, ((0, 0), (0, -rows.shape[1] % arch.runtime.context_shards), (0, 0)))
    rows = lm.split_columns(rows, arch.runtime)
    lora = adapters(params, arch, dropout_key)
    states, _ = lm.forward(
        params["decoder"], rows, arch.backbone, context=before.before, lora=lora, runtime=arch.runtime
    )
    predicts = before.length[:, None] - 1 + jnp.arange(target.shape[1], dtype=jnp.int32)[None, :]
    return jnp.take_along_axis(states, predicts[:, :, None], axis=1)


def loss(params: Tree, arch: Architecture, batch: Batch, min_rate: int, dropout_key: Array | None = None) -> LossSums:
    """(9): next-token cross-entropy on the answer tokens, summed, and the number of correct predictions."""
    memory = memory_of(params, arch, batch, min_rate, dropout_key)
    scores = answer_logits(params, arch, memory, batch, dropout_key)
    vectors = jnp.sum(jnp.where(batch.answer_length > 0, memory.entries, 0).astype(scores.dtype))
    return dataclasses.replace(sum_loss(scores, batch.answer, batch.answer_length), vectors=vectors)


def reconstruction_loss(
    params: Tree, arch: Architecture, batch: Batch, min_rate: int, dropout_key: Array | None = None
) -> LossSums:
    """Autoencoding: cross-entropy of each context's own tokens and the end-of-sequence token, read after [memory; task
    vector]. Each context is reconstructed once, at the rate of its first example."""
    first = one_per_context(batch)
    with jax.named_scope("reconstruct"):
        memory = memory_of(params, arch, first, min_rate, dropout_key)
        one = jnp.ones_like(memory.length)
        asks = task(params, arch, "autoencoding", one.shape[0])
        rows, length = join_rows(memory.vectors.astype(arch.dtype), memory.length, asks, one)
        end = jnp.take_along_axis(first.answer, jnp.maximum(first.answer_length - 1, 0)[:, None], axis=1)
        target, target_length = join_rows(first.context, first.context_length, end, one)
        states = predicting(params, arch, Prompt(rows, length, memory.before), target, target_length, dropout_key)
        asked = jnp.sum(batch.answer_length.reshape(-1, batch.share) > 0, axis=1)
        sums = sum_loss_in_slices(params, states, target, jnp.where(asked > 0, target_length, 0))
    return dataclasses.replace(sums, vectors=jnp.sum((asked * memory.entries).astype(sums.loss.dtype)))


def one_per_context(batch: Batch) -> Batch:
    """The first example of each context."""
    names = ("query", "query_length", "answer", "answer_length", "rate")
    return dataclasses.replace(batch, **{name: getattr(batch, name)[:: batch.share] for name in names})


def sum_loss_in_slices(
    params: Tree, states: Float[Array, "B A D"], target: Int[Array, "B A"], length: Int[Array, " B"]
) -> LossSums:
    """``sum_loss`` of the logits of ``states``, a slice of tokens at a time, as all logits of a long context would not
    fit into memory."""
    size = min(RECONSTRUCTED, target.shape[1])
    short = -target.shape[1] % size
    states, target = jnp.pad(states, ((0, 0), (0, short), (0, 0))), jnp.pad(target, ((0, 0), (0, short)))
    starts = jnp.arange(0, target.shape[1], size, dtype=jnp.int32)

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def add(total, start):
        part, ids = (jax.lax.dynamic_slice_in_dim(x, start, size, axis=1) for x in (states, target))
        sums = sum_loss(lm.logits(params["decoder"], part), ids, jnp.clip(length - start, 0, size))
        return jax.tree.map(jnp.add, total, (sums.loss, sums.correct, sums.tokens)), None

    zero = jnp.zeros((), jnp.promote_types(states.dtype, jnp.float32))
    return LossSums(*jax.lax.scan(add, (zero, zero, zero), starts)[0])


def sum_loss(scores: Float[Array, "B A V"], answer: Int[Array, "B A"], length: Int[Array, " B"]) -> LossSums:
    """Cross-entropy of ``answer`` under ``scores``, over each row's first ``length`` tokens."""
    real: Bool[Array, "B A"] = jnp.arange(answer.shape[1])[None, :] < length[:, None]
    log_probability = jax.nn.log_softmax(scores, axis=-1)
    nll = -jnp.take_along_axis(log_probability, answer[:, :, None], axis=2)[:, :, 0]
    right = jnp.argmax(scores, axis=-1).astype(answer.dtype) == answer
    return LossSums(
        loss=jnp.sum(jnp.where(real, nll, 0.0)),
        correct=jnp.sum((real & right).astype(scores.dtype)),
        tokens=jnp.sum(real.astype(scores.dtype)),
    )
