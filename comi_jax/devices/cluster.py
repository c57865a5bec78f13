"""The coordinator, process count and process index of a run, from Slurm, a TPU pod or three variables.

Several processes outside Slurm and TPU pods need these variables; where set, they take precedence:

    COMI_COORDINATOR=HOST:PORT  COMI_PROCESSES=N  COMI_PROCESS=I
"""

import re
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from comi_jax.devices import machine
from comi_jax.errors import ConfigError

COORDINATOR, PROCESSES, PROCESS = "COMI_COORDINATOR", "COMI_PROCESSES", "COMI_PROCESS"
SLURM_STEP = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_PROCID")  # srun sets all of them
SLURM_PORTS = (61440, 4096)  # first port and number of ports: above Linux's default ephemeral range
TPU_PORT = 8482
METADATA = "metadata.google.internal"  # the metadata server of a TPU VM


@dataclass(frozen=True)
class Member:
    """The identity of this process in a run of several."""

    coordinator: str  # HOST:PORT of process 0
    count: int
    index: int
    gpus: tuple[int, ...] | None = None  # indices among its visible GPUs; None: all of them


def find(environment: Mapping[str, str]) -> Member | None:
    """This process's place in its run; None if it is the only process.

    Raises ConfigError for variables that are incomplete or contradict each other.
    """
    gpus = own_gpus(environment)
    if any(environment.get(name) for name in (COORDINATOR, PROCESSES, PROCESS)):
        return _described(environment, gpus)
    if all(name in environment for name in SLURM_STEP):
        return _slurm(environment, gpus)
    if environment.get("TPU_PROCESS_ADDRESSES") or environment.get("TPU_WORKER_HOSTNAMES"):
        return _tpu(environment.get)
    if environment.get("COMI_DISTRIBUTED") == "auto":
        return _tpu_vm(environment)
    return None


def number(environment: Mapping[str, str], name: str, default: int) -> int:
    """The variable ``name`` as a non-negative integer; ``default`` if unset or empty. Raises ConfigError otherwise."""
    text = environment.get(name) or str(default)
    if not text.isdecimal():
        raise ConfigError(f"{name}={text} is not a whole number")
    return int(text)


def address(coordinator: str) -> tuple[str, int]:
    """Host and port of HOST:PORT; HOST may be an IPv6 address in brackets. Raises ConfigError for anything else."""
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
        raise ConfigError(f"{COORDINATOR}={coordinator} is not HOST:PORT (example: node1:1234)")
    return host.strip("[]"), int(port)


def _described(environment: Mapping[str, str], gpus: tuple[int, ...] | None) -> Member:
    given = [name for name in (COORDINATOR, PROCESSES, PROCESS) if environment.get(name)]
    if len(given) < 3:
        raise ConfigError(f"only {', '.join(given)} is set; set {COORDINATOR}, {PROCESSES} and {PROCESS} together")
    count, index = number(environment, PROCESSES, 0), number(environment, PROCESS, 0)
    if index >= count:
        raise ConfigError(f"{PROCESS}={index} is out of range: it must be below {PROCESSES}={count}")
    address(environment[COORDINATOR])
    return Member(environment[COORDINATOR], count, index, gpus)


# --- Slurm ------------------------------------------------------------------------------------------------------------


def _slurm(environment: Mapping[str, str], gpus: tuple[int, ...] | None) -> Member | None:
    count = number(environment, "SLURM_STEP_NUM_TASKS", number(environment, "SLURM_NTASKS", 1))
    if count == 1:
        return None
    first, ports = SLURM_PORTS
    # A different port for each step: a leftover process of the previous step may still hold its port.
    step = 13 * number(environment, "SLURM_JOB_ID", 0) + number(environment, "SLURM_STEP_ID", 0)
    port = number(environment, "JAX_COORDINATOR_PORT", first + step % ports)
    host = first_host(environment["SLURM_STEP_NODELIST"])
    return Member(f"{host}:{port}", count, number(environment, "SLURM_PROCID", 0), gpus)


def first_host(nodes: str) -> str:
    """The first node of a Slurm node list: ``a3`` for a[3-5,9],b1."""
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])+", nodes)
    return re.sub(r"\[([^\],-]*)[^\]]*\]", r"\1", first[0]) if first else nodes


