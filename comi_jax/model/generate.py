"""Greedy decoding in one jitted call: prefill over [memory; embed(Q)], then one token at a time with a KV cache."""

from typing import no_type_check

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from comi_jax.config import Generation
from comi_jax.model import backbone as lm
from comi_jax.model.architecture import Architecture
from comi_jax.model.cache import empty_cache
from comi_jax.model.comi import adapters
from comi_jax.params import Tree


@no_type_check
@struct.dataclass
class Generated:
    """Token ids. The first ``length`` of each row are real, including the end-of-sequence token if it was generated."""

    ids: Int[Array, "B A"]
    length: Int[Array, " B"]


def penalize(scores: Float[Array, "B V"], seen: Bool[Array, "B V"], penalty: float) -> Float[Array, "B V"]:
    """Divide the positive and multiply the negative scores of ``seen`` tokens by ``penalty`` (Keskar et al. 2019)."""
    return jnp.where(seen, jnp.where(scores > 0, scores / penalty, scores * penalty), scores)


def greedy(
    params: Tree,
    arch: Architecture,
    prompt: Float[Array, "B T D"],
    prompt_length: Int[Array, " B"],
    options: Generation,
    stop: tuple[int, ...],
) -> Generated:
    """Greedy continuation of embedded ``prompt`` rows, until one of the tokens ``stop`` or ``options.max_new_tokens``.
    A row's result does not depend on the other rows."""
    decoder, new = params["decoder"], options.max_new_tokens
    batch, length, _ = prompt.shape
    lora = adapters(params, arch)
    cache = empty_cache(arch.backbone, arch.backbone.num_hidden_layers, batch, length + new, arch.dtype)
    with jax.named_scope("prefill"):
        states, cache = lm.forward(decoder, prompt, arch.backbone, cache=cache, lora=lora, runtime=arch.runtime)
        last = jnp.take_along_axis(states, (prompt_length - 1)[:, None, None], axis=1)[:, 0]
    rows = jnp.arange(batch)
    stops = jnp.array(stop, jnp.int32)

    def choose(states, step, seen, done, ids, count):
        """Pick the token that follows ``states`` and write it at index ``step`` of each unfinished row."""
        scores = penalize(lm.logits(decoder, states), seen, options.repetition_penalty)
        token = jnp.argmax(scores, axis=-1).astype(jnp.int32)
        ids = ids.at[:, step].set(jnp.where(done, 0, token))
        count = count + (~done).astype(jnp.int32)
        done = done | jnp.any(token[:, None] == stops[None, :], axis=1)
        return token, step + 1, seen.at[rows, token].set(True), done, ids, count

    def unfinished(carry):
        _, (_, step, _, done, _, _) = carry
        return (step < new) & ~jnp.all(done)

    def one_token(carry):
        cache, (token, step, seen, done, ids, count) = carry
        x = lm.embed_tokens(decoder, token[:, None], arch.dtype)
        start = prompt_length + step - 1
        states, cache = lm.forward(decoder, x, arch.backbone, cache=cache, start=start, lora=lora, runtime=arch.runtime)
        return cache, choose(states[:, 0], step, seen, done, ids, count)

    with jax.named_scope("decode"):
        seen, done = jnp.zeros((batch, arch.backbone.vocab_size), bool), jnp.zeros((batch,), bool)
        ids, count = jnp.zeros((batch, new), jnp.int32), jnp.zeros((batch,), jnp.int32)
        first = choose(last, jnp.int32(0), seen, done, ids, count)
        _, (*_, ids, count) = jax.lax.while_loop(unfinished, one_token, (cache, first))
    return Generated(ids, count)
