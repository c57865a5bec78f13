"""The programs that a server's limits allow, each run once before it takes requests."""

import itertools
from collections.abc import Callable, Iterator

import numpy as np

from comi_jax.config import max_groups
from comi_jax.serving import asking, batching, encoding, rates
from comi_jax.serving.compressor import Comi
from comi_jax.serving.segments import Contents, Segment, read_segment
from comi_jax.serving.settings import Settings


def embedded(comi: Comi, ids: np.ndarray) -> np.ndarray:
    """The decoder's embeddings of a question, [tokens, D], by one of the programs that ``run`` has compiled."""
    padded = np.zeros((1, _width(len(ids))), np.int32)
    padded[0, : len(ids)] = ids
    return np.asarray(asking.embeddings(comi.params, padded, comi.architecture))[: len(ids)]


def shapes(comi: Comi, settings: Settings) -> tuple[list[int], list[int]]:
    """The widths of segments and of questions that the limits allow."""
    config = comi.run.config
    longest = min(settings.max_context, config.compression.segment_size)
    segments = {encoding.bucket(length, config.data, config.compression) for length in range(1, longest + 1)}
    questions = {batching.query_width(length) for length in range(1, settings.max_question + 1)}
    return sorted(segments), sorted(questions)


def count(comi: Comi, settings: Settings) -> int:
    """How many programs ``run`` compiles: for each width of a segment, one that encodes it and, for each width of a
    question and each rate but 1, at most one without and one with ``keep``, and one for the rate "auto" if it goes by
    statistics; and the embeddings."""
    segments, questions = shapes(comi, settings)
    each = 2 * sum(rate > 1 for rate in settings.rates) + bool(examined_rates(comi, settings))
    return len(segments) * (2 + each * len(questions)) + len(list(_embedded_widths(settings)))


def examined_rates(comi: Comi, settings: Settings) -> tuple[int, ...]:
    """The rates whose statistics the rate "auto" looks at; none if it is refused, or always the same."""
    calibration = comi.calibration() if settings.auto else None
    return calibration.rates if calibration and calibration.price is not None else ()


def run(comi: Comi, settings: Settings, enough: Callable[[], bool]) -> None:
    """Run every program once, so that no request waits for a compilation; ``enough`` ends that early."""
    segments, questions = shapes(comi, settings)
    for width in _embedded_widths(settings):
        embedded(comi, np.zeros(width, np.int32))
    for width in segments:
        ids, arch = np.zeros(width, np.int32), comi.architecture
        kept = read_segment(comi.params, ids[None], np.full(1, width, np.int32), arch, arch.dtype, True)
        segment = Segment(ids, None, kept).to_device(arch.runtime.mesh)  # a program of each shape, as in the store
        contents, compared = Contents(comi.origin, (segment,), 0, False), examined_rates(comi, settings)
        for question in questions if compared else ():
            if enough():
                return
            rates.examined(comi, segment, np.zeros(question, np.int32), compared)
        for rate in settings.rates:
            masks = (None, np.arange(width) == 0) if rate > 1 and max_groups(width, rate) > 1 else (None,)
            for question, mask in itertools.product(questions if rate > 1 else questions[:1], masks):
                if enough():
                    return
                query = np.zeros(question, np.int32)
                asking.memory(comi, asking.Question(contents, query, rate, (mask,), ""))


def _width(length: int) -> int:
    """The width that a question is padded to before it is embedded."""
    return batching.bucket(length, 16)


def _embedded_widths(settings: Settings) -> Iterator[int]:
    width = _width(1)
    while width < settings.slot_length:
        yield width
        width *= 2
    yield width
