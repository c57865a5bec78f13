"""Text is data: no document, question or answer ever becomes a control token, whatever the tokenizer and its tokens."""

import functools
import importlib.util
from pathlib import Path

import pytest
import train_fixtures
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizer, PreTrainedTokenizerFast

from comi_jax.config import Data
from comi_jax.data import encode
from comi_jax.data.encode import TextError, control_tokens, token_ids
from comi_jax.data.records import Record
from comi_jax.weights.tokenizer import load_tokenizer

ROOT = Path(__file__).resolve().parents[1]
PROSE = ["The goat of Ann lives <here>, in the |im| end of a long street.", "think </b> of [INST] <s> a tool_call"] * 3
# Kinds that real models have: special or not, normalised, eating the space beside them, whole words alone.
SPECIAL = [AddedToken("<|im_end|>", special=True), AddedToken("<|pad|>", special=True, normalized=True, lstrip=True)]
MARKUP = [
    AddedToken("<think>", normalized=True, lstrip=True, rstrip=True),
    AddedToken("</think>", normalized=False),
    AddedToken("<|im_start|>", normalized=False, rstrip=True),
    AddedToken("[INST]", single_word=True),
]
WORDS = [AddedToken("goatish", normalized=False), AddedToken("\n\n\n", normalized=False)]


def made(model, trainer=None, **parts):
    """A tokenizer of PROSE from its parts, and the same with ``added`` tokens."""

    def tokenizer(added):
        inner = Tokenizer(model())
        for name, part in parts.items():
            setattr(inner, name, part)
        if trainer:
            inner.train_from_iterator(PROSE, trainer)
        out = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="</s>", bos_token="<s>", unk_token="<unk>")
        out.add_special_tokens({"additional_special_tokens": SPECIAL[: len(added)]})
        out.add_tokens(added)
        return out

    return tokenizer


def byte_level(added):
    """As Qwen's: bytes; control tokens stand behind the vocabulary."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    parts = {"pre_tokenizer": pre_tokenizers.ByteLevel(add_prefix_space=False), "decoder": decoders.ByteLevel()}
    return made(models.BPE, trainer, normalizer=normalizers.NFC(), **parts)(added)


def byte_fallback(added):
    """As LLaMA-2's: ▁ before every text, control tokens within the vocabulary, bytes for unknown letters."""
    first = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    vocabulary = {piece: i for i, piece in enumerate(first + sorted({"▁", *"".join(PROSE)} - {" "}) + ["▁a", "▁<"])}
    model = functools.partial(
        models.BPE, vocabulary, [("▁", "a"), ("▁", "<")], byte_fallback=True, unk_token="<unk>", fuse_unk=True
    )
    return made(
        model,
        normalizer=normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]),
        decoder=decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        ),
    )(added)


def unigram(added):
    """Control tokens within the vocabulary, and as likely as any word of it."""
    pieces = [("<unk>", -9.0), ("<s>", 0.0), ("</s>", 0.0), *((letter, -5.0) for letter in sorted(set("".join(PROSE))))]
    return made(functools.partial(models.Unigram, pieces, unk_id=0))(added)


class Letters(PreTrainedTokenizer):
    """A tokenizer in Python. It has a word of its own that is a control token."""

    def __init__(self, **options):
        self._letters = ["<unk>", "<s>", "</s>", "<|im_end|>", *sorted(set("".join(PROSE)))]
        super().__init__(eos_token="</s>", bos_token="<s>", unk_token="<unk>", **options)

    @property
    def vocab_size(self):
        return len(self._letters)

    def get_vocab(self):
        return {letter: i for i, letter in enumerate(self._letters)} | self.added_tokens_encoder

    def _tokenize(self, text, **options):
        head, word, tail = text.partition("<|im_end|>")
        return [*head, word, *tail] if word else list(text)

    def _convert_token_to_id(self, token):
        return self._letters.index(token) if token in self._letters else 0

    def _convert_id_to_token(self, index):
        return self._letters[index]


def in_python(added):
    out = Letters()
    out.add_special_tokens({"additional_special_tokens": SPECIAL[: len(added)]})
    out.add_tokens(added)
    return out


def carried(added):
    """The one of the language model that the package carries."""
    out = load_tokenizer(ROOT / "comi_jax" / "tiny_lm")
    out.add_special_tokens({"additional_special_tokens": SPECIAL[: len(added)]})
    out.add_tokens(added)
    return out


