"""Text that comes piece by piece: whole characters alone, and joined the same as all of it."""

import random

import pytest
import train_fixtures
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from comi_jax.serving.detokenizer import Detokenizer

TEXTS = ["Grüße aus Köln", "你好，世界！再见", "👩‍👩‍👧‍👦 and 🇩🇪 flags 🏳️‍🌈", " a\n b  c ", "naïve — “quoted”", "x" * 30]


def byte_level():
    """One token a byte, as GPT-2 writes bytes; merges would only make fewer pieces."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    model = Tokenizer(models.BPE({letter: i for i, letter in enumerate([*alphabet, "<eos>"])}, []))
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=model, eos_token="<eos>")


def byte_fallback():
    """Letters, and tokens of a byte each for all others, as LLaMA-2 has them."""
    letters = list("abcdefghijklmnopqrstuvwxyz▁")
    words = ["<unk>", *(f"<0x{i:02X}>" for i in range(256)), *letters, "<eos>"]
    model = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, [], byte_fallback=True, unk_token="<unk>"))
    model.pre_tokenizer = pre_tokenizers.Metaspace()
    model.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return PreTrainedTokenizerFast(tokenizer_object=model, unk_token="<unk>", eos_token="<eos>")


def tidying():
    """Words, and punctuation that moves to the word before it."""
    words = ["<unk>", "<eos>", *"do n't you 's it 're . , ! ? ' 've 'm a b".split()]
    model = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    model.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=model, unk_token="<unk>", eos_token="<eos>", clean_up_tokenization_spaces=True
    )


TOKENIZERS = {made.__name__: made() for made in (byte_level, byte_fallback, tidying, train_fixtures.tokenizer)}


@pytest.fixture(params=TOKENIZERS)
def tokenizer(request):
    return TOKENIZERS[request.param]


def pieces(tokenizer, ids, stops=()):
    reader = Detokenizer(tokenizer, stops)
    out = [reader.add([i]) for i in ids]
    return [*out, reader.finish()], reader


@pytest.mark.parametrize("text", TEXTS)
def test_no_piece_has_half_a_character(text):
    for name in ("byte_level", "byte_fallback"):
        tokenizer = TOKENIZERS[name]
        ids = tokenizer.encode(text, add_special_tokens=False)
        said, reader = pieces(tokenizer, ids)
        assert "".join(said) == reader.text == tokenizer.decode(ids, skip_special_tokens=True).strip()
        assert not any("\ufffd" in piece for piece in said)
        if name == "byte_level":
            assert reader.text == text.strip() and sum(map(bool, said)) > 1
            for piece in said:  # each begins and ends with a whole character
                assert piece.encode("utf-8").decode("utf-8") == piece


def test_random_tokens_give_the_text_of_all_of_them(tokenizer):
    """Bytes in no sensible order, special tokens between them. At the end of the text stands what the tokenizer writes
    for bytes that were never completed; where it would spoil complete characters before them, these stay."""
    rng = random.Random(0)
    for _ in range(60):
        ids = [rng.randrange(len(tokenizer)) for _ in range(rng.randrange(1, 25))]
        said, reader = pieces(tokenizer, ids)
        whole = tokenizer.decode(ids, skip_special_tokens=True).strip()
        assert "".join(said) == reader.text
        if tokenizer is not TOKENIZERS["byte_fallback"]:
            assert reader.text == whole
        regrouped = Detokenizer(tokenizer)
        regrouped.add(ids)
        regrouped.finish()
        assert regrouped.text == reader.text


@pytest.mark.parametrize("name", ["byte_level", "byte_fallback"])
def test_an_unfinished_character_is_held_back_until_the_end(name):
    tokenizer = TOKENIZERS[name]
    ids = tokenizer.encode("ok 好", add_special_tokens=False)
    said, reader = pieces(tokenizer, ids[:-1])
    assert "\ufffd" not in "".join(said[:-1]) and said[-1].strip(" \ufffd") == "" and reader.text.startswith("ok")


# --- stop strings -----------------------------------------------------------------------------------------------------


def said_until(text, stops, name="byte_level"):
    tokenizer = TOKENIZERS[name]
    ids = tokenizer.encode(text, add_special_tokens=False)
    said, reader = pieces(tokenizer, ids, stops)
    assert "".join(said) == reader.text
    return reader, said, ids


@pytest.mark.parametrize(
    "text, stops, want",
    [
        ("The answer is 42.\n\nQuestion: next", ["\n\n", "Question:"], "The answer is 42."),
        ("one END two", ["END"], "one"),
        ("aab aabaac", ["aabaac"], "aab"),  # a beginning that goes wrong, and another inside it
        ("abx", ["abc", "bx"], "a"),
        ("STOP", ["STOP"], ""),
        ("\n", ["\n"], ""),
        ("nothing here STO", ["STOP"], "nothing here STO"),
        ("bis 好的 dann", ["好"], "bis"),
        ("x 👩‍👧 y", ["👧"], "x 👩\u200d"),
    ],
)
def test_an_answer_ends_before_a_stop_string(text, stops, want):
    """Each token is a byte: no stop string comes in one piece."""
    reader, said, ids = said_until(text, stops)
    assert reader.text == want and reader.stopped == any(stop in text for stop in stops)
    shown = ""
    for piece in said:  # at no time more than the answer, which a reader on the other side has already read
        shown += piece
        assert want.startswith(shown)


def test_the_tokens_end_with_the_one_that_completes_the_stop_string():
    reader, _, ids = said_until("one END two", ["END", "two"])
    assert reader.tokens == tuple(ids[:7])
    assert reader.add(ids) == reader.finish() == "" and reader.tokens == tuple(ids[:7])
