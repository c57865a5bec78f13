"""Decoding of answers in batches: prefill over [memory; embed(Q)], then one token at a time with a KV cache.

``begin`` and ``proceed`` are the two programs; ``greedy`` is both in one. ``slots`` decodes rows that start and end
independently of each other.
"""

import dataclasses
from typing import no_type_check

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from comi_jax.config import Generation
from comi_jax.model import backbone as lm
from comi_jax.model import sampling
from comi_jax.model.architecture import Architecture
from comi_jax.model.cache import KVCache, empty_cache, with_room
from comi_jax.model.comi import adapters
from comi_jax.model.sampling import Rules
from comi_jax.params import Tree


@no_type_check
@struct.dataclass
class Generated:
    """Token ids. The first ``length`` of each row are real, including the end-of-sequence token if it was generated."""

    ids: Int[Array, "B A"]
    length: Int[Array, " B"]


@no_type_check
@struct.dataclass
class Decoding:
    """Answers of which ``step`` tokens are chosen: what decoding goes on from. The first ``count`` tokens of each row
    are real, as in Generated; 0 follows."""

    cache: KVCache
    start: Int[Array, " B"]  # the prompt's length
    step: Int[Array, ""]
    token: Int[Array, " B"]  # the last one chosen, which is not in the cache yet
    seen: Bool[Array, "B V"]  # tokens of the answer so far
    done: Bool[Array, " B"]
    ids: Int[Array, "B A"]
    logprobs: Float[Array, "B A"]  # of each token under the model
    count: Int[Array, " B"]


def begin(
    params: Tree,
    arch: Architecture,
    prompt: Float[Array, "B T D"],
    prompt_length: Int[Array, " B"],
    rules: Rules,
    stop: tuple[int, ...],
    room: int,
    *,
    sampled: bool,
    cache: KVCache | None = None,
    start: Int[Array, " B"] | None = None,
) -> Decoding:
    """Read the embedded ``prompt`` rows and choose the first token of each answer, for answers of up to ``room``
    tokens. A ``cache`` of T + ``room`` further positions holds what is before the prompt: ``start`` tokens of a row."""
    decoder, (batch, length, _) = params["decoder"], prompt.shape
    lora, vocabulary = adapters(params, arch), arch.backbone.vocab_size
    if cache is None:
        cache = empty_cache(arch.backbone, arch.backbone.num_hidden_layers, batch, length + room, arch.dtype)
    with jax.named_scope("prefill"):
        states, cache = lm.forward(
            decoder, prompt, arch.backbone, cache=cache, start=start, lora=lora, runtime=arch.runtime
        )
        assert cache is not None  # forward returns the one it was given
        last = jnp.take_along_axis(states, (prompt_length - 1)[:, None, None], axis=1)[:, 0]
    begun = Decoding(
        cache=cache,
        start=prompt_length if start is None else start + prompt_length,
        step=jnp.int32(0),
        token=jnp.zeros((batch,), jnp.int32),
        seen=jnp.zeros((batch, vocabulary), bool),
        done=jnp.zeros((batch,), bool),
        ids=jnp.zeros((batch, room), jnp.int32),
        logprobs=jnp.zeros((batch, room), jnp.float32),
        count=jnp.zeros((batch,), jnp.int32),
    )
    return _choose(lm.next_logits(decoder, last, arch.runtime), begun, rules, stop, sampled)


def proceed(
    params: Tree,
    arch: Architecture,
    decoding: Decoding,
    rules: Rules,
    stop: tuple[int, ...],
    until: Int[Array, ""],
    *,
    sampled: bool,
) -> Decoding:
    """``decoding`` until ``until`` tokens are chosen, at most as many as there is room for, or every row is done. A
    row's result does not depend on the other rows."""
    decoder, lora = params["decoder"], adapters(params, arch)

    def unfinished(decoding):
        return (decoding.step < until) & ~jnp.all(decoding.done)

    def one_token(decoding):
        x = lm.embed_tokens(decoder, decoding.token[:, None], arch.dtype)
        at = decoding.start + decoding.step - 1
        states, cache = lm.forward(
            decoder, x, arch.backbone, cache=decoding.cache, start=at, lora=lora, runtime=arch.runtime
        )
        logits = lm.next_logits(decoder, states[:, 0], arch.runtime)
        return _choose(logits, dataclasses.replace(decoding, cache=cache), rules, stop, sampled)

    with jax.named_scope("decode"):
        return jax.lax.while_loop(unfinished, one_token, decoding)


def _choose(
    logits: Float[Array, "B V"], decoding: Decoding, rules: Rules, stop: tuple[int, ...], sampled: bool
) -> Decoding:
    """``decoding`` with a token chosen by ``logits`` in each row that is not done."""
    step, done = decoding.step, decoding.done
    rows, stops = jnp.arange(logits.shape[0]), jnp.array(stop, jnp.int32)
    places = jnp.broadcast_to(step, rows.shape)
    token, logprob = sampling.choose(logits, decoding.seen, places, rules, sampled)
    return dataclasses.replace(
        decoding,
        step=step + 1,
        token=token,
        seen=decoding.seen.at[rows, token].set(True),
        done=done | jnp.any(token[:, None] == stops[None, :], axis=1),
        ids=decoding.ids.at[:, step].set(jnp.where(done, 0, token)),
        logprobs=decoding.logprobs.at[:, step].set(jnp.where(done, 0.0, logprob.astype(jnp.float32))),
        count=decoding.count + (~done).astype(jnp.int32),
    )


def take_rows(decoding: Decoding, rules: Rules, rows: Int[Array, " R"]) -> tuple[Decoding, Rules]:
    """The ``rows`` of a batch as a smaller batch."""
    apart = {"cache": jax.tree.map(lambda x: x[:, rows], decoding.cache), "step": decoding.step}
    names = (field.name for field in dataclasses.fields(decoding) if field.name not in apart)
    taken = dataclasses.replace(decoding, **apart, **{name: getattr(decoding, name)[rows] for name in names})
    return taken, jax.tree.map(lambda x: x[rows], rules)


def greedy(
    params: Tree,
    arch: Architecture,
    prompt: Float[Array, "B T D"],
    prompt_length: Int[Array, " B"],
    options: Generation,
    stop: tuple[int, ...],
    *,
    before: KVCache | None = None,
    start: Int[Array, " B"] | None = None,
) -> Generated:
    """Greedy continuation of embedded ``prompt`` rows, until one of the tokens ``stop`` or ``options.max_new_tokens``.
    A row's result does not depend on the other rows.

    With ``before``, row b's prompt follows the first start[b] positions of that cache; what is behind them is ignored.
    """
    new = options.max_new_tokens
    rules = jax.tree.map(jnp.asarray, sampling.rules(dataclasses.replace(options, temperature=0.0), prompt.shape[0]))
    cache = None if before is None else with_room(before, prompt.shape[1] + new)
    decoding = begin(params, arch, prompt, prompt_length, rules, stop, new, sampled=False, cache=cache, start=start)
    decoding = proceed(params, arch, decoding, rules, stop, jnp.int32(new), sampled=False)
    return Generated(decoding.ids, decoding.count)
