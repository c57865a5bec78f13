"""From records to token ids: context, query and answer are tokenised raw, separately and without control tokens."""

import copy
import functools
import itertools
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any

import numpy as np

from comi_jax.backbone import Backbone
from comi_jax.checks import shown
from comi_jax.config import Beacon, Config, Data, beacons_of, max_groups, memory_length
from comi_jax.data.records import BYTE_ORDER_MARK, Record
from comi_jax.errors import UserError

FORMAT = 2  # increment when the same records give different examples
CHUNK = 256  # records per tokenizer call, which processes them in parallel
PARTS = ("context", "question", "answer")
SETTINGS = ("context", "query", "answer")  # their limits are data.max_NAME


class LengthError(UserError):
    """Records longer than the settings allow; the message gives their number, the first one and the settings."""


@dataclass(frozen=True)
class Example:
    """Token ids of one record, int32. Without a target (when only answering), ``answer`` is empty."""

    context: np.ndarray
    query: np.ndarray
    answer: np.ndarray
    _: KW_ONLY
    rate: int = 0
    truncated: bool = False  # whether a part was truncated
    cut: str = ""  # the truncated PARTS, e.g. "context and question"; not stored with a run


@dataclass
class LengthReport:
    """The numbers of examples, of their context tokens and of truncated parts."""

    examples: int = 0
    context_tokens: int = 0
    truncated_contexts: int = 0
    truncated_queries: int = 0
    truncated_answers: int = 0

    def __str__(self) -> str:
        cut = f"{self.truncated_contexts} contexts, {self.truncated_queries} queries, {self.truncated_answers} answers"
        return f"{self.examples} examples, {self.context_tokens} context tokens; cut to fit: {cut}"


def encode(
    records: Sequence[Record], tokenizer: Any, data: Data, *, targets: bool = True
) -> tuple[list[Example], LengthReport]:
    """All examples of ``encoded``, and its report."""
    report = LengthReport()
    return list(itertools.chain.from_iterable(encoded(records, tokenizer, data, report, targets=targets))), report


def encoded(
    records: Iterable[Record], tokenizer: Any, data: Data, report: LengthReport, *, targets: bool = True
) -> Iterator[list[Example]]:
    """``records`` tokenised, CHUNK at a time; with ``targets`` also their first answers. Adds to ``report``.

    Parts longer than data.max_context, max_query or max_answer tokens are truncated and counted if data.on_long is
    "truncate": the context at its end, the question at its beginning (its end does the asking), the answer before its
    end-of-sequence token. Otherwise LengthError is raised after all records are read. A context or query without
    tokens raises it at once.
    """
    long: list[tuple[int, list[int]]] = []
    limits, spare = (data.max_context, data.max_query, data.max_answer), (0, 0, int(targets))  # room for its EOS token
    records = iter(records)
    while chunk := list(itertools.islice(records, CHUNK)):
        contexts = token_ids(tokenizer, [record.context_text() for record in chunk])
        queries = token_ids(tokenizer, [record.prompt for record in chunk])
        answers = token_ids(tokenizer, [record.answers[0] for record in chunk]) if targets else [[]] * len(chunk)
        examples = []
        for parts in zip(contexts, queries, answers, strict=True):
            report.examples += 1
            for name, ids in zip(("context", "query"), parts, strict=False):
                if not ids:
                    raise LengthError(
                        f"record {report.examples} has a {name} of no tokens; leave it out, or give it some text"
                    )
            over = [len(ids) + room > limit for ids, limit, room in zip(parts, limits, spare, strict=True)]
            if any(over):
                long.append((report.examples, [len(ids) for ids in parts]))
            context, query, answer = parts[0][: limits[0]], parts[1][-limits[1] :], parts[2][: limits[2] - spare[2]]
            answer = [*answer, tokenizer.eos_token_id] if targets else answer
            arrays = (np.asarray(ids, np.int32) for ids in (context, query, answer))
            examples.append(Example(*arrays, truncated=any(over), cut=" and ".join(itertools.compress(PARTS, over))))
            report.context_tokens += len(context)
            report.truncated_contexts += over[0]
            report.truncated_queries += over[1]
            report.truncated_answers += over[2]
        yield examples
    if long and data.on_long == "refuse":
        number, lengths = long[0]
        over = [
            f"{length} tokens of {part}, more than data.max_{name} ({limit}{', end of sequence included' * room})"
            for part, name, length, limit, room in zip(PARTS, SETTINGS, lengths, limits, spare, strict=True)
            if length + room > limit
        ]
        raise LengthError(
            f"{len(long)} of {report.examples} records are too long, the first is record {number} with "
            f"{' and '.join(over)}; raise {'that' if len(over) == 1 else 'these'}, or set data.on_long=truncate"
        )


