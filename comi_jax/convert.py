"""Import, export and inspect weights: ``python -m comi_jax.convert COMMAND``, with COMMAND inspect or an arrow below.

    language model (Hugging Face) --import-hf-------> COMI checkpoint --export-hf-------> decoder/ encoder/ lsa/
    official COMI state dict ------import-official--> COMI checkpoint --export-official-> official COMI state dict

A COMI checkpoint is the folder of a run. An import keeps the dtypes, so that exporting it gives the same bytes.
"""

import argparse

from rich.console import Console
from rich.table import Table

from comi_jax import cli
from comi_jax.config import Config
from comi_jax.errors import ConfigError
from comi_jax.overrides import override
from comi_jax.weights import export_models, inspection
from comi_jax.weights.export_models import export_official
from comi_jax.weights.import_models import import_hf, import_official
from comi_jax.weights.writing import SHARD_BYTES


def print_inspection(found: inspection.Inspection, console: Console) -> None:
    """Print what ``inspect`` found."""
    console.print(f"{found.kind}\n{found.architecture}", highlight=False)
    if found.weights:
        console.print(f"weights: {found.weights}", highlight=False)
    table = Table("part", "arrays", "parameters", "GB", "dtypes")
    rows = [*found.parts, inspection.Part.all("all", found.parts)] if len(found.parts) > 1 else found.parts
    for p in rows:
        table.add_row(p.name, f"{p.arrays:,}", f"{p.parameters:,}", f"{p.bytes / 1e9:.3f}", ", ".join(p.dtypes))
    console.print(table)
    for note in found.notes:
        console.print(f"note: {note}", highlight=False)
    shown = "\n  ".join(found.missing[:20]) + (f"\n  and {len(found.missing) - 20} more" * (len(found.missing) > 20))
    console.print(f"missing:\n  {shown}" if found.missing else "nothing is missing", highlight=False)


def _parser() -> cli.Parser:
    parser = cli.Parser(prog="python -m comi_jax.convert", description="Import, export and inspect weights.")
    commands = parser.add_subparsers(dest="command", required=True)

    def command(name: str, text: str) -> cli.Parser:
        return commands.add_parser(name, help=text, description=text)

    fresh = command("import-hf", "Make an untrained COMI checkpoint from a Hugging Face language model.")
    fresh.add_argument("--backbone", type=cli.path, required=True, help="folder of the language model")
    theirs = command("import-official", "Make a COMI checkpoint from the official release's state dict.")
    theirs.add_argument(
        "--checkpoint", type=cli.path, required=True, help="safetensors or .bin file, an index, or a folder of them"
    )
    theirs.add_argument(
        "--backbone", type=cli.path, required=True, help="folder of the language model it was trained from"
    )
    theirs.add_argument("--lora-alpha", type=float, help="required if the decoder has adapters")
    for one in (fresh, theirs):
        one.add_argument("--output", type=cli.path, required=True, help="folder to write; must be new or empty")
        one.add_argument("--rates", help="e.g. 16,32")
        one.add_argument("--segment-size", help="context tokens encoded together")
        cli.add_ignore_config(one)
        one.add_argument(
            "settings", nargs="*", metavar="path=value", help="settings, e.g. compression.encoder_layers=8"
        )
    fresh.add_argument("--encoder-layers")
    fresh.add_argument("--lsa-layers")
    back = command("export-official", "Write a COMI checkpoint as the official release's state dict.")
    back.add_argument("--checkpoint", type=cli.path, required=True, help="folder of a COMI checkpoint")
    back.add_argument("--output", type=cli.path, required=True, help="safetensors file to write")
    back.add_argument("--merge-lora", action="store_true", help="merge the adapters into the decoder's projections")
    folders = command("export-hf", "Write three folders that plain transformers loads: decoder, encoder, lsa.")
    folders.add_argument("--checkpoint", type=cli.path, required=True, help="folder of a COMI checkpoint")
    folders.add_argument("--output", type=cli.path, required=True, help="folder to write; must be new or empty")
    folders.add_argument("--adapter", action="store_true", help="write LoRA adapters for PEFT instead of merging them")
    folders.add_argument("--shard-gb", type=float, default=SHARD_BYTES / 1e9, help="maximum file size (default: 5)")
    for one in (back, folders):
        one.add_argument(
            "--dtype", default="", help="dtype of all weights: float32, float16 or bfloat16 (default: unchanged)"
        )
    look = command("inspect", "Show what a folder or file of weights holds.")
    look.add_argument("path", type=cli.path)
    return parser


def _config(given: argparse.Namespace) -> Config:
    words = list(given.settings) + cli.ignore_config(given)
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
            raise ConfigError(
                f"{', '.join(read)} cannot be set, as the checkpoint determines it; remove it (for alpha of the "
                "adapters: --lora-alpha)"
            )
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
            raise ConfigError(f"--shard-gb={given.shard_gb} is not a size; give a positive number of GB")
        shard_bytes = int(given.shard_gb * 1e9)
        sizes = export_models.export_hf(given.checkpoint, given.output, given.dtype, shard_bytes, adapter=given.adapter)
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
    """Convert; an error that the user can fix ends in one sentence and exit status 1."""
    console = Console(width=cli.width(), soft_wrap=True, markup=False)
    with cli.one_way_out():
        _do(_parser().parse_args(arguments), console)


if __name__ == "__main__":
    main()
