"""Tokenizers of Hugging Face folders: sentencepiece models alone, special tokens without embeddings."""

import dataclasses
import json
import struct

import numpy as np
import pytest
import tiny_models

from comi_jax.errors import ConfigError
from comi_jax.weights import hf_folder
from comi_jax.weights.tokenizer import fit_tokenizer, load_tokenizer


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
