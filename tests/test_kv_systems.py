"""StreamingLLM and SnapKV against kvpress's golden outputs and against transformers' attention weights."""

import inspect
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import systems_adapter
import tiny_models
import torch
from transformers import AutoModelForCausalLM, DynamicCache, LlamaForCausalLM

from comi_jax.evaluation.systems.protocol import bucket, padded
from comi_jax.evaluation.systems.snapkv import SnapKV
from comi_jax.evaluation.systems.streaming import Streaming
from comi_jax.model import backbone as lm
from comi_jax.model.cache import with_room
from comi_jax.serving.language_model import LanguageModel, of_backbone
from comi_jax.weights import hf, hf_config

GOLDEN = Path(__file__).parent / "golden" / "baselines"
WHOLE = Path(__file__).resolve().parents[2] / "shared" / "golden" / "baselines"
# transformers renamed it in 5.24.
CACHE = "cache" if "cache" in inspect.signature(LlamaForCausalLM.forward).parameters else "past_key_values"
SYSTEMS = ("streaming", "streaming_rerotated", "snapkv")


@pytest.mark.parametrize("system", SYSTEMS)
@pytest.mark.parametrize(
    "kind", ["qwen3", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("llama", "qwen2"))]
)
def test_what_kvpress_keeps_and_computes(kind, system):
    folder = GOLDEN / kind if (GOLDEN / kind).is_dir() else WHOLE / kind
    if not folder.is_dir():
        pytest.skip("the whole set of golden outputs is not beside this checkout")
    golden = np.load(f"{folder}.npz")
    options = {"sinks": 4, "window": 16, "kernel": 5}
    kept, logits = systems_adapter.keep(folder, golden["ids"].tolist(), golden["q"].tolist(), system, 4, options)
    assert np.array_equal(kept, np.sort(golden[f"{system}_kept"], axis=-1))
    np.testing.assert_allclose(logits, golden[f"{system}_logits"], atol=1e-4)
    assert np.abs(golden["full_logits"] - logits).max() > 1  # compression itself is no rounding error


# --- any setting, against transformers --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Kind -> transformers' model, and its folder; "mqa" has one kv head."""
    made = {}

    def model(kind):
        if kind not in made:
            config = tiny_models.transformers_config("qwen2" if kind == "mqa" else kind)
            config.num_key_value_heads = 1 if kind == "mqa" else config.num_key_value_heads
            torch.manual_seed(1)
            theirs = AutoModelForCausalLM.from_config(config, attn_implementation="eager").float().eval()
            with torch.no_grad():
                for parameter in theirs.parameters():
                    parameter.add_(0.2 * torch.randn_like(parameter))
            folder = tmp_path_factory.mktemp(kind)
            theirs.save_pretrained(folder)
            made[kind] = theirs, folder
        return made[kind]

    return model


def voted(attentions, context, length, budget, window, kernel, kv_heads):
    """Plain NumPy: the positions [L, K, budget] of the context that the window at the end of ``length`` keeps."""
    kept = []
    for weights in attentions:
        heads = weights[0].double().numpy()[:, length - window : length, : length - window].mean(1)
        grouped = heads.reshape(kv_heads, -1, length - window).mean(1)
        score = np.stack([np.convolve(row, np.full(kernel, 1 / kernel), mode="same") for row in grouped])
        score = np.pad(score, ((0, 0), (0, window)), constant_values=np.inf)[:, :context]
        kept.append(np.sort(np.argsort(-score, axis=1, kind="stable")[:, :budget], axis=1))
    return np.stack(kept)


def after(theirs, cache, kept, tokens, position, rerotate=None):
    """transformers' logits of ``tokens`` from ``position`` on, after the entries ``kept`` [L, K, M] of ``cache``."""
    less = DynamicCache()
    for layer, places in enumerate(torch.tensor(np.array(kept))):
        k, v = (
            torch.take_along_dim(x[0], places[:, :, None], dim=1)
            for x in (cache.layers[layer].keys, cache.layers[layer].values)
        )
        if rerotate is not None:  # as complex numbers, to their own slots
            half = k.shape[-1] // 2
            turn = (torch.arange(places.shape[1])[None] - places)[:, :, None] * rerotate[None, None]
            turned = torch.complex(k[..., :half], k[..., half:]) * torch.polar(torch.ones_like(turn), turn)
            k = torch.cat([turned.real, turned.imag], dim=-1)
        less.update(k[None].float(), v[None], layer)
    where = position + torch.arange(len(tokens))[None]
    with torch.no_grad():
        out = theirs(input_ids=torch.as_tensor(tokens)[None], position_ids=where, **{CACHE: less})
    return out.logits[0].numpy()


def prefilled(theirs, ids):
    with torch.no_grad():
        out = theirs(input_ids=torch.as_tensor(ids)[None], use_cache=True, output_attentions=True)
    return out.past_key_values, out.attentions


SETTINGS = [  # kind, tokens, rate, sinks, window, kernel
    ("llama2", 90, 3, 2, 8, 3),
    ("llama3", 75, 5, 0, 12, 7),
    ("mqa", 40, 2, 4, 16, 5),
]


