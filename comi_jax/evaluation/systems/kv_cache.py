"""Systems that prefill the whole context and keep some of its KV entries, per layer and kv head.

Hidden states are those of the dense prefill; only what is read later sees the loss. Rotary embeddings see differences
of positions alone. So kept entries move to the first slots of a cache, each key is rotated to a new position, and the
question is read at the slot that follows, through the same ``backbone.forward``.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from comi_jax.evaluation.systems.protocol import Question, Reading, bucket, padded
from comi_jax.model import backbone as lm
from comi_jax.model import flops
from comi_jax.model.architecture import Architecture
from comi_jax.model.cache import KVCache, empty_cache
from comi_jax.model.rope import rotate, rotation
from comi_jax.params import Tree
from comi_jax.serving.language_model import LanguageModel


@functools.partial(jax.jit, static_argnames="arch")
def prefill(params: Tree, ids: Int[Array, "B T"], arch: Architecture) -> KVCache:
    """The KV cache of right-padded rows of tokens."""
    x = lm.embed_tokens(params["decoder"], ids, arch.dtype, arch.runtime)
    rows, length = ids.shape
    cache = empty_cache(arch.backbone, arch.backbone.num_hidden_layers, rows, length, arch.dtype)
    _, cache = lm.forward(params["decoder"], x, arch.backbone, cache=cache, runtime=arch.runtime)
    assert cache is not None
    return cache


@functools.partial(jax.jit, static_argnames="arch")
def gather(cache: KVCache, kept: Int[Array, "L B K M"], places: Int[Array, "L B K M"], arch: Architecture) -> KVCache:
    """The entries of ``cache`` at positions ``kept`` in M slots, with their keys rotated on to the positions
    ``places``, which may be negative."""
    layers, rows, heads, slots = kept.shape
    index = kept.swapaxes(2, 3)[..., None]
    k, v = (jnp.take_along_axis(x, index, axis=2) for x in (cache.k, cache.v))
    rope = rotation(arch.backbone, (places - kept).reshape(-1, slots))
    each = k.swapaxes(2, 3).reshape(layers * rows * heads, slots, 1, -1)
    return KVCache(rotate(each, rope).reshape(layers, rows, heads, slots, -1).swapaxes(2, 3), v)


@dataclass(frozen=True)
class CacheSystem:
    """Base class: a subclass says which entries it ``keep``s, and which questions it refuses."""

    needs_budget: ClassVar[bool] = True
    splits: ClassVar[bool] = False  # whether it runs with the tokens of a row split over devices
    query_aware = False
    reread = True  # whether the question is read after the compression; otherwise its last token alone is

    def refusal(self, question: Question, budget: int) -> str:
        """Why the system cannot keep ``budget`` entries for ``question``, and what to do; empty if it can."""
        raise NotImplementedError

    def keep(
        self, model: LanguageModel, ids: Any, lengths: np.ndarray, budgets: np.ndarray, questions: np.ndarray
    ) -> tuple[KVCache, Array, Array]:
        """A cache with the kept entries in its first slots, the positions [L, B, K, M] that they had, and the number of
        filled slots of each row.

        ``ids`` [B, T] are contexts of ``lengths`` tokens, right-padded; for a query-aware system, contexts with their
        questions of ``questions`` tokens. Slots behind a row's own are arbitrary.
        """
        raise NotImplementedError

    def longest(self, model: LanguageModel, question: Question, budget: int) -> int:
        """The positions that the longest row of the decoder needs before the answer."""
        return len(question.context) + len(question.query)

    def read(self, model: LanguageModel, questions: Sequence[Question], budgets: Sequence[int]) -> Reading:
        """Prefill the contexts and keep what stands for them."""
        aware, arch = self.query_aware, model.architecture
        rows = [np.concatenate([q.context, q.query]) if aware else q.context for q in questions]
        prompts = [q.query if self.reread else q.query[-1:] for q in questions]
        lengths = np.array([len(q.context) for q in questions], np.int32)
        sizes = np.array([len(row) for row in rows], np.int32)
        kept = np.minimum(np.array(budgets, np.int32), lengths)
        ids = model.put(padded(rows, bucket(int(max(sizes)))))
        cache, _, start = self.keep(model, ids, lengths, kept, sizes - lengths)
        pairs = [(int(size), int(m)) for size, m in zip(sizes, kept, strict=True)]
        ingest = [flops.read(arch, 0, size) + self.votes(arch, size, m) for size, m in pairs]
        return Reading(prompts, kept.tolist(), ingest, cache=cache, start=start)

    def votes(self, arch: Architecture, tokens: int, budget: int) -> float:
        """FLOP of the choice among ``tokens``, beside their prefill."""
        return 0.0
