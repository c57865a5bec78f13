"""The model card of an exported checkpoint: what it is, what was measured with exactly these weights, and how."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from comi_jax.model.architecture import Architecture
from comi_jax.runs.checksums import CheckpointError
from comi_jax.runs.description import Run
from comi_jax.runs.folder import Folder
from comi_jax.runs.stored_weights import weights_of

METRICS = ("em", "f1_max", "rougeL")
COLUMNS = ("system", "step", "data", "n", "rate", *METRICS, "ratio", "decoding")


def results_of(checkpoint: str | Path, step: int) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """The results of the weights of ``step``, by title, the run's closing table first; and a sentence about each result
    in ``checkpoint`` that is left out because it is of other or unknown weights."""
    folder, weights = Folder(checkpoint), weights_of(checkpoint, step)
    rows: dict[str, dict[str, Any]] = {}
    left_out = []
    closing = _table(folder.results)
    if closing:
        if weights and closing.get("COMI", {}).get("weights") == weights:
            rows |= {_title(row, name): row for name, row in closing.items()}
        else:
            left_out.append(f"The run's closing table is left out: {_of(closing.get('COMI', {}))}.")
    for row in _table(Folder(folder.evaluation).results).values():
        if weights and row.get("weights") == weights:
            title = _title(row, "COMI")
            known = [row[name] for name in COMPARED if name in row] if title in rows else None
            if known and known == [rows[title][name] for name in COMPARED if name in rows[title]]:
                continue  # the same measurement is in the closing table
            rows[title if title not in rows else f"{title}, evaluated later"] = row
        else:
            left_out.append(f"A later evaluation is left out: {_of(row)}.")
    return rows, left_out


NEUTRAL = {"temperature": 0.0, "top_k": 0, "top_p": 1.0, "seed": 0, "stop_strings": []}  # as if they did not exist
COMPARED = ("records", "rate", "closed_book", "decoding")


def _table(path: Path) -> dict[str, dict[str, Any]]:
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(rows, dict) or not all(isinstance(row, dict) for row in rows.values()):
            raise ValueError("it is no table of results")
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}; fix or remove it") from None
    return rows


def _title(row: Mapping[str, Any], name: str) -> str:
    """The title of a result; it says if the contexts were withheld or only the first records were evaluated."""
    title = "closed book: the contexts withheld" if row.get("closed_book") else name
    whole = row.get("of", row["n"])
    return title if row["n"] == whole else f"{title}, the first {row['n']:,} of {whole:,} only"


def _of(row: Mapping[str, Any]) -> str:
    if "weights" not in row:
        return "an earlier version wrote it without recording the weights"
    return f"it used other weights (step {row.get('step', 'unknown')}, checksum {row['weights'][:16] or 'unknown'})"


def card(run: Run, arch: Architecture, step: int, weights: str, results: Mapping[str, Any], left_out: list[str]) -> str:
    """The README.md of a model exported after ``step``."""
    backbone, compression = run.backbone, arch.compression
    lines = [
        "---",
        "library_name: transformers",
        "tags: [context-compression, comi, comi_jax]",
        "---",
        "",
        "# COMI context compressor",
        "",
        f"A {backbone.model_type} model of {backbone.num_hidden_layers} layers and width {backbone.hidden_size} that "
        f"answers from compressed contexts: {compression.encoder_layers} encoder layers, {compression.lsa_layers} "
        f"alignment layer(s), rates {', '.join(map(str, compression.rates))}, segments of {compression.segment_size:,} "
        "tokens. Method: COMI, arXiv 2602.01719.",
        "",
        "`decoder/` is a causal LM; `encoder/` and `lsa/` load with `AutoModel`. `comi.json` says what is computed "
        "between them. The decoder reads prompt embeddings `[memory; embedded question]`.",
        *["Its adapters are in `adapter/`: `PeftModel.from_pretrained(decoder, ...)`."] * bool(arch.lora.rank),
        "",
        "vLLM (tried: 0.32) serves the decoder with prompt embeddings, over `/v1/completions`; let none but trusted "
        "callers reach it. In this folder:",
        "",
        "```sh",
        "python -m vllm.entrypoints.openai.api_server --model decoder --served-model-name comi --enable-prompt-embeds "
        "--host 127.0.0.1",
        "```",
        "",
        f"Weights after step {step:,}, checksum {weights[:16] or 'unknown'}.",
        "",
    ]
    if results:
        lines += [f"| {' | '.join(COLUMNS)} |", f"| {' | '.join('---' for _ in COLUMNS)} |"]
        lines += [f"| {' | '.join(_cells(title, row))} |" for title, row in results.items()]
        lines += ["", "95 % bootstrap intervals in brackets; `data` with the fingerprint of its records."]
    else:
        lines.append("No measured results came with this checkpoint.")
    if left_out:
        lines += ["", *left_out]
    return "\n".join(lines) + "\n"


def _cells(title: str, row: Mapping[str, Any]) -> list[str]:
    # File names without their folders, which are private.
    data = ", ".join(re.sub(r"[^:@]*/(?=[^/@])", "", word) for word in row.get("data", [])) or "-"
    cells = [
        title, str(row.get("step", "-")), f"{data} ({row.get('records', '-')[:16]})", f"{row['n']:,}",
        str(row.get("rate") or "-"),
        *(_score(row["metrics"].get(name)) for name in METRICS),
        f"{row['ratio']:.1f}" if row["ratio"] else "-",
        ", ".join(f"{name} {value}" for name, value in row["decoding"].items() if NEUTRAL.get(name) != value),
    ]  # fmt: skip
    return [cell.replace("|", "\\|").replace("\n", " ") for cell in cells]


def _score(value: Mapping[str, float] | None) -> str:
    return f"{value['mean']:.3f} [{value['low']:.3f}, {value['high']:.3f}]" if value else "-"
