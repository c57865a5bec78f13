"""The model that a run starts from: a pretrained language model, or a COMI checkpoint."""

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from jaxtyping import Array

from comi_jax.backbone import Backbone
from comi_jax.config import Config
from comi_jax.devices import sharding
from comi_jax.errors import ConfigError
from comi_jax.model import architecture
from comi_jax.model.architecture import SCALARS
from comi_jax.overrides import to_dict
from comi_jax.params import Tree, flatten, unflatten
from comi_jax.runs.description import Run, is_run, read_run
from comi_jax.runs.folder import Folder
from comi_jax.runs.stored_weights import load_flat
from comi_jax.weights import hf, hf_config
from comi_jax.weights.tokenizer import fit_tokenizer, load_tokenizer


@dataclasses.dataclass(frozen=True)
class StartingModel:
    """The model in ``folder``, opened for a run with ``config``; tokenizer and weights are read only when needed."""

    folder: Path
    config: Config
    backbone: Backbone
    before: Run | None  # the run of a COMI checkpoint; None for a language model

    @classmethod
    def open(cls, config: Config) -> "StartingModel":
        """The model that ``config`` names. Raises ConfigError saying what to download if there is none, and
        CheckpointError for a COMI checkpoint that cannot be read."""
        folder = _folder(config)
        before = read_run(folder) if is_run(folder) else None
        backbone = before.backbone if before else hf_config.read_config(folder, config.model.ignore_config)
        return cls(folder, config, backbone, before)

    @functools.cached_property
    def tokenizer(self) -> Any:
        """The tokenizer that the config names, or else the model's own; ``fit_tokenizer`` fits it to the model."""
        own = Folder(self.folder).tokenizer if self.before else self.folder
        return fit_tokenizer(load_tokenizer(self.config.model.tokenizer or own), self.backbone)

    @property
    def stop(self) -> tuple[int, ...]:
        """The token ids that end an answer: the tokenizer's end-of-sequence token and, unless the config names another
        tokenizer, the model's own stop tokens."""
        own = {self.tokenizer.eos_token_id}
        if self.config.model.tokenizer:
            return tuple(own)
        return tuple(sorted(own | set(self.before.stop if self.before else hf_config.stop_tokens(self.folder))))

    def check(self) -> None:
        """Check the model before any data is read. Raises WeightsError if the weights of a language model do not match
        its config, and ConfigError if a COMI checkpoint has other parts or scalars than this run's config."""
        if not self.before:
            hf.open_model(self.folder, self.backbone)
            return
        names = ["system", "compression.encoder_layers", "compression.lsa_layers"]
        names += ["lora.rank", "lora.alpha", "lora.targets"]
        names += ["icae.memory_tokens", "icae.rank", "icae.alpha"] if self.config.system == "icae" else []
        names += [f"compression.{name}" for name in SCALARS]  # the run uses the checkpoint's values
        there, here = (flatten(to_dict(c)) for c in (self.before.config, self.config))
        other = [name for name in names if there[name.replace(".", "/")] != here[name.replace(".", "/")]]
        if not self.before.config.lora.rank and not self.config.lora.rank:
            other = [name for name in other if not name.startswith("lora.")]
        if other:
            values = (there[name.replace(".", "/")] for name in other)
            texts = (",".join(map(str, value)) if isinstance(value, list) else value for value in values)
            words = " ".join(f"{name}={text}" for name, text in zip(other, texts, strict=True))
            raise ConfigError(f"the COMI checkpoint in {self.folder} does not match this run's config; pass {words}")

    def load(self, run: Run, mesh: jax.sharding.Mesh) -> dict[str, Array]:
        """The initial weights of ``run``, by flat path, on the devices of ``mesh``: those of the COMI checkpoint, or
        those of the language model, with what it does not have (``own_parameters``) fresh."""
        arch = run.architecture
        shardings = sharding.parameters(architecture.specs(arch), mesh)

        def place(path: str) -> tuple[str, Any]:
            trained = architecture.is_trained(path, arch)
            return ("float32" if trained else architecture.frozen_dtype(path, arch)), shardings[path]

        if self.before:
            return load_flat(self.folder, arch, place)
        params = hf.load_parts(self.folder, run.backbone, architecture.parts_of_backbone(arch), place)
        return params | architecture.own_parameters(arch, run.config.train.seed, mesh)

    def load_parts(self, run: Run, parts: Sequence[str], mesh: jax.sharding.Mesh | None = None) -> Tree:
        """``parts`` of ``run`` ("encoder", "lsa", "decoder") as they were before training, in the model's dtype, on the
        devices of ``mesh`` (None: on one device)."""
        arch = run.architecture
        shardings = {} if mesh is None else sharding.parameters(architecture.specs(arch), mesh)

        def place(path: str) -> tuple[str, Any]:
            return arch.dtype, shardings.get(path)

        if self.before:
            arrays = load_flat(self.folder, arch, place)
        else:
            trees = architecture.parts_of_backbone(arch)
            arrays = hf.load_parts(self.folder, run.backbone, {part: trees[part] for part in parts}, place)
        return unflatten({path: array for path, array in arrays.items() if path.partition("/")[0] in parts})


def tokenizer_of(config: Config) -> Any:
    """The tokenizer of a run with ``config``, for callers that need no model."""
    return load_tokenizer(config.model.tokenizer) if config.model.tokenizer else StartingModel.open(config).tokenizer


def _folder(config: Config) -> Path:
    if config.model.path == "tiny":
        return Path(__file__).parent.parent / "tiny_lm"
    if config.model.path and (Path(config.model.path) / "config.json").is_file():
        return Path(config.model.path)
    what = f"{config.model.path} is not a model's folder" if config.model.path else "model.path is not set"
    if config.model.made_by:
        raise ConfigError(f"{what}; make it first with {config.model.made_by}, or pass model.path=DIR")
    name = config.model.hub or "a LLaMA-2, LLaMA-3, Qwen2 or Qwen3 model"
    fetch = f": hf download {name} --local-dir=DIR" if config.model.hub else ""
    raise ConfigError(
        f"config {config.name!r} starts from the folder of a pretrained language model and {what}; download {name}"
        f"{fetch}, then pass model.path=DIR"
    )
