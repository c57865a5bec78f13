"""SnapKV (Li et al. 2024): the last tokens vote for the entries that they attend to, in each layer and kv head.

    vote[j] = mean over the window's queries i and the heads of a group of softmax_j(q_i . k_j / sqrt(H))
    score   = the mean of ``kernel`` neighbouring votes; outside the scored tokens a vote is 0
    kept    = the window, and the tokens of the largest scores, up to the budget

Window attention, pooling and groups are those of kvpress's SnapKVPress. ``query_aware``: the window is at the end of
[context; question]; otherwise at the context's end. ``reread``: the question is read after the compression. As
published it is not: all of its entries stay, and they have seen the whole context, of which they can carry what is
asked for past any budget, though no system is charged for its question. Only its last token is read again, so that the
first token of the answer sees no more than the others do.
"""

import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from comi_jax.checks import require
from comi_jax.evaluation.systems.kv_cache import CacheSystem, gather, prefill
from comi_jax.evaluation.systems.protocol import Question, bucket
from comi_jax.model import backbone as lm
from comi_jax.model.architecture import Architecture
from comi_jax.model.attention import MASKED
from comi_jax.model.cache import KVCache
from comi_jax.model.rope import rotation
from comi_jax.params import Tree
from comi_jax.serving.language_model import LanguageModel


