"""Who this process is among those of its run, as three variables, Slurm or a TPU pod say.

Where neither of the others does, these do; where they are set, they are what counts:

    COMI_COORDINATOR=HOST:PORT  COMI_PROCESSES=N  COMI_PROCESS=I
"""

import re
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from comi_jax.config import ConfigError
from comi_jax.devices import machine

COORDINATOR, PROCESSES, PROCESS = "COMI_COORDINATOR", "COMI_PROCESSES", "COMI_PROCESS"
SLURM_STEP = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_PROCID")  # set together in what srun starts
SLURM_PORTS = (61440, 4096)  # the first, and how many: above those that Linux gives to outgoing connections
TPU_PORT = 8482
METADATA = "metadata.google.internal"  # where a TPU VM is told what it belongs to


@dataclass(frozen=True)
class Member:
    """One process of several."""

    coordinator: str  # HOST:PORT of process 0
    count: int
    index: int
    gpus: tuple[int, ...] | None = None  # those it takes, of the ones it can see; None: all


def find(environment: Mapping[str, str]) -> Member | None:
    """Who this process is; None if it is the only one.

    Raises ConfigError for variables that do not go together.
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
    """The whole number that the variable ``name`` holds. Raises ConfigError for anything else."""
    text = environment.get(name) or str(default)
    if not text.isdecimal():
        raise ConfigError(f"{name}={text} is not a whole number")
    return int(text)


def address(coordinator: str) -> tuple[str, int]:
    """Host and port of HOST:PORT, where HOST may be [an IPv6 address]."""
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
        raise ConfigError(f"{COORDINATOR}={coordinator} is not HOST:PORT, as node1:1234 is")
    return host.strip("[]"), int(port)


def _described(environment: Mapping[str, str], gpus: tuple[int, ...] | None) -> Member:
    given = [name for name in (COORDINATOR, PROCESSES, PROCESS) if environment.get(name)]
    if len(given) < 3:
        raise ConfigError(f"{', '.join(given)} is set; {COORDINATOR}, {PROCESSES} and {PROCESS} go together")
    count, index = number(environment, PROCESSES, 0), number(environment, PROCESS, 0)
    if index >= count:
        raise ConfigError(f"{PROCESS} is {index} of {PROCESSES} {count}; it counts from 0")
    address(environment[COORDINATOR])
    return Member(environment[COORDINATOR], count, index, gpus)


# --- Slurm ------------------------------------------------------------------------------------------------------------


def _slurm(environment: Mapping[str, str], gpus: tuple[int, ...] | None) -> Member | None:
    count = number(environment, "SLURM_STEP_NUM_TASKS", number(environment, "SLURM_NTASKS", 1))
    if count == 1:
        return None
    first, ports = SLURM_PORTS
    # Another port in each step: what is left of the one before may still hold that one's.
    step = 13 * number(environment, "SLURM_JOB_ID", 0) + number(environment, "SLURM_STEP_ID", 0)
    port = number(environment, "JAX_COORDINATOR_PORT", first + step % ports)
    host = first_host(environment["SLURM_STEP_NODELIST"])
    return Member(f"{host}:{port}", count, number(environment, "SLURM_PROCID", 0), gpus)


def first_host(nodes: str) -> str:
    """The first of a Slurm list of nodes, such as ``a3`` of a[3-5,9],b1."""
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])+", nodes)
    return re.sub(r"\[([^\],-]*)[^\]]*\]", r"\1", first[0]) if first else nodes


def tasks_here(environment: Mapping[str, str]) -> int:
    """How many tasks of this Slurm step are on this node: of 2(x3),1 the node's own; 1 outside of a step."""
    tasks: list[int] = []
    for entry in environment.get("SLURM_STEP_TASKS_PER_NODE", "").split(","):
        if found := re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", entry):
            tasks += [int(found[1])] * int(found[2] or 1)
    node = number(environment, "SLURM_NODEID", 0)
    return tasks[node] if node < len(tasks) else 1


