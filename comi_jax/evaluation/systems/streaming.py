"""StreamingLLM (Xiao et al. 2023): the first tokens, which attention needs as sinks, and the most recent ones.

    kept = {0, ..., sinks - 1} and {n - budget + sinks, ..., n - 1}, in every layer and head

As published, keys are rotated by their place in the cache (``rerotate``): the question follows at position `budget`.
Without it they keep the positions of the context, and the question is at position n. The published code evicts while
it generates; it compresses no prompt to a ratio. Here the prompt is prefilled densely and then evicted, as in kvpress's
StreamingLLMPress and, rerotated, KeyRerotationPress.
"""

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from comi_jax.evaluation.systems.kv_cache import CacheSystem, gather, prefill
from comi_jax.evaluation.systems.protocol import Question, bucket
from comi_jax.model.cache import KVCache
from comi_jax.serving.language_model import LanguageModel


@dataclass(frozen=True)
class Streaming(CacheSystem):
    sinks: int = 4
    rerotate: bool = True

    def refusal(self, question: Question, budget: int) -> str:
        if budget >= min(self.sinks + 1, len(question.context)):
            return ""
        return f"{budget} entries are fewer than {self.sinks} sinks and one recent token; lower the rate"

    def keep(
        self, model: LanguageModel, ids: Any, lengths: np.ndarray, budgets: np.ndarray, questions: np.ndarray
    ) -> tuple[KVCache, Array, Array]:
        backbone = model.backbone
        slots = np.arange(bucket(int(max(budgets))), dtype=np.int32)[None, :]
        kept = np.where(slots < self.sinks, slots, lengths[:, None] - budgets[:, None] + slots)
        kept = np.minimum(kept, lengths[:, None] - 1)
        places = slots + 0 * kept if self.rerotate else kept + (budgets - lengths)[:, None]
        shape = (backbone.num_hidden_layers, len(lengths), backbone.num_key_value_heads, slots.shape[1])
        kept, places = (jnp.broadcast_to(model.put(x)[None, :, None, :], shape) for x in (kept, places))
        cache = gather(prefill(model.params, ids, model.architecture), kept, places, model.architecture)
        return cache, kept, model.put(budgets)
