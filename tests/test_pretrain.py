"""comi_jax.pretrain and the model it made: the text it learns from, its start, the folder that the package carries."""

from itertools import islice
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from comi_jax import pretrain
from comi_jax.data import synthetic
from comi_jax.model import backbone as lm
from comi_jax.model.rope import rotate, rotation
from comi_jax.training import pretraining
from comi_jax.training.pretraining import VOCABULARY, Stage
from comi_jax.weights import hf, hf_config
from comi_jax.weights.tokenizer import load_tokenizer

CARRIED = Path(pretrain.__file__).parent / "tiny_lm"


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(CARRIED)


def test_the_first_block_starts_by_looking_at_the_tokens_just_before():
    backbone = pretraining.shape(300)
    layers = pretraining.initial(backbone, 0)["layers"]
    rope = rotation(backbone, jnp.arange(40)[None])
    q, k = (rotate(jnp.tile(layers[f"{name}_bias"][:1, None], (1, 40, 1, 1)), rope)[0] for name in ("q", "k"))
    for head in range(backbone.num_attention_heads):
        scores = np.asarray(q[-1, head] @ k[:, head].T) * backbone.head_dim**-0.5
        weight = np.exp(scores - scores.max())
        assert weight[-1 - (head + 1)] / weight.sum() > 0.7


def test_the_loss_is_about_every_answer_and_no_padding(tokenizer):
    stage = Stage(1, 3, 144, 8, ((4, 3),), 0.5)
    ids, weight = next(pretraining.question_answering(tokenizer, stage, seed=5))
    rows = next(pretraining.rows_of(pretraining.question_answering(tokenizer, stage, seed=5), stage, seed=0))
    asked = rows.at[0][rows.weight[0] == 1.0]
    assert set(asked) == set(np.flatnonzero(weight == 1.0)) and len(asked) == 16
    assert ids[np.sort(asked)[1::2]].tolist() == [tokenizer.eos_token_id] * 8
    picked = np.take_along_axis(rows.ids, rows.at, axis=1)
    assert (rows.weight[picked == tokenizer.pad_token_id] == 0).all()


def test_word_lists_ask_only_for_what_was_said(tokenizer):
    stage = Stage(1, 1, 48)
    for ids, weight in islice(pretraining.word_lists(tokenizer, stage, seed=1), 20):
        for place in np.flatnonzero(weight):
            assert ids[place] in ids[: place - 1]


@pytest.mark.slow
def test_two_short_runs_from_one_seed_are_equal(tokenizer, capsys):
    stages = (Stage(2, 2, 48),)
    with jax.numpy_dtype_promotion("standard"):  # optax's muon counts on it
        first, again, other = (
            pretraining.pretrain(tokenizer, pretraining.shape(len(tokenizer)), s, stages) for s in (0, 0, 1)
        )
    assert jax.tree.all(jax.tree.map(np.array_equal, first, again))
    assert not np.array_equal(first["embed"], other["embed"])
    assert "parameters" in capsys.readouterr().out


def test_a_saved_folder_is_read_back(tokenizer, tmp_path):
    backbone = pretraining.shape(len(tokenizer))
    params = pretraining.initial(backbone, 0)
    pretraining.save(tmp_path / "lm", params, backbone, tokenizer)
    assert hf_config.read_config(tmp_path / "lm") == backbone
    read = hf.load_backbone(tmp_path / "lm", backbone)
    np.testing.assert_allclose(read["layers"]["q"], params["layers"]["q"], atol=1e-3)
    assert load_tokenizer(tmp_path / "lm")("Lisbon").input_ids == tokenizer("Lisbon").input_ids
    assert hf_config.stop_tokens(tmp_path / "lm") == (tokenizer.eos_token_id,)
    with pytest.raises(SystemExit, match="already holds a model"):
        pretrain.main([f"--output={tmp_path / 'lm'}"])


def test_the_carried_model_is_small_and_made_by_this_file(tokenizer):
    assert sum(file.stat().st_size for file in CARRIED.iterdir()) <= 4 * 2**20
    assert hf_config.read_config(CARRIED) == pretraining.shape(len(tokenizer))
    texts = synthetic.corpus(0, 3000) + synthetic.corpus(1, 1000, notes=0.5)
    assert synthetic.train_tokenizer(texts, VOCABULARY).get_vocab() == tokenizer.get_vocab()


def test_the_carried_model_answers_from_a_text_about_people_it_never_met(tokenizer):
    backbone = hf_config.read_config(CARRIED)
    params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), hf.load_backbone(CARRIED, backbone))
    records = synthetic.records("eval", 64, seed=3)
    contexts = tokenizer([record.context_text() for record in records]).input_ids
    prompts = tokenizer([record.prompt for record in records]).input_ids
    rows = [c + p for c, p in zip(contexts, prompts, strict=True)]
    ids = np.zeros((len(rows), max(map(len, rows))), np.int32)
    for row, tokens in zip(ids, rows, strict=True):
        row[: len(tokens)] = tokens
    states, _ = lm.forward(params, lm.embed_tokens(params, jnp.asarray(ids), "float32"), backbone)
    last = states[np.arange(len(rows)), np.asarray([len(r) - 1 for r in rows])]
    said = tokenizer.batch_decode(np.asarray(jnp.argmax(lm.logits(params, last), axis=-1))[:, None])
    assert np.mean([s.strip() == r.answers[0] for s, r in zip(said, records, strict=True)]) > 0.9
