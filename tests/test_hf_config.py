"""config.json of Hugging Face folders: both dialects are read, what is not implemented is refused by name."""

import json
import shutil

import hf_fixtures
import pytest
import tiny_models
import train_fixtures
from hf_fixtures import KINDS, config_of, rewrite

from comi_jax.backbone import Llama3Rope
from comi_jax.config import Config
from comi_jax.errors import ConfigError
from comi_jax.overrides import override
from comi_jax.planning import programs
from comi_jax.weights import hf_config
from comi_jax.weights.hf_attributes import ATTRIBUTES, COMPUTED, HARMLESS, MUST, MUST_BE, NOTHING
from comi_jax.weights.starting_model import StartingModel

folders = hf_fixtures.folders


@pytest.mark.parametrize("kind", KINDS)
def test_config_is_read_in_both_dialects(kind, folders, tmp_path):
    folder, _ = folders(kind)
    backbone = tiny_models.BACKBONES[kind]
    assert "rope_parameters" in config_of(folder)
    assert hf_config.read_config(folder) == backbone
    rope = config_of(folder)["rope_parameters"]
    theta = rope.pop("rope_theta")
    scaled = rope if backbone.rope_scaling else None
    old = rewrite(folder, tmp_path, rope_parameters=None, rope_theta=theta, rope_scaling=scaled)
    assert hf_config.read_config(old) == backbone
    older = {"type": rope.pop("rope_type"), **rope}  # the key before transformers 4.43
    assert hf_config.read_config(rewrite(old, tmp_path, rope_scaling=older)) == backbone


def test_two_scalings_that_disagree_are_refused(folders, tmp_path):
    """A card's rope_scaling beside what transformers 5 wrote: of the two one would be dropped in silence."""
    folder, _ = folders("qwen2")
    both = rewrite(folder, tmp_path, rope_scaling={"type": "yarn", "factor": 4.0})
    with pytest.raises(ConfigError, match="has rope_parameters .* and rope_scaling .*yarn.*, which differ; remove one"):
        hf_config.read_config(both)


