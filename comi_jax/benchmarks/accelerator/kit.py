"""What the measurements of ``benchmarks.device`` share: shapes, rows, timing, and the device's own rates."""

import dataclasses
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from comi_jax.benchmarks import speed
from comi_jax.config import Backbone, Compression, Generation
from comi_jax.devices import chips
from comi_jax.kernels import bench
from comi_jax.model import architecture, sampling
from comi_jax.model.architecture import Architecture
from comi_jax.model.batch import Batch
from comi_jax.params import flatten, initialize, unflatten
from comi_jax.planning import hlo
from comi_jax.planning.published_models import BACKBONES

RUNS = 5  # timed runs, of which the median counts
LEAST = 0.02  # seconds: shorter calls are timed several at a time, as starting one takes up to 0.1 ms
MOST_AT_ONCE = 20
RATE = 32


@dataclass(frozen=True)
class Shapes:
    """The sizes that are measured."""

    name: str
    backbone: Backbone
    encoder_layers: int = 8
    context: int = 32_768  # tokens of compress, train step and the kept document
    kernel_tokens: tuple[int, ...] = (32_768, 8_192, 131_072)  # the most important first
    batches: tuple[int, ...] = (1, 16, 64)  # of prefill and decode
    query: int = 32
    answer: int = 20
    new_tokens: int = 16  # of a timed run of decoding
    check_tokens: int = 700  # of the correctness checks: no multiple of any tile
    dtype: str = "bfloat16"
    copied: int = 2**29  # entries of the array whose copying is timed
    multiplied: int = 8_192  # side of the matrices whose product is timed

    @property
    def arch(self) -> Architecture:
        compression = Compression(rates=(RATE,), encoder_layers=self.encoder_layers, segment_size=self.context)
        return Architecture(self.backbone, compression, dtype=self.dtype)


_TINY = dataclasses.replace(
    speed.BACKBONE, vocab_size=512, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
    head_dim=16,
)  # fmt: skip
SHAPES = {
    "qwen2-7b": Shapes("qwen2-7b", BACKBONES["Qwen/Qwen2-7B-Instruct"]),
    "llama2-7b": Shapes("llama2-7b", BACKBONES["meta-llama/Llama-2-7b-chat-hf"]),
    "qwen3-8b": Shapes("qwen3-8b", BACKBONES["Qwen/Qwen3-8B"]),
    "tiny": Shapes(
        "tiny", _TINY, 2, 256, (256, 128, 512), (1, 2), 8, 4, 4, 150, "float32", copied=2**22, multiplied=512
    ),
}


@dataclass
class Row:
    """One line of the table. ``of`` is None for what has no such figure."""

    name: str
    by: str = ""  # the implementation that ran
    seconds: float | None = None
    floor: float | None = None  # seconds that the device's own rates allow
    floor_of: str = ""  # what the floor is made of: "bytes" or "FLOP"
    plan: float | None = None  # the plan's lower bound, from the compiled program and the data sheet
    error: float | None = None  # of a check: the largest relative difference from the reference
    limit: float | None = None  # what it may be
    failed: bool = False
    note: str = ""


