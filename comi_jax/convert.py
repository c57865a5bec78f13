"""Weights in and out: ``python -m comi_jax.convert COMMAND``, of import-hf, import-official, export-official, export-hf
and inspect.

    language model (Hugging Face) --import-hf-------> COMI checkpoint --export-hf-------> decoder/ encoder/ lsa/
    official COMI state dict ------import-official--> COMI checkpoint --export-official-> official COMI state dict

A COMI checkpoint is a folder as training leaves it. What comes in keeps its dtype, so that what goes out again is the
same, byte for byte.
"""

import argparse
import dataclasses
import functools
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

from comi_jax.config import Config, ConfigError
from comi_jax.model import architecture
from comi_jax.model.architecture import SCALARS, Architecture
from comi_jax.overrides import override
from comi_jax.params import flatten, unflatten
from comi_jax.runs.checksums import CheckpointError
from comi_jax.runs.description import Run, check_new, read_run
from comi_jax.runs.stored_weights import load_flat, save_import
from comi_jax.weights import export_models, files, hf, inspection, official

UNUSED = "official_unused.safetensors"  # in the checkpoint's folder: tensors of an official file that nothing reads


# --- in ---------------------------------------------------------------------------------------------------------------


def import_hf(backbone: str | Path, output: str | Path, config: Config, dtype: str = "") -> Run:
    """Write a fresh COMI around the language model in ``backbone`` into ``output``; ``config`` gives the layer counts,
    switches and adapters, ``dtype`` that of activations (empty: float32 for float32 weights, else bfloat16). Raises
    ConfigError, WeightsError or CheckpointError."""
    check_new(output)
    shape, tokenizer = hf.read_config(backbone), hf.load_tokenizer(backbone)
    hf.check_tokenizer(tokenizer, shape)
    arch = Architecture(shape, config.compression, config.lora)
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
    """Write the official COMI state dict in ``checkpoint`` into ``output``. Layer counts, rank and targets of LoRA come
    from its tensors, rates and switches from ``config``, the scalars from the file. Raises as ``import_hf``."""
    check_new(output)
    shape, tokenizer = hf.read_config(backbone), hf.load_tokenizer(backbone)
    hf.check_tokenizer(tokenizer, shape)
    params, arch = official.load(checkpoint, shape, config.compression, lora_alpha)
    flat = flatten(params)
    scalars = {name: float(flat[f"mig/{name}"]) for name in SCALARS}
    arch = dataclasses.replace(arch, compression=dataclasses.replace(arch.compression, **scalars))
    run = _run_of(config, arch, flat, backbone, tokenizer, dtype)
    kept = _unused(official.OfficialTensors(checkpoint), arch, flat)
    save_import(output, run, flat, tokenizer)
    if kept:
        files.save_file(Path(output) / UNUSED, kept)
    return run


def _unused(held: files.Tensors, arch: Architecture, flat: Mapping[str, Any]) -> list[files.Writable]:
    """The tensors of an official file that nothing reads, where the way back would not make them up the same."""
    kept, bad = [], []
    for name in official.unused(arch):
        if name not in held.shapes:
            continue
        tensor = held.read(name)
        if not files.is_finite(tensor):
            bad.append(name)
        elif not _same(tensor, official.filled(name, arch, flat)):
            kept.append(files.Writable(name, tensor.shape, tensor.dtype, functools.partial(held.read, name)))
    if bad:
        raise files.WeightsError(f"{held.path}: infinities or NaN in {', '.join(bad)}")
    return kept


def _same(a: np.ndarray, b: np.ndarray) -> bool:
    return a.dtype == b.dtype and a.tobytes() == b.tobytes()


def _run_of(
    config: Config, arch: Architecture, params: Mapping[str, Any], backbone: str | Path, tokenizer: Any, dtype: str
) -> Run:
    """The description of an imported model."""
    dtype = dtype or ("float32" if params["decoder/embed"].dtype == jnp.float32 else "bfloat16")
    model = dataclasses.replace(config.model, path=str(backbone), dtype=dtype)
    config = dataclasses.replace(config, model=model, compression=arch.compression, lora=arch.lora)
    stop = tuple(sorted({tokenizer.eos_token_id, *hf.stop_tokens(backbone)}))
    return Run(config, arch.backbone, stop, imported=True)


# --- out --------------------------------------------------------------------------------------------------------------


def export_official(checkpoint: str | Path, output: str | Path, merge_lora: bool = False, dtype: str = "") -> int:
    """Write the COMI checkpoint as the release's flat state dict, one safetensors file that the release loads with
    strict=True. Returns the bytes of its tensors."""
    output = Path(output)
    if output.exists():
        raise CheckpointError(f"{output} exists; choose another --output")
    if output.suffix != ".safetensors":
        raise ConfigError(f"--output={output} is written as safetensors; give it that ending")
    run = read_run(checkpoint)
    arch, flat = run.architecture, load_flat(checkpoint, run.architecture)
    if merge_lora:
        arch, flat = export_models.merged(arch, flat)
    unused = Path(checkpoint) / UNUSED
    kept = files.Tensors(unused) if unused.is_file() else None
    written = export_models.dtype_of(run, dtype)
    tensors = list(official.writables(unflatten(flat), arch, kept, written))
    output.parent.mkdir(parents=True, exist_ok=True)
    files.save_file(output, tensors)
    return sum(tensor.bytes for tensor in tensors)


# --- the command ------------------------------------------------------------------------------------------------------


