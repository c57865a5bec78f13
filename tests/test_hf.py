"""Hugging Face folders: both dialects are read, the rest is refused by name; weights come back byte for byte."""

import dataclasses
import functools
import json
import shutil
import struct

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_models
import train_fixtures
from safetensors.numpy import load_file, save_file

from comi_jax.backbone import Llama3Rope
from comi_jax.config import Config
from comi_jax.errors import ConfigError
from comi_jax.model import architecture
from comi_jax.model import backbone as lm
from comi_jax.overrides import override
from comi_jax.params import flatten
from comi_jax.planning import programs
from comi_jax.weights import hf, hf_config, hf_folder
from comi_jax.weights.hf_attributes import ATTRIBUTES, COMPUTED, HARMLESS, MUST, MUST_BE, NOTHING
from comi_jax.weights.layout import WeightsError
from comi_jax.weights.starting_model import StartingModel
from comi_jax.weights.tokenizer import fit_tokenizer, load_tokenizer

KINDS = list(tiny_models.BACKBONES)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """kind -> a folder as transformers writes it, and its model."""
    pytest.importorskip("torch")

    @functools.cache
    def make(kind):
        model = tiny_models.transformers_model(kind)
        folder = tmp_path_factory.mktemp(kind)
        model.save_pretrained(folder)
        return folder, model

    return make


@functools.partial(jax.jit, static_argnums=2)
def logits(params, ids, backbone):
    states, _ = lm.forward(params, lm.embed_tokens(params, ids, jnp.float32), backbone)
    return lm.logits(params, states)


def specs_of(backbone):
    return lm.specs(backbone, backbone.num_hidden_layers, embed=True, head=True)


def config_of(folder):
    return json.loads((folder / "config.json").read_text())


def rewrite(folder, tmp_path, **changes):
    """A copy of ``folder``'s config.json with ``changes``; None takes an entry away."""
    values = config_of(folder) | changes
    (tmp_path / "config.json").write_text(json.dumps({k: v for k, v in values.items() if v is not None}))
    return tmp_path


# --- config.json ------------------------------------------------------------------------------------------------------


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