@pytest.mark.parametrize("system", SYSTEMS)
@pytest.mark.parametrize("kind, tokens, rate, sinks, window, kernel", SETTINGS)
def test_any_setting_keeps_and_computes_what_transformers_says(
    models, kind, tokens, rate, sinks, window, kernel, system
):
    theirs, folder = models(kind)
    rng = np.random.default_rng(tokens)
    ids, question = rng.integers(3, 61, tokens), rng.integers(3, 61, 5)
    options = {"sinks": sinks, "window": window, "kernel": kernel}
    kept, logits = systems_adapter.keep(folder, ids.tolist(), question.tolist(), system, rate, options)
    budget, heads = systems_adapter.budget(tokens, rate), theirs.config.num_key_value_heads
    cache, attentions = prefilled(theirs, ids)
    if system == "snapkv":
        expected = voted(attentions, tokens, tokens, budget, window, kernel, heads)
    else:
        places = [*range(sinks), *range(tokens - budget + sinks, tokens)]
        expected = np.broadcast_to(places, (len(attentions), heads, budget))
    assert np.array_equal(kept, expected)
    own_slots = system == "streaming_rerotated"
    frequencies = theirs.model.rotary_emb.inv_freq if own_slots else None
    want = after(theirs, cache, expected, question, budget if own_slots else tokens, frequencies)
    np.testing.assert_allclose(logits, want, atol=1e-4)


@pytest.mark.parametrize("tokens, rate, budget", [(100, 10, 9), (30, 3, 9), (35, 5, 6), (66, 6, 10), (64, 4, 16)])
def test_the_budget_has_the_rounding_error_of_kvpress(tokens, rate, budget):
    """It is told to remove 1 - 1 / rate, and keeps 1 minus that of the tokens, rounded down: 9 of 100 at 10x."""
    assert systems_adapter.budget(tokens, rate) == budget


def opened(folder):
    backbone = hf_config.read_config(folder)
    return LanguageModel({"decoder": hf.load_backbone(folder, backbone)}, of_backbone(backbone), None, ())


def test_the_question_votes_and_its_last_token_reads_what_is_kept(models):
    """Rows of different lengths, budgets and windows together; each as transformers has it alone."""
    theirs, folder = models("qwen2")
    model, rng = opened(folder), np.random.default_rng(5)
    system = SnapKV(window=10, kernel=3)
    sizes = [(60, 4, 21), (33, 9, 8), (47, 1, 30)]  # context, question, budget; windows of 10, 4 and 10
    rows = [(rng.integers(3, 61, n), rng.integers(3, 61, q)) for n, q, _ in sizes]
    contexts, questions, budgets = (np.array(x, np.int32) for x in zip(*sizes, strict=True))
    ids = padded([np.concatenate(row) for row in rows], bucket(64) + 32)
    cache, kept, start = system.keep(model, jnp.asarray(ids), contexts, budgets, questions)
    last = jnp.array([[question[-1]] for _, question in rows], jnp.int32)
    x = lm.embed_tokens(model.params["decoder"], last, jnp.float32)
    states, _ = lm.forward(model.params["decoder"], x, model.backbone, cache=with_room(cache, 1), start=start)
    logits = np.asarray(lm.logits(model.params["decoder"], states))
    for row, ((context, question), (n, q, m)) in enumerate(zip(rows, sizes, strict=True)):
        past, attentions = prefilled(theirs, np.concatenate([context, question]))
        want = voted(attentions, n, n + q, m, min(10, m // 2), 3, 2)
        asked = np.broadcast_to(np.arange(n, n + q - 1), (*want.shape[:2], q - 1))
        want = np.concatenate([want, asked], axis=-1)
        assert int(start[row]) == m + q - 1
        assert np.array_equal(kept[:, row, :, : m + q - 1], want)
        np.testing.assert_allclose(logits[row], after(theirs, past, want, question[-1:], n + q - 1), atol=1e-4)


def test_a_budget_as_long_as_the_context_changes_nothing(models):
    theirs, folder = models("qwen2")
    ids, question = np.arange(3, 43), np.arange(5, 9)
    with torch.no_grad():
        want = theirs(input_ids=torch.as_tensor(np.concatenate([ids, question]))[None]).logits[0, -4:].numpy()
    for system in ("streaming_rerotated", "snapkv"):
        kept, logits = systems_adapter.keep(folder, ids.tolist(), question.tolist(), system, 1, {"window": 8})
        assert np.array_equal(kept, np.broadcast_to(np.arange(40), kept.shape))
        np.testing.assert_allclose(logits, want, atol=1e-4)


def test_padding_and_other_rows_are_nothing_to_a_row(models):
    _, folder = models("qwen3")
    model, rng = opened(folder), np.random.default_rng(2)
    ids = rng.integers(3, 61, (3, 96)).astype(np.int32)
    lengths, budgets = np.array([40, 96, 57], np.int32), np.array([13, 24, 11], np.int32)
    for system in (Streaming(), SnapKV(window=8, query_aware=False, reread=True)):
        cache, kept, _ = system.keep(model, jnp.asarray(ids), lengths, budgets, 0 * lengths)
        for row in range(3):
            alone = padded([ids[row, : lengths[row]]], 96 if row == 1 else 64)
            one = system.keep(model, jnp.asarray(alone), *(x[row : row + 1] for x in (lengths, budgets, 0 * lengths)))
            m = budgets[row]
            assert np.array_equal(kept[:, row, :, :m], one[1][:, 0, :, :m])
            for part in ("k", "v"):
                np.testing.assert_allclose(
                    getattr(cache, part)[:, row, :m], getattr(one[0], part)[:, 0, :m], atol=1e-5, rtol=1e-5
                )
