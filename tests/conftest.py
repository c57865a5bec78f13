"""Every test runs on four fake CPU devices (COMI_TEST_DEVICES), with JAX's silent conveniences turned into errors."""

import os
import socket

from xla_flags import FLAGS

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("COMI_CACHE", "off")  # what an earlier run compiled is not tested
os.environ.setdefault("XLA_FLAGS", FLAGS)
os.environ.pop("COLUMNS", None)  # which pytest-xdist sets: no table is broken to the width of a terminal

import jax
import pytest

jax.config.update("jax_num_cpu_devices", int(os.environ.get("COMI_TEST_DEVICES", "4")))
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture(scope="module", autouse=True)
def few_mappings():
    """The whole suite in one process would need more mappings of memory than there are."""
    yield
    from comi_jax.devices import compilations  # not before jaxtyping's hook is in place

    compilations.drop_if_many()


# The files that take longest, by which pytest-xdist's workers begin: one that got such a file last would end minutes
# after the others. Files with a run of their own stand between those that wait for the shared one of train_fixtures.
LONGEST = """
    faults train baselines beacon sharding diagnostics official documents comi systems compare loop context_parallel
    convert beacon_runs compressor distributed plan server_lifecycle baseline_runs benchmarks replay server adapters
    launch explain answering kernels_ahead benchmark_serving compress attention backbone pretrain slots store
""".split()


def pytest_configure(config):
    """pytest-xdist would begin with the files that have most tests, which are not those that take longest."""
    if hasattr(config.option, "loadscopereorder"):
        config.option.loadscopereorder = False


def pytest_collection_modifyitems(items):
    places = {f"test_{name}.py": place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.name, len(places)))


@pytest.fixture
def free_port():
    """A port of this machine at which nothing listens, where no outgoing connection is given one."""
    for port in range(62000 + os.getpid() % 3000, 65536):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)):
                return port
    pytest.fail("every port is taken")