def print_inspection(found: inspection.Inspection, console: Console) -> None:
    """Show what ``inspect`` found as a table."""
    console.print(f"{found.kind}\n{found.architecture}", highlight=False)
    table = Table("part", "arrays", "parameters", "GB", "dtypes")
    rows = [(p.name, p.arrays, p.parameters, p.bytes, ", ".join(p.dtypes)) for p in found.parts]
    if len(rows) > 1:
        rows.append(("all", *(sum(row[i] for row in rows) for i in (1, 2, 3)), ""))
    for name, arrays, parameters, size, dtypes in rows:
        table.add_row(name, f"{arrays:,}", f"{parameters:,}", f"{size / 1e9:.3f}", dtypes)
    console.print(table)
    for note in found.notes:
        console.print(f"note: {note}", highlight=False)
    shown = "\n  ".join(found.missing[:20]) + (f"\n  and {len(found.missing) - 20} more" * (len(found.missing) > 20))
    console.print(f"missing:\n  {shown}" if found.missing else "nothing is missing", highlight=False)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m comi_jax.convert", description="Weights in and out.")
    commands = parser.add_subparsers(dest="command", required=True)
    settings = {"nargs": "*", "metavar": "path=value", "help": "settings, e.g. compression.encoder_layers=8"}

    def command(name: str, text: str) -> argparse.ArgumentParser:
        return commands.add_parser(name, help=text, description=text)

    fresh = command("import-hf", "A fresh COMI from a Hugging Face language model.")
    fresh.add_argument("--backbone", required=True, help="folder of the language model")
    theirs = command("import-official", "A COMI from the official release's state dict.")
    theirs.add_argument("--checkpoint", required=True, help="safetensors or .bin file, an index, or a folder of them")
    theirs.add_argument("--backbone", required=True, help="folder of the language model it was trained from")
    theirs.add_argument("--lora-alpha", type=float, help="needed where the decoder has adapters")
    for one in (fresh, theirs):
        one.add_argument("--output", required=True, help="folder to write; it must not exist or be empty")
        one.add_argument("--rates", help="e.g. 16,32")
        one.add_argument("--segment-size", help="context tokens that are encoded together")
        one.add_argument("settings", **settings)
    fresh.add_argument("--encoder-layers")
    fresh.add_argument("--lsa-layers")
    back = command("export-official", "The official release's state dict of a COMI checkpoint.")
    back.add_argument("--checkpoint", required=True, help="folder of a COMI checkpoint")
    back.add_argument("--output", required=True, help="safetensors file to write")
    back.add_argument("--merge-lora", action="store_true", help="adapters merged into the decoder's projections")
    folders = command("export-hf", "Three folders for plain transformers: decoder, encoder, lsa.")
    folders.add_argument("--checkpoint", required=True, help="folder of a COMI checkpoint")
    folders.add_argument("--output", required=True, help="folder to write; it must not exist or be empty")
    folders.add_argument("--shard-gb", type=float, default=files.SHARD_BYTES / 1e9, help="largest file (default: 5)")
    for one in (back, folders):
        one.add_argument("--dtype", default="", help="of all weights: float32, float16 or bfloat16 (default: kept)")
    look = command("inspect", "What a folder or file of weights is.")
    look.add_argument("path")
    return parser


def _config(given: argparse.Namespace) -> Config:
    words = list(given.settings)
    for name in ("rates", "segment_size", "encoder_layers", "lsa_layers"):
        if getattr(given, name, None) is not None:
            words.append(f"compression.{name}={getattr(given, name)}")
    if given.command == "import-official":
        known = (
            "compression.encoder_layers",
            "compression.lsa_layers",
            "compression.alpha",
            "compression.beta",
            "lora.",
        )
        read = [word for word in words if word.startswith(known)]
        if read:
            raise ConfigError(f"{', '.join(read)}: the checkpoint says it itself; leave it out (--lora-alpha is given)")
    return override(Config(name=given.command), words)


def _do(given: argparse.Namespace, console: Console) -> None:
    if given.command == "inspect":
        print_inspection(inspection.inspect(given.path), console)
        return
    if given.command == "export-official":
        size = export_official(given.checkpoint, given.output, given.merge_lora, given.dtype)
        console.print(f"{size / 1e9:.2f} GB in {given.output}", highlight=False)
        return
    if given.command == "export-hf":
        if given.shard_gb <= 0:
            raise ConfigError(f"--shard-gb={given.shard_gb} is not a size")
        sizes = export_models.export_hf(given.checkpoint, given.output, given.dtype, int(given.shard_gb * 1e9))
        words = ", ".join(f"{part}/ {size / 1e9:.2f} GB" for part, size in sizes.items())
        console.print(f"{given.output}: {words}", highlight=False)
        return
    config = _config(given)
    dtype = config.model.dtype if any(word.startswith("model.dtype=") for word in given.settings) else ""
    if given.command == "import-hf":
        run = import_hf(given.backbone, given.output, config, dtype)
    else:
        run = import_official(given.checkpoint, given.backbone, given.output, config, given.lora_alpha, dtype)
    console.print(f"{given.output}: {inspection.describe(run.backbone)}", highlight=False)


def main(arguments: list[str] | None = None) -> None:
    """Parse the command line, convert, and turn what a user can mend into one sentence and exit status 1."""
    console = Console(soft_wrap=True, markup=False)
    try:
        _do(_parser().parse_args(arguments), console)
    except (ConfigError, files.WeightsError, CheckpointError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
