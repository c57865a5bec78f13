"""The choice of the next token: the best one, or one drawn with temperature, top-k and top-p from a seed, row by row.

    scores = penalised logits;  p = softmax(scores / temperature), without what top-k and then top-p leave out
    token = argmax(log p + Gumbel noise), which is a draw from p (Maddison et al. 2014)

The noise of a token is a function of the row's seed and of the token's number in the answer alone, so that a row draws
the same answer in any batch and at any row of it.
"""

from typing import Any, no_type_check

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Bool, Float, Int, UInt32

from comi_jax.config import Generation


@no_type_check
@struct.dataclass
class Rules:
    """How each row chooses its tokens."""

    penalty: Float[Array, " B"]  # repetition penalty; 1: none
    temperature: Float[Array, " B"]  # 0: greedy
    top_k: Int[Array, " B"]  # 0: all tokens
    top_p: Float[Array, " B"]  # 1: all tokens
    seed: UInt32[Array, "B 2"]  # high and low word


def rules(options: Generation, rows: int) -> Rules:
    """The rules of ``rows`` rows that all follow ``options``, as host arrays."""

    def number(value: int | float, dtype: type) -> Any:
        return np.full(rows, value, dtype)

    seed: Any = np.tile(np.array([options.seed >> 32, options.seed & 0xFFFFFFFF], np.uint32), (rows, 1))
    return Rules(
        penalty=number(options.repetition_penalty, np.float32),
        temperature=number(options.temperature, np.float32),
        top_k=number(min(options.top_k, 2**31 - 1), np.int32),
        top_p=number(options.top_p, np.float32),
        seed=seed,
    )


def penalize(
    scores: Float[Array, "B V"], seen: Bool[Array, "B V"], penalty: float | Float[Array, "B 1"]
) -> Float[Array, "B V"]:
    """Divide the positive and multiply the negative scores of ``seen`` tokens by ``penalty`` (Keskar et al. 2019)."""
    return jnp.where(seen, jnp.where(scores > 0, scores / penalty, scores * penalty), scores)


def kept(scores: Float[Array, "B V"], top_k: Int[Array, " B"], top_p: Float[Array, " B"]) -> Bool[Array, "B V"]:
    """The tokens that may be drawn: of the ``top_k`` best ones (0: of all) the fewest, best first, whose probabilities
    under softmax(scores of these) sum to ``top_p`` or more. Of equal scores the lower id is the better one."""
    order = jnp.argsort(scores, axis=-1, stable=True, descending=True)
    ranked = jnp.take_along_axis(scores, order, axis=-1)
    rank = jnp.arange(scores.shape[-1], dtype=jnp.int32)[None, :]
    among = rank < jnp.where(top_k > 0, top_k, scores.shape[-1])[:, None]
    p = jax.nn.softmax(jnp.where(among, ranked, -jnp.inf), axis=-1)
    before = jnp.cumsum(p, axis=-1) - p
    among &= (before < top_p[:, None]) | (top_p[:, None] >= 1)  # the sum of all may round to more than 1
    rows = jnp.arange(scores.shape[0])[:, None]
    return jnp.zeros_like(among).at[rows, order].set(among, unique_indices=True)


def draw(scores: Float[Array, "B V"], step: Int[Array, " B"], rules: Rules) -> Int[Array, " B"]:
    """A token of each row, drawn for place ``step`` of its answer."""
    temperature = jnp.where(rules.temperature > 0, rules.temperature, 1)[:, None]
    scaled = (scores - jnp.max(scores, axis=-1, keepdims=True)) / temperature  # so that no temperature is too low
    with_limits = jnp.any((rules.temperature > 0) & ((rules.top_k > 0) | (rules.top_p < 1)))
    scaled = jax.lax.cond(  # a sort of the vocabulary, which many batches can do without
        with_limits,
        lambda: jnp.where(kept(scaled, rules.top_k, rules.top_p), scaled, -jnp.inf),
        lambda: scaled,
    )

    def noise(seed, step):
        key = jax.random.fold_in(jax.random.wrap_key_data(seed, impl="threefry2x32"), step)
        return jax.random.gumbel(key, scaled.shape[1:], scaled.dtype)

    return jnp.argmax(scaled + jax.vmap(noise)(rules.seed, step), axis=-1).astype(jnp.int32)


def choose(
    logits: Float[Array, "B V"], seen: Bool[Array, "B V"], step: Int[Array, " B"], rules: Rules, sampled: bool
) -> tuple[Int[Array, " B"], Float[Array, " B"]]:
    """The token of each row for place ``step`` of its answer, and its log-probability under the model: softmax(logits),
    whatever the rules. ``seen`` are the tokens that the row's answer has so far. With ``sampled`` off, all rows must be
    greedy, and no code for drawing is compiled."""
    with jax.named_scope("choose"):
        scores = penalize(logits, seen, rules.penalty.astype(logits.dtype)[:, None])
        token = jnp.argmax(scores, axis=-1).astype(jnp.int32)
        if sampled:
            drawn = jax.lax.cond(jnp.any(rules.temperature > 0), lambda: draw(scores, step, rules), lambda: token)
            token = jnp.where(rules.temperature > 0, drawn, token)
        chosen = jnp.take_along_axis(logits, token[:, None], axis=-1)[:, 0]
        return token, chosen - jax.nn.logsumexp(logits, axis=-1)