def real(**changes):
    """config.json of meta-llama/Llama-3.2-1B, the entries that matter."""
    values = {
        "architectures": ["LlamaForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
        "bos_token_id": 128000, "eos_token_id": 128001,
        "head_dim": 64, "hidden_act": "silu", "hidden_size": 2048, "initializer_range": 0.02,
        "intermediate_size": 8192, "max_position_embeddings": 131072, "mlp_bias": False, "model_type": "llama",
        "num_attention_heads": 32, "num_hidden_layers": 16, "num_key_value_heads": 8, "pretraining_tp": 1,
        "rms_norm_eps": 1e-05, "rope_theta": 500000.0, "tie_word_embeddings": True, "torch_dtype": "bfloat16",
        "rope_scaling": {"factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
                         "original_max_position_embeddings": 8192, "rope_type": "llama3"},
        "transformers_version": "4.45.0.dev0", "use_cache": True, "vocab_size": 128256,
    }  # fmt: skip
    return values | changes


def test_a_real_config_is_read():
    backbone = hf_config.backbone_of(real(), "here")
    assert backbone.rope_scaling == Llama3Rope(32.0, 1.0, 4.0, 8192)
    assert (backbone.rope_theta, backbone.head_dim, backbone.tie_word_embeddings) == (500_000.0, 64, True)
    # The first LLaMA-2 files: no head_dim, no rope_theta, generation settings among the rest.
    old = real(
        head_dim=None, rope_theta=None, rope_scaling=None, max_length=4096, pad_token_id=0, tie_word_embeddings=False
    )
    backbone = hf_config.backbone_of({k: v for k, v in old.items() if k != "head_dim"}, "here")
    assert (backbone.rope_theta, backbone.rope_scaling, backbone.head_dim) == (10_000.0, None, 64)


@pytest.mark.parametrize(
    "change",
    [
        {"hidden_act": "gelu"},
        {"attention_bias": True},
        {"mlp_bias": True},
        {"attention_dropout": 0.1},
        {"use_sliding_window": True, "model_type": "qwen2"},
        {"use_sliding_window": True, "model_type": "qwen3"},
        {"sliding_window": 4096},
        {"is_causal": False},
        {"is_causal": None},
        {"is_encoder_decoder": True},
        {"pruned_heads": {"1": [0]}},
        {"per_layer_config": {"1": {"intermediate_size": 8}}},
        {"partial_rotary_factor": 0.5},
        {"quantization_config": {"bits": 4}},
        {"final_logit_softcapping": 30.0},
        {"layer_types": ["full_attention", "sliding_attention"]},
        {"num_experts": 8},
        {"model_type": "mistral"},
        {"model_type": None},
    ],
)
def test_what_is_not_implemented_is_refused_by_name(change):
    with pytest.raises(ConfigError, match=next(iter(change))):
        hf_config.backbone_of(real(**change), "here")


def test_everything_that_is_refused_is_named_at_once():
    with pytest.raises(ConfigError, match="hidden_act='gelu'.*num_experts=8.*scale_embeddings=True") as refused:
        hf_config.backbone_of(real(hidden_act="gelu", num_experts=8, scale_embeddings=True), "here")
    assert "pass --ignore-config=hidden_act,num_experts,scale_embeddings" in str(refused.value)
    with pytest.raises(ConfigError) as refused:  # what is computed with cannot be ignored, and nobody is told to
        hf_config.backbone_of(real(layer_types=["linear_attention"]), "here")
    assert "ignore-config" not in str(refused.value)


@pytest.mark.parametrize("value", [False, None, 0, "", [], {}, True, 1.5, "some"])
def test_an_attribute_that_is_not_known_is_refused_whatever_its_value(value):
    """false, too: what it is false of may be what every other model does."""
    with pytest.raises(ConfigError, match="mask_the_future="):
        hf_config.backbone_of(real(mask_the_future=value), "here")


@pytest.mark.parametrize("value", [False, None, 0, "", [], {}, True, 1.5, "some", {"a": [1]}])
def test_what_computes_nothing_is_read_whatever_its_value(value):
    harmless = [name for name, known in ATTRIBUTES.items() if known.kind == NOTHING]
    assert len(harmless) > 150
    assert hf_config.backbone_of(real(**dict.fromkeys(harmless, value)), "here") == hf_config.backbone_of(
        real(), "here"
    )


@pytest.mark.parametrize("name", [name for name, known in ATTRIBUTES.items() if known.kind == MUST_BE])
def test_what_must_be_off_is_read_when_it_is(name):
    known = ATTRIBUTES[name]
    for value in known.allowed:
        hf_config.backbone_of(real(**{name: value}), "here")
    for kind in hf_config.MODEL_TYPES:
        values = real(model_type=kind, **{name: "other"})
        if kind in known.of:
            with pytest.raises(ConfigError, match=f"{name}='other'"):
                hf_config.backbone_of(values, "here")
        else:
            hf_config.backbone_of(values, "here")


def test_the_table_of_attributes_says_each_once_and_why():
    once = [*MUST, *(name for _, names in (*COMPUTED, *HARMLESS) for name in names.split())]
    assert sorted(once) == sorted(ATTRIBUTES) and all(known.reason for known in ATTRIBUTES.values())


# What stands in published LLaMA and Qwen folders besides the shape of the model, with the values that stand there.
LEFTOVERS = {
    "Vicuna, LLaVA and other early LLaMA": {
        "max_sequence_length": 2048, "pretraining_tp": 2, "tokenizer_model_max_length": 4096, "bad_words_ids": None,
        "tokenizer_padding_side": "right", "unk_token_id": 0, "num_beams": 1, "top_k": 50, "pruned_heads": {},
        "tie_encoder_decoder": False, "torchscript": False, "finetuning_task": None,
        "cross_attention_hidden_size": None,
        "is_encoder_decoder": False, "typical_p": 1.0, "use_bfloat16": False, "task_specific_params": None,
        "tf_legacy_loss": False, "suppress_tokens": None, "diversity_penalty": 0.0, "length_penalty": 1.0,
        "id2label": {"0": "LABEL_0", "1": "LABEL_1"}, "label2id": {"LABEL_0": 0, "LABEL_1": 1}, "num_beam_groups": 1,
    },
    "SmolLM": {
        "is_llama_config": True, "rope_interleaved": False, "rope_scaling": None,
        "transformers.js_config": {"dtype": "q4", "kv_cache_dtype": {"q4f16": "float16"}},
    },
    "fine-tunes": {
        "unsloth_version": "2024.12.4", "unsloth_fixed": True, "use_cache": False, "gradient_checkpointing": False,
        "_attn_implementation_autoset": True, "neftune_noise_alpha": 5, "model_max_length": 4096,
        "_name_or_path": "someone/base", "max_seq_length": 4096, "label_smoothing": 0.0, "use_flash_attention_2": True,
    },
    "Qwen2 and Qwen2.5": {
        "max_window_layers": 28, "sliding_window": 131072, "use_sliding_window": False, "attention_bias": True,
        "auto_map": {"AutoModelForCausalLM": "modeling_qwen.Qwen2ForCausalLM"}, "max_length": 32768,
        "use_mrope": False,
    },
}  # fmt: skip


@pytest.mark.parametrize("leftovers", LEFTOVERS.values(), ids=LEFTOVERS)
def test_leftovers_change_nothing_that_transformers_computes_either(leftovers, folders, tmp_path):
    import torch
    from transformers import AutoModelForCausalLM

    kind = "qwen2" if "use_sliding_window" in leftovers else "llama2"
    folder, model = folders(kind)
    shutil.copy(folder / "model.safetensors", tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config_of(folder) | leftovers))
    assert hf_config.read_config(tmp_path) == tiny_models.BACKBONES[kind]
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, attn_implementation="eager")
        torch.testing.assert_close(theirs(ids).logits, model(ids).logits, atol=1e-5, rtol=0)


