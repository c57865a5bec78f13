"""Memory and speed of importing a large checkpoint: ``python -m comi_jax.benchmarks.conversion --folder=DIR``.

Writes a temporary Hugging Face folder with the tensor shapes and shard sizes of Qwen2-7B, cut to --layers, with random
bfloat16 values. Each row of the table is a separate process on the same files:

    read       every tensor with safetensors alone, one after another
    load       the language model as stacked, transposed device arrays (hf.load_parts); also sharded over 8 fake devices
    import-hf  the whole command: a COMI checkpoint on disk (2 encoder layers)

The peak memory of the process should not exceed the result by more than the largest tensor and 1 GB.
"""

import dataclasses
import functools
import json
import math
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
from rich.console import Console
from rich.table import Table
from safetensors import safe_open

from comi_jax import cli
from comi_jax.backbone import Backbone
from comi_jax.benchmarks.speed import peak_memory
from comi_jax.config import Compression, Config, Mesh
from comi_jax.devices import sharding
from comi_jax.model import architecture
from comi_jax.params import count
from comi_jax.planning.published_models import BACKBONES
from comi_jax.weights import files, hf, hf_config, import_models, writing
from comi_jax.weights.writing import Writable

QWEN2_7B = BACKBONES["Qwen/Qwen2-7B-Instruct"]
SHARD_BYTES = 3_950_000_000  # as in the published files
GB = 1e9


def random_bfloat16(shape: tuple[int, ...], seed: int) -> np.ndarray:
    """Values of magnitude in [0.5, 1): random bits with a fixed exponent, which is fast and always finite."""
    bits = np.frombuffer(np.random.default_rng(seed).bytes(2 * math.prod(shape)), np.uint16)
    return ((bits & 0x807F) | 0x3F00).view(ml_dtypes.bfloat16).reshape(shape)


def write_model(folder: Path, layers: int) -> int:
    """Write a language model of QWEN2_7B's shapes with fewer layers, and a tokenizer. Returns the weights' bytes."""
    backbone = _cut(layers)
    specs = hf.lm_specs(backbone, layers, embed=True, head=True)
    tensors = [
        Writable(name, shape, np.dtype(ml_dtypes.bfloat16), functools.partial(random_bfloat16, shape, seed))
        for source in hf.sources(specs).values()
        for seed, (name, shape) in enumerate(source.expected().items())
    ]
    config = hf_config.config_values(backbone, torch_dtype="bfloat16", eos_token_id=0)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    for file in (Path(__file__).parent.parent / "tiny_lm").glob("*token*"):
        shutil.copy(file, folder)
    return writing.save(folder, tensors, SHARD_BYTES)


def _cut(layers: int) -> Backbone:
    return dataclasses.replace(QWEN2_7B, num_hidden_layers=layers)


def read(folder: Path, devices: int) -> dict[str, float]:
    """Read every tensor with safetensors alone."""
    since, size, largest = time.perf_counter(), 0, 0
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="np") as tensors:
            for name in tensors.keys():
                held = tensors.get_tensor(name).nbytes
                size, largest = size + held, max(largest, held)
    return {"seconds": time.perf_counter() - since, "read": size / GB, "result": 0.0, "largest": largest / GB}


def load(folder: Path, devices: int) -> dict[str, float]:
    """Load the language model, sharded over ``devices``."""
    if devices > 1:
        jax.config.update("jax_num_cpu_devices", devices)
    backbone = hf_config.read_config(folder)
    specs = {"lm": hf.lm_specs(backbone, backbone.num_hidden_layers, embed=True, head=True)}
    mesh = sharding.make_mesh(Mesh(data=1, fsdp=devices // 2, tensor=2) if devices > 1 else Mesh())
    placed = sharding.parameters(specs, mesh)
    since = time.perf_counter()
    arrays = jax.block_until_ready(hf.load_parts(folder, backbone, specs, lambda path: (None, placed[path])))
    seconds = time.perf_counter() - since
    size = sum(array.nbytes for array in arrays.values()) / GB
    largest = max(files.Tensors(folder).sizes().values()) / GB
    return {"seconds": seconds, "read": size, "result": size, "largest": largest}


def import_hf(folder: Path, devices: int) -> dict[str, float]:
    """Run import-hf, from folder to folder."""
    output = folder / "comi"
    since = time.perf_counter()
    config = Config(compression=Compression(encoder_layers=2))
    run = import_models.import_hf(folder, output, config)
    seconds = time.perf_counter() - since
    size = 2 * count(architecture.specs(run.architecture)) / GB
    shutil.rmtree(output)
    largest = max(files.Tensors(folder).sizes().values()) / GB
    return {"seconds": seconds, "read": size, "result": size, "largest": largest}


TASKS = {"read": (read, 1), "load": (load, 1), "load on 8 devices": (load, 8), "import-hf": (import_hf, 1)}


def main() -> None:
    """Write the model, run each task in its own process, print the table, remove the model."""
    parser = cli.Parser(prog="python -m comi_jax.benchmarks.conversion", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--folder", type=cli.path, help="where to write the model (default: the temporary folder)")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--only", choices=list(TASKS), nargs="+", default=list(TASKS))
    parser.add_argument("--here", metavar="MODEL", type=Path, help="run one task on an existing model and print JSON")
    given = parser.parse_args()
    if given.here:
        task, devices = TASKS[given.only[0]]
        print(json.dumps({**task(given.here, devices), "peak": peak_memory()}))
        return
    with tempfile.TemporaryDirectory(dir=given.folder) as folder:
        size = write_model(Path(folder), given.layers)
        console = Console(width=cli.width())
        console.print(f"{given.layers} layers of Qwen2-7B's shapes, {size / GB:.2f} GB in bfloat16")
        table = Table("", "s", "GB/s", "result, GB", "peak memory, GB", "result + largest tensor + 1 GB")
        for name in given.only:
            command = [sys.executable, "-m", "comi_jax.benchmarks.conversion", f"--here={folder}", "--only", name]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                table.add_row(name, "failed", (done.stderr.strip().splitlines() or ["?"])[-1][:60])
                continue
            row = json.loads(done.stdout.splitlines()[-1])
            allowed = row["result"] + row["largest"] + 1
            cells = (row["seconds"], row["read"] / row["seconds"], row["result"], row["peak"], allowed)
            table.add_row(name, *(f"{value:.2f}" for value in cells))
        console.print(table)


if __name__ == "__main__":
    main()
