"""What ``benchmarks.serving`` compares does the same work, and what it counts is what is kept."""

import numpy as np
import pytest
import tiny_models

from comi_jax.benchmarks import serving
from comi_jax.config import Generation
from comi_jax.model import architecture, sampling

TOKENS, NEW = 40, 3
ARCH = tiny_models.architecture("qwen2", rates=(4,), segment_size=TOKENS)


@pytest.fixture(scope="module")
def model():
    return serving.Model(tiny_models.shaken(architecture.specs(ARCH)), ARCH, 4, NEW)


def test_the_rows_of_a_document(model):
    rows = {row[0]: row[1:] for row in serving.document(model, TOKENS, 2)}
    assert list(rows) == ["re-read", "prefix cache", "COMI, encoding each time", "COMI, kept"]
    assert all(float(cell) >= 0 for cells in rows.values() for cell in cells)
    assert all(float(cells[0]) > 0 for cells in rows.values())


def test_what_is_kept_is_counted_without_the_room_behind_it(model):
    rows, backbone = {row[0]: row[-1] for row in serving.document(model, TOKENS, 1)}, ARCH.backbone
    per_layer = 2 * TOKENS * backbone.num_key_value_heads * backbone.head_dim * 4
    states, norms = TOKENS * backbone.hidden_size * 4, TOKENS * 4
    document = ARCH.compression.encoder_layers * per_layer + states
    assert rows["prefix cache"] == f"{backbone.num_hidden_layers * per_layer / 1e6:,.1f}"
    kept = serving._bytes(serving._encode(model, serving._question(backbone, TOKENS, 4, 0)))
    assert document + norms <= kept <= document + 2 * norms and rows["COMI, kept"] == f"{kept / 1e6:,.1f}"
    assert rows["re-read"] == rows["COMI, encoding each time"] == "0.0"


def test_what_is_kept_gives_what_reading_all_again_gives(model):
    batch = serving._question(ARCH.backbone, TOKENS, 4, 0)
    rules = sampling.rules(Generation(), 1)
    encoded = serving._remember(model, serving._encode(model, batch), batch)
    anew = serving.batching.remember(model.params, batch, ARCH, 4)
    np.testing.assert_allclose(encoded.vectors, anew.vectors, atol=1e-5)
    cache = serving._prefix(model.params, batch, ARCH, batch.query.shape[1] + NEW)
    kept = serving._after_prefix(model.params, cache, batch, rules, ARCH, NEW)
    again = serving._reread(model.params, batch, rules, ARCH, NEW)
    np.testing.assert_allclose(kept.logprobs, again.logprobs, atol=1e-4)
    assert int(kept.token[0]) == int(again.token[0])


def test_slots_and_batches_give_every_answer_its_tokens(model, monkeypatch):
    """Five questions in batches of two, one of which is half full."""
    monkeypatch.setattr(serving, "ANSWERS", (1, 6))
    load = serving.Load.draw(ARCH, 9, 5)
    decoded = []
    real = serving.SlotDecoder.step

    def step(loop):
        events = real(loop)
        decoded.extend(events)
        return events

    monkeypatch.setattr(serving.SlotDecoder, "step", step)
    for serve in (serving.in_slots, serving.in_batches):
        waits, seconds = serve(model, load, 2)
        assert len(waits) == 5 and 0 < min(waits) and max(waits) < seconds
    assert len(decoded) == sum(load.new) and len(set(load.new)) > 1
    assert sum(event.finish_reason == "length" for event in decoded) == 5
    rows = serving.at_once(model, 9, 3, (1, 2))
    assert [row[:2] for row in rows] == [(n, way) for n in "12" for way in ("static batches", "slots")]
