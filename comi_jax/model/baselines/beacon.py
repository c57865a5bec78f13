"""Activation Beacon (arXiv 2401.03462): beacons, read among the tokens of a window, leave their keys and values.

    full window w of W tokens, rate r:  [past beacons; x_1 .. x_r, beacon, x_r+1 .. x_2r, beacon, ...] -> decoder
                                        keys and values of its ceil(W / r) beacons -> past beacons
    [past beacons; embed(unfinished window); embed(Q)] -> decoder -> A

Every layer of the decoder attends causally, beacons and tokens alike; past beacons have the positions 0, 1, ..., and a
window those after them. Beacons have one embedding, and differences from W_Q, W_K and W_V, zero at first. The tokens of
an unfinished last window are read as they are. docs/baselines.md lists what differs from the release.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from comi_jax.config import beacons_of, max_groups
from comi_jax.model import backbone as lm
from comi_jax.model import costs as count
from comi_jax.model import lora
from comi_jax.model.batch import Batch
from comi_jax.model.cache import ContextKV, KVCache, empty_cache
from comi_jax.model.costs import NOTHING, Cost, Lengths
from comi_jax.model.memory import Memory
from comi_jax.model.shape import Architecture, Stage, decoder_specs, is_tuned
from comi_jax.params import ParamSpec, Tree

OWN = ("q", "k", "v", "q_bias", "k_bias", "v_bias")  # of these, what the backbone has


def specs(arch: Architecture) -> dict[str, Any]:
    """The spec tree of the decoder and the beacons: their embedding and the differences of their projections."""
    decoder, width = decoder_specs(arch), arch.backbone.hidden_size
    layers = decoder["layers"]
    own = {name: dataclasses.replace(layers[name], init=0.0) for name in OWN if name in layers}
    embedding = ParamSpec((width,), ("embed",), "normal", width)
    return {"decoder": decoder, "beacons": {"embed": embedding, "layers": own}}


def is_trained(path: str, arch: Architecture, stage: Stage) -> bool:
    """The beacons and the decoder's part."""
    return path.startswith("beacons/") or is_tuned(path, arch)


def memory_of(
    params: Tree, arch: Architecture, batch: Batch, min_rate: int, dropout_key: Array | None = None
) -> Memory:
    """The beacons of the full windows, as keys and values, and the embeddings of the tokens behind these."""
    ids, length, rate = batch.context, batch.context_length, batch.rate
    if is_shared(arch):
        rate = rate[:: batch.share]
    else:
        ids, length = jnp.repeat(ids, batch.share, axis=0), jnp.repeat(length, batch.share, axis=0)
    before = read_windows(params, arch, ids, length, rate, min_rate, dropout_key)
    raw, raw_length = rest(ids, length, arch.beacon.window)
    vectors = lm.embed_tokens(params["decoder"], raw, arch.dtype, arch.runtime)
    again = batch.query.shape[0] // ids.shape[0]
    return Memory(jnp.repeat(vectors, again, axis=0), jnp.repeat(raw_length, again), (), before)


def is_shared(arch: Architecture) -> bool:
    """Whether all examples of a context have the same beacons: with a single rate to draw from in training, the only
    place where examples share a context."""
    return len(set(arch.compression.rates)) == 1


def read_windows(
    params: Tree,
    arch: Architecture,
    ids: Int[Array, "C X"],
    length: Int[Array, " C"],
    rate: Int[Array, " C"],
    min_rate: int,
    dropout_key: Array | None = None,
) -> ContextKV:
    """The keys and values of the beacons of all full windows, one window after the other."""
    window, (rows, width) = arch.beacon.window, ids.shape
    windows, most = width // window, max_groups(window, min_rate)
    cache = empty_cache(arch.backbone, arch.backbone.num_hidden_layers, rows, max(windows * most, 1), arch.dtype)
    before = ContextKV(cache.k, cache.v, jnp.zeros_like(length))
    if not windows:
        return before
    keys = None
    if dropout_key is not None:
        keys = jax.random.split(jax.random.fold_in(dropout_key, 1), windows)

    def read(before, inputs):
        tokens, number, key = inputs
        full = number < length // window
        return read_window(params, arch, before, tokens, full, rate, most, key), None

    tokens = ids[:, : windows * window].reshape(rows, windows, window).swapaxes(0, 1)
    with jax.named_scope("windows"):
        return jax.lax.scan(read, before, (tokens, jnp.arange(windows, dtype=jnp.int32), keys))[0]


