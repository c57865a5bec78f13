"""Export of a COMI checkpoint as folders that plain transformers and serving engines load without our code.

    decoder/   the causal LM that answers, adapters merged, with tokenizer and generation config
    adapter/   its adapters for PEFT, if they are not merged
    encoder/   the model that reads [context; question]        lsa/   the model that aligns merged vectors
    comi.json  the computation between them: rates, scalars, switches, token conventions
    README.md  model card

``launch/replay_pytorch.py`` reassembles the three models in PyTorch.
"""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from comi_jax.config import Lora
from comi_jax.errors import ConfigError
from comi_jax.model import lora as lora_module
from comi_jax.model.architecture import SCALARS, Architecture
from comi_jax.params import flatten, unflatten
from comi_jax.runs.checksums import CheckpointError
from comi_jax.runs.description import Run, check_new, read_run
from comi_jax.runs.folder import Folder
from comi_jax.runs.selection import existing
from comi_jax.runs.stored_weights import load_flat, weights_of
from comi_jax.weights import files, hf, hf_config, model_card, official, peft, writing
from comi_jax.weights.tokenizer import load_tokenizer
from comi_jax.weights.writing import SHARD_BYTES

DTYPES = ("float32", "float16", "bfloat16")
SWITCHES = ("coarse", "fine", "coarse_redundancy", "fine_redundancy", "lsa")


def export_hf(
    checkpoint: str | Path,
    output: str | Path,
    dtype: str = "",
    shard_bytes: int = SHARD_BYTES,
    *,
    adapter: bool = False,
) -> dict[str, int]:
    """Write the COMI checkpoint to the new folder ``output``. ``dtype`` is one of DTYPES; if it is empty, an imported
    model keeps its dtypes and a trained one is written in its model.dtype. With ``adapter`` the decoder's adapters are
    not merged, but written beside it for PEFT. Returns the bytes of weights by part."""
    check_new(output)
    run, output, step = read_run(checkpoint), Path(output), existing(checkpoint)
    check_exportable(checkpoint, run)
    if adapter and not run.architecture.lora.rank:
        raise ConfigError(f"{checkpoint} has no adapters (lora.rank is 0); leave --adapter out")
    tokenizer = load_tokenizer(Folder(checkpoint).tokenizer)
    arch, flat = run.architecture, load_flat(checkpoint, run.architecture, step=step)
    if not adapter:
        arch, flat = merged(arch, flat)
    kept, results = dtype_of(run, dtype), model_card.results_of(checkpoint, step)
    params = unflatten(flat)
    params["lsa"]["embed"] = params["decoder"]["embed"]  # never used: the LSA reads vectors, not tokens
    written = {}
    for part, layers in (
        ("decoder", arch.backbone.num_hidden_layers),
        ("encoder", arch.compression.encoder_layers),
        ("lsa", arch.compression.lsa_layers),
    ):
        written[part] = _save_part(output / part, part, layers, params[part], run, tokenizer, kept, shard_bytes)
    if adapter:
        written["adapter"] = peft.save_adapter(output / "adapter", arch, flat, kept)
    tokenizer.save_pretrained(output / "decoder")
    ends = {"eos_token_id": list(run.stop), "do_sample": False} | _special(tokenizer)
    _write_json(output / "decoder" / "generation_config.json", ends)
    _write_json(output / "comi.json", protocol(run, arch, params["mig"]))
    card = model_card.card(run, arch, step, weights_of(checkpoint, step), *results)
    (output / "README.md").write_text(card, encoding="utf-8")
    return written


def check_exportable(checkpoint: str | Path, run: Run) -> None:
    """Raises ConfigError for what other software has no format for: another system than COMI, and queries that are
    encoded alone."""
    if run.config.system != "comi":
        raise ConfigError(
            f"{checkpoint} holds system={run.config.system}, and only COMI can be exported; use it with "
            "comi_jax.answer and comi_jax.evaluate"
        )
    if not run.config.compression.query_reads_context:
        raise ConfigError(
            f"{checkpoint} has compression.query_reads_context=false, and other software encodes the query behind the "
            "context; use it with comi_jax.answer and comi_jax.evaluate"
        )