def check_positions(
    examples: Sequence[Example], backbone: Backbone, config: Config, min_rate: int, new_tokens: int | None = None
) -> None:
    """Raise LengthError if a row of the encoder or the decoder is longer than the model's position limit. For COMI
    these are (segment, query) and (memory, query, answer or ``new_tokens``). Padding follows the real tokens and does
    not count."""
    limit, system = backbone.max_position_embeddings, config.system
    for number, example in enumerate(examples, start=1):
        context, query = len(example.context), len(example.query)
        answer = len(example.answer) if new_tokens is None else new_tokens
        _check_encoder(f"record {number}", config, context, query, min_rate, limit)
        memory = memory_length(system, config.compression, config.beacon, context, min_rate)
        advice = "lower data.max_context" + f" or raise the rate {min_rate}" * (system != "full_prompt")
        task = int(system == "icae")  # a learned vector between memory and query
        if memory + task + query + answer > limit:
            raise LengthError(
                f"record {number}: {memory} memory vectors, a query of {query} and an answer of {answer} tokens are "
                f"more than the {limit} positions of the model; {advice}"
            )
        if config.autoencoding_steps and new_tokens is None and memory + 1 + context + 1 > limit:
            raise LengthError(
                f"record {number}: {memory} memory vectors and the {context} context tokens that system={system} "
                f"reconstructs from them are more than the {limit} positions of the model; lower data.max_context"
            )


def _check_encoder(where: str, config: Config, context: int, query: int, rate: int, limit: int) -> None:
    """Raise LengthError if a segment of a context and what the encoder reads after it exceed ``limit`` positions."""
    if config.system == "full_prompt":
        return
    if config.system == "beacon":
        return _check_windows(where, config.beacon, context, rate, limit)
    longest = max(config.compression.segments(context), default=0)
    slots, most = max_groups(longest, rate), config.icae.memory_tokens
    after, what = {"comi": (query, f"a query of {query}"), "icae": (slots, f"{slots} memory tokens")}.get(
        config.system, (0, "nothing else")
    )
    if longest + after > limit:
        raise LengthError(
            f"{where}: a segment of {longest} tokens and {what} make {longest + after}, but "
            f"the model has {limit} positions; lower compression.segment_size to {max(limit - after, 1)}"
        )
    if config.system == "icae" and slots > most:
        raise LengthError(
            f"{where}: a segment of {longest} tokens at rate {rate} needs {slots} memory tokens, more than "
            f"icae.memory_tokens, {most}; lower compression.segment_size to {most * rate}"
        )


def _check_windows(where: str, beacon: Beacon, context: int, rate: int, limit: int) -> None:
    """Raise LengthError if the last full window of a context, with all beacons, exceeds ``limit`` positions."""
    beacons = beacons_of(beacon, context, rate)[0]
    if beacons and beacons + beacon.window > limit:
        raise LengthError(
            f"{where}: a window of {beacon.window} tokens and {beacons} beacons are more than the {limit} positions of "
            f"the model; lower data.max_context or beacon.window, or raise the rate {rate}"
        )


# --- text -------------------------------------------------------------------------------------------------------------

_MARKUP = re.compile(r"<.*>|\[.*\]", re.DOTALL)


class TextError(UserError):
    """A text that a tokenizer cannot encode without control tokens."""


