"""Prompts as vectors, [memory; embed(question)]: what the decoder reads, here or in a serving engine."""

import base64
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from comi_jax.weights import files


@dataclass(frozen=True)
class PromptEmbeddings:
    """The whole prompt of one question; a decoder reads it as it is, with nothing before or behind."""

    vectors: np.ndarray  # [memory vectors + question tokens, hidden size], in the decoder's dtype
    context_tokens: int
    memory_vectors: int
    truncated: bool  # whether the context or the question was truncated to data.max_*
    cut: str = ""  # which: "context", "question" or "context and question"

    def save(self, path: str | os.PathLike) -> None:
        """Write the vectors to ``path`` as torch.save does. Raises WeightsError without torch."""
        Path(path).write_bytes(files.torch_saved(self.vectors))

    def base64(self) -> str:
        """The bytes of ``save`` in base64: the ``prompt_embeds`` of a request to vLLM's /v1/completions."""
        return base64.b64encode(files.torch_saved(self.vectors)).decode("ascii")
