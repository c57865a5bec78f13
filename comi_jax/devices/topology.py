"""Devices for compilation without the hardware, by a name such as ``v5e:8x8`` or ``h100:64``.

TPU slices need libtpu, their compiler. GPUs need JAX's CUDA plugin and a description of the GPU, which this module
writes from its data sheet.
"""

import contextlib
import dataclasses
import importlib.util
import os
import sys
from collections.abc import Iterator
from typing import Any

import jax
from jax.experimental import topologies

from comi_jax.devices import chips
from comi_jax.errors import ConfigError

GPUS_PER_NODE = 8
# Streaming multiprocessors, bytes of L2 cache and GHz of each GPU. All have compute capability 9.0, which fixes the
# other limits.
GPUS = {"h100": (132, 50 * 2**20, 1.98), "h200": (132, 50 * 2**20, 1.98)}
TPUS = ("v4", "v5e", "v5p", "v6e")


@dataclasses.dataclass(frozen=True)
class Topology:
    """Compile-only devices."""

    name: str
    chip: chips.Chip
    devices: tuple[Any, ...]
    per_node: int | None  # devices connected by ``chip.link``; None: all


def find(name: str) -> Topology:
    """The compile-only devices called ``name``. Raises ConfigError for an unknown name, and if the compiler for these
    chips is not installed. Call it before JAX is used: it restricts JAX to the CPU of this machine."""
    kind, _, shape = name.partition(":")
    if kind not in (*TPUS, *GPUS) or not shape:
        known = f"{', '.join(TPUS)} with a shape (v5e:8x8, v5p:2x2x1), {', '.join(GPUS)} with a number (h100:8)"
        raise ConfigError(f"there is no topology {name!r}; known are {known}")
    jax.config.update("jax_platforms", "cpu")
    devices = _tpus(name) if kind in TPUS else _gpus(kind, shape, name)
    return Topology(name, chips.CHIPS[kind], tuple(devices), None if kind in TPUS else GPUS_PER_NODE)


def _tpus(name: str) -> list[Any]:
    if importlib.util.find_spec("libtpu") is None:
        raise ConfigError(f"compiling for {name} needs the TPU compiler, which is not installed: pip install '.[plan]'")
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # there is no metadata server to query
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # libtpu's lock protects a chip, and there is none
    try:
        with _silenced():
            return topologies.get_topology_desc(platform="tpu", topology_name=name).devices
    except Exception as error:  # libtpu reports every problem with the name as a bare JaxRuntimeError
        raise ConfigError(f"the TPU compiler rejects {name}: {str(error).splitlines()[0]}") from None


@contextlib.contextmanager
def _silenced() -> Iterator[None]:
    """Discards what native code writes to standard error: libtpu looks for a TPU machine, and complains that this is
    none. Its real errors are exceptions."""
    sys.stderr.flush()
    kept = os.dup(2)
    try:
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def _gpus(kind: str, shape: str, name: str) -> list[Any]:
    count = int(shape) if shape.isdecimal() else 0
    if not count or (count > GPUS_PER_NODE and count % GPUS_PER_NODE):
        raise ConfigError(
            f"{name} is not a valid number of GPUs; give 1 to {GPUS_PER_NODE}, or a multiple of {GPUS_PER_NODE}"
        )
    if not any(importlib.util.find_spec(f"jax_cuda{version}_plugin") for version in (12, 13)):
        raise ConfigError(
            f"compiling for {name} needs JAX's CUDA compiler, which is not installed: pip install '.[cuda]', in "
            "an environment of its own"
        )
    os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")  # there is no driver
    nodes = max(count // GPUS_PER_NODE, 1)
    layout = f"1x{nodes}x{count // nodes}"
    target = describe_gpu(kind)
    return topologies.get_topology_desc(
        platform="cuda", topology_name=kind, topology=layout, target_config=target
    ).devices


def describe_gpu(kind: str) -> str:
    """The XLA GpuTargetConfigProto, in text format, of a GPU of compute capability 9.0."""
    cores, cache, clock = GPUS[kind]
    chip = chips.CHIPS[kind]
    info = {
        "threads_per_warp": 32,
        "threads_per_block_limit": 1024,
        "threads_per_core_limit": 2048,
        "block_dim_limit_x": 2**31 - 1,
        "block_dim_limit_y": 2**16 - 1,
        "block_dim_limit_z": 2**16 - 1,
        "registers_per_core_limit": 2**16,
        "registers_per_block_limit": 2**16,
        "shared_memory_per_block": 48 * 2**10,
        "shared_memory_per_block_optin": 227 * 2**10,
        "shared_memory_per_core": 228 * 2**10,
        "core_count": cores,
        "fpus_per_core": 128,
        "clock_rate_ghz": clock,
        "l2_cache_size": cache,
        "memory_bandwidth": int(chip.bandwidth),
        "device_memory_size": int(chip.memory),
    }
    fields = "\n".join(f"  {name}: {value}" for name, value in info.items())
    return (
        f"gpu_device_info {{\n{fields}\n  cuda_compute_capability {{ major: 9 minor: 0 }}\n}}\n"
        'platform_name: "CUDA"\ndnn_version_info { major: 9 minor: 10 patch: 0 }\n'
        f'device_description_str: "NVIDIA {kind.upper()}"\n'
    )