def words(added):
    out = train_fixtures.tokenizer()
    out.add_tokens(added)
    return out


BYTES = {"byte level": byte_level, "byte fallback": byte_fallback, "carried": carried}
KINDS = BYTES | {"unigram": unigram, "in Python": in_python, "words": words}
ADDED = functools.cache(lambda kind: KINDS[kind](MARKUP + WORDS))
BARE = functools.cache(lambda kind: KINDS[kind]([]))
TEXTS = st.lists(
    st.sampled_from([token.content for token in SPECIAL + MARKUP] + ["</s>", "<s>", "<unk>", "<eos>", "<bos>"])
    | st.sampled_from([" ", "  ", "\n", "a goat", "<", "|", "s>", "end|>", "é", "狗", "[", "</"]),
    max_size=9,
).map("".join)


@pytest.mark.parametrize("kind", KINDS)
def test_no_text_becomes_a_control_token(kind):
    tokenizer = ADDED(kind)
    names = {token.content for token in SPECIAL + MARKUP} if kind != "words" else {token.content for token in MARKUP}
    assert names | {tokenizer.eos_token} <= control_tokens(tokenizer).keys()
    never = set(control_tokens(tokenizer).values()) - {tokenizer.unk_token_id}
    before = tokenizer(["a <think> goatish"]).input_ids

    @settings(derandomize=True, deadline=None, max_examples=150)
    @given(TEXTS)
    def run(text):
        (ids,) = token_ids(tokenizer, [text])
        assert never.isdisjoint(ids)
        if kind in BYTES:  # and they are those of a tokenizer that has no such tokens
            assert token_ids(BARE(kind), [text]) == [ids]
            assert tokenizer.decode(ids).removeprefix(" ") == text.removeprefix(" ")

    run()
    assert tokenizer(["a <think> goatish"]).input_ids == before  # the tokenizer itself is as it was
    assert not never.isdisjoint(before[0])


@pytest.mark.parametrize("kind", BYTES)
def test_words_that_were_added_stay_words(kind):
    tokenizer = ADDED(kind)
    (ids,) = token_ids(tokenizer, ["a goatish\n\n\n<think>"])
    assert {tokenizer.convert_tokens_to_ids(token.content) for token in WORDS} <= set(ids)
    plain = ["The goat of Ann", " a\nstreet", "狗"]
    assert token_ids(tokenizer, plain) == tokenizer(plain, add_special_tokens=False).input_ids


@pytest.mark.parametrize("kind", KINDS)
def test_a_byte_order_mark_at_the_beginning_is_no_letter(kind):
    tokenizer = ADDED(kind)
    assert token_ids(tokenizer, ["\ufeffa goat", "\ufeff"]) == [*token_ids(tokenizer, ["a goat"]), []]


def test_documents_questions_and_answers_are_read_alike():
    tokenizer = ADDED("byte level")
    said = "a goat </s><|im_end|>"
    (example,), _ = encode.encode([Record((said, "\ufeffb"), said, (said,))], tokenizer, Data())
    (letters,) = token_ids(BARE("byte level"), [said])
    assert example.query.tolist() == letters and example.answer.tolist() == [*letters, tokenizer.eos_token_id]
    assert example.context.tolist() == token_ids(tokenizer, [said + "\nb"])[0]


def test_a_text_that_has_no_letters_is_refused():
    vocabulary = {"<unk>": 0, "§": 1, "a": 2}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>", eos_token="§")
    assert token_ids(tokenizer, ["a <unk> b"]) == [[2, 0, 0]]
    with pytest.raises(
        TextError, match="the text 'a § a' holds '§', a control token that this tokenizer cannot encode"
    ):
        token_ids(tokenizer, ["a", "a § a"])


@pytest.mark.parametrize("kind", BYTES)
def test_the_replay_in_pytorch_reads_the_same(kind):
    spec = importlib.util.spec_from_file_location("replay_pytorch", ROOT / "launch" / "replay_pytorch.py")
    replay = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(replay)
    for text in ("a goatish</s> <think> [INST] \n\n\n<|im_end|> b", "\ufeffa <|pad|>b", "The goat of Ann"):
        assert replay.token_ids(ADDED(kind), text).tolist() == token_ids(ADDED(kind), [text])[0]
