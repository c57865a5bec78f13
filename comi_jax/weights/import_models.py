"""Import of language models and of the official release's checkpoints as COMI checkpoints."""

import dataclasses
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from comi_jax.config import Config
from comi_jax.errors import ConfigError
from comi_jax.model import architecture
from comi_jax.model.architecture import SCALARS, Architecture
from comi_jax.params import flatten
from comi_jax.runs.description import Run, check_new
from comi_jax.runs.folder import Folder
from comi_jax.runs.stored_weights import save_import
from comi_jax.weights import files, hf, hf_config, loading, official, writing
from comi_jax.weights.layout import WeightsError
from comi_jax.weights.tokenizer import fit_tokenizer, load_tokenizer
from comi_jax.weights.writing import Writable


def import_hf(backbone: str | Path, output: str | Path, config: Config, dtype: str = "") -> Run:
    """Write a fresh COMI model, made from the language model in ``backbone``, to ``output``. ``config`` gives the layer
    counts, switches and adapters. ``dtype`` is the dtype of activations (empty: float32 if the weights are float32,
    else bfloat16). Raises ConfigError, WeightsError or CheckpointError."""
    check_new(output)
    shape, tokenizer = hf_config.read_config(backbone, config.model.ignore_config), load_tokenizer(backbone)
    tokenizer = fit_tokenizer(tokenizer, shape)
    arch = Architecture(shape, config.compression, config.lora, system=config.system, icae=config.icae)
    params = hf.load_parts(backbone, shape, architecture.parts_of_backbone(arch))
    params |= architecture.own_parameters(arch, config.train.seed)
    run = _run_of(config, arch, params, backbone, tokenizer, dtype)
    save_import(output, run, params, tokenizer)
    return run


def import_official(
    checkpoint: str | Path,
    backbone: str | Path,
    output: str | Path,
    config: Config,
    lora_alpha: float | None = None,
    dtype: str = "",
) -> Run:
    """Import the official COMI state dict in ``checkpoint`` to ``output``. Its tensors give the layer counts, the LoRA
    rank and targets and the scalars; ``config`` gives rates and switches. Raises as ``import_hf``."""
    check_new(output)
    if config.system != "comi":
        raise ConfigError(f"the release's checkpoints are COMI's; leave system={config.system} out")
    shape, tokenizer = hf_config.read_config(backbone, config.model.ignore_config), load_tokenizer(backbone)
    tokenizer = fit_tokenizer(tokenizer, shape)
    params, arch = official.load(checkpoint, shape, config.compression, lora_alpha)
    flat = flatten(params)
    scalars = {name: float(flat[f"mig/{name}"]) for name in SCALARS}
    arch = dataclasses.replace(arch, compression=dataclasses.replace(arch.compression, **scalars))
    run = _run_of(config, arch, flat, backbone, tokenizer, dtype)
    kept = _unused(official.OfficialTensors(checkpoint), arch, flat)
    save_import(output, run, flat, tokenizer)
    if kept:
        writing.save_file(Folder(output).official_unused, kept)
    return run


def _unused(held: files.Tensors, arch: Architecture, flat: Mapping[str, Any]) -> list[Writable]:
    """The unused tensors of an official file that an export could not recreate. Raises WeightsError if an unused tensor
    is not finite."""
    kept, bad = [], []
    for name in official.unused(arch):
        if name not in held.shapes:
            continue
        tensor = held.read(name)
        if not loading.is_finite(tensor):
            bad.append(name)
        elif not _same(tensor, official.filled(name, arch, flat)):
            kept.append(Writable(name, tensor.shape, tensor.dtype, functools.partial(held.read, name)))
    if bad:
        raise WeightsError(f"{held.path}: infinities or NaN in {', '.join(bad)}")
    return kept


def _same(a: np.ndarray, b: np.ndarray) -> bool:
    return a.dtype == b.dtype and a.tobytes() == b.tobytes()


def _run_of(
    config: Config, arch: Architecture, params: Mapping[str, Any], backbone: str | Path, tokenizer: Any, dtype: str
) -> Run:
    """The run description of an imported model."""
    dtype = dtype or ("float32" if params["decoder/embed"].dtype == jnp.float32 else "bfloat16")
    model = dataclasses.replace(config.model, path=str(backbone), dtype=dtype)
    config = dataclasses.replace(config, model=model, compression=arch.compression, lora=arch.lora)
    stop = tuple(sorted({tokenizer.eos_token_id, *hf_config.stop_tokens(backbone)}))
    return Run(config, arch.backbone, stop, imported=True)