def read_window(
    params: Tree,
    arch: Architecture,
    before: ContextKV,
    tokens: Int[Array, "C S"],
    full: Bool[Array, " C"],
    rate: Int[Array, " C"],
    most: int,
    dropout_key: Array | None,
) -> ContextKV:
    """``before`` with the beacons, at most ``most``, of one window of S tokens, of the rows in which it is ``full``."""
    decoder, window = params["decoder"], tokens.shape[1]
    source, is_beacon, at, count = interleaved(window, rate, most)
    x = lm.embed_tokens(decoder, jnp.take_along_axis(tokens, source, axis=1), arch.dtype, arch.runtime)
    x = jnp.where(is_beacon[:, :, None], params["beacons"]["embed"].astype(x.dtype)[None, None], x)
    number = jnp.arange(most, dtype=jnp.int32)[None, :]
    real = (number < count[:, None]) & full[:, None]
    marked = lora.Marked.in_layers(params["beacons"]["layers"], jnp.where(real, at, x.shape[1]), number - at)
    added = lora.Adapters({}, None, 0.0, marked=marked)
    if arch.lora.rank:
        added = dataclasses.replace(lora.adapters(params["lora"], arch.lora, dropout_key), marked=marked)
    _, kept = lm.forward(decoder, x, arch.backbone, context=before, lora=added, runtime=arch.runtime)
    assert kept is not None  # forward returns the marked tokens'
    place = jnp.where(real, before.length[:, None] + number, before.k.shape[2])  # beyond the end, nothing is written
    rows = jnp.arange(tokens.shape[0])[:, None]
    cache = KVCache(before.k, before.v)
    cache = jax.tree.map(lambda old, new: old.at[:, rows, place].set(new, mode="drop"), cache, kept)
    return ContextKV(cache.k, cache.v, before.length + jnp.where(full, count, 0))


def interleaved(
    window: int, rate: Int[Array, " C"], most: int
) -> tuple[Int[Array, "C T"], Bool[Array, "C T"], Int[Array, "C M"], Int[Array, " C"]]:
    """A window with a beacon after every ``rate`` tokens and one at its end, as T = window + ``most`` places.

    Returns the token at each place, whether a beacon is there instead, the places of the beacons, and their number;
    beyond a row's own window and beacons, places are arbitrary.
    """
    count = -(-window // rate)
    place = jnp.arange(window + most, dtype=jnp.int32)[None, :]
    past = place // (rate[:, None] + 1)  # the beacons before it
    is_beacon = (place % (rate[:, None] + 1) == rate[:, None]) | (place == window + count[:, None] - 1)
    number = jnp.arange(most, dtype=jnp.int32)[None, :]
    at = number + jnp.minimum((number + 1) * rate[:, None], window)
    return jnp.clip(place - past, 0, window - 1), is_beacon, at, count


def rest(ids: Int[Array, "C X"], length: Int[Array, " C"], window: int) -> tuple[Int[Array, "C R"], Int[Array, " C"]]:
    """The tokens of an unfinished last window, and how many they are."""
    at = (length - length % window)[:, None] + jnp.arange(min(window - 1, ids.shape[1]), dtype=jnp.int32)[None, :]
    return jnp.take_along_axis(ids, jnp.minimum(at, ids.shape[1] - 1), axis=1), length % window


def costs(arch: Architecture, lengths: Lengths, stage: Stage) -> dict[str, Cost]:
    """FLOP of one training example by part of the model; the windows are the encoder's part, if they are read once for
    all questions, else the compression."""
    backbone, window = arch.backbone, arch.beacon.window
    kept, raw = beacons_of(arch.beacon, lengths.context, lengths.rate)
    each = max_groups(window, lengths.rate)
    windows = NOTHING
    for number in range(lengths.context // window):
        row = count.blocks(backbone, backbone.num_hidden_layers, window + each, (not arch.lora.rank, False))
        windows += row + count.adapters(backbone, arch.lora, window + each) + own_projections(arch, each)
        windows += count.seen(backbone, number * each, window + each)
    tokens = raw + lengths.query + lengths.answer
    decoder = count.decoder(arch, tokens, lengths.answer) + count.seen(backbone, kept, tokens)
    parts = {"encoder": NOTHING, "compression": NOTHING, "lsa": NOTHING, "decoder": decoder}
    return parts | {"encoder" if is_shared(arch) else "compression": windows}


def own_projections(arch: Architecture, beacons: int) -> Cost:
    """The beacons' differences from W_Q, W_K and W_V."""
    backbone = arch.backbone
    heads = (backbone.num_attention_heads + 2 * backbone.num_key_value_heads) * backbone.head_dim
    product = 2.0 * backbone.num_hidden_layers * beacons * backbone.hidden_size * heads
    return Cost(product, 2 * product)