def _save_part(
    folder: Path, part: str, layers: int, tree: Any, run: Run, tokenizer: Any, dtype: str | None, shard_bytes: int
) -> int:
    folder.mkdir(parents=True)
    head = part == "decoder"
    backbone = dataclasses.replace(run.backbone, num_hidden_layers=layers)
    specs = hf.lm_specs(backbone, layers, embed=True, head=head)
    stored = dtype or str(tree["embed"].dtype)
    more = _special(tokenizer) if head else {}
    values = hf_config.config_values(backbone, head=head, torch_dtype=stored, eos_token_id=list(run.stop), **more)
    return hf.save_backbone(folder, specs, tree, values, dtype, base=not head, shard_bytes=shard_bytes)


def _special(tokenizer: Any) -> dict[str, int]:
    names = ("bos_token_id", "pad_token_id")
    return {name: getattr(tokenizer, name) for name in names if getattr(tokenizer, name, None) is not None}


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(dict(values), indent=2) + "\n", encoding="utf-8")


def merged(arch: Architecture, flat: Mapping[str, Any]) -> tuple[Architecture, dict[str, Any]]:
    """The same model with its adapters merged into the decoder's projections."""
    if not arch.lora.rank:
        return arch, dict(flat)
    params = unflatten(flat)
    params["decoder"]["layers"] = lora_module.merge(params["decoder"]["layers"], params.pop("lora"), arch.lora)
    return dataclasses.replace(arch, lora=Lora()), flatten(params)


def dtype_of(run: Run, dtype: str) -> str | None:
    """The dtype to write all weights in; None: each keeps its own. A trained run keeps its trained weights in float32,
    so they are cast to the dtype of the frozen ones. Raises CheckpointError if ``dtype`` is not one of DTYPES."""
    if dtype and dtype not in DTYPES:
        raise CheckpointError(f"--dtype={dtype} is not one of {', '.join(DTYPES)}")
    return dtype or (None if run.imported else run.config.model.dtype)


def protocol(run: Run, arch: Architecture, scalars: Mapping[str, Any]) -> dict[str, Any]:
    """The content of comi.json: everything about the computation that is not in the weights."""
    compression = arch.compression
    return {
        "format": 1,
        "rates": list(compression.rates),
        "segment_size": compression.segment_size,
        "scalars": {name: float(jnp.asarray(scalars[name])) for name in SCALARS},
        "switches": {name: getattr(compression, name) for name in SWITCHES},
        "compression_dtype": "float32",
        "tokens": {
            "encoder_input": "[context; question]",
            "decoder_input": "[memory; question]",
            "special_tokens": "none are added; those in a text are tokenised as ordinary characters; no chat template, "
            "no separators",
            "stop": list(run.stop),
        },
        "generation": {"method": run.config.generation.method, **dataclasses.asdict(run.config.generation)},
    }


def export_official(checkpoint: str | Path, output: str | Path, merge_lora: bool = False, dtype: str = "") -> int:
    """Write the COMI checkpoint as the release's flat state dict: one safetensors file that the release loads with
    strict=True. Returns the bytes of its tensors."""
    output = Path(output)
    if output.exists():
        raise CheckpointError(f"{output} exists; choose another --output")
    if output.suffix != ".safetensors":
        raise ConfigError(f"--output={output} is written as safetensors; give it that ending")
    run = read_run(checkpoint)
    check_exportable(checkpoint, run)
    arch, flat = run.architecture, load_flat(checkpoint, run.architecture)
    if merge_lora:
        arch, flat = merged(arch, flat)
    unused = Folder(checkpoint).official_unused
    kept = files.Tensors(unused) if unused.is_file() else None
    written = dtype_of(run, dtype)
    tensors = list(official.writables(unflatten(flat), arch, kept, written))
    output.parent.mkdir(parents=True, exist_ok=True)
    writing.save_file(output, tensors)
    return sum(tensor.bytes for tensor in tensors)
