"""From a text to the segments of a document, one at a time: what a segment is does not depend on any other."""

from collections.abc import Generator, Iterator, Sequence
from typing import Any, Protocol, TypeVar, runtime_checkable

import jax
import numpy as np
import xxhash

from comi_jax.checks import one_of
from comi_jax.config import Compression, Data
from comi_jax.data.encode import LengthError, TextError, token_ids, token_spans
from comi_jax.errors import ConfigError
from comi_jax.model.architecture import Architecture
from comi_jax.params import flatten
from comi_jax.runs.description import Run
from comi_jax.serving.auto_rate import Calibration
from comi_jax.serving.documents import Document
from comi_jax.serving.segments import DTYPES, Contents, Origin, Segment, read_segment

PLACES = ("device", "host")


@runtime_checkable
class Model(Protocol):
    """What documents need of a trained compressor, which is a ``Comi``."""

    run: Run
    params: dict[str, Any]
    tokenizer: Any
    architecture: Architecture
    batch_size: int

    @property
    def origin(self) -> Origin: ...

    def calibration(self) -> Calibration: ...


def origin_of(run: Run, params: dict[str, Any], tokenizer: Any, name: str, weights: str) -> Origin:
    """The origin of a model's documents. Without ``weights``, a hash, those of the encoder are hashed."""
    if not weights:
        state = xxhash.xxh3_128()
        for path, x in sorted(flatten(params["encoder"]).items()):
            state.update(f"{path} {x.dtype} {x.shape}".encode())
            state.update(np.ascontiguousarray(np.asarray(x)).reshape(-1).view(np.uint8).data)
        weights = state.hexdigest()
    vocabulary = repr(sorted(tokenizer.get_vocab().items()))
    backend = getattr(tokenizer, "backend_tokenizer", None)
    described = vocabulary if backend is None else backend.to_str()
    dtype, segment_size = run.architecture.dtype, run.config.compression.segment_size
    return Origin(name, weights, xxhash.xxh3_128(described.encode()).hexdigest(), dtype, segment_size)


def bucket(length: int, data: Data, compression: Compression) -> int:
    """The length that a segment of ``length`` tokens is padded to, so that few programs are compiled: one of
    data.buckets or, without these, 32, 48, 64, 96, ...; at most a whole segment."""
    steps = data.buckets or [base * 2**k for k in range(40) for base in (32, 48)]
    return min((step for step in steps if length <= step < compression.segment_size), default=compression.segment_size)


def document_of(model: Model, text: str, name: str, dtype: str | None, keep_kv: bool, place: str) -> Document:
    """``text`` encoded, with its arrays in ``dtype`` (None: that of the model) on the device or in host memory.
    ``name`` is that of the text in messages."""
    return finished(encoded_in_steps(model, text, name, dtype, keep_kv, place))


R = TypeVar("R")


def finished(steps: Generator[None, None, R]) -> R:
    """What a generator returns, without its pauses."""
    while True:
        try:
            next(steps)
        except StopIteration as end:
            return end.value


def encoded_in_steps(
    model: Model, text: str, name: str, dtype: str | None = None, keep_kv: bool = True, place: str = "device"
) -> Generator[None, None, Document]:
    """``document_of`` as a generator that returns the document, and pauses behind each segment, which is computed then
    and not merely queued: whatever is asked of the device in a pause waits for no other segment."""
    dtype = dtype or model.architecture.dtype
    one_of("dtype", dtype, DTYPES)
    one_of("place", place, PLACES)
    if model.architecture.system != "comi":
        raise ConfigError(f"documents are COMI's; the system of this run is {model.architecture.system}")
    check_one_process(model)
    ids, characters, truncated = _tokens(model, text, name, 0)
    segments = []
    for segment in _segments(model, ids, characters, dtype, keep_kv, place):
        jax.block_until_ready(segment.kept)
        segments.append(segment)
        yield
    return adopt(model, Contents(model.origin, tuple(segments), len(text), truncated))


def adopt(model: Model, contents: Contents) -> Document:
    """The document of ``contents``, to which ``model`` appends texts, kept as its first segment is."""
    first = contents.segments[0].kept
    dtype, keep_kv = str(first.states.values.dtype), first.keys is not None

    def encode(text: str, before: int, tokens: int) -> tuple[list[Segment], bool]:
        check_one_process(model)
        ids, characters, truncated = _tokens(model, text, "the appended text", tokens)
        characters = None if characters is None else characters + np.int32(before)
        return list(_segments(model, ids, characters, dtype, keep_kv, "host")), truncated

    return Document(contents, encode, model.architecture.runtime.mesh)


def _tokens(model: Model, text: str, name: str, before: int) -> tuple[np.ndarray, np.ndarray | None, bool]:
    """The token ids of ``text``, behind ``before`` others, their characters, and whether it was truncated."""
    data = model.run.config.data
    (ids,) = token_ids(model.tokenizer, [text])
    if not ids:
        raise LengthError(f"{name} has no tokens; give it some text")
    room = data.max_context - before
    if len(ids) > room and data.on_long == "refuse" or room < 1:
        behind = f" behind the {before} of the document" if before else ""
        raise LengthError(
            f"{name} has {len(ids)} tokens{behind}, more than data.max_context ({data.max_context}); raise it, or set "
            "data.on_long=truncate"
        )
    try:
        characters = np.asarray(token_spans(model.tokenizer, text)[:room], np.int32).reshape(-1, 2)
    except TextError:  # told when a span is asked for
        characters = None
    return np.asarray(ids[:room], np.int32), characters, len(ids) > room


def _segments(
    model: Model, ids: np.ndarray, characters: np.ndarray | None, dtype: str, keep_kv: bool, place: str
) -> Iterator[Segment]:
    """``ids`` cut into segments, each encoded when it is asked for; with ``place`` "host", no more than one is on the
    device at a time."""
    config, arch = model.run.config, model.architecture
    limit, size = model.run.backbone.max_position_embeddings, config.compression.segment_size
    if min(len(ids), size) > limit:
        raise LengthError(
            f"a segment of {min(len(ids), size)} tokens is longer than the {limit} positions of the model; lower "
            f"compression.segment_size"
        )
    for first in range(0, len(ids), size):
        own = ids[first : first + size]
        padded = np.zeros((1, bucket(len(own), config.data, config.compression)), np.int32)
        padded[0, : len(own)] = own
        kept = read_segment(model.params, padded, np.array([len(own)], np.int32), arch, dtype, keep_kv)
        own_characters = None if characters is None else characters[first : first + size]
        segment = Segment(own, own_characters, kept)
        yield segment.to_host() if place == "host" else segment


def check_one_process(model: Model) -> None:
    """Raise ConfigError for a model on the devices of several processes, each of which would have to encode and ask the
    same documents in the same order."""
    mesh = model.architecture.runtime.mesh
    if mesh is not None and mesh.is_multi_process:
        raise ConfigError(
            "documents are encoded and asked by one process, and the model is on devices of several; load it in each "
            "process with a mesh of its own devices, jax.local_devices()"
        )


def check_origins(model: Model, documents: Sequence[Any]) -> None:
    """Raise DocumentError unless all ``documents`` are documents that ``model`` can use, and ConfigError if it is on
    the devices of several processes."""
    check_one_process(model)
    for document in documents:
        if not isinstance(document, Document):
            raise ConfigError(f"a document is expected, not a {type(document).__name__}; encode the text first")
        document.origin.check(model.origin)
