"""A causal language model in use: the decoder of the systems that need no training."""

import functools
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import xxhash
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from comi_jax.backbone import Backbone
from comi_jax.config import Compression, Config, Generation
from comi_jax.devices import sharding
from comi_jax.errors import ConfigError
from comi_jax.model import architecture, generate, lora
from comi_jax.model import backbone as lm
from comi_jax.model.architecture import Architecture
from comi_jax.model.cache import KVCache
from comi_jax.params import Tree, unflatten
from comi_jax.runs.folder import Folder
from comi_jax.runs.selection import existing
from comi_jax.runs.stored_weights import load_params, weights_of
from comi_jax.weights import hf
from comi_jax.weights.starting_model import StartingModel
from comi_jax.weights.tokenizer import load_tokenizer


@dataclass(frozen=True)
class LanguageModel:
    """A language model on its devices; ``params`` has the part "decoder" alone."""

    params: Tree
    architecture: Architecture
    tokenizer: Any
    stop: tuple[int, ...]
    weights: str = ""  # a hash of the weights; empty: unknown, so that nothing is resumed
    batch_size: int = 16  # a multiple of the row shards

    @classmethod
    def open(cls, config: Config, *, batch_size: int = 16, mesh: Mesh | None = None) -> "LanguageModel":
        """The language model that a run with ``config`` starts from (model.path), sharded over ``mesh`` (None: on one
        device). Raises ConfigError if that is a COMI checkpoint, and as ``StartingModel.open``."""
        start = starting_model(config)
        arch = of_backbone(start.backbone, config.model.dtype, attention=config.model.attention or None, mesh=mesh)
        specs = {"decoder": architecture.specs(arch)["decoder"]}
        placed = sharding.parameters(specs, mesh) if mesh else {}
        flat = hf.load_parts(start.folder, start.backbone, specs, lambda path: (arch.dtype, placed.get(path)))
        size = _whole_shards(batch_size, mesh)
        return cls(unflatten(flat), arch, start.tokenizer, start.stop, _hash(start.folder), size)

    @classmethod
    def of_run(cls, folder: str, *, batch_size: int = 16, mesh: Mesh | None = None) -> "LanguageModel":
        """The decoder of the run in ``folder``, its adapters merged. Raises CheckpointError if it has no checkpoint."""
        run, params = load_params(folder, mesh=mesh)
        decoder = params["decoder"]
        if run.config.lora.rank:
            decoder = {**decoder, "layers": lora.merge(decoder["layers"], params["lora"], run.config.lora)}
        arch = of_backbone(
            run.backbone, run.config.model.dtype, attention=run.config.model.attention or None, mesh=mesh
        )
        tokenizer, weights = load_tokenizer(Folder(folder).tokenizer), weights_of(folder, existing(folder))
        return cls({"decoder": decoder}, arch, tokenizer, run.stop, weights, _whole_shards(batch_size, mesh))

    @property
    def backbone(self) -> Backbone:
        return self.architecture.backbone

    @property
    def mesh(self) -> Mesh | None:
        return self.architecture.runtime.mesh

    @property
    def row_shards(self) -> int:
        return sharding.row_shards(self.mesh) if self.mesh else 1

    def put(self, x: np.ndarray) -> Array:
        """``x`` on the devices, its first axis over the row shards."""
        return sharding.put_batch(x, self.mesh) if self.mesh else jnp.asarray(x)


def starting_model(config: Config) -> StartingModel:
    """The language model that ``config`` names. Raises ConfigError if it is a COMI checkpoint."""
    start = StartingModel.open(config)
    if start.before:
        raise ConfigError(
            f"{start.folder} is a COMI checkpoint, not a language model; set model.path to the folder of the "
            "language model that it was trained from"
        )
    return start


def _whole_shards(batch_size: int, mesh: Mesh | None) -> int:
    """``batch_size`` rounded up to a multiple of the row shards of ``mesh``."""
    shards = sharding.row_shards(mesh) if mesh else 1
    return -(-batch_size // shards) * shards


def of_backbone(
    backbone: Backbone, dtype: str = "float32", *, attention: str | None = None, mesh: Mesh | None = None
) -> Architecture:
    """An architecture of which only the decoder is used."""
    compression = Compression(encoder_layers=1, lsa_layers=1)
    return Architecture(backbone, compression, dtype=dtype, runtime=lm.Runtime(attention=attention, mesh=mesh))


@functools.partial(jax.jit, static_argnames="arch")
def token_losses(params: Tree, ids: Int[Array, "B T"], arch: Architecture) -> Float[Array, "B T"]:
    """The negative log-likelihood of each token given those before it, in nats; 0 for the first token of a row."""
    x = lm.embed_tokens(params["decoder"], ids, arch.dtype, arch.runtime)
    states, _ = lm.forward(params["decoder"], x, arch.backbone, runtime=arch.runtime)

    def losses(part):  # one token of all rows: the logits of whole rows can be larger than the model
        states, following = part
        log_probability = jax.nn.log_softmax(lm.logits(params["decoder"], states), axis=-1)
        return -jnp.take_along_axis(log_probability, following[:, None], axis=1)[:, 0]

    rest = jax.lax.map(losses, (states[:, :-1].swapaxes(0, 1), ids[:, 1:].swapaxes(0, 1)), batch_size=128)
    return jnp.pad(rest.swapaxes(0, 1), ((0, 0), (1, 0)))


@functools.partial(jax.jit, static_argnames=("arch", "options", "stop"))
def reply(
    params: Tree,
    ids: Int[Array, "B T"],
    length: Int[Array, " B"],
    arch: Architecture,
    options: Generation,
    stop: tuple[int, ...],
    before: KVCache | None = None,
    start: Int[Array, " B"] | None = None,
) -> generate.Generated:
    """The greedy continuation of the first length[b] tokens of each row, after start[b] positions of ``before``."""
    x = lm.embed_tokens(params["decoder"], ids, arch.dtype, arch.runtime)
    return generate.greedy(params, arch, x, length, options, stop, before=before, start=start)


def _hash(folder: str | os.PathLike) -> str:
    """A hash of the files of weights in ``folder``, and of its config.json."""
    digest = xxhash.xxh3_128()
    for path in sorted(p for p in Path(folder).iterdir() if p.suffix in (".safetensors", ".bin", ".json")):
        digest.update(path.name.encode())
        with path.open("rb") as file:
            while block := file.read(2**24):
                digest.update(block)
    return digest.hexdigest()
