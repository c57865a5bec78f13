"""Norm, rotary embedding, block and whole model against transformers; causality, padding and the key/value cache."""

import functools
import tempfile
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_models

from comi_jax.model import backbone as lm
from comi_jax.model.cache import KVCache, empty_cache, write
from comi_jax.model.rope import rope_frequencies, rotate, rotation
from comi_jax.weights import hf

KINDS = list(tiny_models.BACKBONES)
BATCH, LENGTH = 2, 24


@functools.cache
def pair(kind):
    """transformers' model and the same weights as our tree."""
    torch = pytest.importorskip("torch")
    model = tiny_models.transformers_model(kind)
    backbone = tiny_models.BACKBONES[kind]
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        params = hf.load_backbone(folder, backbone)
    return types.SimpleNamespace(torch=torch, model=model, params=params, backbone=backbone)


@functools.partial(jax.jit, static_argnums=2)
def run(params, x, backbone):
    """States and logits of embedded tokens."""
    states, _ = lm.forward(params, x, backbone)
    return states, lm.logits(params, states)


@functools.partial(jax.jit, static_argnums=2)
def first_block(params, x, backbone):
    positions = jnp.broadcast_to(jnp.arange(x.shape[1]), x.shape[:2])
    weights = jax.tree.map(lambda w: w[0], params["layers"])
    rope = rotation(backbone, positions)
    return lm.block(
        weights, x, rope, backbone, index=jnp.int32(0), cache=None, start=None, lora=None, runtime=lm.Runtime()
    )[0]


def random_ids(seed=0, shape=(BATCH, LENGTH)):
    return np.random.default_rng(seed).integers(0, 61, shape)


def random_states(seed=0):
    return np.random.default_rng(seed).standard_normal((BATCH, LENGTH, 32)).astype(np.float32)


def their_block(p, x):
    with p.torch.no_grad():
        x = p.torch.from_numpy(x)
        position = p.torch.arange(LENGTH)[None].expand(BATCH, -1)
        rope = p.model.model.rotary_emb(x, position)
        mask = p.torch.full((LENGTH, LENGTH), -p.torch.inf).triu(1)[None, None]
        out = p.model.model.layers[0](x, attention_mask=mask, position_embeddings=rope)
        return (out[0] if isinstance(out, tuple) else out).numpy()


@pytest.mark.parametrize("kind", KINDS)
def test_rms_norm_is_transformers(kind):
    p, x = pair(kind), 3 * random_states()
    with p.torch.no_grad():
        want = p.model.model.norm(p.torch.from_numpy(x)).numpy()
    got = lm.rms_norm(jnp.asarray(x), p.params["norm"], p.backbone.rms_norm_eps)
    np.testing.assert_allclose(got, want, atol=1e-5)


