"""The input of the model: token ids of examples."""

from typing import no_type_check

from flax import struct
from jaxtyping import Array, Int


@no_type_check
@struct.dataclass
class Batch:
    """Right-padded token ids and their lengths. ``comi.segments`` cuts the contexts into segments.

    B is a multiple of the number of contexts C: examples i·B/C to (i+1)·B/C - 1 ask about context i. A filler row has
    an answer of length 0.
    """

    context: Int[Array, "C X"]
    context_length: Int[Array, " C"]
    query: Int[Array, "B Q"]
    query_length: Int[Array, " B"]
    answer: Int[Array, "B A"]  # including the end-of-sequence token
    answer_length: Int[Array, " B"]
    rate: Int[Array, " B"]

    @property
    def share(self) -> int:
        """The number of examples per context."""
        return self.query.shape[0] // self.context.shape[0]
