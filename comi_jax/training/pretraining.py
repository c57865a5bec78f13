"""Pretraining of the bundled tiny language model (``python -m comi_jax.pretrain``).

    loss = sum_t w_t · -log p(token_t | tokens before it) / sum_t w_t,   w = 1 on answers, TEXT_WEIGHT elsewhere

All text is generated (comi_jax.data.synthetic) without people of the evaluation split, and the same arguments on the
same machine give the same weights. It is a curriculum, as retrieval from long texts is hardly learnt from scratch:
repeated word lists, short notes with questions, plain sentences.
"""

import json
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int
from optax.contrib import MuonDimensionNumbers, muon

from comi_jax.backbone import Backbone
from comi_jax.data import synthetic
from comi_jax.model import backbone as lm
from comi_jax.model.rope import rope_frequencies, rotate, rotation
from comi_jax.params import Tree, count, initialize
from comi_jax.weights import hf, hf_config

TEXT_WEIGHT = 0.1  # most words of a fact are unpredictable; answers are not
VOCABULARY = 1536  # maximum size: every word of the generated text is one token
OUTPUT_SCALE = 0.1  # initial scale of W_O and W_down: the residual stream starts as the token's embedding
PREVIOUS_TOKEN = 4.0  # size of the biases that make the first block attend to the preceding tokens


class Stage(NamedTuple):
    """A stage of the curriculum. ``facts`` 0 stands for word lists."""

    steps: int
    rows: int  # texts per step
    length: int  # tokens that a row is padded or cut to
    facts: int = 0
    grids: tuple[tuple[int, int], ...] = ()  # (people, relations) of a text, drawn at random
    notes: float = 0.0  # fraction of facts and questions written as notes


GRIDS = ((8, 1), (4, 2), (4, 3), (2, 4), (3, 3), (8, 2))
STAGES = (
    Stage(150, 32, 48),
    Stage(150, 24, 88, 8, ((8, 1),), 1.0),  # one relation: only the name identifies the answer
    Stage(100, 24, 88, 8, GRIDS, 1.0),
    Stage(400, 15, 144, 8, GRIDS, 0.5),
    Stage(500, 6, 336, 16, ((5, 4),), 0.0),
)


class Rows(NamedTuple):
    """Token ids, the positions of the loss's target tokens, and the weight of each."""

    ids: Int[np.ndarray, "B T"]
    at: Int[np.ndarray, "B P"]
    weight: Float[np.ndarray, "B P"]


def shape(vocab_size: int) -> Backbone:
    """A Qwen2 of about 0.4 million parameters."""
    return Backbone(
        model_type="qwen2",
        vocab_size=vocab_size,
        hidden_size=96,
        intermediate_size=192,
        num_hidden_layers=3,
        num_attention_heads=3,
        num_key_value_heads=3,
        head_dim=32,
        rms_norm_eps=1e-6,
        rope_theta=1000.0,
        rope_scaling=None,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        qkv_bias=True,
        qk_norm=False,
    )


# --- text -------------------------------------------------------------------------------------------------------------


