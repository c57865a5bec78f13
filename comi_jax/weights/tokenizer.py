"""Tokenizers of Hugging Face folders."""

import os
from pathlib import Path
from typing import Any

from comi_jax.config import Backbone, ConfigError


def load_tokenizer(folder: str | Path) -> Any:
    """The tokenizer in ``folder``; never one that brings code of its own, never from the network."""
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # that torch is not there, which nobody misses
    from transformers import AutoTokenizer, PreTrainedTokenizerFast  # slow to import, of use to those who read text

    # Beside a Qwen2 config, AutoTokenizer puts Qwen2's own splitting of words in the place of tokenizer.json's.
    as_written = (Path(folder) / "tokenizer.json").is_file()
    reader = PreTrainedTokenizerFast if as_written else AutoTokenizer
    try:
        tokenizer = reader.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    except Exception as error:  # of a damaged tokenizer.json, the tokenizers library raises no other
        raise ConfigError(f"{folder} holds no tokenizer that transformers can load: {error}") from None
    if tokenizer.eos_token_id is None:
        raise ConfigError(f"the tokenizer in {folder} has no end-of-sequence token, which every answer ends with")
    return tokenizer


def check_tokenizer(tokenizer: Any, backbone: Backbone) -> None:
    """Refuse a tokenizer that has more tokens than the language model."""
    if len(tokenizer) > backbone.vocab_size:
        raise ConfigError(f"the tokenizer has {len(tokenizer)} tokens, the model only {backbone.vocab_size}")
