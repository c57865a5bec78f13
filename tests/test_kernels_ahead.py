"""The kernels compile for real, ahead of time, for chips that are not here: Pallas' Mosaic for TPU v5e and v6e, plain
XLA for H100. Each in a process of its own, as the compilers must be found before JAX starts."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PROGRAM = """
import sys
import jax, jax.numpy as jnp
from jax.sharding import SingleDeviceSharding
from comi_jax.devices import topology
from comi_jax.kernels.merge import merge
from comi_jax.kernels.redundancy import max_cosine

where = topology.find(sys.argv[1])
home = SingleDeviceSharding(where.devices[0])
name = sys.argv[2]
for contexts, batch, length, width, dtype in [
    (1, 1, 32768, 3584, "bfloat16"), (2, 8, 300, 96, "float32"), (1, 1, 4096, 4096, "float32")
]:
    x, inverse, gain, group = (
        jax.ShapeDtypeStruct((rows, length, *more), kind, sharding=home)
        for rows, more, kind in (
            (contexts, (width,), dtype), (contexts, (), "float32"), (batch, (), "float32"), (batch, (), "int32")
        )
    )
    slots = -(-length // 16)
    for kernel, numbers in (
        (lambda x, n, g: max_cosine(x, n, g, implementation=name), inverse),
        (lambda x, n, g: merge(x, n, g, slots, implementation=name), gain),
    ):
        compiled = jax.jit(kernel).lower(x, numbers, group).compile()
        assert name != "tpu" or "tpu_custom_call" in compiled.as_text()
        extra = compiled.memory_analysis().temp_size_in_bytes
        # On GPU a copy of the states, the cosines of 128 tokens to each, and a sum for every 16 tokens and every slot.
        states, sums = (length + 128) * (width * x.dtype.itemsize + 2 * 128 * 4), (slots + length // 16) * 4 * width
        assert extra < 2e6 + (name == "gpu") * batch * max(states, sums), f"{extra} bytes beyond input and output"
print("compiled")
"""


def installed(*packages):
    return any(importlib.util.find_spec(package) for package in packages)


@pytest.mark.parametrize(
    "topology, name",
    [
        pytest.param(chips, "tpu", marks=pytest.mark.skipif(not installed("libtpu"), reason="libtpu is not installed"))
        for chips in ("v5e:2x2", "v6e:2x2")
    ]
    + [
        pytest.param(
            "h100:1",
            "gpu",
            marks=pytest.mark.skipif(
                not installed("jax_cuda12_plugin", "jax_cuda13_plugin"), reason="JAX's CUDA plugin is not installed"
            ),
        )
    ],
)
def test_kernels_compile_for_chips_that_are_not_here(topology, name):
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"} | {"ALLOW_MULTIPLE_LIBTPU_LOAD": "true"}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, topology, name], capture_output=True, text=True, cwd=ROOT, env=environment
    )
    assert done.stdout == "compiled\n", done.stderr[-3000:]