def test_an_attribute_can_be_ignored_by_name(folders, tmp_path):
    folder, _ = folders("qwen2")
    own = rewrite(folder, tmp_path, dual_chunk_attention_config={"chunk_size": 8}, attention_dropout=0.1)
    with pytest.raises(ConfigError, match="--ignore-config=attention_dropout,dual_chunk_attention_config"):
        hf_config.read_config(own)
    with pytest.raises(ConfigError, match="implemented: attention_dropout=0.1; if it"):
        hf_config.read_config(own, ["dual_chunk_attention_config"])
    names = ("dual_chunk_attention_config", "attention_dropout")
    assert hf_config.read_config(own, names) == tiny_models.BACKBONES["qwen2"]
    with pytest.raises(ConfigError, match="has no attribute dual_chunk, which --ignore-config names"):
        hf_config.read_config(own, ["dual_chunk"])
    with pytest.raises(
        ConfigError, match="hidden_size,rope_parameters cannot be ignored: the model's computation depends on it"
    ):
        hf_config.read_config(own, ["hidden_size", "rope_parameters", *names])


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "linear", "factor": 2.0},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768},
        {"type": "dynamic", "factor": 2.0},
        {"rope_type": "llama3", "factor": 8.0},
        {"rope_type": "default", "partial_rotary_factor": 0.5},
    ],
)
def test_other_rotary_scalings_are_refused(rope):
    with pytest.raises(ConfigError, match="rotary embeddings of type '" + (rope.get("rope_type") or rope["type"])):
        hf_config.backbone_of(real(rope_scaling=rope), "here")


def test_broken_configs_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="no config.json"):
        hf_config.read_config(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama",')
    with pytest.raises(ConfigError, match="config.json is not valid JSON"):
        hf_config.read_config(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ConfigError, match="an object is expected"):
        hf_config.read_config(tmp_path)
    with pytest.raises(ConfigError, match="has no integer for hidden_size, num_hidden_layers"):
        hf_config.backbone_of(real(hidden_size=None, num_hidden_layers="16"), "here")
    with pytest.raises(ConfigError, match="not a multiple"):
        hf_config.backbone_of(real(hidden_size=2050, head_dim=None), "here")


def test_stop_tokens_come_from_the_generation_config_first(tmp_path):
    (tmp_path / "config.json").write_text('{"eos_token_id": 2}')
    assert hf_config.stop_tokens(tmp_path) == (2,)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [7, 9]}')
    assert hf_config.stop_tokens(tmp_path) == (7, 9)
    (tmp_path / "generation_config.json").write_text("{}")
    assert hf_config.stop_tokens(tmp_path) == (2,)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match="names no eos_token_id"):
        hf_config.stop_tokens(tmp_path)
    (tmp_path / "generation_config.json").write_text("{")
    with pytest.raises(ConfigError, match="generation_config.json is not valid JSON"):
        hf_config.stop_tokens(tmp_path)


def test_a_run_starts_from_a_folder_of_which_something_is_ignored(folders, tmp_path):
    folder, _ = folders("qwen2")
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    rewrite(folder, tmp_path, dual_chunk_attention_config={"chunk_size": 8})
    train_fixtures.tokenizer().save_pretrained(tmp_path)
    config = override(Config(), [f"model.path={tmp_path}", "model.ignore_config=dual_chunk_attention_config"])
    assert programs.backbone_of(config) == StartingModel.open(config).backbone == tiny_models.BACKBONES["qwen2"]
    with pytest.raises(ConfigError, match="--ignore-config=dual_chunk_attention_config"):
        StartingModel.open(override(config, ["model.ignore_config="]))