@dataclass
class Kit:
    """The device, its rates, and the model that is measured on it. ``seed`` draws all inputs."""

    shapes: Shapes
    seed: int

    def __post_init__(self):
        self.device = jax.devices()[0]
        self.chip = chips.find(self.device.device_kind)
        self.key = jax.random.key(self.seed)
        self._params: dict[str, Any] = {}

    @property
    def is_cpu(self) -> bool:
        return self.device.platform == "cpu"

    @cached_property
    def copy_rate(self) -> float:
        """Bytes per second, read and written, of rewriting an array in place."""
        x = jnp.ones((self.shapes.copied,), self.shapes.dtype)
        size = x.nbytes
        return 2 * size / bench.seconds_in_place(x, RUNS)

    @cached_property
    def matmul_rate(self) -> float:
        """FLOP per second of one large matrix product in the model's dtype."""
        side = self.shapes.multiplied
        a, b = (jax.random.normal(key, (side, side), self.shapes.dtype) for key in jax.random.split(self.key))
        product = jax.jit(lambda a, b: a @ b)
        return 2.0 * side**3 / seconds(lambda: product(a, b))

    def floor(self, size: float | int, flops: float) -> tuple[float, str]:
        """The seconds that moving ``size`` bytes and computing ``flops`` take at least, and which of them it is."""
        return max((size / self.copy_rate, "bytes"), (flops / self.matmul_rate, "FLOP"))

    def params(self, *parts: str) -> dict[str, Any]:
        """Random weights of ``parts`` of the model in its dtype, one array at a time, to leave memory free. They are
        kept until ``forget_params``."""
        arch = self.shapes.arch
        for part in set(parts) - set(self._params):
            drawn = {}
            for path, spec in flatten({part: architecture.specs(arch)[part]}).items():
                dtype = architecture.frozen_dtype(path, arch)
                draw = jax.jit(lambda key, spec=spec, dtype=dtype: initialize({"x": spec}, key, dtype)["x"])
                drawn[path] = draw(self.key)
            self._params |= unflatten(drawn)
        return {part: self._params[part] for part in parts}

    def forget_params(self) -> None:
        """Free the memory of all weights; the next use draws them again."""
        self._params.clear()

    def batch(self, context: int) -> Batch:
        """One context of random tokens with a query and an answer."""
        rng, shapes = np.random.default_rng(self.seed), self.shapes

        def ids(length: int) -> jax.Array:
            return jnp.asarray(rng.integers(0, shapes.backbone.vocab_size, (1, length)), jnp.int32)

        def number(value: int) -> jax.Array:
            return jnp.full((1,), value, jnp.int32)

        return Batch(
            ids(context), number(context), ids(shapes.query), number(shapes.query), ids(shapes.answer),
            number(shapes.answer), number(RATE),
        )  # fmt: skip

    def rules(self, rows: int) -> sampling.Rules:
        return jax.tree.map(jnp.asarray, sampling.rules(Generation(), rows))

    def row(
        self, name: str, took: float, size: float | int, flops: float, program: Any = None, *, by: str = "",
        per: int = 1, open_trips: int = 1, note: str = "",
    ) -> Row:  # fmt: skip
        """The row of a measurement that ``took`` seconds and has to move ``size`` bytes and compute ``flops``.
        ``program`` does ``per`` such measurements; ``open_trips`` is as in ``hlo.count``."""
        floor, of = self.floor(size, flops)
        row = Row(name, by, took, floor, of, note=note)
        if program is not None and self.chip is not None:
            try:
                counts = hlo.count(program.as_text(), None, open_trips)
                row.plan = max(hlo.lower_bounds(counts, self.chip).values()) / per
            except Exception as error:  # a compiler newer than the counts; the measurement stands without the bound
                row.note = f"{note}{'; ' if note else ''}no plan: {type(error).__name__}: {error}"[:200]
        return row


def compiled(function: Callable[..., Any], *arguments: Any, donate: tuple[int, ...] = ()) -> Any:
    """``function`` compiled for ``arguments``."""
    return jax.jit(function, donate_argnums=donate).lower(*arguments).compile()


def seconds(work: Callable[[], Any], at_once: int | None = None) -> float:
    """The median seconds of one call of ``work`` over RUNS timed runs, after a warm-up. A run ends when all of its
    results are computed; it has ``at_once`` calls, by default as many as take LEAST seconds."""
    jax.block_until_ready(work())
    if at_once is None:
        since = time.perf_counter()
        jax.block_until_ready(work())
        at_once = min(max(math.ceil(LEAST / max(time.perf_counter() - since, 1e-6)), 1), MOST_AT_ONCE)
    taken = []
    for _ in range(RUNS):
        since = time.perf_counter()
        result = None
        for _ in range(at_once):
            result = work()
        jax.block_until_ready(result)
        taken.append((time.perf_counter() - since) / at_once)
    return statistics.median(taken)


def size_of(tree: Any) -> int:
    """Bytes of the arrays in ``tree``."""
    return sum(x.nbytes for x in jax.tree.leaves(tree))