@dataclass(frozen=True)
class SnapKV(CacheSystem):
    window: int = 64
    kernel: int = 5
    query_aware: bool = True
    reread: bool = False
    # Whether the window is at most half of the budget. As published it is not: a budget below the window is refused.
    narrow: bool = True

    def __post_init__(self):
        require(self.query_aware or self.reread, "SnapKV without the question must read it later: set reread")

    def windows(self, budgets: Any) -> Any:
        """The window for each of ``budgets``."""
        budgets = np.asarray(budgets)
        return np.minimum(self.window, budgets // 2) if self.narrow else np.full_like(budgets, self.window)

    def refusal(self, question: Question, budget: int) -> str:
        if self.kernel % 2 == 0:
            return f"the pooling kernel is {self.kernel}, which has no middle; make it odd"
        asked = len(question.query) if self.query_aware else 0
        window, tokens = int(self.windows(budget)), len(question.context)
        if window < 1 or window - asked > budget:
            entries = "1 entry is" if budget == 1 else f"{budget} entries are"
            return f"{entries} fewer than a window of {max(window, 1)} and one more token; lower the rate"
        if window >= tokens + asked:
            return f"its {tokens + asked} tokens are not more than the window of {window}; give it a longer context"
        return ""

    def keep(
        self, model: LanguageModel, ids: Any, lengths: np.ndarray, budgets: np.ndarray, questions: np.ndarray
    ) -> tuple[KVCache, Array, Array]:
        windows = self.windows(budgets).astype(np.int32)
        # Static sizes, of which few are compiled.
        widest, most = min(self.window, bucket(int(max(windows)))), min(bucket(int(max(budgets))), ids.shape[1])
        asked = -(-int(max(questions)) // 8) * 8 if self.query_aware else 0
        cache = prefill(model.params, ids, model.architecture)
        rows = [model.put(x) for x in (lengths, lengths + questions, budgets, windows)]
        kept, places, filled = choose(
            model.params, ids, cache, *rows, model.architecture, widest, self.kernel, most, asked
        )
        return gather(cache, kept, places, model.architecture), kept, filled

    def votes(self, arch: Architecture, tokens: int, budget: int) -> float:
        backbone = arch.backbone
        width = backbone.num_attention_heads * backbone.head_dim
        return 2.0 * backbone.num_hidden_layers * int(self.windows(budget)) * tokens * width


@functools.partial(jax.jit, static_argnames=("arch", "widest", "kernel", "most", "asked"))
def choose(
    params: Tree,
    ids: Int[Array, "B T"],
    cache: KVCache,
    context: Int[Array, " B"],
    length: Int[Array, " B"],
    budget: Int[Array, " B"],
    window: Int[Array, " B"],
    arch: Architecture,
    widest: int,
    kernel: int,
    most: int,
    asked: int,
) -> tuple[Int[Array, "L B K M"], Int[Array, "L B K M"], Int[Array, " B"]]:
    """The positions that are kept, in ascending order, the positions that their keys are rotated to, and how many each
    row keeps: ``budget`` of its ``context`` tokens, at most ``most``, and all but the last of the question's tokens,
    at most ``asked``, which end at ``length``."""
    scores = pooled_votes(params, ids, cache, length, window, arch, widest, kernel)
    position = jnp.arange(ids.shape[1], dtype=jnp.int32)[None, :]
    voting = position >= (length - window)[:, None]
    scores = jnp.where(voting[None, :, None, :], jnp.inf, scores)
    scores = jnp.where((position < context[:, None])[None, :, None, :], scores, -jnp.inf)
    _, best = jax.lax.top_k(scores, most)
    slot = jnp.arange(most + asked, dtype=jnp.int32)[None, :]
    ours = (slot[:, :most] < budget[:, None])[None, :, None, :]
    best = jnp.sort(jnp.where(ours, best, ids.shape[1]), axis=-1)  # those of no budget last
    best = jnp.pad(best, ((0, 0), (0, 0), (0, 0), (0, asked)))
    question = context[:, None] + slot - budget[:, None]
    kept = jnp.where((slot < budget[:, None])[None, :, None, :], best, question[None, :, None, :])
    kept = jnp.clip(kept, 0, ids.shape[1] - 1).astype(jnp.int32)
    filled = budget + jnp.clip(length - context - 1, 0, asked)
    return kept, kept + (budget - context)[None, :, None, None], filled


def pooled_votes(
    params: Tree,
    ids: Int[Array, "B T"],
    cache: KVCache,
    length: Int[Array, " B"],
    window: Int[Array, " B"],
    arch: Architecture,
    widest: int,
    kernel: int,
) -> Float[Array, "L B K T"]:
    """The score of each cached token before the window of its row.

    The window's queries come from a second pass over its tokens alone, layer by layer after the cached keys, so that
    the prefill itself is the decoder's own and gives out nothing.
    """
    backbone, dtype = arch.backbone, jnp.promote_types(cache.k.dtype, jnp.float32)
    start = jnp.maximum(length - widest, 0)
    at = start[:, None] + jnp.arange(widest, dtype=jnp.int32)[None, :]
    tokens = jnp.take_along_axis(ids, jnp.minimum(at, ids.shape[1] - 1), axis=1)
    key = jnp.arange(ids.shape[1], dtype=jnp.int32)[None, None, :]
    seen = (key <= at[:, :, None])[:, None, None]
    counts = ((at >= (length - window)[:, None]) & (at < length[:, None]))[:, None, None, :, None]
    before = (key[:, 0] < (length - window)[:, None])[:, None, :]
    share = (window * (backbone.num_attention_heads // backbone.num_key_value_heads)).astype(dtype)[:, None, None]
    rope = rotation(backbone, at)

    def layer(x, part):
        weights, k, v = part
        w = {name: value.astype(x.dtype) for name, value in weights.items()}
        q, _, _ = lm.attention_inputs(w, x, rope, backbone)
        q = q.reshape(*q.shape[:2], k.shape[2], -1, q.shape[3])
        scores = jnp.einsum("bwkgh,bskh->bkgws", q, k, preferred_element_type=dtype) * backbone.head_dim**-0.5
        weight = jax.nn.softmax(jnp.where(seen, scores, MASKED), axis=-1)
        votes = jnp.sum(jnp.where(counts, weight, 0.0), axis=(2, 3)) / share
        votes = jnp.where(before, votes, 0.0)
        around = jnp.pad(votes, ((0, 0), (0, 0), (kernel // 2, kernel // 2)))
        pooled = jnp.stack([around[:, :, i : i + votes.shape[2]] for i in range(kernel)]).mean(0)
        x, _ = lm.block(
            weights, x, rope, backbone, index=jnp.int32(0), cache=KVCache(k[None], v[None]), start=start, lora=None,
            runtime=arch.runtime,
        )  # fmt: skip
        return x, pooled

    x = lm.embed_tokens(params["decoder"], tokens, arch.dtype, arch.runtime)
    return jax.lax.scan(layer, x, (params["decoder"]["layers"], cache.k, cache.v))[1]
