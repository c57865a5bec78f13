"""Tokenizers of Hugging Face folders."""

import json
import os
import tempfile
from pathlib import Path
from typing import Any

from comi_jax.backbone import Backbone
from comi_jax.errors import ConfigError, UserError
from comi_jax.weights import hf_folder, tokenizer_model
from comi_jax.weights.layout import some


def load_tokenizer(folder: str | Path) -> Any:
    """The tokenizer in ``folder``; it runs no code from there and uses no network. Raises ConfigError if there is no
    usable one, or if it has no end-of-sequence token."""
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # else transformers warns that torch is missing
    # Beside a Qwen2 config, AutoTokenizer replaces the pre-tokenizer of tokenizer.json with Qwen2's own.
    as_written = (Path(folder) / "tokenizer.json").is_file()
    # Both are slow to import, and AutoTokenizer imports torch where that is installed.
    if as_written:
        from transformers import PreTrainedTokenizerFast as reader
    else:
        from transformers import AutoTokenizer as reader
    try:
        if not as_written and (Path(folder) / "tokenizer.model").is_file():  # transformers 5 splits text differently
            tokenizer = tokenizer_model.load(Path(folder))
        else:
            tokenizer = reader.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    except UserError:
        raise
    except Exception as error:  # tokenizers raises a bare Exception for a damaged tokenizer.json
        raise ConfigError(f"{folder} holds no tokenizer that transformers can load: {error}") from None
    if tokenizer.eos_token_id is None:
        raise ConfigError(f"the tokenizer in {folder} has no end-of-sequence token, which every answer ends with")
    return tokenizer


def fit_tokenizer(tokenizer: Any, backbone: Backbone) -> Any:
    """``tokenizer`` without the special tokens, usually a padding token, that have no embedding in ``backbone``, so no
    text is encoded as one; a warning lists them. Raises ConfigError if any other token has no embedding."""
    beyond = {token for token, number in tokenizer.get_vocab().items() if number >= backbone.vocab_size}
    if not beyond:
        return tokenizer
    used = {tokenizer.bos_token, tokenizer.eos_token, tokenizer.unk_token}
    spare = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special} - used
    size = f"the model only {backbone.vocab_size}"
    if missed := sorted(beyond - spare):
        raise ConfigError(
            f"the tokenizer has {len(tokenizer)} tokens, {size}: {some(missed)} has no embedding; pass the "
            "model's own tokenizer"
        )
    hf_folder.tell(
        f"the tokenizer has {len(tokenizer)} tokens, {size}: {some(sorted(beyond))} has no embedding and is not used; "
        "in a text it is tokenised as ordinary characters"
    )
    return _without(tokenizer, beyond)


def _without(tokenizer: Any, tokens: set[str]) -> Any:
    """``tokenizer``, saved, with ``tokens`` removed from its files, and loaded again."""
    from transformers import PreTrainedTokenizerFast

    def kept(value: Any) -> bool:
        return (value.get("content") if isinstance(value, dict) else value) not in tokens

    with tempfile.TemporaryDirectory() as made:
        tokenizer.save_pretrained(made)
        for path in Path(made).glob("*.json"):
            values = json.loads(path.read_text(encoding="utf-8"))
            if path.name == "tokenizer.json":
                values["added_tokens"] = list(filter(kept, values["added_tokens"]))
            else:
                values = {
                    name: value for name, value in values.items() if not isinstance(value, str | dict) or kept(value)
                }
                values.pop("added_tokens_decoder", None)  # tokenizer.json has them
                if isinstance(listed := values.get("extra_special_tokens"), list):
                    values["extra_special_tokens"] = list(filter(kept, listed))
            path.write_text(json.dumps(values), encoding="utf-8")
        return PreTrainedTokenizerFast.from_pretrained(made, local_files_only=True)