def rows_of(texts: Iterator[tuple[np.ndarray, np.ndarray]], stage: Stage, seed: int) -> Iterator[Rows]:
    """Batches of (ids, weight) rows. To save logits, the loss covers half of the positions: all of weight 1 (answers,
    which are fewer), and a random choice of the others."""
    rng = np.random.default_rng(seed)
    while True:
        ids, weight = (np.stack(x) for x in zip(*islice(texts, stage.rows), strict=True))
        noise = rng.random((stage.rows, stage.length - 1)) * TEXT_WEIGHT
        priority = np.where(weight[:, 1:] > 0, weight[:, 1:] + noise, 0.0)
        at = 1 + np.argsort(-priority, axis=1)[:, : stage.length // 2]
        yield Rows(ids, at.astype(np.int32), np.take_along_axis(weight, at, axis=1))


def word_lists(tokenizer: Any, stage: Stage, seed: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Rows that repeat a random list of words; the loss is on all but the first repetition."""
    names = synthetic.FIRST + synthetic.LAST + list(synthetic.RELATIONS)
    words = names + [value for relation in synthetic.RELATIONS.values() for value in relation.values]
    vocabulary = np.asarray([tokenizer(word).input_ids[0] for word in words], np.int32)
    rng = np.random.default_rng(seed)
    while True:
        chosen = rng.permutation(vocabulary)[: rng.integers(3, stage.length // 3 + 1)]
        yield np.resize(chosen, stage.length), (np.arange(stage.length) > len(chosen)).astype(np.float32)


def question_answering(tokenizer: Any, stage: Stage, seed: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Rows of a context and a question about each of its facts; every answer ends with the end-of-sequence token."""
    rng = np.random.default_rng(seed)
    sources = [
        synthetic.examples("train", seed + i, facts=stage.facts, people=p, relations=r, notes=stage.notes)
        for i, (p, r) in enumerate(stage.grids)
    ]
    while True:
        example = next(sources[rng.integers(len(sources))])
        pairs = [text for i in rng.permutation(len(example.pairs)) for text in example.pairs[i]]
        ids, weight = [], []
        for number, piece in enumerate(tokenizer([example.context, *pairs]).input_ids):
            is_answer = number > 0 and number % 2 == 0
            piece = piece + [tokenizer.eos_token_id] * is_answer
            ids += piece
            weight += [1.0 if is_answer else TEXT_WEIGHT] * len(piece)
        padding = max(stage.length - len(ids), 0)
        row = ids[: stage.length] + [tokenizer.pad_token_id] * padding
        yield np.asarray(row, np.int32), np.asarray(weight[: stage.length] + [0.0] * padding, np.float32)


# --- training ---------------------------------------------------------------------------------------------------------


def loss(params: Tree, backbone: Backbone, rows: Rows) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Weighted next-token cross-entropy, and the accuracy on the tokens of weight 1."""
    states, _ = lm.forward(params, lm.embed_tokens(params, jnp.asarray(rows.ids), "float32"), backbone)
    target = jnp.take_along_axis(rows.ids, rows.at, axis=1)
    scores = lm.logits(params, jnp.take_along_axis(states, rows.at[:, :, None] - 1, axis=1))
    nll = optax.softmax_cross_entropy_with_integer_labels(scores, target)
    asked = rows.weight == 1.0
    right = jnp.sum(asked & (jnp.argmax(scores, axis=-1) == target)) / jnp.sum(asked)
    return jnp.sum(nll * rows.weight) / jnp.sum(rows.weight), right


def optimizer(params: Tree, steps: int) -> optax.GradientTransformation:
    """Muon on the matrices of the blocks, AdamW on the rest."""

    def schedule(peak: float) -> optax.Schedule:
        return optax.warmup_cosine_decay_schedule(0.0, peak, min(40, steps // 2), steps, 0.05 * peak)

    inputs = {"q": 1, "k": 1, "v": 1, "o": 2, "gate": 1, "up": 1, "down": 1}

    def dimensions(path: Any, leaf: Array) -> MuonDimensionNumbers | None:
        if path[0].key != "layers" or path[1].key not in inputs:
            return None
        axes = tuple(range(1, leaf.ndim))  # 0 is the layer
        return MuonDimensionNumbers(axes[: inputs[path[1].key]], axes[inputs[path[1].key] :])

    return optax.chain(
        optax.clip_by_global_norm(1.0),
        muon(
            schedule(0.02),
            muon_weight_dimension_numbers=jax.tree_util.tree_map_with_path(dimensions, params),
            adam_learning_rate=schedule(5e-3),
            adam_b2=0.98,
        ),
    )


def initial(backbone: Backbone, seed: int) -> Tree:
    """Random weights with two changes, without which retrieval takes thousands of steps to emerge: the blocks add
    little to the residual stream, and head n of the first block attends to the token n + 1 positions back.

    The biases alone do the latter: after the rotary embedding, k_bias and q_bias = rotate(k_bias, n + 1) have the dot
    product sum_i a_i² cos((distance − n − 1) f_i), which is largest at distance n + 1.
    """
    specs = lm.specs(backbone, backbone.num_hidden_layers, embed=True, head=True)
    params = initialize(specs, jax.random.key(seed))
    layers = dict(params["layers"])
    for name in ("o", "down"):
        layers[name] = layers[name] * OUTPUT_SCALE
    for name in ("q", "k"):
        layers[name] = layers[name].at[0].multiply(0.2)
    fast = rope_frequencies(backbone) > 0.1  # slower ones hardly distinguish neighbours
    key_bias = jnp.concatenate([jnp.where(fast, PREVIOUS_TOKEN, 0.0), jnp.zeros(backbone.head_dim // 2)])
    key_bias = jnp.tile(key_bias, (1, 1, backbone.num_attention_heads, 1))
    back = jnp.arange(1, backbone.num_attention_heads + 1)
    turned = [rotate(key_bias[:, :, :1], rotation(backbone, -back[None, n : n + 1])) for n in range(len(back))]
    layers["k_bias"] = layers["k_bias"].at[0].set(key_bias[0, 0, : backbone.num_key_value_heads])
    layers["q_bias"] = layers["q_bias"].at[0].set(jnp.concatenate(turned, axis=2)[0, 0])
    return {**params, "layers": layers}


def pretrain(tokenizer: Any, backbone: Backbone, seed: int, stages: tuple[Stage, ...] = STAGES) -> Tree:
    """The weights after all ``stages``; prints loss and accuracy every 50 steps."""
    params = initial(backbone, seed)
    update = optimizer(params, sum(stage.steps for stage in stages))
    state = jax.jit(update.init)(params)

    @jax.jit
    def step(params, state, rows):
        (value, right), grads = jax.value_and_grad(loss, has_aux=True)(params, backbone, rows)
        updates, state = update.update(grads, state, params)
        return optax.apply_updates(params, updates), state, jnp.stack([value, right])

    print(f"{count(params):,} parameters, vocabulary {backbone.vocab_size}", flush=True)
    since, done = time.perf_counter(), 0
    for number, stage in enumerate(stages, start=1):
        source = question_answering if stage.facts else word_lists
        rows_seed = 1000 * seed + 100 * number
        rows = rows_of(source(tokenizer, stage, rows_seed), stage, rows_seed)
        seen = []
        for _ in range(stage.steps):
            params, state, metrics = step(params, state, next(rows))
            seen.append(metrics)
            done += 1
            if done % 50 == 0:
                value, right = np.mean(np.stack(seen[-50:]), axis=0)
                spent = time.perf_counter() - since
                print(f"stage {number} step {done} loss {value:.4f} accuracy {right:.4f} {spent:.0f} s", flush=True)
    return params


def save(folder: Path, params: Tree, backbone: Backbone, tokenizer: Any) -> None:
    """Write a Hugging Face folder, with weights in float16."""
    folder.mkdir(parents=True, exist_ok=True)
    ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    config = hf_config.config_values(backbone, torch_dtype="float16", **ends)
    specs = lm.specs(backbone, backbone.num_hidden_layers, embed=True, head=True)
    hf.save_backbone(folder, specs, params, config, dtype="float16")
    (folder / "generation_config.json").write_text(json.dumps(ends, indent=2) + "\n", encoding="utf-8")
    tokenizer.save_pretrained(folder)
