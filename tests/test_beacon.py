"""Activation Beacon: windows read in turn equal one dense masked pass; its memory is keys and values everywhere."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny_models
from jax.sharding import NamedSharding, PartitionSpec

from comi_jax.config import Beacon, Compression, Config, ConfigError, Generation, Lora, Mesh, Optimizer, memory_length
from comi_jax.data.encode import Example, LengthError, check_positions
from comi_jax.devices import sharding
from comi_jax.model import backbone as lm
from comi_jax.model import comi, flops, generate, lora
from comi_jax.model.architecture import Architecture, is_trained, specs
from comi_jax.model.baselines import beacon
from comi_jax.model.batch import Batch
from comi_jax.params import abstract, flatten, partition
from comi_jax.training import optim
from comi_jax.training.state import TrainState
from comi_jax.training.step import CompiledStep

WINDOW, MIN_RATE = 8, 2


def arch_of(kind="qwen2", rank=2, rates=(2, 4), **more):
    settings = Compression(rates=rates, encoder_layers=1)
    beacons = Beacon(window=WINDOW)
    return Architecture(
        tiny_models.BACKBONES[kind], settings, Lora(rank, 4.0, 0.5), system="beacon", beacon=beacons, **more
    )


def params_of(arch):
    return tiny_models.shaken(specs(arch))


@pytest.fixture(scope="module")
def batch():
    """Contexts of three windows and a rest, of two windows, of a rest alone, and none; two questions about each."""
    rng = np.random.default_rng(0)
    return Batch(
        context=rng.integers(0, 61, (4, 3 * WINDOW + 5), np.int32),
        context_length=np.array([3 * WINDOW + 5, 2 * WINDOW, 7, 0], np.int32),
        query=rng.integers(0, 61, (8, 5), np.int32),
        query_length=np.array([3, 5, 1, 4, 5, 2, 3, 1], np.int32),
        answer=rng.integers(0, 61, (8, 4), np.int32),
        answer_length=np.array([4, 1, 3, 2, 4, 4, 1, 2], np.int32),
        rate=np.array([2, 4, 3, 2, 4, 2, 2, 8], np.int32),
    )


def rows_of(batch):
    for i in range(batch.query.shape[0]):
        context = i // batch.share
        parts = [(batch.context, batch.context_length, context)]
        parts += [(getattr(batch, n), getattr(batch, f"{n}_length"), i) for n in ("query", "answer")]
        yield [ids[row, : length[row]] for ids, length, row in parts], int(batch.rate[i])


@dataclasses.dataclass(frozen=True)
class Token:
    """A token of the dense pass; a beacon has no id, and the place that it has for later windows."""

    window: int
    position: int
    id: int | None = None
    compact: int | None = None


def dense_row(context, after, rate):
    """All tokens and beacons of a row, with their windows and positions, as the paper lays them out."""
    tokens, beacons = [], 0
    full = len(context) // WINDOW
    for window in range(full):
        position, kept = beacons, beacons
        ids = context[window * WINDOW : (window + 1) * WINDOW]
        for number, id in enumerate(ids, start=1):
            tokens.append(Token(window, position, int(id)))
            position += 1
            if number % rate == 0 or number == WINDOW:
                tokens.append(Token(window, position, None, kept))
                position, kept = position + 1, kept + 1
        beacons = kept
    rest = [*context[full * WINDOW :], *after]
    tokens += [Token(full, beacons + i, int(id)) for i, id in enumerate(rest)]
    return tokens, beacons


def rotated(x, positions, backbone):
    half = backbone.head_dim // 2
    angle = positions[..., None] * backbone.rope_theta ** (-np.arange(half) / half)
    a, b = x[..., :half], x[..., half:]
    return np.concatenate([a * np.cos(angle) - b * np.sin(angle), b * np.cos(angle) + a * np.sin(angle)], axis=-1)


def normed(x, scale, eps):
    return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + eps) * scale


def dense_logits(params, arch, context, query, answer, rate):
    """The logits of the answer by one pass in NumPy, float64, over all windows at once: a token sees what is before it
    in its own window, and earlier windows' beacons at their compact positions."""
    backbone = arch.backbone
    decoder = dict(params["decoder"])
    if arch.lora.rank:
        decoder["layers"] = lora.merge(decoder["layers"], params["lora"], arch.lora)
    decoder, own = (jax.tree.map(lambda x: np.asarray(x, np.float64), tree) for tree in (decoder, params["beacons"]))
    tokens, beacons = dense_row(context, [*query, *answer], rate)
    marked = np.array([t.id is None for t in tokens])
    window = np.array([t.window for t in tokens])
    position = np.array([t.position for t in tokens])
    compact = np.array([-1 if t.compact is None else t.compact for t in tokens])
    same = window[:, None] == window[None]
    visible = same & np.tri(len(tokens), dtype=bool) | (window[None] < window[:, None]) & marked[None]
    x = np.stack([own["embed"] if t.id is None else decoder["embed"][t.id] for t in tokens])
    for layer in range(backbone.num_hidden_layers):
        w = {name: value[layer] for name, value in decoder["layers"].items()}
        n = normed(x, w["attention_norm"], backbone.rms_norm_eps)

        def project(name, w=w, n=n, layer=layer):
            out = np.einsum("td,dnh->tnh", n, w[name]) + w.get(f"{name}_bias", 0.0)
            extra = np.einsum("td,dnh->tnh", n, own["layers"][name][layer])
            extra = extra + (own["layers"][f"{name}_bias"][layer] if backbone.qkv_bias else 0.0)
            return np.where(marked[:, None, None], out + extra, out)

        q, k, v = (project(name) for name in ("q", "k", "v"))
        if backbone.qk_norm:
            q, k = (normed(y, w[f"{name}_norm"], backbone.rms_norm_eps) for name, y in (("q", q), ("k", k)))
        groups = backbone.num_attention_heads // backbone.num_key_value_heads
        k, v = (np.repeat(y, groups, axis=1) for y in (k, v))
        q = rotated(q, position[:, None], backbone)
        in_window, later = (rotated(k, at[:, None], backbone) for at in (position, compact))
        scores = np.where(same[:, None], *(np.einsum("tnh,snh->tns", q, y) for y in (in_window, later)))
        scores = np.where(visible[:, None], scores / np.sqrt(backbone.head_dim), -np.inf)
        weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
        out = np.einsum("tns,snh->tnh", weights / weights.sum(axis=-1, keepdims=True), v)
        x = x + np.einsum("tnh,nhd->td", out, w["o"])
        n = normed(x, w["mlp_norm"], backbone.rms_norm_eps)
        gate = n @ w["gate"]
        x = x + (gate / (1 + np.exp(-gate)) * (n @ w["up"])) @ w["down"]
    states = normed(x, decoder["norm"], backbone.rms_norm_eps)[-len(answer) - 1 : -1]
    return states @ (decoder["head"] if "head" in decoder else decoder["embed"].T), beacons


@pytest.mark.parametrize("kind", ("qwen2", "qwen3"))
def test_windows_in_turn_equal_one_dense_masked_pass(kind, batch):
    """Of every row by itself: rates of its own, which divide the window or not, contexts with and without windows."""
    arch = arch_of(kind)
    params = params_of(arch)

    @jax.jit
    def run(params, batch):
        memory = comi.memory_of(params, arch, batch, MIN_RATE)
        return memory.entries, memory.length, comi.answer_logits(params, arch, memory, batch)

    entries, raw, logits = run(params, batch)
    for i, ((context, query, answer), rate) in enumerate(rows_of(batch)):
        expected, beacons = dense_logits(params, arch, context, query, answer, rate)
        assert (entries[i], raw[i]) == (beacons + len(context) % WINDOW, len(context) % WINDOW)
        np.testing.assert_allclose(logits[i, : len(answer)], expected, rtol=1e-4, atol=1e-4)
