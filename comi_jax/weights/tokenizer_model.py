"""LLaMA-2's tokenizer.model, a sentencepiece model, read without sentencepiece; the token ids are the same.

It has scored pieces instead of merges. Of all adjacent pairs that form a piece, the one with the highest score merges
first, the leftmost on a tie. An equivalent list of merges: every split of a piece into two pieces, sorted by its score.
"""

import json
import shutil
import struct
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from comi_jax.errors import ConfigError

NORMAL, UNKNOWN, CONTROL, BYTE = 1, 2, 3, 6  # piece types
BPE = 2  # a value of model_type
SPACE = "\u2581"
BESIDE = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
WAY_ON = (
    "take the tokenizer.json that is published with the model, or make it with transformers 4 and sentencepiece: "
    "AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR)"
)


def load(folder: Path) -> Any:
    """The tokenizer in ``folder``/tokenizer.model and the files beside it. Raises ConfigError for a model that is not
    like LLaMA-2's, saying how to get a tokenizer.json."""
    from transformers import PreTrainedTokenizerFast

    path = folder / "tokenizer.model"
    tokens, pieces = tokenizer_of(path)
    special = {f"{name}_token": token for name, token in zip(("unk", "bos", "eos"), tokens, strict=True) if token}
    with tempfile.TemporaryDirectory() as made:
        pieces.save(str(Path(made) / "tokenizer.json"))
        for name in BESIDE:
            if (folder / name).is_file():
                shutil.copy(folder / name, made)
        tokenizer = PreTrainedTokenizerFast.from_pretrained(made, local_files_only=True)
    tokenizer.add_special_tokens({name: token for name, token in special.items() if getattr(tokenizer, name) is None})
    added = folder / "added_tokens.json"
    for token, number in (json.loads(added.read_text(encoding="utf-8")) if added.is_file() else {}).items():
        if tokenizer.convert_tokens_to_ids(token) != number:
            raise ConfigError(
                f"{added} gives {token!r:.80} the id {number}, which does not follow the ids before it; {WAY_ON}"
            )
    return tokenizer


def tokenizer_of(path: Path) -> tuple[tuple[str, str, str], Any]:
    """The unk, bos and eos tokens of the sentencepiece model in ``path``, and its tokenizers.Tokenizer."""
    from tokenizers import Tokenizer, decoders, models, normalizers, processors

    pieces, kinds, scores, tokens = read(path)
    ids = {piece: number for number, piece in enumerate(pieces)}
    model = models.BPE(ids, merges_of(pieces, kinds, scores), unk_token=tokens[0], fuse_unk=True, byte_fallback=True)
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)])
    steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    if tokens[1]:
        first = [(tokens[1], ids[tokens[1]])]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{tokens[1]} $A", pair=f"{tokens[1]} $A {tokens[1]}:1 $B:1", special_tokens=first
        )
    tokenizer.add_special_tokens(
        [piece for piece, kind in zip(pieces, kinds, strict=True) if kind != NORMAL and kind != BYTE]
    )
    return tokens, tokenizer


def merges_of(pieces: list[str], kinds: list[int], scores: list[float]) -> list[tuple[str, str]]:
    """All splits of a piece into two pieces, in the order in which sentencepiece merges them."""
    ids = {piece: number for number, piece in enumerate(pieces) if kinds[number] == NORMAL}
    found = []
    for whole in sorted(ids, key=lambda piece: -scores[ids[piece]]):
        splits = ((whole[:cut], whole[cut:]) for cut in range(1, len(whole)))
        both = (split for split in splits if split[0] in ids and split[1] in ids)
        found += sorted(both, key=lambda split: (ids[split[0]], ids[split[1]]))
    return found


def read(path: Path) -> tuple[list[str], list[int], list[float], tuple[str, str, str]]:
    """The pieces, their types and scores, and the unk, bos and eos tokens of the sentencepiece model in ``path``.
    Raises ConfigError if the file is not a sentencepiece model like LLaMA-2's."""
    try:
        parts = list(fields(path.read_bytes()))
        each = [dict(fields(value)) for number, value in parts if number == 1]
        if not each:
            raise ValueError("it has no pieces")
        trainer, normalizer = (dict(fields(b"".join(v for n, v in parts if n == number))) for number in (2, 3))
        pieces = [piece[1].decode() for piece in each]
        kinds = [piece.get(3, NORMAL) for piece in each]
        scores = [struct.unpack("<f", piece.get(2, bytes(4)))[0] for piece in each]
        numbers = [trainer.get(number, default) for number, default in ((40, 0), (41, 1), (42, 2))]
        # -1, no such token, is read as a large number
        unknown, first, last = (pieces[number] if number < len(pieces) else "" for number in numbers)
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, struct.error) as error:
        raise ConfigError(f"{path} is not a sentencepiece model ({error!r:.80}); {WAY_ON}") from None
    other = {
        "its model is not of type BPE": trainer.get(3) != BPE,
        "it has no bytes for letters that it does not know": not trainer.get(35),
        "it puts spaces after words": trainer.get(24),
        "it normalises text": normalizer.get(2) or normalizer.get(4, 1),
        "it puts no space before a text": not normalizer.get(3, 1) or not normalizer.get(5, 1),
        "it has pieces of other types": not set(kinds) <= {NORMAL, UNKNOWN, CONTROL, BYTE}
        or len(set(pieces)) < len(pieces),
    }
    if reasons := [reason for reason, holds in other.items() if holds]:
        raise ConfigError(f"{path} is a sentencepiece model of another kind than LLaMA-2's ({reasons[0]}); {WAY_ON}")
    return pieces, kinds, scores, (unknown, first, last)


def fields(message: bytes) -> Iterator[tuple[int, Any]]:
    """The fields of a protobuf message as (number, value): an int for a varint, bytes for all other types."""
    at = 0
    while at < len(message):
        key, at = varint(message, at)
        number, wire = key >> 3, key & 7
        if wire == 0:
            value, at = varint(message, at)
            yield number, value
            continue
        size, at = varint(message, at) if wire == 2 else ({1: 8, 5: 4}[wire], at)
        if at + size > len(message):
            raise ValueError("it is cut")
        yield number, message[at : at + size]
        at += size


def varint(message: bytes, at: int) -> tuple[int, int]:
    """The varint at offset ``at`` (seven bits per byte), and the offset after it."""
    value = 0
    for shift in range(0, 70, 7):
        value |= (message[at] & 127) << shift
        if message[at] < 128:
            return value, at + 1
        at += 1
    raise ValueError("a number of more than ten bytes")
