"""Greedy decoding from a cache against recomputing everything for every token, and a trained model's own words."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_models

from comi_jax.config import Compression, Generation
from comi_jax.model import architecture, generate, lora, sampling
from comi_jax.model import backbone as lm
from comi_jax.model.architecture import Architecture
from comi_jax.weights import hf, hf_config

STORIES = Path(__file__).resolve().parents[2] / "shared" / "models" / "stories260K"
ARCH = tiny_models.architecture("qwen3", lora=2)
PROMPT, NEW, PENALTY = 9, 12, 1.3
LENGTHS = np.array([9, 4, 1], np.int32)


@pytest.fixture(scope="module")
def params():
    specs = architecture.specs(ARCH)
    return tiny_models.shaken({"decoder": specs["decoder"], "lora": specs["lora"]}, seed=2)


@pytest.fixture(scope="module")
def prompt():
    return np.random.default_rng(0).standard_normal((3, PROMPT, 32)).astype(np.float32)


greedy = jax.jit(
    lambda params, prompt, lengths, options, stop: generate.greedy(params, ARCH, prompt, lengths, options, stop),
    static_argnums=(3, 4),
)


@pytest.fixture(scope="module")
def recomputed(params, prompt):
    """Penalty -> NEW ids a row, every token from a full pass without a cache, through merged adapters."""
    decoder = {**params["decoder"], "layers": lora.merge(params["decoder"]["layers"], params["lora"], ARCH.lora)}

    @jax.jit
    def scores(rows, last):
        states, _ = lm.forward(decoder, rows, ARCH.backbone)
        return lm.logits(decoder, states[jnp.arange(3), last])

    def run(penalty):
        rows, ids = np.zeros((3, PROMPT + NEW, 32), np.float32), []
        rows[:, :PROMPT] = prompt
        for step in range(NEW):
            score = np.array(scores(rows, LENGTHS + step - 1))
            for row in range(3):
                for token in {int(chosen[row]) for chosen in ids}:  # once, however often it came
                    score[row, token] = (
                        score[row, token] / penalty if score[row, token] > 0 else score[row, token] * penalty
                    )
            ids.append(score.argmax(1))
            rows[np.arange(3), LENGTHS + step] = decoder["embed"][ids[-1]]
        return np.stack(ids, 1)

    return {penalty: run(penalty) for penalty in (1.0, PENALTY)}


def until(ids, stop):
    """``ids`` up to and with the first of ``stop``."""
    ends = [i for i, token in enumerate(ids) if token in stop]
    return list(ids[: ends[0] + 1]) if ends else list(ids)


def answers(out):
    return [list(ids[:n]) for ids, n in zip(np.asarray(out.ids), np.asarray(out.length), strict=True)]


def test_a_cache_generates_what_recomputing_generates(params, prompt, recomputed):
    """Rows of different prompt lengths, stopping at different steps; generated tokens alone are penalised."""
    want = recomputed[PENALTY]
    assert not np.array_equal(want, recomputed[1.0])
    stop = (int(want[1, 5]), 61)  # ends row 1 after at most six tokens
    options = Generation(max_new_tokens=NEW, repetition_penalty=PENALTY)
    out = greedy(params, prompt, LENGTHS, options, stop)
    assert answers(out) == [until(row, stop) for row in want]
    assert len({len(answer) for answer in answers(out)}) > 1
    assert not np.asarray(out.ids)[np.arange(NEW) >= np.asarray(out.length)[:, None]].any()
    # What stands in the padding, and what else is in the batch, is nothing to a row.
    real = np.arange(PROMPT)[None, :, None] < LENGTHS[:, None, None]
    rubbish = greedy(params, np.where(real, prompt, np.float32(1e9)), LENGTHS, options, stop)
    assert answers(rubbish) == answers(out)
    for row in range(3):
        copies = greedy(
            params, np.repeat(prompt[row : row + 1], 3, axis=0), np.repeat(LENGTHS[row : row + 1], 3), options, stop
        )
        assert answers(copies) == [answers(out)[row]] * 3


def test_a_row_alone_and_without_padding_is_the_same(params, prompt, recomputed):
    """And the penalty of 1 is none; without a stop token it goes on to the end."""
    out = greedy(params, prompt[1:2, :4], LENGTHS[1:2], Generation(max_new_tokens=NEW, repetition_penalty=1.0), ())
    assert answers(out) == [list(recomputed[1.0][1])]


def test_the_penalty_divides_positive_and_multiplies_negative_scores():
    scores = jnp.array([[2.0, -2.0, 0.0, 3.0]])
    seen = jnp.array([[True, True, True, False]])
    np.testing.assert_allclose(sampling.penalize(scores, seen, 1.3), [[2 / 1.3, -2.6, 0.0, 3.0]], rtol=1e-6)


@pytest.mark.skipif(not STORIES.is_dir(), reason=f"the trained model of {STORIES.name} is not beside this checkout")
def test_a_trained_model_tells_its_own_story():
    """255 greedy tokens from BOS, as an independent implementation produced them from the same weights."""
    ids = json.loads((STORIES / "greedy.json").read_text())["ids"]
    backbone = hf_config.read_config(STORIES / "hf")
    arch = Architecture(backbone, Compression(encoder_layers=1))
    decoder = jax.tree.map(jnp.asarray, hf.load_backbone(STORIES / "hf", backbone))
    prompt = lm.embed_tokens(decoder, jnp.array([[ids[0]]], jnp.int32), jnp.float32)
    tell = jax.jit(
        lambda decoder: generate.greedy(
            {"decoder": decoder}, arch, prompt, jnp.array([1], jnp.int32), Generation(len(ids) - 1), ()
        )
    )
    assert [ids[0]] + answers(tell(decoder))[0] == ids and len(ids) == 256
