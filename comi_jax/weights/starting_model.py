"""What a run starts from: a pretrained language model, or a COMI checkpoint."""

from pathlib import Path
from typing import Any

from comi_jax.config import Backbone, Config, ConfigError
from comi_jax.model.architecture import SCALARS
from comi_jax.overrides import to_dict
from comi_jax.params import flatten
from comi_jax.runs.description import Run, is_run, read_run
from comi_jax.weights import hf_config
from comi_jax.weights.tokenizer import check_tokenizer, load_tokenizer


def backbone_folder(config: Config) -> Path:
    """The folder of the pretrained language model, or ConfigError saying what to download."""
    if config.model.path == "tiny":
        return Path(__file__).parent.parent / "tiny_lm"
    if not config.model.path or not (Path(config.model.path) / "config.json").is_file():
        what = f"{config.model.path} is not one" if config.model.path else "model.path is not set"
        name = config.model.hub or "a LLaMA-2, LLaMA-3, Qwen2 or Qwen3 model"
        fetch = f": hf download {name} --local-dir=DIR" if config.model.hub else ""
        raise ConfigError(
            f"config {config.name!r} starts from the folder of a pretrained language model and {what}; download "
            f"{name}{fetch}, then pass model.path=DIR"
        )
    return Path(config.model.path)


def starting_backbone(folder: Path) -> Backbone:
    """The backbone of the language model, or of the COMI checkpoint, in ``folder``."""
    return read_run(folder).backbone if is_run(folder) else hf_config.read_config(folder)


def starting_tokenizer(config: Config, folder: Path | None = None) -> Any:
    """The tokenizer that ``config`` names, or that of the model in ``folder``, by default the one it starts from."""
    if config.model.tokenizer:
        return load_tokenizer(config.model.tokenizer)
    folder = folder or backbone_folder(config)
    return load_tokenizer(folder / "tokenizer" if is_run(folder) else folder)


def starting_point(config: Config, folder: Path) -> tuple[Backbone, Any, tuple[int, ...]]:
    """Backbone, tokenizer and stop tokens of the language model, or of the COMI checkpoint, in ``folder``."""
    if is_run(folder):
        start = read_run(folder)
        check_same_parts(start, config, folder)
        backbone, known = start.backbone, start.stop
    else:
        backbone, known = hf_config.read_config(folder), hf_config.stop_tokens(folder)
    tokenizer = starting_tokenizer(config, folder)
    check_tokenizer(tokenizer, backbone)
    stop = {tokenizer.eos_token_id} | set(() if config.model.tokenizer else known)
    return backbone, tokenizer, tuple(sorted(stop))


def check_same_parts(start: Run, config: Config, folder: Path) -> None:
    """Refuse to start from a COMI checkpoint whose parts or scalars are not those that ``config`` asks for."""
    names = ["compression.encoder_layers", "compression.lsa_layers", "lora.rank", "lora.alpha", "lora.targets"]
    names += [f"compression.{name}" for name in SCALARS]  # the checkpoint's are the ones that are used
    there, here = (flatten(to_dict(c)) for c in (start.config, config))
    other = [name for name in names if there[name.replace(".", "/")] != here[name.replace(".", "/")]]
    if not start.config.lora.rank and not config.lora.rank:
        other = [name for name in other if not name.startswith("lora.")]
    if other:
        values = (there[name.replace(".", "/")] for name in other)
        texts = (",".join(map(str, value)) if isinstance(value, list) else value for value in values)
        words = (f"{name}={text}" for name, text in zip(other, texts, strict=True))
        raise ConfigError(f"the COMI checkpoint in {folder} has other parts than this run; pass {' '.join(words)}")