def tasks_here(environment: Mapping[str, str]) -> int:
    """The number of tasks of this Slurm step on this node, from a list such as 2(x3),1; 1 outside a step."""
    tasks: list[int] = []
    for entry in environment.get("SLURM_STEP_TASKS_PER_NODE", "").split(","):
        if found := re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", entry):
            tasks += [int(found[1])] * int(found[2] or 1)
    node = number(environment, "SLURM_NODEID", 0)
    return tasks[node] if node < len(tasks) else 1


def own_gpus(environment: Mapping[str, str], visible: int | None = None) -> tuple[int, ...] | None:
    """The GPUs of this process, as indices among the ``visible`` ones (default: counted on this machine), when several
    tasks of a Slurm step see the same GPUs. None, for all visible GPUs, if this is the node's only task, or if Slurm
    or the user (JAX_LOCAL_DEVICE_IDS) has already assigned GPUs to tasks.

    Raises ConfigError if the GPUs do not divide evenly among the tasks.
    """
    tasks = tasks_here(environment)
    if tasks == 1 or any(environment.get(name) for name in ("SLURM_GPUS_PER_TASK", "JAX_LOCAL_DEVICE_IDS")):
        return None
    visible = machine.visible_gpus(environment) if visible is None else visible
    if visible < max(tasks, number(environment, "SLURM_GPUS_ON_NODE", 0)):  # Slurm shows each task only its own GPUs
        return None
    if visible % tasks:
        raise ConfigError(
            f"{visible} GPUs do not divide evenly among the {tasks} tasks of this node; start one task per node "
            "(--ntasks-per-node=1), which drives all GPUs, or one per GPU"
        )
    share, place = visible // tasks, number(environment, "SLURM_LOCALID", 0)
    return tuple(range(place * share, (place + 1) * share))


# --- TPU --------------------------------------------------------------------------------------------------------------


def _tpu(ask: Callable[[str], str | None]) -> Member | None:
    """From the variables that GKE sets on every host of one or more slices, read with ``ask``."""
    entries = (ask("TPU_PROCESS_ADDRESSES") or ask("TPU_WORKER_HOSTNAMES") or "").split(",")
    hosts = [entry.strip().rsplit(":", 1)[0] for entry in entries if entry.strip()]
    known = {name: ask(name) or "" for name in ("TPU_WORKER_ID", "MEGASCALE_NUM_SLICES", "MEGASCALE_SLICE_ID")}
    slices = number(known, "MEGASCALE_NUM_SLICES", 1)
    if len(hosts) * slices == 1:
        return None
    if not known["TPU_WORKER_ID"]:
        raise ConfigError(
            f"this is one of {len(hosts)} TPU hosts, but TPU_WORKER_ID (the index of this host) is not set"
        )
    index = number(known, "TPU_WORKER_ID", 0) + len(hosts) * number(known, "MEGASCALE_SLICE_ID", 0)
    first = (ask("MEGASCALE_COORDINATOR_ADDRESS") or hosts[0]).split(":")[0]
    return Member(f"{first}:{TPU_PORT}", len(hosts) * slices, index)


def _tpu_vm(environment: Mapping[str, str]) -> Member | None:
    """From the metadata server of a TPU VM."""
    server = environment.get("GCE_METADATA_IP", METADATA)
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # a proxy cannot reach link-local addresses

    def attribute(name: str) -> str:
        url = f"http://{server}/computeMetadata/v1/instance/attributes/{name}"
        request = urllib.request.Request(url, headers={"Metadata-Flavor": "Google"})
        try:
            with opener.open(request, timeout=20) as answer:
                return str(answer.read().decode())
        except OSError as error:
            raise ConfigError(
                "COMI_DISTRIBUTED=auto needs a TPU pod or Slurm, but no Slurm variables are set and the TPU metadata "
                f"server does not answer ({url}: {error}); unset it, or set {COORDINATOR}, {PROCESSES} and {PROCESS}"
            ) from None

    # An entry is a host name, or name:id:address.
    workers = [worker.split(":")[-1] for worker in attribute("worker-network-endpoints").split(",")]
    known = dict(environment)
    for line in attribute("tpu-env").splitlines():
        name, _, value = line.partition(":")
        known.setdefault(name.strip(), value.strip().strip("'"))
    known |= {"TPU_WORKER_HOSTNAMES": ",".join(workers), "TPU_WORKER_ID": attribute("agent-worker-number").strip()}
    known.pop("TPU_PROCESS_ADDRESSES", None)
    return _tpu(known.get)
