"""Token ids of examples, as the model takes them."""

from typing import no_type_check

from flax import struct
from jaxtyping import Array, Int


@no_type_check
@struct.dataclass
class Batch:
    """Token ids, right-padded, and how many of them are real. ``segments`` cuts the contexts.

    B is a multiple of the number of contexts C: examples i·B/C to (i+1)·B/C - 1 ask about context i. A row that only
    fills up has an answer of length 0.
    """

    context: Int[Array, "C X"]
    context_length: Int[Array, " C"]
    query: Int[Array, "B Q"]
    query_length: Int[Array, " B"]
    answer: Int[Array, "B A"]  # end-of-sequence token included
    answer_length: Int[Array, " B"]
    rate: Int[Array, " B"]

    @property
    def share(self) -> int:
        """How many examples ask about one context."""
        return self.query.shape[0] // self.context.shape[0]
