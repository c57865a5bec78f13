"""The counted rows of serving: bytes are those of the arrays that are kept, FLOP add up, and one is counted by hand."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import pytest
import tiny_models

from comi_jax.devices.chips import CHIPS
from comi_jax.model import architecture, flops
from comi_jax.model.architecture import Architecture
from comi_jax.model.cache import empty_cache
from comi_jax.overrides import load
from comi_jax.params import flatten
from comi_jax.planning import serving_counts
from comi_jax.planning.published_models import BACKBONES
from comi_jax.serving.segments import read_segment

FEWER = ("entries, with the question", "entries, without it")
QWEN2 = BACKBONES["Qwen/Qwen2-7B-Instruct"]


def nbytes(tree):
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(tree))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind, reads", [("qwen2", True), ("qwen3", False)])
def test_bytes_are_those_of_the_arrays(kind, reads, dtype):
    arch = dataclasses.replace(tiny_models.architecture(kind, query_reads_context=reads), dtype=dtype)
    specs = architecture.specs(arch)
    params = jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, jnp.dtype(dtype)), specs)
    ids = jax.ShapeDtypeStruct((1, 48), jnp.int32)
    kept = jax.eval_shape(lambda p, i, n: read_segment(p, i, n, arch, dtype, True), params, ids, jnp.full(1, 48))
    assert serving_counts.document_bytes(arch, 48) == nbytes(kept)
    cache = jax.eval_shape(lambda: empty_cache(arch.backbone, arch.backbone.num_hidden_layers, 1, 48, dtype))
    assert serving_counts.prefix_bytes(arch, 48) == nbytes((cache.k, cache.v))
    matrices = {
        path: s for path, s in flatten(specs).items() if "/layers/" in path and len(s.shape) > 2 and "norm" not in path
    }
    width = jnp.dtype(dtype).itemsize
    for part, counted in (("decoder", serving_counts._decoder(arch)), ("compressor", serving_counts._compressor(arch))):
        owners = ("decoder",) if part == "decoder" else ("encoder", "lsa")
        blocks = sum(
            math.prod(s.shape) for path, s in matrices.items() if path.split("/")[0] in owners and "bias" not in path
        )
        head = arch.backbone.vocab_size * arch.backbone.hidden_size if part == "decoder" else 0
        assert counted == width * (blocks + head)


def test_what_is_kept_is_not_computed_again():
    words = ["data.max_context=3000", "data.max_query=30", "compression.rates=16,32", "generation.max_new_tokens=20"]
    found = {way.name: way for way in serving_counts.ways(load("qwen2", words), QWEN2)}
    reread, prefix = found["re-read"], found["prefix cache"]
    hows = ("COMI, encoding each time", "COMI, kept", "fewer tokens", "fewer entries, with the question")
    assert list(found)[2:] == [
        f"{how}, rate {rate}" for rate in (16, 32) for how in (*hows, "fewer entries, without it")
    ]
    assert prefix.first == reread.first == reread.further and prefix.kept > reread.kept == 0
    layers, width, keys, mlp = 28, 3584, 512, 18_944
    weights = layers * (width * (2 * width + 2 * keys) + 3 * width * mlp)
    tokens = 3030
    want = 2 * tokens * weights + 2 * layers * tokens**2 * width + 2 * width * 152_064
    assert reread.first.flop == pytest.approx(want, rel=1e-12)
    read = 2 * (weights + width * 152_064)
    assert prefix.further.read == read + prefix.kept
    alone = 2 * 3000 * weights + 2 * layers * 3000**2 * width
    assert prefix.further.flop == pytest.approx(want - alone, rel=1e-9)

    def compressing(rate):
        arch = Architecture.of(QWEN2, load("qwen2", words))
        lengths = flops.Lengths(3000, 30, 0, rate)
        return flops.compress(arch, lengths) - flops.by_part(arch, flops.Lengths(3000, 0, 0, rate))["encoder"].forward

    for rate in (16, 32):
        each, kept = (found[f"COMI, {how}, rate {rate}"] for how in ("encoding each time", "kept"))
        encoder = 8 * 2 * (3000 * weights / layers + 3000**2 * width)
        assert kept.first == each.first and each.kept == 0
        assert each.first.flop - kept.further.flop == pytest.approx(encoder, rel=1e-9)
        assert kept.token == each.token and kept.token[16].read < prefix.token[16].read
        tokens, asked, once = (found[f"fewer {how}, rate {rate}"] for how in ("tokens", *FEWER))
        memory = -(-3000 // rate)
        assert tokens.first.flop == kept.further.flop - compressing(rate) and tokens.first == tokens.further
        assert asked.first == asked.further == reread.first and asked.token == once.token == tokens.token == kept.token
        assert once.kept == prefix.kept * memory / 3000 and once.further.read == read + once.kept
        extra = 2 * layers * 30 * 2 * (3000 - memory) * width  # the question attends to fewer entries
        assert once.first.flop == pytest.approx(want - extra, rel=1e-9)
    h100 = CHIPS["h100"]  # compute limits reading a text, weights limit a token
    assert reread.first.seconds(h100) == reread.first.flop / h100.flops
    assert prefix.token[1].seconds(h100) == prefix.token[1].read / h100.bandwidth


@pytest.mark.parametrize("system", ["gmsa", "icae", "beacon"])
def test_a_memory_that_no_question_changes_is_kept_as_keys_and_values(system):
    """Then a further question costs as much as behind so many entries of any kind, and the rest was ingest."""
    words = ["data.max_context=3000", "compression.rates=16", f"system={system}"]
    config = load("qwen2", words)
    found = {way.name: way for way in serving_counts.ways(config, QWEN2)}
    anew, kept = (found[f"{config.title}, {how}, rate 16"] for how in ("encoding each time", "kept"))
    assert kept.first == anew.first == anew.further and kept.token == anew.token
    entries = {"gmsa": 188, "icae": 188, "beacon": 2 * 64 + 3000 - 2048}[system]
    assert kept.kept == 2 * 28 * 2 * 512 * entries
    if system != "beacon":
        assert kept.further == found["fewer entries, without it, rate 16"].further
    arch = Architecture.of(QWEN2, config)
    lengths = flops.Lengths(3000, config.data.max_query, 0, 16)
    assert anew.first.flop == pytest.approx(flops.compress(arch, lengths) + flops.answer(arch, lengths, 1), rel=1e-9)
    assert anew.first.read > kept.further.read