def own_gpus(environment: Mapping[str, str], visible: int | None = None) -> tuple[int, ...] | None:
    """Which of the ``visible`` GPUs (by default those that this machine shows) this process takes: its share where
    several tasks of a Slurm step see the same ones. None, for all it sees: where it is the only task of its node, or
    Slurm has shared them out, or the user (JAX_LOCAL_DEVICE_IDS).

    Raises ConfigError where they cannot be shared out evenly.
    """
    tasks = tasks_here(environment)
    if tasks == 1 or any(environment.get(name) for name in ("SLURM_GPUS_PER_TASK", "JAX_LOCAL_DEVICE_IDS")):
        return None
    visible = machine.visible_gpus(environment) if visible is None else visible
    if visible < max(tasks, number(environment, "SLURM_GPUS_ON_NODE", 0)):  # each sees its own
        return None
    if visible % tasks:
        raise ConfigError(
            f"{tasks} tasks of this node cannot share its {visible} GPUs evenly; start one a node "
            "(--ntasks-per-node=1), which drives them all, or one a GPU"
        )
    share, place = visible // tasks, number(environment, "SLURM_LOCALID", 0)
    return tuple(range(place * share, (place + 1) * share))


# --- TPU --------------------------------------------------------------------------------------------------------------


def _tpu(ask: Callable[[str], str | None]) -> Member | None:
    """From what Kubernetes tells every host of a slice, or several slices."""
    entries = (ask("TPU_PROCESS_ADDRESSES") or ask("TPU_WORKER_HOSTNAMES") or "").split(",")
    hosts = [entry.strip().rsplit(":", 1)[0] for entry in entries if entry.strip()]
    known = {name: ask(name) or "" for name in ("TPU_WORKER_ID", "MEGASCALE_NUM_SLICES", "MEGASCALE_SLICE_ID")}
    slices = number(known, "MEGASCALE_NUM_SLICES", 1)
    if len(hosts) * slices == 1:
        return None
    if not known["TPU_WORKER_ID"]:
        raise ConfigError(f"this is one of {len(hosts)} TPU hosts, but TPU_WORKER_ID, which one, is not set")
    index = number(known, "TPU_WORKER_ID", 0) + len(hosts) * number(known, "MEGASCALE_SLICE_ID", 0)
    first = (ask("MEGASCALE_COORDINATOR_ADDRESS") or hosts[0]).split(":")[0]
    return Member(f"{first}:{TPU_PORT}", len(hosts) * slices, index)


def _tpu_vm(environment: Mapping[str, str]) -> Member | None:
    """From the metadata server of a TPU VM."""
    server = environment.get("GCE_METADATA_IP", METADATA)
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # it is on this machine's own network

    def attribute(name: str) -> str:
        url = f"http://{server}/computeMetadata/v1/instance/attributes/{name}"
        request = urllib.request.Request(url, headers={"Metadata-Flavor": "Google"})
        try:
            with opener.open(request, timeout=20) as answer:
                return str(answer.read().decode())
        except OSError as error:
            raise ConfigError(
                "COMI_DISTRIBUTED=auto is for a TPU pod, and neither Slurm nor a TPU's metadata server says who this "
                f"process is ({url}: {error}); leave it out, or set {COORDINATOR}, {PROCESSES} and {PROCESS}"
            ) from None

    # A worker is a host's name, or name:id:address.
    workers = [worker.split(":")[-1] for worker in attribute("worker-network-endpoints").split(",")]
    known = dict(environment)
    for line in attribute("tpu-env").splitlines():
        name, _, value = line.partition(":")
        known.setdefault(name.strip(), value.strip().strip("'"))
    known |= {"TPU_WORKER_HOSTNAMES": ",".join(workers), "TPU_WORKER_ID": attribute("agent-worker-number").strip()}
    known.pop("TPU_PROCESS_ADDRESSES", None)
    return _tpu(known.get)
