"""Counted operations: against the arithmetic of the paper's shapes, against XLA's own count, and the table of chips."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from comi_jax.backbone import Backbone
from comi_jax.config import Compression, Lora
from comi_jax.devices import chips
from comi_jax.model import backbone as lm
from comi_jax.model import flops
from comi_jax.model.architecture import Architecture
from comi_jax.params import initialize

QWEN2_7B = Backbone(
    model_type="qwen2", vocab_size=152_064, hidden_size=3584, intermediate_size=18_944, num_hidden_layers=28,
    num_attention_heads=28, num_key_value_heads=4, head_dim=128, rms_norm_eps=1e-6, rope_theta=1e6, rope_scaling=None,
    max_position_embeddings=32_768, tie_word_embeddings=False, qkv_bias=True, qk_norm=False,
)  # fmt: skip
ARCH = Architecture(QWEN2_7B, Compression(rates=(32,), encoder_layers=8, segment_size=32_768))
LENGTHS = flops.Lengths(context=32_768, query=32, answer=20, rate=32)


def test_qwen2_7b_at_32k():
    """Worked out by hand: 233.0 M linear parameters a block, 8 blocks over 32,800 tokens."""
    assert flops.attention_weights(QWEN2_7B) + flops.mlp_weights(QWEN2_7B) == 233_046_016
    encoder = flops.by_part(ARCH, LENGTHS)["encoder"]
    linear, attention = 2 * 8 * 233_046_016 * 32_800, 2 * 8 * 32_800**2 * 3584
    assert encoder.forward == pytest.approx(linear + attention, rel=1e-12)
    assert encoder.backward == pytest.approx(2 * encoder.forward)
    assert linear / 1e12 == pytest.approx(122, abs=1) and attention / 1e12 == pytest.approx(62, abs=1)
    # 552 for the encoder, three times its forward; 14.2 forward and 16.1 backward for the decoder; 1.5 for the LSA.
    assert flops.train_step(ARCH, LENGTHS) / 1e12 == pytest.approx(584, abs=1)


def test_segments_save_attention_alone():
    short = dataclasses.replace(ARCH, compression=dataclasses.replace(ARCH.compression, segment_size=8192))
    whole, cut = (
        flops.by_part(arch, dataclasses.replace(LENGTHS, query=0))["encoder"].forward for arch in (ARCH, short)
    )
    assert whole - cut == pytest.approx(2 * 8 * 3584 * (32_768**2 - 4 * 8192**2), rel=1e-9)


def test_representatives_are_compared_within_their_segment():
    short = dataclasses.replace(ARCH, compression=dataclasses.replace(ARCH.compression, segment_size=8192))
    whole, cut = (flops.by_part(arch, LENGTHS)["compression"].forward for arch in (ARCH, short))
    assert whole == 2 * 1024**2 * 3584 and cut == whole / 4


def test_a_context_that_several_ask_about_is_encoded_once():
    parts = flops.by_part(ARCH, LENGTHS)
    alone = flops.by_part(ARCH, dataclasses.replace(LENGTHS, query=0, answer=0))["encoder"]
    whole = sum(part.total for part in parts.values())
    assert flops.shared(ARCH, LENGTHS, 1).total == pytest.approx(whole, rel=1e-12)
    assert 4 * flops.shared(ARCH, LENGTHS, 4).total == pytest.approx(4 * whole - 3 * alone.total, rel=1e-12)


def test_adapters_train_less_than_the_matrices():
    adapted = dataclasses.replace(ARCH, lora=Lora(rank=16))
    direct, low_rank = (flops.by_part(arch, LENGTHS)["decoder"] for arch in (ARCH, adapted))
    assert low_rank.forward > direct.forward and low_rank.backward < direct.backward


def test_xla_counts_the_same_products():
    """One block over a row, forward: XLA's count holds the whole square of scores and the small operations too."""
    small = dataclasses.replace(QWEN2_7B, hidden_size=256, intermediate_size=1024, num_attention_heads=4,
                                num_key_value_heads=2, head_dim=64, vocab_size=64)  # fmt: skip
    params = initialize(lm.specs(small, 1, embed=False, head=False), jax.random.key(0))
    x = jnp.zeros((1, 128, 256))
    step = jax.jit(lambda p, x: lm.forward(p, x, small, runtime=lm.Runtime(attention="dense"))[0])
    counted = step.lower(params, x).compile().cost_analysis()["flops"]
    ours = flops.blocks(small, 1, 128, (True, True)).forward + 2 * 128**2 * 256  # the other half of the square
    assert ours < counted < 1.1 * ours


@pytest.mark.parametrize(
    ("kind", "name"),
    [("TPU v5 lite", "v5e"), ("TPU v5", "v5p"), ("TPU v6 lite", "v6e"), ("TPU v4", "v4"),
     ("NVIDIA H100 80GB HBM3", "h100"), ("NVIDIA H200", "h200"), ("NVIDIA H20", "h20")],
)  # fmt: skip
def test_chips_are_found_by_what_jax_calls_them(kind, name):
    assert chips.find(kind) is chips.CHIPS[name]


def test_a_chip_that_is_not_listed_is_not_guessed():
    assert chips.find("cpu") is None
