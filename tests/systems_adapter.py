"""The function through which the systems that keep KV entries are compared with public implementations."""

import jax.numpy as jnp
import numpy as np

from comi_jax.evaluation.systems.protocol import bucket, padded
from comi_jax.evaluation.systems.snapkv import SnapKV
from comi_jax.evaluation.systems.streaming import Streaming
from comi_jax.model import backbone as lm
from comi_jax.model.cache import with_room
from comi_jax.serving.language_model import LanguageModel, of_backbone
from comi_jax.weights import hf, hf_config


def budget(tokens, rate):
    """The entries that kvpress keeps, its floating-point error included: it is told the fraction to remove."""
    return max(1, int(tokens * (1 - (1 - 1 / rate))))


def keep(folder, ids, question, system, rate, options):
    """The kept positions, ascending, [layers, kv heads, budget], and the logits [len(question), V] of the question read
    after them. ``options``: sinks, window, kernel. SnapKV does not see the question."""
    backbone = hf_config.read_config(folder)
    model = LanguageModel({"decoder": hf.load_backbone(folder, backbone)}, of_backbone(backbone), None, ())
    chosen = {
        "streaming": lambda: Streaming(options.get("sinks", 4), rerotate=False),
        "streaming_rerotated": lambda: Streaming(options.get("sinks", 4), rerotate=True),
        "snapkv": lambda: SnapKV(
            options.get("window", 64), options.get("kernel", 5), query_aware=False, reread=True, narrow=False
        ),
    }[system]()
    rows = padded([np.asarray(ids, np.int32)], bucket(len(ids)))
    sizes = (np.array([n], np.int32) for n in (len(ids), budget(len(ids), rate), 0))
    cache, kept, start = chosen.keep(model, model.put(rows), *sizes)
    x = lm.embed_tokens(model.params["decoder"], jnp.asarray(question, jnp.int32)[None], jnp.float32)
    states, _ = lm.forward(model.params["decoder"], x, backbone, cache=with_room(cache, len(question)), start=start)
    return np.asarray(kept[:, 0, :, : budget(len(ids), rate)]), np.asarray(
        lm.logits(model.params["decoder"], states)[0]
    )