def token_ids(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """The tokens of each text, raw: nothing is added, nothing is truncated, and no control token is recognised.

    A text is data, never an instruction: ``<|im_end|>`` becomes the tokens of its ten characters, and so does every
    other control token (``control_tokens``). Ordinary words that were added to a vocabulary keep their tokens. A byte
    order mark at the start of a text is removed.

    Raises TextError if the tokenizer has no other tokens for the characters of a control token.
    """
    control = control_tokens(tokenizer)
    texts = [text.removeprefix(BYTE_ORDER_MARK) for text in texts]
    rows = _read(tokenizer, control, texts)
    never = set(control.values()) - {tokenizer.unk_token_id}  # which also stands for unknown characters
    for number, row in enumerate(rows):
        if not never.isdisjoint(row):  # a word-level vocabulary that contains the control token as a word
            rows[number] = list(itertools.chain(*_read(tokenizer, control, _taken_apart(texts[number], control))))
            if found := never.intersection(rows[number]):
                raise TextError(
                    f"the text {shown(texts[number])} holds {tokenizer.convert_ids_to_tokens(min(found))!r}, a control "
                    "token that this tokenizer cannot encode as plain text; remove the text or use another tokenizer"
                )
    return rows


def token_spans(tokenizer: Any, text: str) -> list[tuple[int, int]]:
    """The characters [first, end) of ``text`` that each of its tokens, those of ``token_ids``, stands for. Raises
    TextError if the tokenizer cannot tell them."""
    if not tokenizer.is_fast:
        raise TextError(
            "this tokenizer does not tell which characters a token stands for; use one with a tokenizer.json"
        )
    control, first = control_tokens(tokenizer), len(text) - len(text.removeprefix(BYTE_ORDER_MARK))
    pieces = [text[first:]]
    if not (set(control.values()) - {tokenizer.unk_token_id}).isdisjoint(_read(tokenizer, control, pieces)[0]):
        pieces = _taken_apart(pieces[0], control)
    spans = []
    for piece, found in zip(pieces, _read(tokenizer, control, pieces, spans=True), strict=True):
        spans.extend((first + begin, first + end) for begin, end in found)
        first += len(piece)
    return spans


def control_tokens(tokenizer: Any) -> dict[str, int]:
    """The tokens that text must never become, with their ids: the special tokens of ``tokenizer``, and added tokens in
    angle or square brackets, which many chat models do not mark as special (``<think>``)."""
    added = tokenizer.added_tokens_decoder.items()
    control = {token.content: i for i, token in added if token.special or _MARKUP.fullmatch(token.content.strip())}
    return control | dict(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True))


def _read(tokenizer: Any, control: dict[str, int], texts: list[str], spans: bool = False) -> list[list[Any]]:
    """The ids of each text's tokens, or with ``spans`` their characters."""
    special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    others = tuple(sorted(control.keys() - special - set(tokenizer.all_special_tokens)))
    if others and getattr(tokenizer, "backend_tokenizer", None) is not None:
        backend = _without(tokenizer, others, len(tokenizer))
        rows = backend.encode_batch(texts, add_special_tokens=False)
        return [row.offsets if spans else row.ids for row in rows]
    options = {"add_special_tokens": False, "return_attention_mask": False, "verbose": False}
    made = tokenizer(texts, split_special_tokens=True, return_offsets_mapping=spans, **options)
    return made["offset_mapping" if spans else "input_ids"]


@functools.lru_cache(maxsize=2)
def _without(tokenizer: Any, names: tuple[str, ...], size: int) -> Any:
    """A copy of the backend of ``tokenizer`` that recognises neither special tokens nor ``names`` in a text;
    split_special_tokens covers special tokens only. ``size``, the number of tokens, is only a key of the cache."""
    backend = copy.deepcopy(tokenizer.backend_tokenizer)
    backend.add_special_tokens(list(names))
    backend.encode_special_tokens = True
    backend.no_truncation()
    backend.no_padding()
    return backend


def _taken_apart(text: str, control: Iterable[str]) -> list[str]:
    """``text`` in pieces that contain none of ``control``: each of these is split after its first character."""
    inside = (f"(?<={re.escape(name[0])})(?={re.escape(name[1:])})" for name in control if len(name) > 1)
    return re.split("|".join(inside), text)
