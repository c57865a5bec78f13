"""Prompts as vectors, [memory; embed(question)]: what the decoder reads, here or in a serving engine."""

import base64
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from comi_jax.errors import ConfigError
from comi_jax.model.cache import ContextKV
from comi_jax.weights import files


@dataclass(frozen=True)
class PromptEmbeddings:
    """The whole prompt of one question; a decoder reads it as it is, with nothing behind and ``before`` before it."""

    vectors: np.ndarray  # [memory vectors + question tokens, hidden size], in the decoder's dtype
    context_tokens: int
    memory_vectors: int  # or KV entries per layer, with those of ``before``
    truncated: bool  # whether the context or the question was truncated to data.max_*
    cut: str = ""  # which: "context", "question" or "context and question"
    before: ContextKV | None = None  # keys and values, of one row, of a system whose memory they are

    def save(self, path: str | os.PathLike) -> None:
        """Write the vectors to ``path`` as torch.save does. Raises WeightsError without torch, and ConfigError if the
        prompt is more than vectors."""
        Path(path).write_bytes(self._saved())

    def base64(self) -> str:
        """The bytes of ``save`` in base64: the ``prompt_embeds`` of a request to vLLM's /v1/completions."""
        return base64.b64encode(self._saved()).decode("ascii")

    def _saved(self) -> bytes:
        if self.before is not None:
            raise ConfigError(
                "this prompt follows keys and values, which a file of vectors cannot hold; decode it with Comi.slots"
            )
        return files.torch_saved(self.vectors)
