"""The counted rows of serving: bytes are those of the arrays that are kept, FLOP add up, and one is counted by hand."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import pytest
import tiny_models

from comi_jax.devices.chips import CHIPS
from comi_jax.model import architecture
from comi_jax.model.cache import empty_cache
from comi_jax.overrides import load
from comi_jax.params import flatten
from comi_jax.planning import serving_counts
from comi_jax.planning.published_models import BACKBONES
from comi_jax.serving.segments import read_segment

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
    assert list(found)[2:] == [
        f"COMI, {how}, rate {rate}" for rate in (16, 32) for how in ("encoding each time", "kept")
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
    for rate in (16, 32):
        each, kept = (found[f"COMI, {how}, rate {rate}"] for how in ("encoding each time", "kept"))
        encoder = 8 * 2 * (3000 * weights / layers + 3000**2 * width)
        assert kept.first == each.first and each.kept == 0
        assert each.first.flop - kept.further.flop == pytest.approx(encoder, rel=1e-9)
        assert kept.token == each.token and kept.token[16].read < prefix.token[16].read
    h100 = CHIPS["h100"]  # compute limits reading a text, weights limit a token
    assert reread.first.seconds(h100) == reread.first.flop / h100.flops
    assert prefix.token[1].seconds(h100) == prefix.token[1].read / h100.bandwidth
