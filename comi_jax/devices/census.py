"""The hosts, processes and devices that a run has, and whether that is all there are."""

import json
import os
import socket
from collections.abc import Mapping
from dataclasses import asdict, dataclass

import jax

from comi_jax.config import ConfigError
from comi_jax.devices import distributed, machine
from comi_jax.devices.cluster import number


@dataclass(frozen=True)
class Seen:
    """What one process has, and what its host shows."""

    host: str
    devices: int  # of the kind the run computes on
    kind: str  # "cpu", "gpu" or "tpu"
    shown: int  # accelerators of the host
    says: str  # what shows them
    nodes: int  # that Slurm gave to the step or, outside of one, to the job


def take(environment: Mapping[str, str] = os.environ) -> list[Seen]:
    """What every process of the run has, in their order; all call it together."""
    shown, says = machine.accelerators(environment)
    nodes = number(environment, "SLURM_STEP_NUM_NODES", number(environment, "SLURM_JOB_NUM_NODES", 1))
    host = environment.get("SLURMD_NODENAME") or socket.gethostname()
    own = Seen(host, jax.local_device_count(), jax.default_backend(), shown, says, nodes)
    everyone = distributed.peers()
    if everyone is None:
        return [own]
    everyone.say("seen", json.dumps(asdict(own)))
    distributed.meet("all have said what they see")
    return [Seen(**json.loads(said)) for _, said in sorted(everyone.said("seen").items())]


def sentence(seen: list[Seen]) -> str:
    """The census for people."""
    kinds = {f"{one.devices} {one.kind} device{'s' * (one.devices != 1)}" for one in seen}
    hosts, each = len({one.host for one in seen}), ", ".join(sorted(kinds))
    return (
        f"{hosts} host{'s' * (hosts != 1)}, {len(seen)} process{'es' * (len(seen) != 1)}, {each} "
        f"{'a process' if len(kinds) == 1 else 'in one process or another'}"
    )


def check(seen: list[Seen]) -> None:
    """Raises ConfigError if a host has accelerators that no process of the run uses, or the run nodes without any."""
    hosts: dict[str, list[Seen]] = {}
    for one in seen:
        hosts.setdefault(one.host, []).append(one)
    for host, those in hosts.items():
        used = sum(one.devices for one in those if one.kind != "cpu")
        most = max(those, key=lambda one: one.shown)
        if used < most.shown:
            why = "" if used else "; JAX is on the CPU: is '.[cuda]' or '.[tpu]' installed here?"
            raise ConfigError(
                f"this run has {used} of {host}'s devices, of which {most.says} {most.shown}{why}; mend that, or pass "
                "--allow-fewer-devices"
            )
    if len(hosts) < seen[0].nodes:
        raise ConfigError(
            f"Slurm gave {seen[0].nodes} nodes, this run is on {len(hosts)} of them; start it with srun, as "
            "launch/slurm.sh does, or pass --allow-fewer-devices"
        )