def test_rms_norm_of_tiny_vectors_is_held_up_by_epsilon():
    x = jnp.full((1, 1, 4), 1e-4)
    got = lm.rms_norm(x, jnp.ones(4), 1e-5)
    np.testing.assert_allclose(got, 1e-4 / np.sqrt(1e-8 + 1e-5), rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_rotary_embedding_is_transformers(kind):
    p = pair(kind)
    theirs = p.model.model.rotary_emb
    np.testing.assert_allclose(rope_frequencies(p.backbone), theirs.inv_freq.numpy(), rtol=1e-6)
    heads, width = p.backbone.num_attention_heads, p.backbone.head_dim
    x = np.random.default_rng(1).standard_normal((2, 5, heads, width)).astype(np.float32)
    positions = np.array([[0, 1, 2, 3, 4], [11, 100, 101, 300, 511]], np.int32)
    with p.torch.no_grad():
        cos, sin = theirs(p.torch.from_numpy(x), p.torch.from_numpy(positions).long())
        module = __import__(type(p.model).__module__, fromlist=["apply_rotary_pos_emb"])
        q = p.torch.from_numpy(x).transpose(1, 2)
        want = module.apply_rotary_pos_emb(q, q, cos, sin)[0].transpose(1, 2).numpy()
    np.testing.assert_allclose(rotate(jnp.asarray(x), rotation(p.backbone, jnp.asarray(positions))), want, atol=1e-4)


def test_llama3_scaling_leaves_fast_rotations_and_slows_slow_ones():
    plain, scaled = (np.asarray(rope_frequencies(tiny_models.BACKBONES[k])) for k in ("llama2", "llama3"))
    base = 1.0 / 500_000.0 ** (np.arange(0, 8, 2) / 8)
    assert plain[0] == scaled[0] == 1.0  # 64 / 2π = 10 turns, more than high_freq_factor
    np.testing.assert_allclose(scaled[2:], base[2:] / 8.0, rtol=1e-6)  # less than one turn: slowed by the whole factor


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("half", ["attention", "mlp", "both"])
def test_block_is_transformers(kind, half):
    """The block, and each half of it with the other's output projection at zero."""
    p, x = pair(kind), random_states(2)
    layer = p.model.model.layers[0]
    silenced = {"attention": layer.mlp.down_proj, "mlp": layer.self_attn.o_proj}.get(half)
    params = {"layers": dict(p.params["layers"])}
    if silenced is None:
        want = their_block(p, x)
    else:
        kept = silenced.weight.data
        silenced.weight.data = p.torch.zeros_like(kept)
        want = their_block(p, x)
        silenced.weight.data = kept
        name = {"attention": "down", "mlp": "o"}[half]
        params["layers"][name] = jnp.zeros_like(params["layers"][name])
    assert np.abs(want - x).max() > 0.1
    np.testing.assert_allclose(first_block(params, jnp.asarray(x), p.backbone), want, atol=5e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_model_is_transformers(kind):
    p, ids = pair(kind), random_ids()
    with p.torch.no_grad():
        out = p.model(p.torch.from_numpy(ids), output_hidden_states=True)
    states, logits = run(p.params, lm.embed_tokens(p.params, jnp.asarray(ids), jnp.float32), p.backbone)
    np.testing.assert_allclose(states, out.hidden_states[-1].numpy(), atol=1e-4)
    scale = np.abs(out.logits.numpy()).max()
    np.testing.assert_allclose(logits / scale, out.logits.numpy() / scale, atol=1e-4)


def test_bfloat16_is_as_close_to_float32_as_transformers_is():
    """Against the float32 result, our rounding error is held against transformers' own in bfloat16."""
    p, ids = pair("qwen3"), random_ids(3)
    exact, _ = run(p.params, lm.embed_tokens(p.params, jnp.asarray(ids), jnp.float32), p.backbone)
    ours, _ = run(p.params, lm.embed_tokens(p.params, jnp.asarray(ids), jnp.bfloat16), p.backbone)
    assert ours.dtype == jnp.bfloat16
    twin = tiny_models.transformers_model("qwen3").bfloat16()
    with p.torch.no_grad():
        theirs = twin.model(p.torch.from_numpy(ids)).last_hidden_state.float().numpy()
    error, reference = (np.sqrt(np.mean((np.asarray(x, np.float32) - exact) ** 2)) for x in (ours, theirs))
    assert 0 < error < 1.5 * reference


@pytest.fixture(scope="module")
def model():
    backbone = tiny_models.BACKBONES["qwen3"]
    params = tiny_models.shaken(lm.specs(backbone, 3, embed=True, head=True))
    return params, backbone


def test_padding_and_companions_do_not_change_real_tokens(model):
    params, backbone = model
    x = jnp.asarray(random_states(4))
    states, _ = run(params, x, backbone)
    real = (np.arange(LENGTH) < 15)[None, :, None]
    garbage = jnp.where(real, x[::-1], jnp.where(real, 0.0, 1e30))  # rows swapped, padding huge
    other, _ = run(params, garbage, backbone)
    np.testing.assert_array_equal(other[:, :15], states[::-1, :15])


def test_a_state_depends_on_what_is_before_it_and_on_nothing_after(model):
    """Causality by gradient: state t has a zero gradient by every later token and a nonzero one by every other."""
    params, backbone = model
    x = jnp.asarray(random_states(5)[:1, :9])

    @jax.jit
    def gradient(x, t):
        return jax.grad(lambda x: jnp.square(lm.forward(params, x, backbone)[0][0, t]).sum())(x)

    for t in (0, 4, 8):
        influence = np.abs(gradient(x, t)[0]).sum(1)
        assert (influence[: t + 1] > 0).all() and (influence[t + 1 :] == 0).all()


def test_a_cache_gives_what_recomputing_gives(model):
    """Prefill of right-padded rows, then a chunk of several tokens that starts elsewhere in every row."""
    params, backbone = model
    x = jnp.asarray(random_states(6))
    start, chunk = jnp.array([5, 14], jnp.int32), 7
    rows = jnp.arange(BATCH)[:, None]
    at = start[:, None] + jnp.arange(chunk)[None, :]

    @jax.jit
    def cached(x):
        cache = empty_cache(backbone, 3, BATCH, LENGTH, x.dtype)
        prefix, cache = lm.forward(params, x[:, :16], backbone, cache=cache)  # beyond start: padding, to be overwritten
        return prefix, lm.forward(params, x[rows, at], backbone, cache=cache, start=start)[0]

    whole, _ = run(params, x, backbone)
    prefix, tokens = cached(x)
    np.testing.assert_allclose(prefix, whole[:, :16], atol=1e-5)
    np.testing.assert_allclose(tokens, whole[rows, at], atol=1e-5)


def test_what_does_not_fit_a_cache_is_dropped_without_harm(model):
    """A token written past the end of the cache changes no key that stands in it."""
    params, backbone = model
    cache = KVCache(*(jnp.asarray(random_states(7)[:, :6, :24].reshape(1, BATCH, 6, 2, 12)) for _ in range(2)))
    new = jnp.ones((BATCH, 1, 2, 12))
    written = write(cache, jnp.int32(0), jnp.array([6, 2], jnp.int32), new, new)
    np.testing.assert_array_equal(written.k[0, 0], cache.k[0, 0])
    np.testing.assert_array_equal(written.k[0, 1, 2], 1.0)


def test_specs_leave_out_what_a_part_does_not_have():
    backbone = tiny_models.BACKBONES["qwen2"]
    lsa = lm.specs(backbone, 1, embed=False, head=False)
    assert set(lsa) == {"layers", "norm"} and lsa["layers"]["q"].shape == (1, 32, 4, 8)
    assert {"q_bias", "k_bias", "v_bias"} < set(lsa["layers"]) and "q_norm" not in lsa["layers"]
    tied = lm.specs(tiny_models.BACKBONES["qwen3"], 2, embed=True, head=True)
    assert "head" not in tied and "embed" in tied and "q_bias" not in tied["layers"]
    assert tied["layers"]["q_norm"].shape == (2, 12) and tied["layers"]["o"].shape == (2, 4, 12, 32)


@functools.partial(jax.jit, static_argnums=(2, 3, 4))
def pulled(params, x, backbone, remat, number):
    """Gradients of the squared states; ``number`` keeps compilations of other slices apart."""

    def energy(params, x):
        return jnp.sum(lm.forward(params, x, backbone, runtime=lm.Runtime(remat=remat))[0] ** 2)

    return jax.value_and_grad(energy, (0, 1))(params, x)


@pytest.mark.parametrize(
    "size, remat",
    [
        (5, "off"),
        (7, "attention"),
        (None, "full"),
        (None, "projections"),
        (None, "products"),
        (3, "products"),
        (None, "offload"),
    ],
)
def test_slices_on_cpu_and_remat_change_nothing(model, size, remat, monkeypatch):
    """24 tokens in slices of 5 or 7, the last one partly padding; and blocks that are computed again."""
    params, backbone = model
    x = jnp.asarray(random_states())
    want = pulled(params, x, backbone, "off", 0)
    if size:
        monkeypatch.setattr(lm, "CPU_SLICE", size)
        one = {name: params["layers"][name][0] for name in ("gate", "up", "down")}
        assert "scan" in str(jax.make_jaxpr(functools.partial(lm.mlp, one, slices=True))(x))  # the slices are taken
    got = pulled(params, x, backbone, remat, size)
    for ours, theirs in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5 * np.abs(theirs).max())


def test_products_recompute_no_matrix_product(model):
    """As many products in the gradient as where everything is kept; "projections" multiplies again."""
    params, backbone = model
    x = jnp.asarray(random_states())

    def products(remat):
        runtime = lm.Runtime(attention="blocked", remat=remat)
        gradient = jax.grad(lambda p, x: jnp.sum(lm.forward(p, x, backbone, runtime=runtime)[0] ** 2), (0, 1))
        return jax.jit(gradient).lower(params, x).as_text().count("stablehlo.dot_general")

    assert products("off") == products("products") < products("projections") < products("attention")
