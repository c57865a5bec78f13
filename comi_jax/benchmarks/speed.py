"""Time and memory on this machine: ``python -m comi_jax.benchmarks.speed [--tokens 2048 8192] [--only compress]``.

Random weights of a small Qwen2 (hidden 512, 8 heads over 2 key/value heads, feed-forward 1,408, 8 decoder and 4 encoder
layers, vocabulary 32,000), one context, rate 32, query 24, answer 16, float32. Each figure is measured in a separate
process: the time is the median after a first run that compiles, the memory the peak resident size of the process.
"""

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

from comi_jax import cli
from comi_jax.backbone import Backbone
from comi_jax.cli import at_least
from comi_jax.config import Compression, Generation, Optimizer
from comi_jax.model import architecture, comi, generate
from comi_jax.model import backbone as lm
from comi_jax.model.architecture import Architecture
from comi_jax.model.batch import Batch
from comi_jax.params import initialize, partition
from comi_jax.training import optim
from comi_jax.training.state import TrainState
from comi_jax.training.step import CompiledStep

RATE, QUERY, ANSWER, NEW_TOKENS = 32, 24, 16, 20
BACKBONE = Backbone(
    model_type="qwen2", vocab_size=32_000, hidden_size=512, intermediate_size=1408, num_hidden_layers=8,
    num_attention_heads=8, num_key_value_heads=2, head_dim=64, rms_norm_eps=1e-6, rope_theta=1e6, rope_scaling=None,
    max_position_embeddings=40_000, tie_word_embeddings=False, qkv_bias=True, qk_norm=False,
)  # fmt: skip


def example(tokens: int) -> Batch:
    """One context of random tokens with a query and an answer."""
    rng = np.random.default_rng(0)

    def ids(*shape: int) -> jax.Array:
        return jnp.asarray(rng.integers(0, BACKBONE.vocab_size, shape), jnp.int32)

    def number(value: int) -> jax.Array:
        return jnp.full((1,), value, jnp.int32)

    return Batch(
        ids(1, tokens),
        number(tokens),
        ids(1, QUERY),
        number(QUERY),
        ids(1, ANSWER),
        number(ANSWER),
        number(RATE),
    )


def prepare(task: str, tokens: int, remat: bool) -> Callable[[], object]:
    """The work of ``task`` as a function without arguments, with weights and example prepared."""
    compression = Compression(rates=(RATE,), encoder_layers=4, segment_size=tokens)
    arch = Architecture(BACKBONE, compression, runtime=lm.Runtime(remat="attention" if remat else "off"))
    params = initialize(architecture.specs(arch), jax.random.key(0))
    batch = example(tokens)
    if task == "train step":
        return _training(params, arch, batch)
    options = Generation(max_new_tokens=NEW_TOKENS)

    @jax.jit
    def compress(params, batch):
        return comi.memory_of(params, arch, batch, RATE)

    @jax.jit
    def answer(params, memory, batch):
        prompt = comi.prompt(params, arch, memory, batch)
        return generate.greedy(params, arch, prompt.rows, prompt.length, options, stop=()).ids

    if task == "compress":
        return lambda: compress(params, batch).vectors
    return lambda: answer(params, compress(params, batch), batch)  # two calls, as in Comi.answer


def _training(params: dict, arch: Architecture, batch: Batch) -> Callable[[], object]:
    trained, frozen = partition(params, lambda path: architecture.is_trained(path, arch))
    update = optim.optimizer(Optimizer(), steps=1000)
    held = [TrainState(jnp.int32(0), trained, update.init(trained))]
    step = CompiledStep(arch, update)

    def run():
        held[0], metrics = step(held[0], frozen, (batch,), jax.random.key(0))
        return metrics

    return run


def measure(task: str, tokens: int, runs: int, remat: bool) -> dict[str, float]:
    """First and median seconds of ``task``, and the peak resident memory of this process in GB."""
    work, seconds = prepare(task, tokens, remat), []
    for _ in range(runs + 1):
        since = time.perf_counter()
        jax.block_until_ready(work())
        seconds.append(time.perf_counter() - since)
    return {"first": seconds[0], "median": statistics.median(seconds[1:]), "peak_gb": peak_memory()}


def peak_memory() -> float:
    """The peak resident memory of this process in GB. (getrusage would include that of the parent process.)"""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) * 1024 / 1e9


TASKS = ("compress", "train step", "compress + 20 tokens")


def main() -> None:
    """Measure each task at each length, one process each, and print a table."""
    parser = cli.Parser(prog="python -m comi_jax.benchmarks.speed", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--tokens", type=at_least(1), nargs="+", default=[2048, 8192, 32768])
    parser.add_argument("--only", choices=TASKS, nargs="+", default=TASKS)
    parser.add_argument("--runs", type=at_least(1), default=3)
    parser.add_argument("--no-remat", action="store_true", help="keep all activations for the backward pass")
    parser.add_argument("--here", action="store_true", help="measure in this process and print JSON (for internal use)")
    given = parser.parse_args()
    if given.here:
        print(json.dumps(measure(given.only[0], given.tokens[0], given.runs, not given.no_remat)))
        return
    table = Table("task", "context tokens", "first run (compiles), s", "median, s", "peak memory, GB")
    for tokens in given.tokens:
        for task in given.only:
            command = [
                sys.executable,
                "-m",
                "comi_jax.benchmarks.speed",
                "--here",
                "--only",
                task,
                "--tokens",
                str(tokens),
            ]
            command += ["--runs", str(given.runs)] + ["--no-remat"] * given.no_remat
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                reason = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
                table.add_row(task, f"{tokens:,}", "failed", reason[:60], "")
                continue
            figures = json.loads(done.stdout.splitlines()[-1])
            cells = (f"{figures[name]:.2f}" for name in ("first", "median", "peak_gb"))
            table.add_row(task, f"{tokens:,}", *cells)
    Console(width=cli.width()).print(table)


if __name__ == "__main__":
    main()
