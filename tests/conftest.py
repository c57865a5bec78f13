"""Every test runs on four fake CPU devices (COMI_TEST_DEVICES), with JAX's silent conveniences turned into errors."""

import gc
import os
import socket
from pathlib import Path

from xla_flags import FLAGS

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("COMI_CACHE", "off")  # what an earlier run compiled is not tested
os.environ.setdefault("XLA_FLAGS", FLAGS)

import jax
import pytest

jax.config.update("jax_num_cpu_devices", int(os.environ.get("COMI_TEST_DEVICES", "4")))
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")


# Linux gives a process 65,530 mappings of memory (vm.max_map_count), each compiled program takes several, and the
# compiler crashes where none is left: the whole suite in one process would need more.
MAPPINGS = 20_000


@pytest.fixture(scope="module", autouse=True)
def few_mappings():
    """Once a process has many mappings, the programs that a test module compiled are dropped at its end."""
    yield
    maps = Path("/proc/self/maps")
    if maps.exists() and maps.read_bytes().count(b"\n") > MAPPINGS:
        jax.clear_caches()
        gc.collect()


@pytest.fixture
def free_port():
    """A port of this machine at which nothing listens, where no outgoing connection is given one."""
    for port in range(62000 + os.getpid() % 3000, 65536):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)):
                return port
    pytest.fail("every port is taken")
