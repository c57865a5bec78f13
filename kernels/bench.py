"""Time, traffic and memory of the compression kernels on this machine: ``python -m comi_jax.kernels.bench``.

Random states of ``--width`` in bfloat16 (float32 on CPU), in groups of about ``--rate`` tokens. MB is the minimum
traffic: each state read once, each result written once. FLOP are those of the cosines within groups and of the weighted
sums. "of copy" is relative to the bandwidth of rewriting the states in place in the same run. Peak memory is input,
result and temporaries of the compiled program; the temporaries are also listed alone.
"""

import argparse
import math
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from comi_jax.kernels import dispatch
from comi_jax.kernels.merge import merge
from comi_jax.kernels.redundancy import max_cosine

ROW = "{:<12}{:<11}{:<10}{:>9}{:>11}{:>12}{:>9}{:>9}{:>9}{:>8}{:>10}{:>12}"
HEAD = (
    "kernel",
    "pass",
    "by",
    "tokens",
    "time, ms",
    "x previous",
    "MB",
    "GFLOP",
    "GB/s",
    "of copy",
    "peak, MB",
    "temporaries",
)


def groups(tokens: int, rate: int, rng: np.random.Generator) -> np.ndarray:
    """Group ids of ``tokens`` tokens, in groups of 1 to 2 · ``rate`` - 1 tokens."""
    sizes = rng.integers(1, 2 * rate, 1 + 2 * tokens // rate)
    while sizes.sum() < tokens:
        sizes = np.concatenate([sizes, sizes])
    return np.repeat(np.arange(len(sizes)), sizes)[:tokens].astype(np.int32)


def work(kernel: str, backward: bool, name: str, slots: int) -> Callable[..., Any]:
    """One of the two kernels, forward or with its gradients."""

    def forward(x, numbers, group):
        if kernel == "redundancy":
            return max_cosine(x, numbers, group, implementation=name)[0]
        return merge(x, numbers, group, slots, implementation=name)[0]

    def gradients(x, numbers, group):
        return jax.grad(lambda x, numbers: jnp.sum(forward(x, numbers, group)), argnums=(0, 1))(x, numbers)

    return gradients if backward else forward


def least(kernel: str, backward: bool, x: jax.Array, ids: np.ndarray) -> tuple[float, float]:
    """Bytes and FLOP that a kernel needs at least on the states ``x`` [1, S, D] in the groups ``ids``: each state read
    once, each result written once, and the cosines within groups or the weighted sums. The backward pass reads the
    states again and writes their gradient."""
    _, tokens, width = x.shape
    out = 8.0 * tokens if kernel == "redundancy" else 4.0 * (int(ids[-1]) + 1) * width
    pairs = float(np.sum(np.bincount(ids).astype(float) ** 2)) / 2
    flops = 2.0 * width * (pairs if kernel == "redundancy" else tokens)
    return (x.nbytes + out + 8 * tokens) + backward * (2 * x.nbytes + out), (3 if backward else 1) * flops


def seconds(function: Callable[..., Any], arguments: tuple[jax.Array, ...], runs: int) -> float:
    """The median of ``runs`` timed runs after a warm-up."""
    taken = []
    for _ in range(runs + 1):
        since = time.perf_counter()
        jax.block_until_ready(function(*arguments))
        taken.append(time.perf_counter() - since)
    return statistics.median(taken[1:])


def seconds_in_place(x: jax.Array, runs: int) -> float:
    """The median time of rewriting all of ``x`` in place, as on CPU allocating memory is slower than writing to it."""
    negate, taken = jax.jit(lambda x: -x, donate_argnums=0), []
    x = jax.block_until_ready(negate(x + 0))
    for _ in range(runs):
        since = time.perf_counter()
        x = jax.block_until_ready(negate(x))
        taken.append(time.perf_counter() - since)
    return statistics.median(taken)


def main() -> None:
    """Time both kernels, forward and backward, at each size, and print a table."""
    parser = argparse.ArgumentParser(
        prog="python -m comi_jax.kernels.bench", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--tokens", type=int, nargs="+", default=[2048, 8192, 32_768, 131_072])
    parser.add_argument("--width", type=int, default=3584)
    parser.add_argument("--rate", type=int, default=32)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"])
    parser.add_argument(
        "--by", nargs="+", choices=dispatch.NAMES, help="implementations (default: the device's and xla)"
    )
    given = parser.parse_args()
    backend = jax.default_backend()
    dtype = jnp.dtype(given.dtype or ("float32" if backend == "cpu" else "bfloat16"))
    names = given.by or sorted({"xla", dispatch.choose("bench", None, dtype)})
    print(f"{jax.devices()[0].device_kind}, {dtype}, width {given.width}, groups of 1 to {2 * given.rate - 1} tokens")
    print(ROW.format(*HEAD))
    before: dict[tuple[str, ...], float] = {}
    copied = math.nan
    for tokens in given.tokens:
        rng = np.random.default_rng(tokens)
        ids = groups(tokens, given.rate, rng)
        slots = int(ids[-1]) + 1
        x = jax.random.normal(jax.random.key(tokens), (1, tokens, given.width), dtype)
        numbers = jnp.asarray(rng.uniform(0.5, 1.5, (1, tokens)) / given.width**0.5, jnp.float32)
        arguments = (x, numbers, jnp.asarray(ids)[None])
        copied = 2 * x.nbytes / seconds_in_place(x, given.runs)
        for kernel in ("redundancy", "merge"):
            for name in names:
                for part in ("forward", "+ backward"):
                    backward = part != "forward"
                    must, flops = least(kernel, backward, x, ids)
                    step = jax.jit(work(kernel, backward, name, slots)).lower(*arguments).compile()
                    took = seconds(step, arguments, given.runs)
                    growth = f"{took / before[kernel, part, name]:.2f}" if (kernel, part, name) in before else ""
                    before[kernel, part, name] = took
                    memory = step.memory_analysis()
                    extra = memory.temp_size_in_bytes if memory else math.nan  # not every device tells
                    held = memory.argument_size_in_bytes + memory.output_size_in_bytes if memory else math.nan
                    print(ROW.format(
                        kernel, part, name, f"{tokens:,}", f"{1e3 * took:.2f}", growth, f"{must / 1e6:.0f}",
                        f"{flops / 1e9:.1f}", f"{must / took / 1e9:.1f}",
                        f"{must / took / copied:.0%}", f"{(extra + held) / 1e6:.0f}", f"{extra / 1e6:.1f}",
                    ), flush=True)  # fmt: skip
    print(f"rewriting the states in place, last size: {copied / 1e9:.1f} GB/s")


if __name__ == "__main__":
    main()