def test_a_tokenizer_splits_words_as_its_file_says(tmp_path):
    """Beside a Qwen2 config, transformers would put Qwen2's own splitting in the place of the file's."""
    tokenizers = pytest.importorskip("tokenizers")
    from transformers import PreTrainedTokenizerFast

    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"[E]": 0, "[U]": 1, "red": 2, "fox-y": 3}, "[U]"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    (tmp_path / "config.json").write_text('{"model_type": "qwen2"}')
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="[E]", unk_token="[U]").save_pretrained(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.encode("red fox-y", add_special_tokens=False) == [2, 3] and tokenizer.eos_token_id == 0
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[U]").save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="no end-of-sequence token"):
        load_tokenizer(tmp_path)
    with pytest.raises(ConfigError, match="holds no tokenizer"):
        load_tokenizer(tmp_path / "nowhere")


def test_a_run_starts_from_a_folder_of_which_something_is_ignored(folders, tmp_path):
    folder, _ = folders("qwen2")
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    rewrite(folder, tmp_path, dual_chunk_attention_config={"chunk_size": 8})
    train_fixtures.tokenizer().save_pretrained(tmp_path)
    config = override(Config(), [f"model.path={tmp_path}", "model.ignore_config=dual_chunk_attention_config"])
    assert programs.backbone_of(config) == StartingModel.open(config).backbone == tiny_models.BACKBONES["qwen2"]
    with pytest.raises(ConfigError, match="--ignore-config=dual_chunk_attention_config"):
        StartingModel.open(override(config, ["model.ignore_config="]))


def varint(number):
    return bytes([number]) if number < 128 else bytes([number & 127 | 128]) + varint(number >> 7)


def message(*fields):
    """A protobuf message of (number, whole number or float or bytes)."""
    made = b""
    for number, value in fields:
        if isinstance(value, float):
            made += varint(number << 3 | 5) + struct.pack("<f", value)
        elif isinstance(value, bytes):
            made += varint(number << 3 | 2) + varint(len(value)) + value
        else:
            made += varint(number << 3) + varint(value)
    return made


PIECES = [
    "a",
    "b",
    "c",
    "d",
    "\u2581",
    "é",
    "ab",
    "\u2581a",
    "bc",
    "abc",
    "\u2581\u2581",
    "cd",
    "\u2581ab",
    "da",
    "dab",
    "bb",
]


def sentencepiece_model(pieces=PIECES, trainer=(), normalizer=()):
    """A model of LLaMA-2's kind: <unk>, <s>, </s>, the 256 bytes, then ``pieces`` with falling scores."""
    each = [("<unk>", 0.0, 2), ("<s>", 0.0, 3), ("</s>", 0.0, 3), *((f"<0x{i:02X}>", 0.0, 6) for i in range(256))]
    each += [(piece, -float(number), 1) for number, piece in enumerate(pieces)]
    parts = [
        (1, message((1, text.encode()), (2, score), *([(3, kind)] if kind > 1 else ()))) for text, score, kind in each
    ]
    parts += [(2, message((3, 2), (35, 1), (43, 2**64 - 1), *trainer)), (3, message((3, 1), (4, 0), *normalizer))]
    return message(*parts)


def pieces_of(text, pieces=PIECES):
    """sentencepiece's own way, by scores: the best pair of neighbours that is a piece merges, the first of equals."""
    ids = {piece: number for number, piece in enumerate(pieces)}
    found = list("\u2581" + text.replace(" ", "\u2581"))
    while pairs := [i for i in range(len(found) - 1) if found[i] + found[i + 1] in ids]:
        first = min(pairs, key=lambda i: (ids[found[i] + found[i + 1]], i))
        found[first : first + 2] = [found[first] + found[first + 1]]
    return [number for piece in found for number in
            ([259 + ids[piece]] if piece in ids else [3 + byte for byte in piece.encode()])]  # fmt: skip


def test_a_sentencepiece_model_alone_gives_its_own_ids(tmp_path):
    """Without sentencepiece; transformers 5 splits such a folder otherwise."""
    (tmp_path / "tokenizer.model").write_bytes(sentencepiece_model())
    tokenizer = load_tokenizer(tmp_path)
    rng = np.random.default_rng(0)
    texts = ["", " ", "a", " ab", "dabcd", "é\U0001f600", "a  b\n", "<0x41>"]
    texts += ["".join(rng.choice(list("aabbcd  éx"), rng.integers(1, 30))) for _ in range(300)]
    for text in texts[1:]:
        ids = tokenizer(text, add_special_tokens=False).input_ids
        assert ids == pieces_of(text), text
        assert tokenizer.decode(ids) == text
    assert (tokenizer.unk_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id, len(tokenizer)) == (0, 1, 2, 275)
    assert tokenizer("ab").input_ids == [1, *pieces_of("ab")]
    tokenizer.save_pretrained(tmp_path / "saved")
    assert load_tokenizer(tmp_path / "saved")(texts).input_ids == tokenizer(texts).input_ids
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"pad_token": "</s>", "bos_token": None}))
    assert load_tokenizer(tmp_path).pad_token_id == 2
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<pad>": 275}))
    assert load_tokenizer(tmp_path).convert_tokens_to_ids("<pad>") == 275
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<pad>": 300}))
    with pytest.raises(ConfigError, match="added_tokens.json gives '<pad>' the id 300.* tokenizer.json"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    "model, said",
    [
        (sentencepiece_model(trainer=[(3, 1)]), "another kind than LLaMA-2's .its model is not of type BPE"),
        (sentencepiece_model(trainer=[(35, 0)]), "it has no bytes"),
        (sentencepiece_model(normalizer=[(2, b"map")]), "it normalises text"),
        (sentencepiece_model(normalizer=[(4, 1)]), "it normalises text"),
        (sentencepiece_model(normalizer=[(3, 0)]), "it puts no space before"),
        (sentencepiece_model() + message((1, message((1, b"user"), (3, 4)))), "it has pieces of other types"),
        (sentencepiece_model()[:-4], "is not a sentencepiece model"),
        (b"IQ== 0\nIg== 1\n", "is not a sentencepiece model"),  # of tiktoken, as LLaMA-3's first files are
        (b"", "is not a sentencepiece model"),
    ],
)
def test_another_tokenizer_model_is_refused_with_a_way_on(model, said, tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(model)
    with pytest.raises(ConfigError, match=f"tokenizer.model .*{said}.*; take the tokenizer.json that is published"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("token", ["pad_token", "extra_special_tokens"])
def test_a_special_token_beyond_the_vocabulary_is_left_out(token, tmp_path, caplog):
    """What a text holds of its letters is read as any other letters are; no id is beyond the embeddings."""
    (tmp_path / "tokenizer.model").write_bytes(sentencepiece_model())
    plain = load_tokenizer(tmp_path)
    backbone = dataclasses.replace(tiny_models.BACKBONES["llama2"], vocab_size=len(plain))
    assert fit_tokenizer(plain, backbone) is plain
    more = load_tokenizer(tmp_path)
    more.add_special_tokens({token: "[PAD]" if token == "pad_token" else ["[PAD]"]})
    more.save_pretrained(tmp_path / "more")
    more, text = load_tokenizer(tmp_path / "more"), "ab [PAD] cd </s> é"
    assert more("[PAD]").input_ids[-1] == len(plain)
    hf_folder.tell.cache_clear()
    fitted = fit_tokenizer(more, backbone)
    assert "tokenizer has 276 tokens, the model only 275: [PAD] has no embedding" in caplog.text
    assert fitted(text).input_ids == plain(text).input_ids and fitted.pad_token is None and len(fitted) == 275
    assert fitted.all_special_tokens == plain.all_special_tokens
    fitted.save_pretrained(tmp_path / "fitted")
    assert load_tokenizer(tmp_path / "fitted")(text).input_ids == plain(text).input_ids
    more.add_tokens(["word"])
    with pytest.raises(ConfigError, match="277 tokens, the model only 275: word has no embedding; pass"):
        fit_tokenizer(more, backbone)
    more.eos_token = "[PAD]"
    with pytest.raises(ConfigError, match=r"\[PAD\], word has no embedding"):
        fit_tokenizer(more, backbone)


# --- weights ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("shard", ["1GB", "20KB"])
def test_a_folder_computes_what_transformers_computes(kind, dtype, shard, tmp_path):
    import torch
    from transformers import AutoModelForCausalLM

    tiny_models.transformers_model(kind).to(getattr(torch, dtype)).save_pretrained(tmp_path, max_shard_size=shard)
    sharded = (tmp_path / "model.safetensors.index.json").is_file()
    assert sharded == (shard == "20KB") and len(list(tmp_path.glob("*.safetensors"))) > 2 * sharded
    params = hf.load_backbone(tmp_path, hf_config.read_config(tmp_path))
    assert {str(leaf.dtype) for leaf in flatten(params).values()} == {dtype}
    ids = np.random.default_rng(0).integers(0, 61, (2, 16))
    with torch.no_grad():
        theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
        want = theirs(torch.from_numpy(ids)).logits.numpy()
    params = jax.tree.map(lambda x: x.astype(np.float32), params)
    got = logits(params, jnp.asarray(ids), tiny_models.BACKBONES[kind])
    scale = np.abs(want).max()
    np.testing.assert_allclose(got / scale, want / scale, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_in_and_out_again_is_byte_identical(kind, folders, tmp_path):
    folder, _ = folders(kind)
    specs = specs_of(tiny_models.BACKBONES[kind])
    hf.save_backbone(tmp_path, specs, hf.load_backbone(folder, hf_config.read_config(folder)), config_of(folder))
    theirs, ours = (load_file(path / "model.safetensors") for path in (folder, tmp_path))
    assert set(ours) == set(theirs)
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype and ours[name].shape == tensor.shape
        assert ours[name].tobytes() == tensor.tobytes(), name
    assert config_of(tmp_path) == config_of(folder)


@pytest.fixture
def copy(folders, tmp_path):
    """kind -> a folder of our own to break, the tensors in it and a way to write them back."""

    def make(kind):
        source, _ = folders(kind)
        shutil.copytree(source, tmp_path, dirs_exist_ok=True)
        path = tmp_path / "model.safetensors"
        tensors = load_file(path)
        return tmp_path, tensors, lambda: save_file(tensors, path, metadata={"format": "pt"})

    return make


@pytest.mark.parametrize("kind", KINDS)
def test_a_fresh_model_is_cut_from_one_language_model(kind, folders):
    folder, _ = folders(kind)
    arch = tiny_models.architecture(kind)
    fresh = hf.load_parts(folder, arch.backbone, architecture.parts_of_backbone(arch))
    want = {path: spec.shape for path, spec in flatten(architecture.specs(arch)).items() if not path.startswith("mig/")}
    assert {path: x.shape for path, x in fresh.items()} == want
    whole = flatten(hf.load_backbone(folder, arch.backbone))
    for path, array in fresh.items():
        np.testing.assert_array_equal(array, whole[path.partition("/")[2]][: len(array)], err_msg=path)


def load(folder):
    return hf.load_backbone(folder, hf_config.read_config(folder))


def test_a_tied_head_may_be_repeated_and_old_frequencies_stored(copy):
    folder, tensors, write = copy("qwen3")
    assert "lm_head.weight" not in tensors
    without = load(folder)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(6, np.float32)
    write()
    repeated = load(folder)
    assert jax.tree.structure(repeated) == jax.tree.structure(without)
    jax.tree.map(np.testing.assert_array_equal, repeated, without)


def test_every_tensor_that_does_not_fit_is_listed(copy):
    folder, tensors, write = copy("qwen2")
    del tensors["lm_head.weight"], tensors["model.layers.1.self_attn.k_proj.bias"]
    tensors["model.layers.3.mlp.up_proj.weight"] = np.zeros((56, 32), np.float32)
    tensors["model.embed_token.weight"] = np.zeros(1, np.float32)
    tensors["model.layers.2.self_attn.q_proj.weight"] = np.zeros((32, 31), np.float32)
    tensors["model.norm.weight"] = np.zeros((32, 1), np.float32)
    write()
    with pytest.raises(WeightsError) as error:
        load(folder)
    message = str(error.value)
    assert message.count("\n") == 6 and "6 problem(s)" in message
    for line in (
        "missing lm_head.weight (61, 32)",
        "missing model.layers.1.self_attn.k_proj.bias (16,)",
        "unexpected model.layers.3.mlp.up_proj.weight (56, 32)",
        "unexpected model.embed_token.weight (1,)",
        "model.layers.2.self_attn.q_proj.weight has shape (32, 31), expected (32, 32)",
        "model.norm.weight has shape (32, 1), expected (32,)",
    ):
        assert line in message


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "model.language_"])
def test_a_prefix_of_every_name_is_said_in_one_line(copy, prefix):
    folder, tensors, write = copy("qwen2")
    for name in list(tensors):
        tensors[prefix + name] = tensors.pop(name)
    write()
    with pytest.raises(
        WeightsError, match=f"model.safetensors has '{prefix}' before the name of every tensor"
    ) as error:
        load(folder)
    assert "\n" not in str(error.value)


def test_a_truncated_file_is_refused(copy):
    folder, _, _ = copy("llama2")
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(WeightsError, match="model.safetensors cannot be read as safetensors"):
        load(folder)
    path.write_bytes(b"")
    with pytest.raises(WeightsError, match="model.safetensors cannot be read as safetensors"):
        load(folder)
    path.unlink()
    with pytest.raises(WeightsError, match="has none of model.safetensors, model.safetensors.index.json, "):
        load(folder)


@pytest.fixture
def sharded(folders, tmp_path):
    _, model = folders("llama2")
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    path = tmp_path / "model.safetensors.index.json"
    return tmp_path, path, json.loads(path.read_text())


def test_a_missing_shard_is_refused(sharded):
    folder, _, index = sharded
    (folder / index["weight_map"]["model.norm.weight"]).unlink()
    with pytest.raises(WeightsError, match=f"files that are not there: {index['weight_map']['model.norm.weight']}"):
        load(folder)


@pytest.mark.parametrize(
    "name", ["../model-00001-of-00002.safetensors", "/etc/model.safetensors", "a/b.safetensors", 3]
)
def test_an_index_that_names_files_outside_is_refused(sharded, name):
    folder, path, index = sharded
    index["weight_map"]["model.norm.weight"] = name
    path.write_text(json.dumps(index))
    with pytest.raises(WeightsError, match="outside its own folder"):
        load(folder)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"weight_map": []}'])
def test_an_index_that_is_none_is_refused(sharded, text):
    folder, path, _ = sharded
    path.write_text(text)
    with pytest.raises(WeightsError, match="is not an index of weight files"):
        load(folder)


def test_what_an_index_says_of_its_files_is_not_believed(sharded):
    """They are asked themselves, as transformers does; a tensor that none of the named files has is missing."""
    folder, path, index = sharded
    right, file = load(folder), index["weight_map"]["model.norm.weight"]
    index["weight_map"]["model.norm.weight"] = index["weight_map"]["model.embed_tokens.weight"]
    path.write_text(json.dumps(index))
    jax.tree.map(np.testing.assert_array_equal, load(folder), right)
    tensors = load_file(folder / file)
    del tensors["model.norm.weight"]
    save_file(tensors, folder / file)
    with pytest.raises(WeightsError, match="missing model.norm.weight"):
        load(folder)
