"""What an answer costs: the KV entries that stand for the context, their bytes, and the FLOP spent on them.

Every system under evaluation is charged by the same rules. Encoder and selection count as ingest, which the formula of
the paper's section 5.4 leaves out.
"""

from dataclasses import dataclass

import jax.numpy as jnp

from comi_jax.model import flops
from comi_jax.model.architecture import Architecture


@dataclass(frozen=True)
class Account:
    """The cost of the first token of one answer.

    - `entries`: KV entries per decoder layer and kv head that stand for the context when that token is chosen.
    - `kv_bytes`: the bytes of these entries, in all layers and kv heads.
    - `ingest_flop`: from the context (and the question, for systems that look at it) to these entries.
    - `question_flop`: from these entries and the question to the token.
    """

    entries: int
    kv_bytes: int
    ingest_flop: float
    question_flop: float


def account(arch: Architecture, entries: int, query: int, ingest_flop: float, *, read: int | None = None) -> Account:
    """The account of a decoder of ``arch`` that reads a question of ``query`` tokens after ``entries``. ``read``: how
    many of the question's last tokens are read after ``ingest_flop`` were spent (None: all)."""
    backbone = arch.backbone
    per_entry = 2 * backbone.num_hidden_layers * backbone.num_key_value_heads * backbone.head_dim
    read = query if read is None else read
    asked = flops.read(arch, entries + query - read, read) + flops.head(backbone, 1).forward
    return Account(entries, entries * per_entry * jnp.dtype(arch.dtype).itemsize, ingest_flop, asked)


def of_memory(arch: Architecture, context: int, query: int, rate: int, before: int, vectors: int) -> Account:
    """A trained system's account of a context compressed at ``rate`` into entries ``before`` the prompt (none, unless
    its memory is keys and values) and ``vectors`` after these: encoder, compression, LSA and the decoder's pass over
    the vectors are its ingest. At COMI's rate 1, the decoder's pass over the text is all."""
    uncompressed = not context or (arch.system == "comi" and rate == 1)
    compressed = 0.0 if uncompressed else flops.compress(arch, flops.Lengths(context, query, 0, rate))
    return account(arch, before + vectors, query, compressed + flops.read(arch, before, vectors))
